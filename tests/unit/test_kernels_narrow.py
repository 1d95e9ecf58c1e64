"""bfloat16 on the way: the numbers of `ps.quantized`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.errors import DataError
from ps.quantized import dequantized, quantized
from ps.wire.messages import WireFormat
from tests.support.reference import same_bits

FORMAT = WireFormat((3,), "bfloat16")
NUMBERS = st.integers(0, 2**32 - 1).filter(lambda bits: bits & 0x7F800000 < 0x7F000000)


@given(bits=st.lists(NUMBERS, max_size=60))
def test_numbers_are_those_of_quantized_rows(bits: list[int]) -> None:
    rows = np.resize(np.array(bits, dtype=np.uint32), (len(bits) // 3, 3)).view(np.float32)
    twin = quantized(rows, "bfloat16")
    numbers = FORMAT.narrowed(rows)
    np.testing.assert_array_equal(numbers, twin.records.view(np.uint16))
    assert same_bits(FORMAT.widened(numbers), dequantized(twin))
    assert same_bits(FORMAT.widened(numbers[None]), dequantized(twin)[None])


@pytest.mark.parametrize(
    "bad", [np.nan, -np.nan, np.inf, -np.inf, np.finfo(np.float32).max, np.float32(-3.4e38)]
)
def test_what_does_not_fit_names_its_row(bad: float) -> None:
    rows = np.ones((5, 3), dtype=np.float32)
    rows[4, 1] = bad
    with pytest.raises(DataError, match="row 4 does not fit bfloat16"):
        FORMAT.narrowed(rows)


def test_nan_of_any_bits_is_found() -> None:
    for bits in (0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001):
        rows = np.full((1, 3), bits, dtype=np.uint32).view(np.float32)
        with pytest.raises(DataError, match="row 0"):
            FORMAT.narrowed(rows)
