"""Which options go with sync mode, and which with async; and how a batch is cut into ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ps.errors import ConfigError
from ps.reduction import Reduction
from ps.shard import Mode

T = TypeVar("T")


def check_mode(
    mode: Mode,
    lookahead: int,
    max_staleness: int | None,
    reduction: Reduction,
    *,
    cached_rows: int,
    cache_max_age: int,
) -> None:
    """Refuse options of `TrainConfig` that the mode does not have, or that contradict each other.

    Raises:
        ConfigError: names the option, its value and what is wanted.
    """
    if mode == "async":
        if max_staleness is None or max_staleness < lookahead:
            raise ConfigError(
                f"max_staleness must be at least lookahead ({lookahead}) in async mode, "
                f"got {max_staleness}"
            )
        if reduction != "mean":
            raise ConfigError(
                f"reduction {reduction} is for mode sync: in async mode every worker's gradient is "
                "applied by itself; leave it out"
            )
    elif max_staleness is not None:
        raise ConfigError("max_staleness is for mode async; mode is sync")
    elif cached_rows:
        raise ConfigError("cached_rows is for mode async: kept rows have no exact version")
    for name, value in (("cached_rows", cached_rows), ("cache_max_age", cache_max_age)):
        if value < 0:
            raise ConfigError(f"{name} must be at least 0, got {value}")
    if bool(cached_rows) != bool(cache_max_age):
        raise ConfigError(
            f"cached_rows and cache_max_age go together, got {cached_rows} and {cache_max_age}"
        )


def check_ranks(batch_size: int, ranks: int | None, workers: int) -> None:
    """See that a batch is cut into equal parts, and that every worker gets some.

    Raises:
        ConfigError: names the option, its value and what is wanted.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(f"train.ranks must be at least 1, got {ranks}")
    parts, key = (workers, "cluster.workers") if ranks is None else (ranks, "train.ranks")
    if batch_size % parts:
        raise ConfigError(f"train.batch_size {batch_size} is not a multiple of {key} {parts}")
    if workers > parts:
        raise ConfigError(
            f"cluster.workers {workers} is more than train.ranks {ranks}: a worker would have "
            "nothing to do"
        )


def ranks_of(worker: int, workers: int, ranks: int) -> range:
    """The ranks that run on a worker, one after the other within a step.

    >>> [list(ranks_of(worker, 2, 5)) for worker in range(2)]
    [[0, 2, 4], [1, 3]]
    """
    return range(worker, ranks, workers)


def in_rank_order(by_worker: Sequence[Sequence[T]]) -> list[T]:
    """What workers gave, each for its ranks in order, as one list by rank.

    >>> in_rank_order([["a0", "a2", "a4"], ["b1", "b3"]])
    ['a0', 'b1', 'a2', 'b3', 'a4']
    """
    ranks, workers = sum(map(len, by_worker)), len(by_worker)
    return [by_worker[rank % workers][rank // workers] for rank in range(ranks)]
