"""Combined, gathered and placed rows are, bit for bit, those of the plain twins.

Every call is made with arrays of all kinds (ordinary, read-only, at odd addresses, against
inaccessible pages) and must write its output, all of it and nothing else.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.kernels import combine
from ps.kernels.combine import COMBINER_CODES, combine_rows, gather_rows, scatter_sequences
from ps.kernels.rows import NarrowFormat, QuantizedRows, record_bytes
from ps.memory import empty
from ps.quantized import quantized
from ps.ragged import F32, I64, Ragged
from tests.support import reference as twin
from tests.support.guarded import EVERY_KIND, Canaries
from tests.support.reference import same_bits
from tests.support.strategies import bags

DIMS = st.sampled_from([1, 3, 5, 8, 17, 21, 24, 37, 40, 64, 128, 260])
"""With a kernel of their own: 1, 8, 24, 40, 64, 128. The others are blocks of 1 to 32 and 256."""
COMBINERS = st.sampled_from(["sum", "mean", "sqrtn"])
NARROW: tuple[NarrowFormat, ...] = ("float16", "bfloat16", "int8")
HARD = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan, 0.1, 16777216.0]
NO_WEIGHTS = np.zeros(0, dtype=np.float32)
few = settings(max_examples=40)


@st.composite
def tables(draw: st.DrawFn, dims: st.SearchStrategy[int] = DIMS) -> F32:
    """float32 [V, D], where every number may be a hard one."""
    shape = draw(st.integers(1, 6)), draw(dims)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.normal(size=shape).astype(np.float32)
    return np.where(rng.random(shape) < draw(st.sampled_from([0, 0.1])), hard(rng, shape), rows)


def hard(rng: np.random.Generator, shape: tuple[int, ...]) -> F32:
    return rng.choice(np.array(HARD, dtype=np.float32), shape)


@st.composite
def records(draw: st.DrawFn, format: NarrowFormat) -> QuantizedRows:
    """Any bytes are rows, of awkward numbers too."""
    num_rows, dim = draw(st.integers(1, 6)), draw(st.sampled_from([17, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = rng.integers(0, 256, (num_rows, record_bytes(format, dim)), dtype=np.uint8)
    if format == "int8":
        made[:, :8] = hard(rng, (num_rows, 2)).view(np.uint8)
    return QuantizedRows(format, dim, made)


def each_array(change: Callable[[Any], Any], argument: Any) -> Any:
    if isinstance(argument, QuantizedRows):
        return replace(argument, records=change(argument.records))
    return change(argument) if isinstance(argument, np.ndarray) else argument


def run(function: Callable[..., None], *args: Any, shape: tuple[int, ...]) -> F32:
    """The output, the same for arrays of every kind, after a look at everything around it."""
    results = []
    for change, offset in EVERY_KIND:
        given_args = [each_array(change, arg) for arg in args]
        out = Canaries(shape, offset=offset)
        function(*given_args, out.array)
        assert out.intact, "written outside the output"
        for before, after in zip(args, given_args, strict=True):
            if isinstance(before, np.ndarray):
                assert before.tobytes() == after.tobytes(), "an input was written to"
        results.append(out.array.copy())
    for result in results[1:]:
        assert same_bits(result, results[0])
    return results[0]


def weights_of(bag: Ragged) -> F32:
    return NO_WEIGHTS if bag.weights is None else bag.weights


def i64(*values: int) -> I64:
    return np.array(values, dtype=np.int64)


def check_combine(rows: Any, table: F32, bag: Ragged, combiner: str) -> None:
    args = (rows, bag.ids, bag.row_splits, weights_of(bag), COMBINER_CODES[combiner])
    got = run(combine_rows, *args, shape=(bag.num_examples, table.shape[1]))
    want = twin.combine_rows(table, bag.ids, bag.row_splits, bag.weights, combiner)
    assert same_bits(got, want)


def check_gather(rows: Any, table: F32, index: I64) -> None:
    got = run(gather_rows, rows, index, shape=(index.size, table.shape[1]))
    assert same_bits(got, twin.gather_rows(table, index))


def check_sequences(rows: Any, table: F32, bag: Ragged, length: int) -> None:
    shape = (bag.num_examples, length, table.shape[1])
    got = run(scatter_sequences, rows, bag.ids, bag.row_splits, shape=shape)
    assert same_bits(got, twin.scatter_sequences(table, bag.ids, bag.row_splits, length))


@few
@given(data=st.data(), table=tables(), combiner=COMBINERS)
def test_combine_equals_its_twin(data: Any, table: F32, combiner: str) -> None:
    check_combine(table, table, data.draw(bags(len(table))), combiner)


@few
@given(data=st.data(), table=tables(st.sampled_from([1, 3, 17, 64])))
def test_gathered_rows_and_sequences_equal_their_twins(data: Any, table: F32) -> None:
    bag = data.draw(bags(len(table), weighted=False))
    check_gather(table, table, bag.ids)
    check_sequences(table, table, bag, data.draw(st.integers(1, 6)))


@pytest.mark.parametrize("format", NARROW)
@settings(max_examples=20)
@given(data=st.data(), combiner=COMBINERS)
def test_narrow_rows_are_read_as_their_float32(
    format: NarrowFormat, data: Any, combiner: str
) -> None:
    rows = data.draw(records(format))
    table, bag = twin.float32_rows(rows), data.draw(bags(rows.num_rows))
    check_combine(rows, table, bag, combiner)
    check_gather(rows, table, bag.ids)
    check_sequences(rows, table, bag, 3)


@pytest.mark.parametrize("dim", [1, 8, 17, 64])
def test_long_inputs_equal_their_twins(dim: int) -> None:
    """More entries than are asked for ahead, and bags of every length around the unrolling."""
    rng = np.random.default_rng(dim)
    table = rng.normal(size=(50, dim)).astype(np.float32)
    lengths = [*range(12), 4500, 1, 1, 0, 700]
    ids = rng.integers(0, 50, sum(lengths))
    splits = np.cumsum([0, *lengths])
    check_combine(table, table, Ragged(ids, splits), "mean")
    check_combine(table, table, Ragged(ids, splits, rng.normal(size=ids.size)), "sqrtn")
    check_gather(table, table, ids)
    check_sequences(table, table, Ragged(ids, splits), 9)


@pytest.mark.parametrize("dim", [8, 64, 272])
def test_big_outputs_hold_the_same(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    monkeypatch.setattr(combine, "_STREAMED_BYTES", 0)
    test_long_inputs_equal_their_twins(dim)


def test_only_whole_cache_lines_are_written_past_the_caches() -> None:
    assert combine._whole_lines(empty((2, 64)))
    assert combine._whole_lines(empty((2, 2, 16)))
    assert not combine._whole_lines(empty((8, 8)))
    assert not combine._whole_lines(empty((9, 24)))
    assert not combine._whole_lines(empty((65 * 16,))[1:-15].reshape(64, 16))


def test_every_column_of_every_dim_is_read_once() -> None:
    for dim in range(1, 1100):
        blocks = combine._blocks(dim)
        columns = [c for first, lanes in blocks for c in range(first, first + lanes)]
        assert columns == list(range(dim))
        own = dim in (1, 2, 4) or (dim % 8 == 0 and dim <= 256)
        assert (len(blocks) == 1) == own


def test_a_part_of_the_bags_gives_a_part_of_the_result() -> None:
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(50, 8)).astype(np.float32), rng.integers(0, 50, 100)
    splits, weights = np.arange(0, 101, 4), rng.normal(size=100).astype(np.float32)
    whole, parts = empty((25, 8)), empty((25, 8))
    combine_rows(table, ids, splits, weights, 1, whole)
    for part in (slice(0, 7), slice(7, 8), slice(8, 25)):
        combine_rows(table, ids, splits[part.start : part.stop + 1], weights, 1, parts[part])
    assert same_bits(whole, parts)


def test_rows_may_be_a_memory_map(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
    table.tofile(tmp_path / "rows")
    quantized(table, "int8").records.tofile(tmp_path / "records")
    mapped = np.memmap(tmp_path / "rows", dtype=np.float32, mode="r", shape=table.shape)
    records = np.memmap(tmp_path / "records", dtype=np.uint8, mode="r", shape=(9, 72))
    for rows, want in (
        (mapped, table),
        (QuantizedRows("int8", 64, records), twin.float32_rows(quantized(table, "int8"))),
    ):
        out = empty((2, 64))
        gather_rows(rows, i64(8, 3), out)
        assert same_bits(out, want[[8, 3]])


def test_sums_are_taken_in_the_order_of_the_entries() -> None:
    big = np.array([[1e8], [1.0], [-1e8]], dtype=np.float32)
    for order, want in [(i64(0, 1, 2), 0.0), (i64(0, 2, 1), 1.0)]:
        assert run(combine_rows, big, order, i64(0, 3), NO_WEIGHTS, 0, shape=(1, 1)) == want


@pytest.mark.parametrize(
    ("weights", "combiner", "want"),
    [
        (None, "sum", [[4, 6], [0, 0], [5, 6]]),
        (None, "mean", [[2, 3], [0, 0], [5, 6]]),
        (None, "sqrtn", [[2.828427, 4.242641], [0, 0], [5, 6]]),
        ([0.5, 2, 3], "sum", [[6.5, 9], [0, 0], [15, 18]]),
        ([0.5, 2, 3], "mean", [[2.6, 3.6], [0, 0], [5, 6]]),
        ([0.5, 2, 3], "sqrtn", [[3.152963, 4.365642], [0, 0], [5, 6]]),
        ([1, -1, -2], "mean", [[0, 0], [0, 0], [5, 6]]),
        ([1, -1, -2], "sqrtn", [[-1.414214, -1.414214], [0, 0], [-5, -6]]),
    ],
)
def test_combine_gives_the_reference_numbers(
    weights: list[float] | None, combiner: str, want: list[list[float]]
) -> None:
    table = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    w = NO_WEIGHTS if weights is None else np.array(weights, dtype=np.float32)
    args = (table, i64(0, 1, 2), i64(0, 2, 2, 3), w, COMBINER_CODES[combiner])
    np.testing.assert_allclose(run(combine_rows, *args, shape=(3, 2)), want, rtol=1e-6)


def test_the_divisor_counts_like_a_sum_of_float32() -> None:
    n = 2**24 + 2  # adding 1 stops to count at 2**24
    out = empty((1, 1))
    table = np.array([[2.0]], dtype=np.float32)
    combine_rows(table, np.zeros(n, dtype=np.int64), i64(0, n), NO_WEIGHTS, 1, out)
    assert out == 2.0


@pytest.mark.parametrize("count", [1, 20, 1000])
def test_sums_are_as_exact_as_stated(count: int) -> None:
    rng = np.random.default_rng(count)
    table = rng.normal(size=(1000, 64)).astype(np.float32)
    ids, weights = rng.integers(0, 1000, count), rng.normal(size=count).astype(np.float32)
    out = empty((1, 64))
    combine_rows(table, ids, i64(0, count), weights, 0, out)
    terms = table[ids].astype(np.float64) * weights.astype(np.float64)[:, None]
    error = np.abs(out[0] - terms.sum(axis=0))
    assert (error <= (count + 1) * 2.0**-24 * np.abs(terms).sum(axis=0)).all()


@pytest.mark.parametrize(("edge", "place"), [("start", -1), ("end", 8)])
def test_guards_end_a_process_that_reads_beyond(edge: str, place: int) -> None:
    program = f"""
import ctypes, numpy as np
from tests.support.guarded import guarded
array = guarded(np.arange(8, dtype=np.uint8), {edge!r})
read = lambda i: ctypes.c_uint8.from_address(array.ctypes.data + i).value
assert [read(i) for i in range(8)] == list(range(8))
read({place})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -11


@pytest.mark.parametrize(("width", "dim"), [(4, 2), (6, 2), (10, 5), (24, 8), (192, 64), (9, 8)])
def test_the_first_columns_of_longer_rows_are_gathered(width: int, dim: int) -> None:
    records = np.random.default_rng(width).normal(size=(6, width)).astype(np.float32)
    index = i64(5, 0, 0, 3)
    assert same_bits(run(gather_rows, records, index, shape=(4, dim)), records[index, :dim])


def test_more_columns_than_a_row_has_are_not_gathered() -> None:
    with pytest.raises(AssertionError):
        gather_rows(np.zeros((2, 4), dtype=np.float32), i64(0), np.zeros((1, 5), dtype=np.float32))
