"""`StepMessage`: parts of shards are views of the whole, and descriptions say where they lie."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.messages import Pull, Push
from ps.optimizers import SGD
from ps.step_message import FIELDS, NO_PLACE, TAIL, StepMessage
from ps.wire.arena import PrivateMemory, address
from tests.support.wire import Job, floats
from tests.support.wire_peers import bits_of, capturing_client, random_gradients


def job_of(num_shards: int, num_tables: int = 3, state_size: int = 3) -> Job:
    return Job(
        optimizers=(SGD(0.1),) * num_tables,
        dims=tuple(2 + i for i in range(num_tables)),
        num_shards=num_shards,
        state_size=state_size,
    )


def messages(job: Job, seed: int, bags: int | None = None) -> tuple[StepMessage, StepMessage]:
    """A pull and a push of the same rows; the push has state."""
    client, captured = capturing_client(job, PrivateMemory())
    names = job.names(seed, bags=bags)
    client.pull(5, 4, names)
    rng = np.random.default_rng(seed)
    grads = random_gradients(job, names, seed)
    client.push(5, names, grads, floats(rng, job.dense_size), floats(rng, job.state_size))
    return captured.pulls[0], captured.pushes[0]


SHARDS = st.integers(1, 4)
few = settings(max_examples=40)
BAGS = st.one_of(st.none(), st.integers(0, 6))


@few
@given(SHARDS, st.integers(0, 1000), BAGS)
def test_parts_of_shards_put_together_are_the_whole(
    num_shards: int, seed: int, bags: int | None
) -> None:
    job = job_of(num_shards)
    pull, push = messages(job, seed, bags)
    names = job.names(seed, bags=bags)
    pulls = [pull.pull(k) for k in range(num_shards)]
    pushes = [push.push(k) for k in range(num_shards)]
    for i, d in enumerate(names.values()):
        for parts in (pulls, pushes):
            whole = np.concatenate([part.local_rows[i] for part in parts])
            np.testing.assert_array_equal(whole, d.local_rows)
    assert np.concatenate([p.dense_grad for p in pushes]).tobytes() == push.dense.tobytes()
    assert push.state is not None
    states = [p.state for p in pushes if p.state is not None]
    assert np.concatenate(states).tobytes() == push.state.tobytes()
    for pulled in pulls:
        assert (pulled.worker, pulled.step, pulled.version) == (0, 5, 4)


@few
@given(SHARDS, st.integers(0, 1000), BAGS)
def test_what_shards_write_is_what_the_worker_reads(
    num_shards: int, seed: int, bags: int | None
) -> None:
    pull, _ = messages(job_of(num_shards), seed, bags)
    for table in pull.tables:
        table.values[...] = -1
    for k in range(num_shards):
        into = pull.pull(k).into
        assert into is not None
        for out in (*into.rows, into.dense, into.state):
            assert out.flags.c_contiguous, "kernels write to it"
            out[...] = k
    for table in pull.tables:
        assert (table.values >= 0).all(), "every row is some shard's"
    splits = pull.layout.dense_splits
    wanted = np.repeat(np.arange(num_shards), np.diff(splits))
    np.testing.assert_array_equal(pull.dense, wanted)


@few
@given(SHARDS, st.integers(0, 1000), BAGS)
def test_descriptions_lead_to_the_arrays(num_shards: int, seed: int, bags: int | None) -> None:
    """Over private memory places are offsets in a block: compared with real addresses."""
    job = job_of(num_shards)
    for message in messages(job, seed, bags):
        described = message.descriptions()
        assert described.shape == (num_shards, FIELDS * len(job.dims) + TAIL)
        for k in range(num_shards):
            part = message.push(k) if message.version == NO_PLACE else message.pull(k)
            assert_description(described[k], part, message, k)


def assert_description(
    numbers: np.ndarray, part: Pull | Push, message: StepMessage, shard: int
) -> None:
    of_tables = numbers[:-TAIL].reshape(-1, FIELDS)
    bags = part.bags or (None,) * len(message.tables)
    for i, (entries, num_bags, rows, splits, weights, values) in enumerate(of_tables.tolist()):
        table, places, of_table = message.tables[i], message.places[i], bags[i]
        assert entries == part.local_rows[i].size
        if entries:
            assert rows - places.local_rows == offset(part.local_rows[i], table.local_rows)
        if isinstance(part, Push):
            its_values = part.grads[i]
        else:
            assert part.into is not None
            its_values = part.into.rows[i]
        if its_values.size:
            assert values - places.values == offset(its_values, table.values)
        if of_table is None:
            assert (num_bags, splits, weights) == (-1, NO_PLACE, NO_PLACE)
            continue
        assert table.bags is not None
        assert num_bags == of_table.count
        assert splits - places.row_splits == offset(of_table.row_splits, table.bags.row_splits)
        assert (weights == NO_PLACE) == (table.bags.weights.size == 0)
        if of_table.weights.size:
            assert weights - places.weights == offset(of_table.weights, table.bags.weights)
    dense = part.dense_grad if isinstance(part, Push) else part.into.dense  # type: ignore[union-attr]
    assert numbers[-3] == dense.size
    if dense.size:
        assert numbers[-4] - message.dense_place == offset(dense, message.dense)


def offset(part: np.ndarray, whole: np.ndarray) -> int:
    return address(part) - address(whole)


@few
@given(SHARDS, st.integers(0, 1000), BAGS)
def test_sizes_are_those_of_the_arrays(num_shards: int, seed: int, bags: int | None) -> None:
    job = job_of(num_shards)
    pull, push = messages(job, seed, bags)
    for message in (pull, push):
        for k in range(num_shards):
            part = message.push(k) if message is push else message.pull(k)
            arrays = [b for b in bits_of(part) if b is not None]
            if isinstance(part, Pull):
                assert part.into is not None
                arrays += [b for b in bits_of(part.into) if b is not None]
            size = sum(len(data) for _, _, data in arrays)
            size += 8 * (FIELDS * len(job.dims) + TAIL)
            assert message.names_bytes()[k] + message.values_bytes()[k] == size
            grads = part.grads if isinstance(part, Push) else part.into.rows  # type: ignore[union-attr]
            assert message.rows_by_shard()[k] == sum(len(g) for g in grads)


def test_a_push_without_state_says_so() -> None:
    job = job_of(2)
    client, captured = capturing_client(job, PrivateMemory())
    names = job.names(1)
    grads = random_gradients(job, names, 1)
    client.push(0, names, grads, np.zeros(job.dense_size, np.float32), None)
    (message,) = captured.pushes
    assert [message.push(k).state for k in range(2)] == [None, None]
    assert message.descriptions()[:, -2:].tolist() == [[NO_PLACE, NO_PLACE]] * 2


@pytest.mark.parametrize("num_shards", [1, 3])
def test_state_of_no_size_is_not_the_same_as_none(num_shards: int) -> None:
    job = job_of(num_shards, state_size=0)
    _, push = messages(job, 3)
    assert [push.push(k).state.size for k in range(num_shards)] == [0] * num_shards  # type: ignore[union-attr]
    assert push.descriptions()[:, -1].tolist() == [0] * num_shards


def test_shards_that_own_nothing_of_a_batch_get_empty_parts() -> None:
    job = job_of(4)
    client, captured = capturing_client(job, PrivateMemory())
    names = job.names(2, size=0)
    client.pull(0, 0, names)
    message = captured.pulls[0]
    assert all(d.local_rows.size == 0 for d in names.values())
    for k in range(4):
        assert [r.size for r in message.pull(k).local_rows] == [0, 0, 0]
    starts = [place.local_rows for place in message.places]
    assert all(b >= a for a, b in pairwise(starts))
