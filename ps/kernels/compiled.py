"""How a kernel becomes machine code: once per machine, on first use, for any kind of array.

A kernel has one signature, that of its first call. The arrays that it only reads are declared
read-only and unaligned, so that one compilation serves read-only arrays from Ray and shared
memory, and arrays at odd addresses, as well as ordinary ones.

Machine code is kept on disk by numba: in `__pycache__` beside this package if that can be written
to, else in the user's cache folder (`NUMBA_CACHE_DIR` overrides both). It is compiled anew when
any file of this package changes, and for another CPU. A file lock makes the other processes of a
machine wait for the first one's result rather than compile the same thing.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, cast

import numba
from filelock import FileLock
from numba import types

P = ParamSpec("P")
R = TypeVar("R")

_SOURCES = sorted(Path(__file__).parent.glob("*.py"))


class Kernel(Generic[P, R]):
    """A compiled function of arrays and numbers; releases the GIL while it runs.

    No `fastmath`: contraction and reordering would make results depend on the machine.
    """

    def __init__(self, function: Callable[P, R], writes: tuple[str, ...]) -> None:
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        parameters = tuple(inspect.signature(function).parameters)
        assert set(writes) <= set(parameters), f"{self.__name__} has no parameters {writes}"
        self._written = tuple(name in writes for name in parameters)
        self._call: Any = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
        self._ready = False
        self._lock = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run; the first call compiles, or loads from disk.

        Raises:
            TypeError: an array of another dtype, rank or layout than the kernel's, or a read-only
                one where it writes.
        """
        assert not kwargs, "arguments of kernels have no names"
        if not self._ready:
            self._compile(args)
        result: R = self._call(*args)
        return result

    def _compile(self, args: tuple[object, ...]) -> None:
        signature = tuple(
            _widened(numba.typeof(arg), written)
            for arg, written in zip(args, self._written, strict=True)
        )
        with self._lock:
            if self._ready:
                return
            with _compiled_by_one(self._call):
                self._call.compile(signature)
            self._call.disable_compile()
            self._ready = True


def kernel(*, writes: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Make a `Kernel`; `writes` names the array parameters that it changes."""
    return lambda function: Kernel(function, writes)


def inline(function: Callable[P, R]) -> Callable[P, R]:
    """A helper that kernels call; LLVM inlines it."""
    return cast("Callable[P, R]", numba.njit(nogil=True, error_model="numpy")(function))


def _widened(kind: types.Type, written: bool) -> types.Type:
    if not isinstance(kind, types.Array):
        return kind
    if kind.layout != "C":
        raise TypeError(f"kernels take C-contiguous arrays, not one of {kind}")
    return types.Array(kind.dtype, kind.ndim, kind.layout, readonly=not written, aligned=False)


@contextlib.contextmanager
def _compiled_by_one(dispatcher: Any) -> Iterator[None]:
    """Let one process at a time compile this function; the others then find it on disk."""
    # numba looks at the kernel's own file only, but helpers of other files are compiled into it.
    stamps = tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in _SOURCES)
    cache_file = dispatcher._cache._cache_file
    cache_file._source_stamp = (cache_file._source_stamp, stamps)
    name = f"{dispatcher.py_func.__module__}.{dispatcher.py_func.__qualname__}"
    folder = Path(dispatcher.stats.cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name.replace('<locals>.', '')}.lock"):
        yield
