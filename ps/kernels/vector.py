"""SIMD vectors for kernels: values of n float32 lanes that LLVM keeps in registers.

A row of a fixed dim is one such value, so that a bag's sum lives in registers while its rows
stream by. LLVM cuts a vector into what the machine has (AVX-512, AVX2, NEON); lanes never mix and
nothing is contracted, so a lane's result is that of the same float32 operations in NumPy.

Vectors are read and written at addresses: whoever calls a kernel has checked its indices. The
number of lanes is a constant where the kernel is compiled: a literal or a closure variable.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

CACHE_LINE = 64
"""Bytes. Of x86-64, and of the arm64 servers."""

P = ParamSpec("P")
Address = int | np.integer[Any]
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_I1, _I8, _I16, _I32 = (ir.IntType(n) for n in (1, 8, 16, 32))


class Vector(Protocol):
    """What the type checker sees of a vector: lane by lane arithmetic."""

    def __add__(self, other: Vector | np.float32) -> Vector: ...
    def __sub__(self, other: Vector | np.float32) -> Vector: ...
    def __mul__(self, other: Vector | np.float32) -> Vector: ...
    def __truediv__(self, other: Vector | np.float32) -> Vector: ...
    def __radd__(self, other: np.float32) -> Vector: ...
    def __rsub__(self, other: np.float32) -> Vector: ...
    def __rmul__(self, other: np.float32) -> Vector: ...
    def __rtruediv__(self, other: np.float32) -> Vector: ...
    def __neg__(self) -> Vector: ...


class VectorType(types.Type):  # type: ignore[misc]  # numba has no types
    """Numba's type of a vector of n float32 lanes."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"Vector({lanes})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: VectorType) -> None:
        super().__init__(manager, kind, _llvm_type(kind.lanes))


def _llvm_type(lanes: int) -> Any:
    """A struct of vectors of 2ᵏ lanes: LLVM takes others to pieces where control flow meets."""
    return ir.LiteralStructType([ir.VectorType(_FLOAT, n) for _, n in _parts(lanes)])


def _parts(lanes: int) -> list[tuple[int, int]]:
    """(first lane, number of lanes) of each part: 24 is 16 and 8."""
    widths = [1 << k for k in reversed(range(lanes.bit_length())) if lanes >> k & 1]
    return [(sum(widths[:k]), n) for k, n in enumerate(widths)]


def _made(builder: Any, lanes: int, part: Callable[[int, int, int], Any]) -> Any:
    """The vector whose k-th part, n lanes from the first-th on, is `part(k, first, n)`."""
    value = ir.Constant(_llvm_type(lanes), ir.Undefined)
    for k, (first, n) in enumerate(_parts(lanes)):
        value = builder.insert_value(value, part(k, first, n), k)
    return value


def _intrinsic(function: Callable[Concatenate[Any, P], Any]) -> Callable[P, Any]:
    """A function of kernels; the given one gets types and returns (signature, how to emit it)."""
    return cast("Callable[P, Any]", intrinsic(prefer_literal=True)(function))


# --- memory --------------------------------------------------------------------------------------


@_intrinsic
def prefetch(context: Any, address: Address) -> Any:
    """Ask for the cache line at an address, to be read soon; never faults."""
    return types.void(address), _emit_prefetch(0)


@_intrinsic
def prefetch_to_write(context: Any, address: Address) -> Any:
    """Ask for the cache line at an address, to be changed soon; never faults."""
    return types.void(address), _emit_prefetch(1)


def _emit_prefetch(write: int) -> Callable[..., Any]:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        numbers = [ir.Constant(_I32, n) for n in (write, 3, 1)]
        builder.call(call, [builder.inttoptr(args[0], _I8.as_pointer()), *numbers])
        return context.get_dummy_value()

    return emit


def _pointer(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    place = builder.add(address, ir.Constant(address.type, offset))
    return builder.inttoptr(place, kind.as_pointer())


def _loaded(
    address: Any, lanes: Any, element: Any, size: int, widened: Callable[..., Any]
) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns that reads elements of `size` bytes and widens them."""
    kind = VectorType(lanes.literal_value)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def part(k: int, first: int, n: int) -> Any:
            pointer = _pointer(builder, args[0], first * size, ir.VectorType(element, n))
            value = builder.load(pointer)
            value.align = 1
            return widened(builder, value, n)

        return _made(builder, kind.lanes, part)

    return kind(address, lanes), emit


@_intrinsic
def load(context: Any, address: Address, lanes: int) -> Any:
    """Read n float32 at an address."""
    return _loaded(address, lanes, _FLOAT, 4, lambda builder, value, n: value)


@_intrinsic
def load_float16(context: Any, address: Address, lanes: int) -> Any:
    """Read n IEEE half floats at an address, as float32: exact."""

    def widened(builder: Any, value: Any, n: int) -> Any:
        return builder.fpext(value, ir.VectorType(_FLOAT, n))

    return _loaded(address, lanes, _HALF, 2, widened)


@_intrinsic
def load_bfloat16(context: Any, address: Address, lanes: int) -> Any:
    """Read n bfloat16 (the upper halves of float32) at an address, as float32: exact."""

    def widened(builder: Any, value: Any, n: int) -> Any:
        wide = builder.zext(value, ir.VectorType(_I32, n))
        shift = ir.Constant(wide.type, [16] * n)
        return builder.bitcast(builder.shl(wide, shift), ir.VectorType(_FLOAT, n))

    return _loaded(address, lanes, _I16, 2, widened)


@_intrinsic
def load_uint8(context: Any, address: Address, lanes: int) -> Any:
    """Read n bytes at an address, as float32 from 0 to 255."""

    def widened(builder: Any, value: Any, n: int) -> Any:
        wide = builder.zext(value, ir.VectorType(_I32, n))
        return builder.sitofp(wide, ir.VectorType(_FLOAT, n))

    return _loaded(address, lanes, _I8, 1, widened)


@_intrinsic
def load_scalar(context: Any, address: Address) -> Any:
    """Read one float32 at an address."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = builder.load(builder.inttoptr(args[0], _FLOAT.as_pointer()))
        value.align = 1
        return value

    return types.float32(address), emit


@_intrinsic
def store(context: Any, address: Address, value: Vector) -> Any:
    """Write a vector at an address."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for written, _ in _stores(builder, args[0], args[1], sig.args[1].lanes):
            written.align = 1
        return context.get_dummy_value()

    return types.void(address, value), emit


def _stores(builder: Any, address: Any, value: Any, lanes: int) -> list[tuple[Any, int]]:
    """Per part: the instruction that writes it, and how many bytes that are."""
    stores = []
    for k, (first, n) in enumerate(_parts(lanes)):
        pointer = _pointer(builder, address, 4 * first, ir.VectorType(_FLOAT, n))
        stores.append((builder.store(builder.extract_value(value, k), pointer), 4 * n))
    return stores


@_intrinsic
def stream(context: Any, address: Address, value: Vector) -> Any:
    """Write a vector past the caches, at an address that is a multiple of its size (at most 64)."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one = builder.module.add_metadata([ir.Constant(_I32, 1)])
        for written, size in _stores(builder, args[0], args[1], sig.args[1].lanes):
            written.align = min(size, CACHE_LINE)
            written.set_metadata("nontemporal", one)
        return context.get_dummy_value()

    return types.void(address, value), emit


@_intrinsic
def stream_fence(context: Any) -> Any:
    """Make what `stream` wrote visible to other threads before anything written later."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


# --- values --------------------------------------------------------------------------------------


@_intrinsic
def splat(context: Any, value: np.float32, lanes: int) -> Any:
    """The same number in n lanes."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = context.cast(builder, args[0], sig.args[0], types.float32)
        return _made(builder, sig.return_type.lanes, lambda k, first, n: _splat(builder, number, n))

    return VectorType(lanes.literal_value)(value, lanes), emit  # type: ignore[attr-defined]


@_intrinsic
def sqrt(context: Any, x: Vector) -> Any:
    """Square roots, correctly rounded."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _lane_by_lane(builder, "sqrt", sig.return_type.lanes, args)

    return x(x), emit  # type: ignore[operator]


@_intrinsic
def power(context: Any, x: Vector, exponent: Vector) -> Any:
    """Powers, by the `powf` of the C library."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _lane_by_lane(builder, "pow", sig.return_type.lanes, args)

    return x(x, exponent), emit  # type: ignore[operator]


def _lane_by_lane(builder: Any, name: str, lanes: int, vectors: Any) -> Any:
    """What LLVM's function of that name makes of vectors."""

    def part(k: int, first: int, n: int) -> Any:
        kind = ir.VectorType(_FLOAT, n)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [kind] * len(vectors)),
            f"llvm.{name}.v{n}f32",
        )
        return builder.call(function, [builder.extract_value(v, k) for v in vectors])

    return _made(builder, lanes, part)


@_intrinsic
def clip(context: Any, x: Vector, low: np.float32, high: np.float32) -> Any:
    """Lanes cut to [low, high]; NaN stays NaN."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def part(k: int, first: int, n: int) -> Any:
            value = builder.extract_value(args[0], k)
            for bound, kind, compare in zip(args[1:], sig.args[1:], "<>", strict=True):
                limit = _splat(builder, context.cast(builder, bound, kind, types.float32), n)
                value = builder.select(builder.fcmp_ordered(compare, value, limit), limit, value)
            return value

        return _made(builder, sig.return_type.lanes, part)

    return x(x, low, high), emit  # type: ignore[operator]


def _splat(builder: Any, number: Any, lanes: int) -> Any:
    kind = ir.VectorType(_FLOAT, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(_I32, 0))
    order = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), order)


def _binary(operation: Callable[..., Any], instruction: str) -> None:
    """`operation` of two vectors, or of a vector and a float32 on either side."""

    @infer_global(operation)
    class _Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) != 2 or not any(isinstance(a, VectorType) for a in args):
                return None
            vector = next(a for a in args if isinstance(a, VectorType))
            fits = all(a in (vector, types.float32) for a in args)
            return signature(vector, *args) if fits else None

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def part(k: int, first: int, n: int) -> Any:
            x, y = (
                builder.extract_value(value, k)
                if isinstance(kind, VectorType)
                else _splat(builder, value, n)
                for value, kind in zip(args, sig.args, strict=True)
            )
            return getattr(builder, instruction)(x, y)

        return _made(builder, sig.return_type.lanes, part)

    lower_builtin(operation, VectorType, VectorType)(emit)
    lower_builtin(operation, VectorType, types.Float)(emit)
    lower_builtin(operation, types.Float, VectorType)(emit)


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _binary(_operation, _instruction)


@infer_global(operator.neg)
class _NegTyping(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0], *args) if isinstance(args[0], VectorType) else None


@lower_builtin(operator.neg, VectorType)  # type: ignore[untyped-decorator]
def _emit_neg(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    def part(k: int, first: int, n: int) -> Any:
        return builder.fneg(builder.extract_value(args[0], k))

    return _made(builder, sig.return_type.lanes, part)
