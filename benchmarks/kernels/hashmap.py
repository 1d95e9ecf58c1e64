"""Finding keys in a hash map."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from benchmarks.kernels import ours
from benchmarks.kernels.cases import NUM_BATCHES
from benchmarks.kernels.options import Options
from benchmarks.kernels.report import Cell, Section, lowest, table
from benchmarks.kernels.timing import Contender, interleaved
from ps.ragged import I64

MUTABLE, DENSE, PANDAS = "TF MutableHashTable", "TF DenseHashTable", "pandas"
_SIZES, _QUICK_SIZES = (1_000_000, 10_000_000), (1_000_000,)
_FIND = 1_000_000
_ABSENT, _EMPTY, _DELETED = -1, -1, -2
_TEXT = """\
Millions of random int64 keys found per second in a map from key to place, one thread, a million
keys per call: all of them present, or half of them. *pandas* is `Index.get_indexer`; the two tables
of TensorFlow are looked up in a `tf.function`; `DenseHashTable` starts with room for all keys."""


def run(options: Options) -> Section:
    """Maps of a million and of ten million keys."""
    cells = [
        cell
        for num_keys in (_QUICK_SIZES if options.quick else _SIZES)
        for cell in _measure(num_keys, options)
    ]
    targets = [
        *lowest("hash map: TensorFlow's tables", 3, cells, (MUTABLE, DENSE)),
        *lowest("hash map: pandas", 2, cells, (PANDAS,)),
    ]
    return Section("Hash map", _TEXT, [table("Find", ("keys", "present"), cells, "M/s")], targets)


def _measure(num_keys: int, options: Options) -> list[Cell]:
    rng = np.random.default_rng(num_keys)
    drawn = np.unique(rng.integers(0, 1 << 62, 2 * num_keys + num_keys // 100))
    both = rng.permutation(drawn)[: 2 * num_keys]
    keys, absent = both[:num_keys], both[num_keys:]
    places = np.arange(num_keys)
    mutable = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, _ABSENT)
    dense = tf.lookup.experimental.DenseHashTable(
        tf.int64, tf.int64, _ABSENT, _EMPTY, _DELETED,
        initial_num_buckets=1 << (2 * num_keys - 1).bit_length(),
    )  # fmt: skip
    for found in (mutable, dense):
        found.insert(keys, places)
    index = pd.Index(keys)
    cells = []
    for present, pool in (("all", keys), ("half", both)):
        batches: list[I64] = [rng.choice(pool, _FIND) for _ in range(NUM_BATCHES)]
        contenders = [
            ours.find(keys, batches),
            _tensorflow(MUTABLE, mutable, batches),
            _tensorflow(DENSE, dense, batches),
            Contender(PANDAS, [partial(index.get_indexer, b) for b in batches]),
        ]
        _check(contenders, keys, absent, batches[0])
        cell = Cell(
            (f"{num_keys // 1_000_000}M", present), _FIND, interleaved(contenders, options.cell_s)
        )
        cells.append(options.done("hashmap", cell))
    return cells


def _tensorflow(name: str, found: Any, batches: list[I64]) -> Contender:
    lookup = tf.function(found.lookup)
    return Contender(name, [partial(lookup, tf.constant(b)) for b in batches])


def _check(contenders: list[Contender], keys: I64, absent: I64, wanted: I64) -> None:
    expected = np.isin(wanted, absent)
    for contender in contenders:
        found = np.asarray(contender.run(0))
        np.testing.assert_array_equal(found < 0, expected, err_msg=contender.name)
        np.testing.assert_array_equal(keys[found[~expected]], wanted[~expected], contender.name)
