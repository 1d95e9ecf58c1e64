"""The plain twin of `ps.keymap.KeyMap`: a dict, and a search for the lowest free row."""

from __future__ import annotations

from itertools import count

import numpy as np

from ps.ragged import I64


class ReferenceMap:
    """What every method of a `KeyMap` gives."""

    def __init__(self) -> None:
        self.row_of: dict[int, int] = {}
        self.num_rows = 0

    def __len__(self) -> int:
        return len(self.row_of)

    def find(self, keys_N: I64) -> I64:
        return _int64([self.row_of.get(key, -1) for key in keys_N.tolist()])

    def insert(self, keys_N: I64) -> tuple[I64, I64]:
        new = []
        for position, key in enumerate(keys_N.tolist()):
            if key not in self.row_of:
                taken = set(self.row_of.values())
                row = next(row for row in count() if row not in taken)
                self.row_of[key] = row
                self.num_rows = max(self.num_rows, row + 1)
                new.append(position)
        return self.find(keys_N), _int64(new)

    def erase(self, keys_N: I64) -> I64:
        return _int64([self.row_of.pop(key, -1) for key in keys_N.tolist()])

    def items(self) -> tuple[I64, I64]:
        pairs = sorted((row, key) for key, row in self.row_of.items())
        return _int64([key for _, key in pairs]), _int64([row for row, _ in pairs])


def _int64(values: list[int]) -> I64:
    return np.array(values, dtype=np.int64)
