"""The driver's side of writing a snapshot: it counts when its manifest is there, not before.

Shards write their parts of the tables themselves (`ps.table_parts`) and report what they sealed.
The driver writes the dense model and the vocabularies, then the manifest, then LATEST. Every file
but these two has the attempt in its name, so that attempts at one step never touch each other's.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from ps.columns import Transform
from ps.dense_variables import DenseValues, DenseVariable, unflat
from ps.disk import Disk
from ps.errors import SnapshotError, StorageError
from ps.folders import transform_entries, write_variables
from ps.manifest import LATEST, MANIFEST, file_name
from ps.optimizers import Optimizer
from ps.partition import Layout, Placement
from ps.snapshot_root import (
    SNAPSHOT,
    names_of,
    read_manifest,
    remove_name,
    retain,
    snapshot_name,
)
from ps.spec import EmbeddingSpec, TableSpec
from ps.storage import Storage
from ps.table_parts import PartTarget, PartWriter, SealedPart

__all__ = ["SnapshotWriter", "retain"]
_log = logging.getLogger(__name__)


class SnapshotWriter:
    """One attempt to write the snapshot of a step.

    Use as a context manager: what is not committed is removed. Whatever fails before the manifest
    is in place, the previous snapshot and LATEST are as they were.

    >>> with SnapshotWriter(root, spec, step=12, seed=0, job="ads", num_shards=2) as w:
    ...     w.add_parts(parts_of_shard_0)  # doctest: +SKIP
    ...     w.add_parts(parts_of_shard_1)
    ...     w.commit()
    """

    def __init__(
        self,
        root: str | Path,
        spec: EmbeddingSpec,
        *,
        step: int,
        seed: int,
        job: str,
        num_shards: int,
        transforms: Mapping[str, Transform] | None = None,
        fences: Sequence[int] | None = None,
        cursor: Mapping[str, Any] | None = None,
        disk: Disk | None = None,
    ) -> None:
        """Name what will be written; nothing is yet.

        Args:
            root: of the snapshots: a folder that all shards see, `s3://…` or `gs://…`.
            spec: the tables and features.
            step: number of steps applied.
            seed: of the job.
            job: its name. A snapshot of this step that the same job wrote is replaced.
            num_shards: that write parts.
            transforms: from raw values to ids, by feature.
            fences: per rank, the next step that the shards expect of it.
            cursor: where the input goes on, as JSON values.
            disk: for tests.

        Raises:
            SnapshotError: `root` is no location.
        """
        with SNAPSHOT.errors():
            self._storage = Storage.at(root, disk)
        self._spec = spec
        self._num_shards = num_shards
        self._about: dict[str, Any] = {
            "job": job,
            "step": step,
            "seed": seed,
            "num_shards": num_shards,
            "fences": None if fences is None else [int(step) for step in fences],
            "cursor": None if cursor is None else dict(cursor),
        }
        self._transforms = dict(transforms or {})
        self._folder = snapshot_name(step)
        self._attempt = uuid.uuid4().hex[:12]
        self._parts: dict[tuple[str, int], SealedPart] = {}
        self._dense: dict[str, Any] | None = None

    @property
    def location(self) -> str:
        """Of the snapshot, once it is committed."""
        return self._storage.below(self._folder).location

    def __enter__(self) -> Self:
        """See early that the step is free.

        Raises:
            SnapshotError: another job has a snapshot of this step, or the disk refuses.
        """
        self._check_free()
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def target(self, shard: int) -> PartTarget:
        """What a shard needs to write its parts."""
        return PartTarget(self._storage.uri, self._folder, self._attempt, shard, self._num_shards)

    def part(self, shard: int, table: str) -> PartWriter:
        """Writes a shard's part of a table from this process; `add_parts` what it seals.

        Raises:
            SnapshotError: the disk refuses. Methods of the part raise `StorageError`.
        """
        with SNAPSHOT.errors():
            return PartWriter(self.target(shard), self._spec.table(table), self._storage)

    def add_parts(self, parts: Iterable[SealedPart]) -> None:
        """Take note of parts that are written; a shard's newer part of a table replaces its older.

        Raises:
            SnapshotError: a part is not of this job's tables and shards.
        """
        known = {table.name for table in self._spec.tables}
        for part in parts:
            if part.table not in known or not 0 <= part.shard < self._num_shards:
                raise SnapshotError(
                    f"snapshot '{self.location}': a part of table '{part.table}' by shard "
                    f"{part.shard}, of {sorted(known)} and {self._num_shards} shards"
                )
            self._parts[part.table, part.shard] = part

    def add_dense(
        self,
        variables: Sequence[DenseVariable],
        values: DenseValues,
        *,
        model: Mapping[str, Any],
        optimizer: Optimizer | None,
    ) -> None:
        """Store the dense model.

        Args:
            variables: what the flat values are, trainable ones first.
            values: the flat values.
            model: how to rebuild the model, as JSON values: its name and parameters.
            optimizer: whose slots `values` has, None without any.

        Raises:
            SnapshotError: the disk refuses.
        """
        trainable = [v for v in variables if v.trainable]
        state = [v for v in variables if not v.trainable]
        named = unflat(trainable, values.trainable) | unflat(state, values.state)

        def write(file: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
            return self._write(file, lambda sink: write_variables(sink, arrays))

        self._dense = {
            "model": dict(model),
            "variables": [asdict(v) for v in variables],
            "optimizer": None if optimizer is None else optimizer.describe(),
            "slots": [
                {"name": slot}
                | write(f"dense.{file_name(slot)}", unflat(trainable, values.slots[slot]))
                for slot in values.slots
            ],
            **write("dense", named),
        }

    def commit(self) -> str:
        """Make it the newest snapshot.

        Returns:
            Its location.

        Raises:
            SnapshotError: rows of a table are missing, there is a snapshot of this step by another
                job, or the disk refuses.
        """
        with SNAPSHOT.errors():
            manifest = self._manifest()
            old = self._check_free()
            text = json.dumps(manifest, indent=2) + "\n"
            self._storage.replace(f"{self._folder}/{MANIFEST}", text.encode())
            self._storage.replace(LATEST, f"{self._folder}\n".encode())
        for name in sorted(names_of(old) - names_of(manifest)):
            remove_name(self._storage, self._folder, name)
        return self.location

    def abandon(self) -> None:
        """Remove this attempt's files, as far as possible; after a commit, none."""
        try:
            manifest = read_manifest(self._storage, self._folder)
            if manifest is not None and manifest.get("attempt") == self._attempt:
                return
            for name in self._storage.names(self._folder):
                if self._attempt in name:
                    remove_name(self._storage, self._folder, name)
            if self._storage.exists(self._folder) and not self._storage.names(self._folder):
                self._storage.remove_folder(self._folder)
        except StorageError as e:
            _log.warning("files of an abandoned snapshot stay: %s", e)

    def _check_free(self) -> dict[str, Any] | None:
        """The manifest of this job's snapshot of this step, which may be replaced, if there is one.

        Raises:
            SnapshotError: there is one of another job, or it cannot be read.
        """
        with SNAPSHOT.errors():
            old = read_manifest(self._storage, self._folder)
        if old is not None and old.get("job") != self._about["job"]:
            raise SnapshotError(
                f"'{self.location}': there is one already, of job '{old.get('job')}'; "
                "write to another folder, or remove it"
            )
        return old

    def _manifest(self) -> dict[str, Any]:
        layout = Layout.of(self._spec, self._num_shards)
        tables = [self._table(table, layout.placements[table.name]) for table in self._spec.tables]
        return {
            "format_version": SNAPSHOT.format_version,
            "version": self._folder,
            **self._about,
            "attempt": self._attempt,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tables": tables,
            "features": [asdict(feature) for feature in self._spec.features],
            "transforms": transform_entries(self._transforms, self._write_keys),
            "dense": self._dense,
        }

    def _table(self, table: TableSpec, placement: Placement) -> dict[str, Any]:
        parts = [self._part(table, placement, shard) for shard in range(self._num_shards)]
        return {
            "name": table.name,
            "vocabulary_size": table.vocabulary_size,
            "dim": table.dim,
            "combiner": table.combiner if isinstance(table.combiner, str) else "custom",
            "optimizer": table.optimizer.describe(),
            "slots": list(table.optimizer.slot_names),
            "slab_rows": placement.slab_rows,
            "offset": placement.offset,
            "parts": parts,
        }

    def _part(self, table: TableSpec, placement: Placement, shard: int) -> dict[str, Any]:
        part = self._parts.get((table.name, shard))
        found = 0 if part is None else part.num_rows
        if part is None or found != (wanted := placement.num_local_rows(shard)):
            wanted = placement.num_local_rows(shard)
            raise SnapshotError(
                f"snapshot '{self.location}': shard {shard} wrote {found} rows of table "
                f"'{table.name}', it has {wanted}"
            )
        size = self._storage.size(f"{self._folder}/{part.file}")
        if size != part.size_bytes:
            raise SnapshotError(
                f"'{self.location}/{part.file}' has {size} bytes here, {part.size_bytes} where "
                f"shard {shard} wrote it; all nodes must see the same folder"
            )
        return {
            "shard": shard,
            "file": part.file,
            "size_bytes": part.size_bytes,
            "checksum": part.checksum,
            "num_rows": part.num_rows,
        }

    def _write_keys(self, name: str, keys: pa.RecordBatch) -> dict[str, Any]:
        def write(sink: Any) -> None:
            with pa.ipc.new_file(sink, keys.schema) as out:
                out.write_batch(keys)

        return self._write(f"vocabulary.{name}", write)

    def _write(self, stem: str, write: Callable[[Any], None]) -> dict[str, Any]:
        """A file of this attempt; its entry in the manifest."""
        file = f"{stem}.{self._attempt}.arrow"
        with SNAPSHOT.errors(), self._storage.writer(f"{self._folder}/{file}") as sink:
            write(sink)
        return {"file": file, "size_bytes": sink.size, "checksum": sink.checksum}
