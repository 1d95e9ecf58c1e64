"""Features looked up in one call are, bit for bit, those of the plain twins.

Every call is made with arrays of all kinds (ordinary, read-only, at odd addresses, against
inaccessible pages) and must write its output, all of it and nothing else; or nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import COMBINERS
from ps.kernels.combine import COMBINER_CODES
from ps.kernels.features import (
    KEEP_ALL,
    KEEP_IDS,
    KEEP_WEIGHTED,
    combine_features_for,
    gather_features_for,
)
from ps.kernels.rows import QuantizedRows, RowFormat, record_bytes
from ps.memory import empty
from ps.ragged import F32, I64, Ragged
from tests.support import reference_features as twin
from tests.support.guarded import EVERY_KIND, Canaries
from tests.support.reference import float32_rows, same_bits
from tests.support.strategies import frozen

Kind = tuple[RowFormat, int]
Table = npt.NDArray[Any]
"""The records of a table."""

KINDS: list[Kind] = [
    ("float32", 1),
    ("float32", 5),
    ("float32", 40),
    ("float32", 128),
    ("int8", 37),
]
"""Of whole rows in registers, and of overlapping pieces."""
HARD = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-38, 3e38, -3e38, np.inf, -np.inf, np.nan, 0.1, 16777216.0]
KEEPS = [KEEP_ALL, KEEP_IDS, KEEP_WEIGHTED]
NO_WEIGHTS = np.zeros(0, dtype=np.float32)
few = settings(max_examples=40)


def make_table(rng: np.random.Generator, kind: Kind, num_rows: int) -> Table:
    format, dim = kind
    if format == "float32":
        rows = rng.normal(size=(num_rows, dim)).astype(np.float32)
        return np.where(rng.random(rows.shape) < 0.1, hard(rng, rows.shape), rows)
    made = rng.integers(0, 256, (num_rows, record_bytes(format, dim)), dtype=np.uint8)
    made[:, :8] = rng.normal(size=(num_rows, 2)).astype(np.float32).view(np.uint8)
    return made


def hard(rng: np.random.Generator, shape: int | tuple[int, ...]) -> F32:
    return rng.choice(np.array(HARD, dtype=np.float32), shape)


def make_ids(rng: np.random.Generator, num_rows: int, size: int, wild: float) -> I64:
    """Ids in range but for a part that may be anything."""
    anything = rng.choice([-1, -(2**63), num_rows, 2**31, 2**40, 2**63 - 1], size)
    return np.where(rng.random(size) < wild, anything, rng.integers(0, num_rows, size))


def make_bag(
    rng: np.random.Generator, num_rows: int, lengths: Sequence[int], weighted: bool, wild: float
) -> Ragged:
    splits = np.cumsum([0, *lengths])
    ids = make_ids(rng, num_rows, int(splits[-1]), wild)
    return Ragged(ids, splits, hard(rng, ids.size) if weighted else None)


def float32_of(table: Table, kind: Kind) -> F32:
    format, dim = kind
    return table if format == "float32" else float32_rows(QuantizedRows(format, dim, table))


def run(
    kernel: Callable[..., bool],
    shape: tuple[int, ...],
    tables: Sequence[Table],
    ids_N: I64,
    *args: npt.NDArray[Any],
    features: Sequence[I64] = (),
) -> F32 | None:
    """The output or None, the same for arrays of every kind, after a look around it."""
    results = []
    for change, offset in EVERY_KIND:
        near = {id(table): change(table) for table in tables}
        address_F = np.array([near[id(table)].ctypes.data for table in tables])
        num_rows_F = np.array([len(table) for table in tables])
        ids = np.copy(ids_N) if change is frozen else change(ids_N)
        out = Canaries(shape, offset=offset)
        others = [change(a) for a in (*args, address_F, num_rows_F, *features)]
        in_range = kernel(ids, *others, out.array)
        assert out.intact, "written outside the output"
        assert in_range or np.isnan(out.array).all(), "written in spite of a bad id"
        results.append(out.array.copy() if in_range else None)
    for result in results[1:]:
        assert same(result, results[0])
    return results[0]


def same(a: F32 | None, b: F32 | None) -> bool:
    return a is b if a is None or b is None else same_bits(a, b)


def check_combine(
    kind: Kind, tables: list[Table], bags: list[Ragged], combiners: list[str], keeps: list[int]
) -> None:
    weighted = bags[0].weights is not None
    got = run(
        combine_features_for(*kind),
        (len(bags), bags[0].num_examples, kind[1]),
        tables,
        np.concatenate([bag.ids for bag in bags]),
        np.concatenate([bag.weights for bag in bags]) if weighted else NO_WEIGHTS,  # type: ignore[misc]
        np.stack([bag.row_splits for bag in bags]),
        features=[np.array([COMBINER_CODES[c] for c in combiners]), np.array(keeps)],
    )
    rows = [float32_of(table, kind) for table in tables]
    lookups = [twin.Lookup(*each) for each in zip(rows, bags, combiners, keeps, strict=True)]
    assert same(got, twin.combine_features(lookups))


def check_gather(kind: Kind, tables: list[Table], ids_FB: I64) -> None:
    shape = (*ids_FB.shape, kind[1])
    got = run(gather_features_for(*kind), shape, tables, ids_FB.reshape(-1))
    assert same(got, twin.gather_features([float32_of(t, kind) for t in tables], ids_FB))


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_combined_features_equal_their_twins(kind: Kind, data: Any) -> None:
    """Features of one table too, all combiners at once, bad ids where they count or not."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    few_tables = [make_table(rng, kind, int(n)) for n in rng.integers(1, 7, 2)]
    num_features, num_examples = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4))
    tables = [few_tables[k] for k in rng.integers(0, 2, num_features)]
    weighted, wild = data.draw(st.booleans()), data.draw(st.sampled_from([0, 0.03, 0.3]))
    combiners = [str(c) for c in rng.choice(COMBINERS, num_features)]
    keeps = rng.choice(KEEPS, num_features).tolist()
    lengths = rng.integers(0, 5, (num_features, num_examples)).tolist()
    bags = [
        make_bag(rng, len(table), each, weighted, wild)
        for table, each in zip(tables, lengths, strict=True)
    ]
    check_combine(kind, tables, bags, combiners, keeps)


@pytest.mark.parametrize("kind", KINDS[1:4])
@few
@given(data=st.data())
def test_gathered_features_equal_their_twins(kind: Kind, data: Any) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape, wild = rng.integers([1, 0], [5, 5]), data.draw(st.sampled_from([0, 0.1]))
    tables = [make_table(rng, kind, int(n)) for n in rng.integers(1, 7, shape[0])]
    ids = [make_ids(rng, len(table), int(shape[1]), wild) for table in tables]
    check_gather(kind, tables, np.array(ids, dtype=np.int64).reshape(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_long_inputs_equal_their_twins(kind: Kind) -> None:
    """More entries than are asked for ahead, in long bags and across features."""
    rng = np.random.default_rng(0)
    tables = [make_table(rng, kind, 50) for _ in range(3)]
    for weighted in (False, True):
        bags = [make_bag(rng, 50, (0, 900, 1, 200 * k, 0), weighted, 0) for k in range(3)]
        check_combine(kind, tables, bags, ["sum", "mean", "sqrtn"], KEEPS)
    if kind in KINDS[1:4]:
        check_gather(kind, tables, rng.integers(0, 50, (3, 1500)))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("bad_id", [5, 2**31, 2**32, 2**40, 2**63 - 1, -1, -(2**63)])
def test_one_bad_id_among_many_is_found_wherever_it_is(keep: int, bad_id: int) -> None:
    tables = [np.ones((5, 5), dtype=np.float32)] * 2
    combine = combine_features_for("float32", 5)
    address_F, num_rows_F = np.array([t.ctypes.data for t in tables]), np.array([5, 5])
    splits_FS = np.array([[0, 20], [0, 17]])
    for place in range(37):
        ids_N = np.zeros(37, dtype=np.int64)
        ids_N[place] = bad_id
        out = empty((2, 1, 5))
        features = address_F, num_rows_F, np.zeros(2, dtype=np.int64), np.full(2, keep)
        in_range = combine(ids_N, NO_WEIGHTS, splits_FS, *features, out)
        assert in_range == (bad_id < 0 and keep != KEEP_ALL)
        if in_range:
            assert out[:, 0, 0].tolist() == ([19, 17] if place < 20 else [20, 16])


@pytest.mark.parametrize("count", [1, 20, 1000])
def test_sums_are_as_exact_as_stated(count: int) -> None:
    rng = np.random.default_rng(count)
    table = rng.normal(size=(1000, 40)).astype(np.float32)
    bag = Ragged(rng.integers(0, 1000, count), [0, count], rng.normal(size=count))  # type: ignore[arg-type]
    assert bag.weights is not None
    features = (np.array([n]) for n in (table.ctypes.data, 1000, COMBINER_CODES["sum"], KEEP_ALL))
    out = empty((1, 1, 40))
    splits_FS = bag.row_splits.reshape(1, -1)
    combine = combine_features_for("float32", 40)
    assert combine(bag.ids.copy(), bag.weights, splits_FS, *features, out)
    terms = table[bag.ids].astype(np.float64) * bag.weights.astype(np.float64)[:, None]
    error = np.abs(out[0, 0] - terms.sum(axis=0))
    assert (error <= (count + 1) * 2.0**-24 * np.abs(terms).sum(axis=0)).all()
