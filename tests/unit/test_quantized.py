"""Narrow rows: what is stored, what comes back, and how far that is from what was given."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ps import quantized as module
from ps.errors import DataError
from ps.kernels.rows import NarrowFormat
from ps.quantized import QuantizedRows, dequantized, quantized
from ps.ragged import F32
from tests.support import reference as twin
from tests.support.reference import same_bits
from tests.support.strategies import frozen, unaligned

FORMATS: tuple[NarrowFormat, ...] = ("float16", "bfloat16", "int8")
few = settings(max_examples=60)
BOUNDS = {"float16": 6e4, "bfloat16": 3e38, "int8": 1.7e38}


def tables(bound: float) -> st.SearchStrategy[F32]:
    bound = float(np.float32(bound))
    numbers = (
        st.floats(-bound, bound, width=32)
        | st.floats(-1, 1, width=32)
        | st.sampled_from([0.0, -0.0, 1e-45, -3e-45, 1.1e-38, 1e-7, 2.0**-14, 2.0**-24])
    )
    shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 5, 8]))
    return arrays(np.float32, shapes, elements=numbers, fill=st.nothing())


def error(q: QuantizedRows, rows: F32) -> np.ndarray[Any, Any]:
    return np.abs(dequantized(q).astype(np.float64) - rows.astype(np.float64))


def scales(q: QuantizedRows) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(q.records[:, :4]).view(np.float32).astype(np.float64)


@few
@given(rows=tables(BOUNDS["float16"]))
def test_float16_is_as_near_as_stated(rows: F32) -> None:
    assert (error(quantized(rows, "float16"), rows) <= bound(rows, 2.0**-11, 2.0**-25)).all()


@few
@given(rows=tables(BOUNDS["bfloat16"]))
def test_bfloat16_is_as_near_as_stated(rows: F32) -> None:
    assert (error(quantized(rows, "bfloat16"), rows) <= bound(rows, 2.0**-8, 2.0**-134)).all()


@few
@given(rows=tables(BOUNDS["int8"]))
def test_int8_is_as_near_as_stated(rows: F32) -> None:
    q = quantized(rows, "int8")
    most = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
    limit = np.maximum(scales(q) / 2 + 2.0**-21 * most, 2.0**-141)
    assert (error(q, rows) <= limit).all()


def bound(rows: F32, relative: float, absolute: float) -> np.ndarray[Any, Any]:
    return np.maximum(relative * np.abs(rows.astype(np.float64)), absolute)


def test_int8_rows_span_their_range_evenly() -> None:
    rows = np.array([[-1, 0, 254], [7, 7, 7], [0, 0.5, 127.5]], dtype=np.float32)
    q = quantized(rows, "int8")
    assert q.records.shape == (3, 8 + 3)
    assert [struct.unpack("<ff", r[:8].tobytes()) for r in q.records] == [(1, -1), (0, 7), (0.5, 0)]
    assert q.records[:, 8:].tolist() == [[0, 1, 255], [0, 0, 0], [0, 1, 255]]
    assert same_bits(dequantized(q), rows)


def test_int8_rounds_halves_to_even() -> None:
    rows = np.array([[0, 0.5, 1.5, 2.5, 253.5, 254.5, 255]], dtype=np.float32)
    assert quantized(rows, "int8").records[0, 8:].tolist() == [0, 0, 2, 2, 254, 254, 255]


def test_a_row_of_equal_numbers_is_exact() -> None:
    rows = np.repeat(np.array([[0.1], [-3e38], [1e-45], [0]], dtype=np.float32), 9, axis=1)
    q = quantized(rows, "int8")
    assert not scales(q).any()
    assert same_bits(dequantized(q), rows)


def test_float16_is_what_numpy_makes_of_it() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 33)).astype(np.float32)
    assert same_bits(quantized(rows, "float16").records.view(np.float16), rows.astype(np.float16))


@pytest.mark.parametrize(
    ("given_bits", "kept_bits"),
    [
        (0x3F800000, 0x3F80),
        (0x3F808000, 0x3F80),  # a half, to even
        (0x3F808001, 0x3F81),
        (0x3F818000, 0x3F82),  # a half, to even
        (0x80000001, 0x8000),
        (0x7F7F7FFF, 0x7F7F),  # the biggest that fits
    ],
)
def test_bfloat16_keeps_the_nearest_upper_half(given_bits: int, kept_bits: int) -> None:
    row = np.array([[given_bits]], dtype=np.uint32).view(np.float32)
    assert quantized(row, "bfloat16").records.view(np.uint16) == kept_bits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_refused_by_number(format: NarrowFormat, bad: float) -> None:
    rows = np.zeros((5, 3), dtype=np.float32)
    rows[3, 1] = rows[4, 0] = bad
    with pytest.raises(DataError, match=f"row 3 does not fit {format}"):
        quantized(rows, format)


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("float16", [0, 65520]),
        ("float16", [-1e6, 1]),
        ("bfloat16", [3.4e38, 0]),
        ("int8", [-2e38, 2e38]),
        ("int8", [-3e38, 3e38]),
    ],
)
def test_a_row_beyond_the_format_is_refused(format: NarrowFormat, row: list[float]) -> None:
    with pytest.raises(DataError, match=f"row 1 does not fit {format}"):
        quantized(np.array([[1, 2], row], dtype=np.float32), format)


@pytest.mark.parametrize("format", FORMATS)
def test_records_do_not_depend_on_other_rows(
    monkeypatch: pytest.MonkeyPatch, format: NarrowFormat
) -> None:
    rows = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
    whole = quantized(rows, format)
    monkeypatch.setattr(module, "_CHUNK_NUMBERS", 12)
    for given_rows in (rows, frozen(rows), unaligned(rows)):
        assert quantized(given_rows, format).records.tobytes() == whole.records.tobytes()
    assert whole.records.ctypes.data % 64 == 0
    assert (whole.num_rows, whole.dim, whole.nbytes) == (11, 6, whole.records.size)
    assert quantized(rows[:0], format).num_rows == 0


@pytest.mark.parametrize("format", FORMATS)
def test_dequantized_rows_are_those_of_the_twin(format: NarrowFormat) -> None:
    q = quantized(np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32), format)
    want = twin.float32_rows(q)
    assert same_bits(dequantized(q), want)
    ids = np.array([3, 3, 10, 0])
    assert same_bits(dequantized(q, ids), want[ids])
    assert dequantized(q, ids[:0]).shape == (0, 8)
    for bad in (-1, 11):
        with pytest.raises(AssertionError, match="an id is"):
            dequantized(q, np.array([0, bad]))
