"""What hypothesis draws: ragged ids with awkward weights, and rows of awkward numbers."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ps.ragged import F32, Ragged

T = TypeVar("T")

DIMS = st.sampled_from([1, 3, 8, 17])
NUMBERS = st.floats(-8, 8, width=32)
WEIGHTS = st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0, -0.0, 1e-30, 3e38, np.nan, np.inf, -np.inf])


def rows(num_rows: int, dim: int) -> st.SearchStrategy[F32]:
    """float32 [num_rows, dim]."""
    return arrays(np.float32, (num_rows, dim), elements=NUMBERS, fill=st.just(1.5))


@st.composite
def bags(
    draw: st.DrawFn,
    num_rows: int,
    *,
    num_examples: int | None = None,
    weighted: bool | None = None,
    weights: st.SearchStrategy[float] = WEIGHTS,
) -> Ragged:
    """Bags of ids in [0, num_rows): empty examples, repeats, no example at all."""
    size = draw(st.integers(0, 5)) if num_examples is None else num_examples
    ids = [draw(st.lists(st.integers(0, num_rows - 1), max_size=5)) for _ in range(size)]
    if weighted is None:
        weighted = draw(st.booleans())
    if not weighted:
        return Ragged.from_lists(ids)
    return Ragged.from_lists(ids, [[draw(weights) for _ in row] for row in ids])


def frozen(array: T) -> T:
    """A read-only copy, as arrays from Ray arrive. Numba refuses to compile a write to it."""
    if not isinstance(array, np.ndarray):
        return array
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def unaligned(array: np.ndarray) -> np.ndarray:
    """A copy at an odd address, as arrays in a message or a file may lie."""
    raw = np.zeros(array.nbytes + 1, dtype=np.uint8)
    copy = raw[1 - raw.ctypes.data % 2 :][: array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
