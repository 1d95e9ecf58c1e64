"""TensorFlow restores the checkpoints that we write, with its own checks.

The oracle is stock `TPUEmbeddingForServing` under `tf.train.Checkpoint`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import serving.tf.checkpoint
from ps.config import SGD, FeatureConfig, TableConfig
from ps.errors import CheckpointError, ConfigError
from ps.export import open_export
from ps.snapshot import Snapshot, open_snapshot
from ps.spec import resolve
from serving.tf.checkpoint import write_checkpoint
from serving.tf.checkpoint_import import import_snapshot
from serving.tf.model_variables import described, flat_values
from serving.tf.object_graph import key_of
from tests.support.parity_size import examples
from tests.support.reference import same_bits
from tests.support.snapshots import (
    OPTIMIZERS,
    SIZES,
    random_contents,
    write_snapshot,
)
from tests.support.tf_checkpoints import (
    CONTENTS,
    SPEC,
    STOCK_OPTIMIZERS,
    Restored,
    make_model,
    rows_only,
    same_contents,
    snapshot_contents_equal,
    spec_of,
    stock,
    stock_embedding,
    stock_written,
    written_checkpoints,
    written_snapshot,
)

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return written_snapshot(tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="module")
def written(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return written_checkpoints(snapshot, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("kind", ["slots", "no slots", "model"])
def test_keys_shapes_and_types_are_those_that_tensorflow_writes(
    written: dict[str, str], tmp_path: Path, kind: str
) -> None:
    optimizers = dict.fromkeys(STOCK_OPTIMIZERS) if kind == "no slots" else STOCK_OPTIMIZERS
    parts = {"embedding": stock_embedding(optimizers)}
    if kind == "model":
        parts["model"] = make_model()
    theirs = tf.train.load_checkpoint(tf.train.Checkpoint(**parts).save(str(tmp_path / "ckpt")))
    ours = tf.train.load_checkpoint(written[kind])
    assert ours.get_variable_to_shape_map() == theirs.get_variable_to_shape_map()
    assert ours.get_variable_to_dtype_map() == theirs.get_variable_to_dtype_map()


@pytest.mark.parametrize("build_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "tables", "with_model", "matched", "consumed"),
    [
        ("slots", "same", False, True, True),
        ("slots", "no optimizer", False, True, False),
        ("no slots", "same", False, False, False),
        ("no slots", "no optimizer", False, True, True),
        ("slots", "other optimizer", False, False, False),
        ("slots", "fewer", False, True, False),
        ("slots", "renamed", False, False, False),
        ("slots", "same", True, False, False),
        ("model", "same", False, True, False),
        ("model", "same", True, True, True),
    ],
)
def test_stock_restore_accepts_and_refuses_as_for_its_own_checkpoints(
    written: dict[str, str],
    tmp_path: Path,
    kind: str,
    tables: str,
    with_model: bool,
    matched: bool,
    consumed: bool,
    build_first: bool,
) -> None:
    restored = Restored(written[kind], tables, with_model=with_model, build_first=build_first)
    assert (restored.matched, restored.consumed) == (matched, consumed)
    if matched:
        wanted = rows_only(CONTENTS) if tables == "no optimizer" else CONTENTS
        wanted = {name: wanted[name] for name in restored.values}
        assert same_contents(restored.values, wanted)
    if build_first:
        # What TensorFlow says of a checkpoint that it wrote itself.
        theirs = stock_written(kind, tmp_path / "theirs")
        own = Restored(theirs, tables, with_model=with_model, build_first=True)
        assert (own.matched, own.consumed) == (matched, consumed)


def test_lookups_of_a_restored_checkpoint_are_those_of_the_rows(written: dict[str, str]) -> None:
    embedding = stock_embedding(dict.fromkeys(OPTIMIZERS), build=False)
    tf.train.Checkpoint(embedding=embedding).restore(written["slots"]).expect_partial()
    ids = {f"f_{name}": tf.constant([[0, num_rows - 1]]) for name, (num_rows, _) in SIZES.items()}
    found = embedding(ids)
    for name, arrays in CONTENTS.items():
        np.testing.assert_array_equal(found[f"f_{name}"], arrays["rows"][None, [0, -1]])


def test_the_training_class_restores_it_on_a_cpu(written: dict[str, str]) -> None:
    tables = {
        name: stock.TableConfig(*SIZES[name], optimizer=optimizer, combiner="sum", name=name)
        for name, optimizer in STOCK_OPTIMIZERS.items()
    }
    features = {f"f_{name}": stock.FeatureConfig(table) for name, table in tables.items()}
    embedding = stock.TPUEmbedding(features, stock.SGD())
    embedding.build()
    status = tf.train.Checkpoint(embedding=embedding).restore(written["slots"])
    status.assert_consumed()
    for table, variable in embedding.embedding_tables.items():
        assert same_bits(variable.numpy(), CONTENTS[table.name]["rows"])


@given(
    tables=st.dictionaries(
        st.text("ab./S _é", min_size=1, max_size=5),
        st.tuples(st.integers(1, 40), st.integers(1, 9)),
        min_size=1,
        max_size=4,
    ),
    slice_bytes=st.integers(1, 2000),
    data=st.data(),
)
@settings(max_examples=examples(12))
def test_any_tables_cut_anywhere_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    tables: dict[str, tuple[int, int]],
    slice_bytes: int,
    data: st.DataObject,
) -> None:
    kinds = st.sampled_from(list(OPTIMIZERS.values()))
    config = {
        f"f{n}": FeatureConfig(TableConfig(*size, optimizer=data.draw(kinds), name=name))
        for n, (name, size) in enumerate(tables.items())
    }
    spec, folder = resolve(config), tmp_path_factory.mktemp("any")
    contents = random_contents(spec, seed=slice_bytes)
    first = open_snapshot(write_snapshot(folder / "first", spec, contents))
    prefix = write_checkpoint(first, folder / "ckpt", slice_bytes=slice_bytes)
    reader = tf.train.load_checkpoint(prefix)
    for table in spec.tables:
        for slot, values in contents[table.name].items():
            name = table.name if slot == "rows" else f"{table.name}/{slot}"
            assert same_bits(reader.get_tensor(key_of("embedding", name)), values)
    second = open_snapshot(import_snapshot(prefix, spec, folder / "second"))
    assert snapshot_contents_equal(second, contents)


@pytest.mark.parametrize("kind", ["keras", "module"])
def test_the_dense_model_goes_through_a_checkpoint(
    snapshot: Snapshot, tmp_path: Path, kind: str
) -> None:
    make: Callable[[], Any] = make_model if kind == "keras" else Nested
    model = make()
    rng = np.random.default_rng(6)
    for variable in model.variables:
        variable.assign(rng.uniform(0.1, 1.0, variable.shape).astype(np.float32))
    wanted = [v.numpy() for v in model.variables]
    folder = write_snapshot(
        tmp_path,
        SPEC,
        CONTENTS,
        dense=flat_values(model),
        variables=tuple(described(model)),
    )
    prefix = write_checkpoint(open_snapshot(folder), tmp_path / "ckpt", model=make())
    other = make()
    status = tf.train.Checkpoint(model=other).restore(prefix)
    status.assert_existing_objects_matched().expect_partial()
    assert all(map(same_bits, [v.numpy() for v in other.variables], wanted))


class Nested(tf.Module):
    """A model that is no Keras model, with a list and a variable that is not trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [tf.Variable(tf.ones((2, 3)), name="w") for _ in range(3)]
        self.mean = tf.Variable(tf.zeros(3), trainable=False)
        self.scale = tf.Variable(1.0)


def test_latest_checkpoint_finds_it_and_older_ones_stay(snapshot: Snapshot, tmp_path: Path) -> None:
    first = tf.train.Checkpoint(v=tf.Variable(1.0)).save(str(tmp_path / "ckpt"))
    prefix = write_checkpoint(snapshot, tmp_path)
    assert tf.train.latest_checkpoint(str(tmp_path)) == prefix == str(tmp_path / "ckpt-6")
    state = tf.train.get_checkpoint_state(str(tmp_path))
    assert state.all_model_checkpoint_paths == [first, prefix]
    tmp_path.rename(tmp_path.parent / "moved")
    moved = tf.train.latest_checkpoint(str(tmp_path.parent / "moved"))
    assert moved == str(tmp_path.parent / "moved" / "ckpt-6")


def test_saving_goes_on_after_the_snapshots_step(snapshot: Snapshot, tmp_path: Path) -> None:
    write_checkpoint(snapshot, tmp_path)
    checkpoint = tf.train.Checkpoint(embedding=stock_embedding(STOCK_OPTIMIZERS))
    checkpoint.restore(tf.train.latest_checkpoint(str(tmp_path))).assert_consumed()
    assert checkpoint.save(str(tmp_path / "ckpt")) == str(tmp_path / "ckpt-7")


def test_several_writers_make_the_same_checkpoint(snapshot: Snapshot, tmp_path: Path) -> None:
    prefix = write_checkpoint(snapshot, tmp_path, slice_bytes=4000, num_writers=2)
    assert len(list(tmp_path.glob("ckpt-6.data-*"))) > 5
    restored = Restored(prefix, "same", with_model=False, build_first=True)
    assert restored.consumed
    assert same_contents(restored.values, CONTENTS)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write_snapshot(tmp_path / "snapshots", SPEC, CONTENTS)
    broken = open_snapshot(folder)
    (part,) = folder.glob(f"{broken.tables[-1].name}.0-of-1.*")
    os.truncate(part, 300)
    with pytest.raises(
        CheckpointError, match=rf"cannot write checkpoint '.*ckpt-6': '{part}' is damaged: "
    ):
        write_checkpoint(broken, tmp_path / "out", slice_bytes=4000)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("call", ["index", "state", "sync", "merge", "save"])
def test_a_disk_that_fails_while_publishing_leaves_nothing_behind(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_in_tensorflow(**_: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    real_replace = Path.replace
    with monkeypatch.context() as patch:
        if call in ("index", "state"):
            name = {"index": "ckpt-6.index", "state": "checkpoint"}[call]
            patch.setattr(
                Path,
                "replace",
                lambda self, to: full() if to.name == name else real_replace(self, to),
            )
        elif call == "sync":
            patch.setattr(serving.tf.checkpoint, "sync", full)
        else:
            name = {"merge": "MergeV2Checkpoints", "save": "SaveV2"}[call]
            patch.setattr(tf.raw_ops, name, full_in_tensorflow)
        with pytest.raises(CheckpointError, match="ckpt-6': No space left on device"):
            write_checkpoint(snapshot, tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(snapshot, tmp_path)
    with pytest.raises(CheckpointError, match=r"ckpt-6' exists already"):
        write_checkpoint(snapshot, tmp_path)


def test_what_tensorflow_cannot_name_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    config = {
        name: FeatureConfig(TableConfig(4, 2, optimizer=optimizer, name=name))
        for name, optimizer in {"t": OPTIMIZERS["users"], "t/momenta": SGD()}.items()
    }
    spec = resolve(config)
    clash = open_snapshot(write_snapshot(tmp_path / "s", spec, random_contents(spec)))
    with pytest.raises(CheckpointError, match="'t/momenta' is the name of a table and"):
        write_checkpoint(clash, tmp_path / "out")
    for attribute in ("model", "save_counter", "a/b", ""):
        with pytest.raises(ConfigError, match="`attribute` must be a Python name"):
            write_checkpoint(snapshot, tmp_path / "out", attribute=attribute)
    with pytest.raises(ConfigError, match="num_writers=0 must be at least 1"):
        write_checkpoint(snapshot, tmp_path / "out", num_writers=0)
    with pytest.raises(ConfigError, match=r"variable '.*kernel' \[4, 3\], the model given has .*5"):
        write_checkpoint(snapshot, tmp_path / "out", model=make_model(5))
    plain = spec_of("plain")
    bare = open_snapshot(write_snapshot(tmp_path / "bare", plain, random_contents(plain)))
    with pytest.raises(ConfigError, match="has no dense model; leave out `model`"):
        write_checkpoint(bare, tmp_path / "out", model=make_model())
    assert list((tmp_path / "out").iterdir()) == []


MEASURE = """
import sys
from pathlib import Path
from ps.snapshot import open_snapshot
from ps.config import FeatureConfig, SGD, TableConfig
from ps.spec import resolve
from serving.tf.checkpoint import write_checkpoint
from serving.tf.checkpoint_import import import_export
root = Path(sys.argv[1])
def write(name):
    write_checkpoint(open_snapshot(root / name), root / f"{name}-ckpt", slice_bytes=16 << 20)
def peak():  # not ru_maxrss, which begins with what the parent had
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024
write("small")
before = peak()
write("large")
wrote = peak()
spec = resolve([FeatureConfig(TableConfig(500_000, 100, optimizer=SGD(), name="t"))])
import_export(str(root / "whole"), spec, root / "export")
print(wrote - before, peak() - before)
"""


def test_neither_writing_nor_importing_holds_a_table(tmp_path: Path) -> None:
    """200 MB in slices of 16 MiB; the whole-tensor file is what stock TensorFlow writes."""
    for name, num_rows in (("small", 10), ("large", 500_000)):
        spec = resolve([FeatureConfig(TableConfig(num_rows, 100, optimizer=SGD(), name="t"))])
        contents = {"t": {"rows": np.full((num_rows, 100), 1.5, np.float32)}}
        write_snapshot(tmp_path / name, spec, contents)
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "whole"),
        tensor_names=["embedding/t/.ATTRIBUTES/VARIABLE_VALUE"],
        shape_and_slices=[""],
        tensors=[contents["t"]["rows"]],
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    wrote_mb, imported_mb = map(int, done.stdout.split())
    assert wrote_mb < 64, f"{wrote_mb=} {imported_mb=}"
    assert imported_mb < 64, f"{wrote_mb=} {imported_mb=}"
    assert (open_export(tmp_path / "export").tables["t"].rows_VD == 1.5).all()
