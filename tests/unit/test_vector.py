"""Lane by lane, vectors do what NumPy does in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ps.kernels import Kernel, kernel
from ps.kernels import vector as v
from ps.memory import empty
from tests.support.reference import same_bits

N = 8
HARD = np.array(
    [
        0,
        -0.0,
        1,
        -1.5,
        1e-45,
        -1e-38,
        3e38,
        -3e38,
        np.inf,
        -np.inf,
        np.nan,
        0.1,
        7,
        1e-20,
        2**24,
        3,
    ],
    dtype=np.float32,
)


def of_two(operation: Callable[[Any, Any, Any], Any]) -> Kernel[..., None]:
    """out = operation(x, y, s) for vectors x, y and a number s."""
    compute = v_inline(operation)

    @kernel(writes=("out",))
    def apply(x: Any, y: Any, s: Any, out: Any) -> None:
        for i in range(0, x.size, N):
            left, right = v.load(x.ctypes.data + 4 * i, N), v.load(y.ctypes.data + 4 * i, N)
            v.store(out.ctypes.data + 4 * i, compute(left, right, s))

    return apply


def v_inline(operation: Callable[[Any, Any, Any], Any]) -> Any:
    from ps.kernels import inline

    return inline(operation)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        pytest.param(lambda x, y, s: x + y * s, lambda x, y, s: x + y * s, id="add, mul"),
        pytest.param(lambda x, y, s: s - x / y, lambda x, y, s: s - x / y, id="sub, div"),
        pytest.param(lambda x, y, s: s / (-x), lambda x, y, s: s / (-x), id="neg, divide a number"),
        pytest.param(lambda x, y, s: v.sqrt(x), lambda x, y, s: np.sqrt(x), id="sqrt"),
        pytest.param(
            lambda x, y, s: v.clip(x, np.float32(-2), s),
            lambda x, y, s: np.where(x < -2, np.float32(-2), np.where(x > s, s, x)),
            id="clip",
        ),
        pytest.param(lambda x, y, s: v.splat(s, 8) - y, lambda x, y, s: s - y, id="splat"),
    ],
)
def test_arithmetic_equals_numpy(operation: Any, expected: Any) -> None:
    x, y = (a.ravel().copy() for a in np.meshgrid(HARD, HARD))
    s, out = np.float32(0.7), np.empty_like(x)
    of_two(operation)(x, y, s, out)
    with np.errstate(all="ignore"):
        assert same_bits(out, expected(x, y, s))


@kernel(writes=("out",))
def widen_float16(values: Any, out: Any) -> None:
    for i in range(0, values.size, N):
        v.store(out.ctypes.data + 4 * i, v.load_float16(values.ctypes.data + 2 * i, N))


@kernel(writes=("out",))
def widen_bfloat16(values: Any, out: Any) -> None:
    for i in range(0, values.size, N):
        v.store(out.ctypes.data + 4 * i, v.load_bfloat16(values.ctypes.data + 2 * i, N))


@kernel(writes=("out",))
def widen_uint8(values: Any, out: Any) -> None:
    for i in range(0, values.size, N):
        v.store(out.ctypes.data + 4 * i, v.load_uint8(values.ctypes.data + i, N))


def test_every_narrow_number_is_widened_exactly() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    out = np.empty(bits.size, dtype=np.float32)
    widen_float16(bits, out)
    assert same_bits(out, bits.view(np.float16).astype(np.float32))
    widen_bfloat16(bits, out)
    assert same_bits(out, (bits.astype(np.uint32) << 16).view(np.float32))
    small = np.arange(256, dtype=np.uint8)
    widen_uint8(small, out[:256])
    assert out[:256].tolist() == list(range(256))


@kernel(writes=("out",))
def copy(values: Any, out: Any) -> None:
    for i in range(0, values.size, N):
        v.prefetch(values.ctypes.data + 4 * i + 4096)  # beyond the end: never faults
        v.prefetch_to_write(out.ctypes.data + 4 * i + 4096)
        v.stream(out.ctypes.data + 4 * i, v.load(values.ctypes.data + 4 * i, N))
        v.store(out.ctypes.data + 4 * i, v.load(out.ctypes.data + 4 * i, N))
    v.stream_fence()
    out[0] = v.load_scalar(values.ctypes.data + 4)


def test_streamed_and_prefetched_memory_holds_what_was_written() -> None:
    out = empty((16,))
    copy(HARD, out)
    assert out[0] == HARD[1]
    assert same_bits(out[1:], HARD[1:])
