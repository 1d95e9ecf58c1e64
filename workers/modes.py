"""Which options go with sync mode, and which with async."""

from __future__ import annotations

from ps.errors import ConfigError
from ps.reduction import Reduction
from ps.shard import Mode


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
