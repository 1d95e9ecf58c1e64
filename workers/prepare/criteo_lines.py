"""Criteo lines -> NumPy columns, exact on irregular lines, without a Python loop over lines.

A line is `label TAB I1..I13 TAB C1..C26`: 40 fields. Fields are found by their place: a field that
is empty stays empty, and a line that is too short lacks its last fields. No field ever moves into
another column.

Letters: L lines, F = 40 fields, N bytes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ps.errors import DataError

NUM_INTEGERS = 13
NUM_CATEGORICALS = 26
NUM_FIELDS = 1 + NUM_INTEGERS + NUM_CATEGORICALS
_MAX_DECIMAL_DIGITS = 18
_MAX_HEX_DIGITS = 16
_PADDING = b"\0" * 32
_TAB, _NEWLINE, _MINUS = 9, 10, 45

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bool = npt.NDArray[np.bool_]


def _each(byte: int) -> np.uint64:
    """The byte repeated in all eight bytes of a word."""
    return np.uint64(byte * 0x0101010101010101)


def _digit_values() -> npt.NDArray[np.uint8]:
    values = np.full(256, 255, np.uint8)
    for text in ("0123456789abcdef", "0123456789ABCDEF"):
        values[np.frombuffer(text.encode(), np.uint8)] = np.arange(16)
    return values


_DIGITS = _digit_values()


@dataclass(frozen=True, slots=True)
class ParsedLines:
    """The non-blank lines of one chunk; columns are contiguous."""

    label_L: npt.NDArray[np.float32]
    """0.0 or 1.0."""
    line_number_L: I64
    """1 is the first line of the file."""
    integers_IL: I64
    """`[13, L]`; 0 where missing."""
    has_integer_IL: Bool
    categoricals_CL: U64
    """`[26, L]`, the hexadecimal number; 0 where missing."""
    has_categorical_CL: Bool
    num_lines: int
    """Lines of the chunk including blank ones."""
    counters: dict[str, int]


def parse_lines(data: bytes, name: str, first_line: int) -> ParsedLines:
    """Parse whole lines.

    Args:
        data: Lines, each ended by a newline.
        name: Name of the file, for messages.
        first_line: Number of the chunk's first line, from 1.

    Raises:
        DataError: A line has more than 40 fields or a label other than 0 and 1.
    """
    data = data.replace(b"\r\n", b"\n") if b"\r" in data else data
    bytes_N = np.frombuffer(data + _PADDING, np.uint8)
    start_FL, length_FL, fields_L = _find_fields(bytes_N, data, name, first_line)
    number_L = first_line + np.arange(len(fields_L))
    blank_L = (fields_L == 1) & (length_FL[0] == 0)
    num_lines, num_blank = len(fields_L), int(blank_L.sum())
    if num_blank:
        start_FL, length_FL = start_FL[:, ~blank_L], length_FL[:, ~blank_L]
        fields_L, number_L = fields_L[~blank_L], number_L[~blank_L]
    label_L = _labels(bytes_N, start_FL[0], length_FL[0], name, number_L)
    integers = slice(1, 1 + NUM_INTEGERS)
    categoricals = slice(1 + NUM_INTEGERS, NUM_FIELDS)
    integers_IL, has_integer_IL = _decimal(bytes_N, start_FL[integers], length_FL[integers])
    categoricals_CL, has_categorical_CL = _hexadecimal(
        bytes_N, start_FL[categoricals], length_FL[categoricals]
    )
    counters = {
        "lines": len(label_L),
        "blank_lines": num_blank,
        "short_lines": int((fields_L < NUM_FIELDS).sum()),
        **_field_counters(length_FL[integers], has_integer_IL, "integer"),
        **_field_counters(length_FL[categoricals], has_categorical_CL, "categorical"),
        "negative_integers": int((integers_IL < 0).sum()),
    }
    return ParsedLines(
        label_L,
        number_L,
        integers_IL,
        has_integer_IL,
        categoricals_CL,
        has_categorical_CL,
        num_lines,
        counters,
    )


def _field_counters(length: I64, valid: Bool, group: str) -> dict[str, int]:
    """Missing fields of one column group, by reason: cut off, empty, unreadable."""
    cut_off = int((length < 0).sum())
    empty = int((length == 0).sum())
    bad = valid.size - int(valid.sum()) - cut_off - empty
    return {
        f"short_{group}_fields_filled": cut_off,
        f"empty_{group}_fields": empty,
        f"bad_{group}_fields": bad,
    }


def _find_fields(
    bytes_N: npt.NDArray[np.uint8], data: bytes, name: str, first_line: int
) -> tuple[I64, I64, I64]:
    """Start and length of every field, `[40, L]`, length -1 where absent; fields per line."""
    end = np.flatnonzero((bytes_N == _TAB) | (bytes_N == _NEWLINE))
    start = np.empty_like(end)
    start[:1], start[1:] = 0, end[:-1] + 1
    last_of_line = np.flatnonzero(bytes_N[end] == _NEWLINE)
    fields_L = np.diff(last_of_line, prepend=-1)
    if (fields_L > NUM_FIELDS).any():
        line = int(np.argmax(fields_L > NUM_FIELDS))
        text = data.split(b"\n", line + 1)[line][:80].decode(errors="replace")
        raise DataError(
            f"{name}:{first_line + line}: {fields_L[line]} fields in {text!r}...;"
            f" wanted at most {NUM_FIELDS}: label, 13 integers, 26 hex strings"
        )
    field_F1 = np.arange(NUM_FIELDS)[:, None]
    position_FL = np.minimum(last_of_line + 1 - fields_L + field_F1, len(end) - 1)
    start_FL = start[position_FL]
    length_FL = np.where(field_F1 < fields_L, end[position_FL] - start_FL, -1)
    return start_FL, length_FL, fields_L


def _labels(
    bytes_N: npt.NDArray[np.uint8], start_L: I64, length_L: I64, name: str, number_L: I64
) -> npt.NDArray[np.float32]:
    value_L = _DIGITS[bytes_N[start_L]]
    bad_L = (length_L != 1) | (value_L > 1)
    if bad_L.any():
        i = int(np.argmax(bad_L))
        end = start_L[i] + min(int(length_L[i]), 40)
        text = bytes_N[start_L[i] : end].tobytes().decode(errors="replace")
        raise DataError(f"{name}:{number_L[i]}: label is {text!r}, wanted '0' or '1'")
    return value_L.astype(np.float32)


def _decimal(bytes_N: npt.NDArray[np.uint8], start: I64, length: I64) -> tuple[I64, Bool]:
    """Signed decimal numbers and where there is one; 0 where not."""
    negative = (bytes_N[start] == _MINUS) & (length > 0)
    value, valid = _number(bytes_N, start + negative, length - negative, 10, _MAX_DECIMAL_DIGITS)
    signed = value.astype(np.int64)
    return np.where(negative, -signed, signed), valid


def _hexadecimal(bytes_N: npt.NDArray[np.uint8], start: I64, length: I64) -> tuple[U64, Bool]:
    """Hexadecimal numbers and where there is one; 0 where not."""
    return _number(bytes_N, start, length, 16, _MAX_HEX_DIGITS)


def _number(
    bytes_N: npt.NDArray[np.uint8], start: I64, length: I64, base: int, max_digits: int
) -> tuple[U64, Bool]:
    """Numbers of 1 to `max_digits` digits: eight at a time, the few longer ones digit by digit."""
    value, valid = _number_of_eight(bytes_N, start, np.clip(length, 0, 8), base)
    valid &= length >= 1
    value[~valid] = 0
    if length.max(initial=0) > 8:
        long = length > 8
        value[long], valid[long] = _number_of_many(
            bytes_N, start[long], length[long], base, max_digits
        )
    return value, valid


def _number_of_eight(
    bytes_N: npt.NDArray[np.uint8], start: I64, length: I64, base: int
) -> tuple[U64, Bool]:
    """Numbers of at most eight digits, each handled as one 64-bit word of ASCII bytes.

    The first digit is the lowest byte. Shifting left by the unused bytes and filling these with
    "0" gives eight digits; neighbours are then joined three times: bytes, 16-bit, 32-bit lanes.
    A byte c is in [a, b) when adding 128 - a sets its top bit and adding 128 - b does not.
    """
    words = np.ndarray(len(bytes_N) - 7, "<u8", bytes_N, strides=(1,))
    # Length 0 would need a shift by 64 bits, which is undefined; the caller wipes its value.
    shift = np.minimum(8 * (8 - length), 56).astype(np.uint64)
    word = (words[start] << shift) | (_each(0x30) & ((np.uint64(1) << shift) - np.uint64(1)))
    is_digit = (word + _each(0x80 - 0x30)) & ~(word + _each(0x80 - 0x3A))
    value = word & _each(0x0F)
    if base == 16:
        lower = word | _each(0x20)
        is_digit |= (lower + _each(0x80 - 0x61)) & ~(lower + _each(0x80 - 0x67))
        value += ((word >> np.uint64(6)) & _each(1)) * np.uint64(9)
    high = _each(0x80)
    valid = (is_digit & ~word & high) == high
    for bits, lanes in ((8, 0x00FF00FF00FF00FF), (16, 0x0000FFFF0000FFFF), (32, 0xFFFFFFFF)):
        digits_per_lane = bits // 8
        value = value * np.uint64(base**digits_per_lane) + (value >> np.uint64(bits))
        value &= np.uint64(lanes)
    return value, valid


def _number_of_many(
    bytes_N: npt.NDArray[np.uint8], start: I64, length: I64, base: int, max_digits: int
) -> tuple[U64, Bool]:
    valid = length <= max_digits
    value = np.zeros(start.shape, np.uint64)
    for place in range(min(int(length.max(initial=0)), max_digits)):
        digit = _DIGITS[bytes_N[start + place]]
        inside = place < length
        valid &= (digit < base) | ~inside
        value = np.where(inside, value * np.uint64(base) + digit, value)
    value[~valid] = 0
    return value, valid


def add_counters(total: dict[str, int], more: dict[str, int]) -> None:
    """Add counters of one chunk to the total, in place."""
    for name, count in more.items():
        total[name] = total.get(name, 0) + count


def add_totals(counters: dict[str, int]) -> None:
    """Add the sums over both column groups, in place."""
    for pattern in ("short_{}fields_filled", "empty_{}fields", "bad_{}fields"):
        groups = (counters.get(pattern.format(g), 0) for g in ("integer_", "categorical_"))
        counters[pattern.format("")] = sum(groups)
