"""What the disk does without us, and what a shard's parts of a snapshot do on it, in turn."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ps.cut import Cut
from ps.cut_writer import write_cut
from ps.initializers import Constant
from ps.optimizers import SGD, Adagrad
from ps.part_reader import load_parts
from ps.partition import Layout
from ps.shard import ShardSpec, ShardState
from ps.shard_files import load_rows
from ps.spec import EmbeddingSpec, FeatureSpec, TableSpec
from ps.storage import Storage
from ps.table_parts import PartTarget, SealedPart

DIM = 16
_BUFFER = 8 << 20
_NOTHING = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class DiskRates:
    """GB/s (10⁹ bytes), a pair per round: the plain way, and ours."""

    size_bytes: int
    writes: tuple[tuple[float, float], ...]
    reads: tuple[tuple[float, float], ...]
    """From the disk, not from the page cache."""

    @staticmethod
    def ratio(pairs: tuple[tuple[float, float], ...]) -> float:
        """Median of ours against the plain one."""
        return median(ours / plain for plain, ours in pairs)


def measure(folder: Path, size_bytes: int, rounds: int) -> DiskRates:
    """One shard with one table and one slot, of that many bytes in all, written and read back."""
    shard = _Shard(folder, size_bytes)
    writes, reads = [], []
    for number in range(rounds + 1):
        pair = _plain_write(folder / "plain", size_bytes), shard.write()
        writes.append(pair)
        reads.append((_plain_read(folder / "plain"), shard.read()))
        if number == 0:  # the first files of a new disk image are slow to write
            writes.clear()
            reads.clear()
    return DiskRates(size_bytes, tuple(writes), tuple(reads))


class _Shard:
    def __init__(self, folder: Path, size_bytes: int) -> None:
        table = TableSpec(
            name="t",
            vocabulary_size=size_bytes // (4 * DIM * 2),
            dim=DIM,
            combiner="sum",
            initializer=Constant(0.0),
            optimizer=Adagrad(0.1),
        )
        features = (FeatureSpec(name="f", table="t"),)
        self._spec = ShardSpec(
            shard_id=0,
            num_shards=1,
            num_workers=1,
            embedding=EmbeddingSpec(tables=(table,), features=features),
            dense_optimizer=SGD(0.1),
            history=1,
        )
        self._state = ShardState(self._spec)
        self._state.set_dense(_NOTHING, _NOTHING)
        for _, rows, slots in self._state.slabs("t"):
            rows[:] = 1.5
            for slot in slots.values():
                slot[:] = 2.5
        self._folder = folder / "ours"
        self._folder.mkdir()
        self._storage = Storage.at(self._folder)
        self._parts: tuple[SealedPart, ...] = ()

    def write(self) -> float:
        """GB/s from the moment of the cut until all is durable."""
        for file in self._folder.glob("*"):
            file.unlink()
        os.sync()
        target = PartTarget(
            location=str(self._folder), folder="", attempt="a", shard=0, num_shards=1
        )
        cuts: list[Cut] = []
        began = time.perf_counter()
        self._state.arm_cut(0, cuts.append)
        written = write_cut(cuts[0], self._spec.embedding, target, self._storage, _at_once)
        seconds = time.perf_counter() - began
        self._parts = written.parts
        return sum(part.size_bytes for part in written.parts) / seconds / 1e9

    def read(self) -> float:
        """GB/s into a new shard."""
        fresh = ShardState(self._spec)
        placement = Layout.of(self._spec.embedding, 1).placements["t"]
        _forget(self._folder / self._parts[0].file)
        began = time.perf_counter()
        pieces = load_parts(
            self._storage, self._parts, placement, placement, 0, dim=DIM, slots=("accumulators",)
        )
        for _ in load_rows(fresh, "t", pieces):
            pass
        seconds = time.perf_counter() - began
        return sum(part.size_bytes for part in self._parts) / seconds / 1e9


def _at_once(function: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function())
    return future


def _plain_write(path: Path, size_bytes: int) -> float:
    path.unlink(missing_ok=True)
    os.sync()
    buffer = np.random.default_rng(0).bytes(_BUFFER)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in _buffers(size_bytes):
            file.write(buffer)
        os.fsync(file.fileno())
    return size_bytes / (time.perf_counter() - began) / 1e9


def _plain_read(path: Path) -> float:
    """Into memory that is new, as that of a restored table is."""
    _forget(path)
    size = path.stat().st_size
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file, mmap.mmap(-1, size) as memory:
        view = memoryview(memory)
        done = 0
        while done < size:
            done += file.readinto(view[done : done + _BUFFER])
        view.release()
    return size / (time.perf_counter() - began) / 1e9


def _forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _buffers(size_bytes: int) -> Iterator[int]:
    return iter(range(size_bytes // _BUFFER))
