"""Compiled loops over rows: numba, `nogil`, cached on disk, float32, in a fixed order.

Letters in array names: V rows of a table, D columns (dim), N ids, U distinct ids, B examples,
L positions of a sequence. Every kernel has a plain NumPy twin in `tests/support/reference.py`,
which defines its result. No kernel writes to an argument other than the one named `out` or the
state it updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile on first use, release the GIL while running, keep the machine code on disk.

    No `fastmath`: contraction and reordering would make results depend on the machine.
    """
    compile_it = numba.njit(nogil=True, cache=True, error_model="numpy")
    return cast("Callable[P, R]", compile_it(function))


def inline(function: Callable[P, R]) -> Callable[P, R]:
    """A helper that kernels call per element; LLVM inlines it."""
    compile_it = numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
    return cast("Callable[P, R]", compile_it(function))
