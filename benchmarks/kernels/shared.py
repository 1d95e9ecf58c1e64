"""One memory for all: float32 arrays that TensorFlow, torch, FBGEMM, NumPy and C read and update.

TensorFlow updates a variable in place only in memory that it has allocated itself, so it allocates;
the others take the address. It comes from glibc's malloc, which `__main__` has told to ask for huge
pages, so that all have them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import torch

from ps.ragged import F32


@dataclass(frozen=True)
class SharedArray:
    """A variable and views of it, which are valid as long as the variable lives."""

    variable: Any
    numpy: F32
    torch: torch.Tensor


def shared_array(shape: tuple[int, int], value: float = 0.0) -> SharedArray:
    """Allocate float32 [V, D], filled with one value."""
    tensor = tf.fill(shape, np.float32(value))
    address = np.asarray(memoryview(tensor)).ctypes.data
    variable = tf.Variable(tensor)  # takes the memory over
    numbers = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    view = np.ctypeslib.as_array(numbers).reshape(shape)
    return SharedArray(variable, view, torch.from_numpy(view))
