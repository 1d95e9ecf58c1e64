"""Checkpoints that TensorFlow wrote become snapshots and exports, bit for bit.

Training goes on from them by the published formulas.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.tpu.kernels import sparse_core_layout_pb2

import serving.tf.checkpoint
from ps.config import SGD, FeatureConfig, TableConfig
from ps.dense_variables import DenseValues
from ps.errors import CheckpointError, ConfigError, SnapshotError
from ps.export import open_export
from ps.messages import Push
from ps.ragged import F32
from ps.shard import ShardSpec, ShardState
from ps.snapshot import Snapshot, open_snapshot
from ps.spec import EmbeddingSpec, resolve
from serving.tf.bundle import Bundle
from serving.tf.checkpoint import write_checkpoint
from serving.tf.checkpoint_import import import_export, import_snapshot
from serving.tf.checkpoint_reader import CheckpointReader, read_checkpoint
from tests.support.reference import same_bits
from tests.support.shards import whole_table
from tests.support.snapshots import (
    OPTIMIZERS,
    SIZES,
    state_from,
)
from tests.support.tf_checkpoints import (
    CONTENTS,
    SPEC,
    Restored,
    make_model,
    random_model,
    snapshot_contents_equal,
    spec_of,
    stock,
    stock_embedding,
    stock_written,
    values_of,
    written_checkpoints,
    written_snapshot,
)
from tests.support.tf_reference import update

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return written_snapshot(tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="module")
def written(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return written_checkpoints(snapshot, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def stock_prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stock_written("model", tmp_path_factory.mktemp("stock"))


def test_a_checkpoint_is_described(stock_prefix: str, written: dict[str, str]) -> None:
    for prefix in (stock_prefix, written["model"], str(Path(stock_prefix).parent)):
        contents = read_checkpoint(prefix)
        assert not contents.stacked
        found = {t.name: (t.vocabulary_size, t.dim) for t in contents.tables}
        assert found == SIZES
        assert {t.name: set(t.slots) for t in contents.tables} == {
            name: set(optimizer.slot_names) for name, optimizer in OPTIMIZERS.items()
        }


def test_any_attribute_and_slots_of_the_users_own_making_are_found(tmp_path: Path) -> None:
    def make(table: Any, names: list[str], _: Any) -> dict[str, Any]:
        return {n: tf.Variable(tf.fill(table.shape, 0.5), trainable=False) for n in names}

    embedding = stock_embedding({"users": stock.Adam(slot_variable_creation_fn=make)})
    trainer = tf.Module()
    trainer.my_tables = embedding
    prefix = tf.train.Checkpoint(trainer=trainer).save(str(tmp_path / "ckpt"))
    (table,) = read_checkpoint(prefix, attribute="trainer/my_tables").tables
    assert (table.name, table.slots) == ("users", ("momenta", "velocities"))
    spec, path = spec_of("users"), "trainer/my_tables"
    folder = import_snapshot(prefix, spec, tmp_path / "s", attribute=path)
    assert (open_snapshot(folder).table("users").slot("momenta") == 0.5).all()
    with pytest.raises(CheckpointError, match=r"no tables under 'embedding'; .*'trainer'"):
        read_checkpoint(prefix)


def test_a_stock_checkpoint_becomes_a_snapshot_with_every_bit(
    stock_prefix: str, tmp_path: Path
) -> None:
    info = {"name": "package:make_model", "params": {}}
    folder = import_snapshot(
        stock_prefix, SPEC, tmp_path, step=40, seed=9, job="j", model=make_model(), model_info=info
    )
    snapshot = open_snapshot(folder, verify=True)
    assert (snapshot.step, snapshot.seed, snapshot.job) == (40, 9, "j")
    assert snapshot_contents_equal(snapshot, CONTENTS)
    assert snapshot.dense is not None
    values, wanted = snapshot.dense.values(), random_model()[1]
    assert snapshot.dense.model == info
    assert same_bits(values.trainable, wanted.trainable)
    assert same_bits(values.state, wanted.state)
    # And back: TensorFlow consumes all of what we make of it.
    prefix = write_checkpoint(snapshot, tmp_path / "back", model=make_model())
    assert Restored(prefix, "same", with_model=True, build_first=False).consumed


def test_our_own_sliced_checkpoint_becomes_the_same_snapshot(
    written: dict[str, str], tmp_path: Path
) -> None:
    folder = import_snapshot(written["slots"], SPEC, tmp_path)
    assert snapshot_contents_equal(open_snapshot(folder), CONTENTS)


def test_a_stock_checkpoint_becomes_an_export(stock_prefix: str, tmp_path: Path) -> None:
    info = {"name": "package:make_model", "params": {}}
    folder = import_export(
        stock_prefix, SPEC, tmp_path, step=3, job="j", model=make_model(), model_info=info
    )
    export = open_export(folder, verify=True)
    assert (export.step, export.job, export.dense_model) == (3, "j", info)
    for name, arrays in CONTENTS.items():
        assert same_bits(export.tables[name].rows_VD, arrays["rows"])
    values = np.concatenate([v.reshape(-1) for v in export.dense_variables().values()])
    wanted = random_model()[1]
    assert same_bits(values, np.concatenate([wanted.trainable, wanted.state]))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_from_a_stock_checkpoint_by_the_formula(
    stock_prefix: str, tmp_path: Path, name: str
) -> None:
    spec = spec_of(name)
    snapshot = open_snapshot(import_snapshot(stock_prefix, spec, tmp_path, step=12))
    shards = [started(spec, snapshot, shard, 2) for shard in range(2)]
    num_rows, dim = SIZES[name]
    touched = np.unique(np.random.default_rng(1).integers(0, num_rows, 20))
    grads = np.random.default_rng(2).normal(size=(touched.size, dim)).astype(np.float32)
    for state in shards:
        mine = [s for s, _, _ in state.slabs(name)]
        places = [(slab, int(i)) for i in touched for slab in mine
                  if slab.first_id <= i < slab.first_id + slab.num_rows]  # fmt: skip
        local = np.array([s.first_local_row + i - s.first_id for s, i in places], np.int64)
        own = grads[np.searchsorted(touched, [i for _, i in places])].reshape(-1, dim)
        state.push(Push(0, 12, (local,), (own,), np.zeros(0, np.float32), None))
        assert state.version == 13
    arrays = CONTENTS[name]
    slots = {slot: values[touched] for slot, values in arrays.items() if slot != "rows"}
    rows, new_slots = update(OPTIMIZERS[name], arrays["rows"][touched], slots, grads)
    expected = {"rows": rows} | new_slots
    found = whole_table(shards, name)
    for key, values in zip(arrays, found, strict=True):
        wanted = arrays[key].copy()
        wanted[touched] = expected[key]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6, err_msg=key)


def started(spec: EmbeddingSpec, snapshot: Snapshot, shard: int, num_shards: int) -> ShardState:
    nothing = np.zeros(0, np.float32)
    shard_spec = ShardSpec(
        shard_id=shard,
        num_shards=num_shards,
        num_workers=1,
        embedding=spec,
        dense_optimizer=SGD(),
    )
    dense = DenseValues(trainable=nothing, slots={}, state=nothing)
    return state_from(snapshot, shard_spec, dense)


def test_missing_slots_are_refused_or_get_their_first_values(
    written: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"no 'embedding/.*\.S.*VARIABLE_VALUE' \(table '.*', slot '.*'\)",
    ):
        import_snapshot(written["no slots"], SPEC, tmp_path)
    assert list(tmp_path.iterdir()) == []
    folder = import_snapshot(written["no slots"], SPEC, tmp_path, slots="initial")
    snapshot = open_snapshot(folder)
    for table in SPEC.tables:
        found, optimizer = snapshot.table(table.name), table.optimizer
        assert same_bits(found.rows, CONTENTS[table.name]["rows"])
        for slot, value in zip(optimizer.slot_names, optimizer.slot_initial_values, strict=True):
            assert (found.slot(slot) == np.float32(value)).all()
    with pytest.raises(ConfigError, match="`slots` must be 'required' or 'initial', got 'none'"):
        import_snapshot(written["slots"], SPEC, tmp_path, slots="none")  # type: ignore[arg-type]


def test_a_table_that_does_not_fit_is_named_with_its_key(stock_prefix: str, tmp_path: Path) -> None:
    for changes, message in [
        (
            {"vocabulary_size": 301},
            r"'embedding/users/\.ATTRIBUTES/VARIABLE_VALUE' \(table 'users'\) has shape "
            r"\[300, 8\], wanted \[301, 8\]",
        ),
        ({"dim": 4}, r"has shape \[300, 8\], wanted \[300, 4\]"),
        ({"name": "user"}, r"no 'embedding/user/.*' \(table 'user'\); tables there: \['a\.b c'"),
    ]:
        for importer in (import_export, import_snapshot):
            with pytest.raises(CheckpointError, match=message):
                importer(stock_prefix, spec_of("users", **changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint_of_float32_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere': No such file"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        read_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b'model_checkpoint_path: "\xff"')
    with pytest.raises(CheckpointError, match="checkpoint' is damaged"):
        read_checkpoint(tmp_path)
    for name, data in (("noise", b"x" * 500), ("empty", b""), ("short", b"\x57\xfb" * 3)):
        (tmp_path / f"{name}.index").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{name}\.index' is no TensorFlow index"):
            read_checkpoint(tmp_path / name)
    key, f64 = "embedding/users/.ATTRIBUTES/VARIABLE_VALUE", tf.zeros((300, 8), tf.float64)
    prefix = str(tmp_path / "f64")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=[key], shape_and_slices=[""], tensors=[f64])
    with pytest.raises(CheckpointError, match="VARIABLE_VALUE' is of type double, wanted float32"):
        import_export(prefix, spec_of("users"), tmp_path / "out")


def test_a_damaged_index_is_an_error_or_read_but_never_a_crash(
    stock_prefix: str, tmp_path: Path
) -> None:
    whole = Path(f"{stock_prefix}.index").read_bytes()
    for place in range(0, len(whole), 7):
        damaged = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        (tmp_path / "bad.index").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / "bad")
        except CheckpointError as e:
            assert "bad" in str(e)  # noqa: PT017


def test_a_model_that_is_not_the_checkpoints_is_refused(
    stock_prefix: str, written: dict[str, str], tmp_path: Path
) -> None:
    info = {"name": "m", "params": {}}
    for prefix, model in ((stock_prefix, make_model(5)), (written["slots"], make_model())):
        with pytest.raises(CheckpointError, match="'model' is not that of the model given"):
            import_snapshot(prefix, SPEC, tmp_path, model=model, model_info=info)
    with pytest.raises(ConfigError, match="`model` and `model_info` go together"):
        import_snapshot(stock_prefix, SPEC, tmp_path, model=make_model())
    with pytest.raises(ConfigError, match="must have 'name' and 'params', got"):
        import_export(stock_prefix, SPEC, tmp_path, model=make_model(), model_info={"build": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_of_the_same_step_is_not_replaced(stock_prefix: str, tmp_path: Path) -> None:
    import_snapshot(stock_prefix, SPEC, tmp_path)
    with pytest.raises(SnapshotError, match="step-000000000': there is one already"):
        import_snapshot(stock_prefix, SPEC, tmp_path)


STACKS = {"a": ("a_b", 0, 0), "b": ("a_b", 8, 4), "c": ("c", 0, 0)}


STACKED_SIZES = {"a": (20, 4), "b": (5, 2), "c": (70, 12)}


def write_stacked(folder: Path, rows: dict[str, F32]) -> str:
    """A checkpoint as SparseCores write it, row by row."""
    layouts = sparse_core_layout_pb2.SparseCoreTableLayouts()
    module = tf.Module()
    stacks = {"a_b": np.full((128, 8), np.nan, np.float32)}
    stacks["c"] = np.full((128, 16), np.nan, np.float32)
    for name, (stack, offset, rotation) in STACKS.items():
        num_rows, dim = STACKED_SIZES[name]
        padded = [-(-num_rows // 64) * 64, -(-dim // 8) * 8]
        layouts.tables.add(
            table_name=name,
            stacked_table_name=stack,
            num_sparse_cores=8,
            num_partitions=2,
            total_rows_per_sparse_core_shard=16,
            unsharded_shape=[num_rows, dim],
            unsharded_padded_shape=padded,
            sparse_core_shard_row_offset=offset,
            sparse_core_shard_rotation=rotation,
        )
        for row in range(num_rows):
            place = (row + rotation) % 8 * 16 + offset + row // 8
            stacks[stack][place, :dim] = rows[name][row]
    for stack, values in stacks.items():
        setattr(module, stack, tf.Variable(values))
    module._sparse_core_table_layouts = tf.Variable(layouts.SerializeToString())
    prefix: str = tf.train.Checkpoint(embedding=module).save(str(folder / "ckpt"))
    return prefix


def test_stacked_tables_are_read_as_tensorflow_unstacks_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = {n: rng.normal(size=size).astype(np.float32) for n, size in STACKED_SIZES.items()}
    prefix = write_stacked(tmp_path, rows)
    contents = read_checkpoint(prefix)
    assert contents.stacked
    assert {t.name: (t.vocabulary_size, t.dim) for t in contents.tables} == STACKED_SIZES
    features = {
        name: FeatureConfig(TableConfig(*size, optimizer=OPTIMIZERS["users"], name=name))
        for name, size in STACKED_SIZES.items()
    }
    spec = resolve(features)
    with pytest.raises(CheckpointError, match=r"no 'embedding/a\.Smomenta/.*slot 'momenta'"):
        import_snapshot(prefix, spec, tmp_path / "snapshot")
    export = open_export(import_export(prefix, spec, tmp_path / "export"))
    embedding = stock.TPUEmbeddingForServing(
        {n: stock.FeatureConfig(stock.TableConfig(*s, name=n)) for n, s in STACKED_SIZES.items()},
        None,
    )
    tf.train.Checkpoint(embedding=embedding).restore(prefix).expect_partial()
    embedding.build()
    for name, values in values_of(embedding).items():
        assert same_bits(export.tables[name].rows_VD, values["rows"])
        assert same_bits(values["rows"], rows[name])
    reader = CheckpointReader(prefix, "embedding")
    for first, count in itertools.product(range(0, 70, 9), (1, 3, 8, 21)):
        part = np.empty((min(count, 70 - first), 12), np.float32)
        reader.rows(spec.table("c"))(first, part)
        assert same_bits(part, rows["c"][first : first + count])


def test_layouts_that_do_not_fit_their_stack_are_refused(tmp_path: Path) -> None:
    rows = {name: np.zeros(size, np.float32) for name, size in STACKED_SIZES.items()}
    prefix = write_stacked(tmp_path, rows)
    bad = resolve({"f": FeatureConfig(TableConfig(21, 4, name="a"))})
    with pytest.raises(CheckpointError, match=r"table 'a'\) has shape \[20, 4\], wanted \[21, 4"):
        import_export(prefix, bad, tmp_path / "export")
    module = tf.Module()
    layouts = tf.train.load_checkpoint(prefix).get_tensor(
        "embedding/_sparse_core_table_layouts/.ATTRIBUTES/VARIABLE_VALUE"
    )
    module._sparse_core_table_layouts = tf.Variable(layouts)
    module.a_b = tf.Variable(tf.zeros((64, 8)))
    prefix = tf.train.Checkpoint(embedding=module).save(str(tmp_path / "short"))
    with pytest.raises(CheckpointError, match=r"of shape \[128, 8\], there is \[64, 8\]"):
        read_checkpoint(prefix)


def test_row_ranges_of_any_cut_read_as_tensorflow_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, cuts in enumerate([(0, 5), (0, 1, 5), (0, 63, 64, 65, 127, 200), (0, 8191, 8300)]):
        rows = rng.normal(size=(cuts[-1], 3)).astype(np.float32)
        prefix = save_slices(tmp_path, f"n{number}", rows, cuts)
        bundle = Bundle(prefix)
        for first in sorted({*cuts[:-1], cuts[-1] - 1}):
            for count in {1, cuts[-1] - first}:
                found = np.empty((count, 3), np.float32)
                bundle.read_rows("some/key", first, found)
                assert same_bits(found, rows[first : first + count])


def save_slices(folder: Path, name: str, rows: F32, cuts: tuple[int, ...], of: int = 0) -> str:
    """A checkpoint of `some/key`, [of, D], whose slices begin and end at these rows."""
    parts = []
    for start, stop in itertools.pairwise(cuts):
        parts.append(str(folder / f"{name}-part-{start}"))
        spec = f"{of or len(rows)} {rows.shape[1]} {start},{stop - start}:0,{rows.shape[1]}"
        tf.raw_ops.SaveV2(
            prefix=parts[-1],
            tensor_names=["some/key"],
            shape_and_slices=[spec],
            tensors=[rows[start - cuts[0] : stop - cuts[0]]],
        )
    prefix = str(folder / name)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=prefix)
    return prefix


def test_rows_beyond_two_to_the_31_are_cut_and_found(tmp_path: Path) -> None:
    num_rows, first = 2**31 + 1000, 2**31 - 2
    rows = np.arange(1.0, 7.0, dtype=np.float32)[:, None]
    prefix = save_slices(tmp_path, "big", rows, (first, first + 1, first + 6), of=num_rows)
    found = np.empty((5, 1), np.float32)
    Bundle(prefix).read_rows("some/key", first + 1, found)
    assert same_bits(found, rows[1:])
    with pytest.raises(CheckpointError, match=rf"'some/key' lacks row {first + 6}"):
        Bundle(prefix).read_rows("some/key", first + 2, found)
    table = SimpleNamespace(vocabulary_size=num_rows, dim=1)
    array = serving.tf.checkpoint._Array(table)  # type: ignore[arg-type]
    parts = list(serving.tf.checkpoint._parts({"k": array}, 1 << 30))
    spans = [(s.first, s.count) for part in parts for s in part]
    assert sum(count for _, count in spans) == num_rows
    assert all(4 * count <= 1 << 30 for _, count in spans)
    assert spans[-1][0] + spans[-1][1] == num_rows


@pytest.mark.parametrize(
    "change",
    [
        {"unsharded_shape": [6]},
        {"unsharded_padded_shape": [8]},
        {"unsharded_shape": [6, 9]},
        {"sparse_core_shard_row_offset": 2},
        {},
    ],
)
def test_damaged_layouts_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    fields = {
        "table_name": "a",
        "stacked_table_name": "s",
        "num_sparse_cores": 2,
        "total_rows_per_sparse_core_shard": 4,
        "unsharded_shape": [6, 2],
        "unsharded_padded_shape": [8, 8],
    }
    layouts = sparse_core_layout_pb2.SparseCoreTableLayouts()
    layouts.tables.add(**{**fields, **change})
    module = tf.Module()
    serialized = layouts.SerializeToString() if change else b"\xff\xff"
    module._sparse_core_table_layouts = tf.Variable(serialized)
    module.s = tf.Variable(tf.zeros((8, 8)))
    prefix = tf.train.Checkpoint(embedding=module).save(str(tmp_path / "ckpt"))
    with pytest.raises(CheckpointError, match="ckpt-1': "):
        read_checkpoint(prefix)
