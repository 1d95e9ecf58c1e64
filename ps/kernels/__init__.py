"""Compiled loops over rows: numba, `nogil`, cached on disk, float32, in a fixed order.

Letters in array names: V rows of a table, D columns (dim), N ids, U distinct ids, B examples,
L positions of a sequence, F features. Every kernel has a plain NumPy twin in
`tests/support/reference.py` or a file beside it (`reference_features`, `reference_map`), which
defines its result. No kernel writes to an argument other than those it declares. `vector` has the
words that kernels are written in, `compiled` how and when they become machine code.
"""

from ps.kernels.compiled import Kernel, inline, kernel

__all__ = ["Kernel", "inline", "kernel"]
