"""Random lookups of one feature, as plain arrays, and what stock TensorFlow says of them.

`cases()` draws dense, sparse and ragged inputs with everything that may go wrong: bad ids, weights
that are not positive or not numbers, unsorted, repeated and misplaced coordinates, empty inputs.
Who tests an implementation turns a `Case` into its own inputs, runs it through `outcome` and hands
the result to `check`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from hypothesis import strategies as st

from ps.config import COMBINERS, Combiner
from ps.ragged import F32, I64

Kind = Literal["dense", "sparse", "ragged"]
Array = npt.NDArray[Any]

DIM = 3
SIZES = (1, 5, 13)
WEIGHTS = [-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 3.0]
"""Few bits each, so that no sum of them is nearly but not quite 0."""
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
BAD_IDS = [-1, -7, -(2**40), 2**31, 2**32, 2**40, 2**63 - 1]


@dataclass(frozen=True)
class Case:
    """One lookup of one feature."""

    kind: Kind
    ids: Array
    """int32 or int64: any shape (dense), [N] (sparse, ragged)."""
    num_rows: int = 5
    """V of the table; `rows` are its rows."""
    combiner: Combiner = "mean"
    max_sequence_length: int = 0
    validate: bool = True
    output_shape: tuple[int | None, ...] | None = None
    weights: Array | None = None
    """float32 or float64 [N]; for sparse input the count may be wrong."""
    indices: I64 | None = None
    """Sparse: [N, rank]."""
    dense_shape: tuple[int, ...] | None = None
    """Sparse: [rank]."""
    row_splits: I64 | None = None
    """Ragged: [B + 1]."""

    @property
    def rows(self) -> F32:
        """float32 [V, DIM]."""
        return table_rows(self.num_rows)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a FeatureConfig besides its table; fields of a FeatureSpec."""
        return {
            "max_sequence_length": self.max_sequence_length,
            "validate_weights_and_indices": self.validate,
            "output_shape": self.output_shape,
        }


@dataclass(frozen=True)
class Refused:
    """A lookup that ended in an error of the expected family."""

    error: Exception


@cache
def table_rows(num_rows: int) -> F32:
    """Rows of the size that the tolerance is stated for."""
    rng = np.random.default_rng(num_rows)
    return rng.normal(0, 1 / np.sqrt(32), size=(num_rows, DIM)).astype(np.float32)


def outcome(
    call: Callable[[], Any],
    errors: tuple[type[Exception], ...] = (ValueError, tf.errors.InvalidArgumentError),
) -> F32 | Refused:
    """The array that a lookup gives, or its error if it is one of `errors`."""
    try:
        return np.asarray(call())
    except errors as e:
        return Refused(e)


def tensorflow_inputs(case: Case, weights_dtype: Any = None) -> tuple[Any, Any]:
    """The ids and the weights (or None) as TensorFlow has them.

    Args:
        case: the lookup.
        weights_dtype: what to cast the weights to; None for no cast.
    """
    weights = case.weights
    if weights is not None and weights_dtype is not None:
        weights = weights.astype(weights_dtype)
    if case.kind == "dense":
        return tf.constant(case.ids), None if weights is None else tf.constant(weights)
    if case.kind == "ragged":
        ids, found = (
            None if values is None else tf.RaggedTensor.from_row_splits(values, case.row_splits)
            for values in (case.ids, weights)
        )
        return ids, found
    assert case.indices is not None
    ids = tf.SparseTensor(case.indices, case.ids, case.dense_shape)
    if weights is None:
        return ids, None
    indices = np.resize(case.indices, (weights.size, case.indices.shape[1]))
    return ids, tf.SparseTensor(indices, weights, case.dense_shape)


def stock_config(case: Case, name: str = "t") -> Any:
    """TensorFlow's FeatureConfig; its `table` is the key of the rows."""
    embedding = tf.tpu.experimental.embedding
    table = embedding.TableConfig(case.num_rows, DIM, combiner=case.combiner, name=name)
    return embedding.FeatureConfig(table, **case.options)


def stock(case: Case) -> F32 | Refused:
    """TensorFlow's own answer, eagerly.

    Weights are cast to float32 first: TensorFlow documents that cast and, on most paths, refuses
    other types instead. Doing it is our rule (D3).
    """
    feature = stock_config(case)
    ids, weights = tensorflow_inputs(case, np.float32)

    def call() -> Any:
        return tf.tpu.experimental.embedding.serving_embedding_lookup(
            {"f": ids},
            None if weights is None else {"f": weights},
            {feature.table: tf.Variable(case.rows)},
            {"f": feature},
        )["f"]

    return outcome(call)


def check(found: F32 | Refused, wanted: F32 | Refused) -> None:
    """Both refuse, or both give the same shape and values."""
    if isinstance(found, Refused) or isinstance(wanted, Refused):
        assert type(found) is type(wanted), (found, wanted)
        return
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def cases() -> st.SearchStrategy[Case]:
    """Dense, sparse and ragged lookups."""
    return st.one_of(dense_cases(), sparse_cases(), sparse_cases(), ragged_cases())


@st.composite
def dense_cases(draw: st.DrawFn) -> Case:
    """Ids of rank 0 to 3; now and then a sequence feature or weights, which are refused."""
    num_rows = draw(st.sampled_from(SIZES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    ids = _ids(draw, num_rows, int(np.prod(shape, dtype=int))).reshape(shape)
    weights = draw(st.sampled_from([None] * 9 + [np.ones(1, np.float32)]))
    options = _options(draw, None, weights is not None)
    options["max_sequence_length"] = draw(st.sampled_from([0] * 9 + [2]))
    return Case("dense", ids, num_rows, weights=weights, **options)


@st.composite
def sparse_cases(draw: st.DrawFn) -> Case:
    """Rank 1 to 4; coordinates mostly sorted, distinct and in the shape."""
    num_rows = draw(st.sampled_from(SIZES))
    rank = draw(st.sampled_from([1, 2, 2, 2, 3, 4]))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank)))
    indices = _indices(draw, shape)
    size = indices.shape[0]
    weights = _weights(draw, size if draw(st.integers(0, 15)) else draw(st.integers(0, size + 1)))
    return Case(
        "sparse",
        _ids(draw, num_rows, size),
        num_rows,
        weights=weights,
        indices=indices,
        dense_shape=shape,
        **_options(draw, shape[0], weights is not None),
    )


@st.composite
def ragged_cases(draw: st.DrawFn) -> Case:
    """Rank 2; often with an `output_shape`, which means most to ragged input."""
    num_rows = draw(st.sampled_from(SIZES))
    lengths = draw(st.lists(st.integers(0, 4), max_size=4))
    splits = np.cumsum([0, *lengths]).astype(np.int64)
    size = int(splits[-1])
    weights = _weights(draw, size)
    return Case(
        "ragged",
        _ids(draw, num_rows, size),
        num_rows,
        weights=weights,
        row_splits=splits,
        **_options(draw, len(lengths), weights is not None),
    )


def _options(draw: st.DrawFn, batch: int | None, weighted: bool) -> dict[str, Any]:
    lengths = [0] * 9 + [2] if weighted else [0, 0, 2, 3]  # weighted sequences are refused
    shapes: list[tuple[int | None, ...] | None] = [None, None, None, None, (), (2,), (2, 3), (4,)]
    if batch is not None:
        shapes += [(batch,), (1, batch), (batch, 3), (2, batch), (batch, 1, 2), (batch, None)]
    return {
        "combiner": draw(st.sampled_from(COMBINERS)),
        "max_sequence_length": draw(st.sampled_from(lengths)),
        "validate": draw(st.booleans()),
        "output_shape": draw(st.sampled_from(shapes)),
    }


def _ids(draw: st.DrawFn, num_rows: int, size: int) -> Array:
    usual = [*range(num_rows)]
    bad = draw(st.integers(0, 2)) == 0
    pool = usual * 3 + [*BAD_IDS, num_rows] if bad else usual
    ids = draw(st.lists(st.sampled_from(pool), min_size=size, max_size=size))
    narrow = all(-(2**31) <= i < 2**31 for i in ids) and draw(st.booleans())
    return np.array(ids, dtype=np.int32 if narrow else np.int64)


def _weights(draw: st.DrawFn, size: int) -> Array | None:
    pools = [None, None, [0.5, 1.0, 1.5, 3.0], WEIGHTS, WEIGHTS * 2 + NOT_FINITE]
    pool = draw(st.sampled_from(pools))
    if pool is None:
        return None
    weights = draw(st.lists(st.sampled_from(pool), min_size=size, max_size=size))
    return np.array(weights, dtype=draw(st.sampled_from([np.float32, np.float32, np.float64])))


def _indices(draw: st.DrawFn, shape: tuple[int, ...]) -> I64:
    """Most often as TensorFlow wants them; else in any order, repeated or out of the shape."""
    wild = draw(st.integers(0, 3)) == 0
    spare = 1 if wild and draw(st.booleans()) else 0
    if not spare and 0 in shape:
        return np.zeros((0, len(shape)), np.int64)
    places = st.tuples(*(st.integers(-spare, size - 1 + 2 * spare) for size in shape))
    drawn = draw(st.lists(places, max_size=8))
    chosen = drawn if wild else sorted(set(drawn))
    return np.array(chosen, dtype=np.int64).reshape(-1, len(shape))
