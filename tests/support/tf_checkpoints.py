"""Tables of every optimizer in TensorFlow's own classes: its checkpoints of them, its checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from ps.config import FeatureConfig, TableConfig
from ps.dense_variables import DenseValues
from ps.snapshot import Snapshot, open_snapshot
from ps.spec import EmbeddingSpec, resolve
from serving.tf.checkpoint import write_checkpoint
from serving.tf.model_variables import described, flat_values
from tests.support.reference import same_bits
from tests.support.snapshots import (
    OPTIMIZERS,
    SIZES,
    Contents,
    contents_of,
    every_optimizer_spec,
    random_contents,
    write_snapshot,
)

stock = tf.tpu.experimental.embedding
SPEC = every_optimizer_spec()
CONTENTS = random_contents(SPEC)
STOCK_OPTIMIZERS = {
    "users": stock.Adam(0.01, epsilon=1e-3),
    "site/ads": stock.Adagrad(0.1),
    "a.b c": stock.FTRL(0.05),
    "one.row/": stock.AdagradMomentum(0.01, momentum=0.9, epsilon=1e-3),
    "plain": stock.SGD(0.05),
}


def stock_embedding(optimizers: dict[str, Any], *, build: bool = True) -> Any:
    """TensorFlow's class over the tables that are named, with these optimizers."""
    tables = {
        name: stock.TableConfig(*SIZES[name], optimizer=optimizer, combiner="sum", name=name)
        for name, optimizer in optimizers.items()
    }
    features = {f"f_{name}": stock.FeatureConfig(table) for name, table in tables.items()}
    embedding = stock.TPUEmbeddingForServing(features, None)
    if build:
        embedding.build()
    return embedding


def values_of(embedding: Any) -> Contents:
    """Rows and slots of a built stock object."""
    return {
        name: {slot.replace("parameters", "rows"): v.numpy() for slot, v in variables.items()}
        for name, variables in embedding._variables.items()
    }


def same_contents(a: Contents, b: Contents) -> bool:
    return a.keys() == b.keys() and all(
        a[t].keys() == b[t].keys() and all(same_bits(a[t][k], b[t][k]) for k in a[t]) for t in a
    )


def rows_only(contents: Contents) -> Contents:
    return {name: {"rows": arrays["rows"]} for name, arrays in contents.items()}


def snapshot_contents_equal(snapshot: Snapshot, contents: Contents) -> bool:
    return same_contents(contents_of(snapshot), contents)


def spec_of(*names: str, **changes: Any) -> EmbeddingSpec:
    """Some of the tables, with other numbers."""
    return resolve(
        {
            f"f_{name}": FeatureConfig(
                TableConfig(
                    **{
                        "vocabulary_size": SIZES[name][0],
                        "dim": SIZES[name][1],
                        "optimizer": OPTIMIZERS[name],
                        "combiner": "sum",
                        "name": name,
                    }
                    | changes
                )
            )
            for name in names
        }
    )


def make_model(hidden: int = 3) -> tf.Module:
    """A dense model with non-trainable state."""
    model = tf.keras.Sequential(
        [
            tf.keras.layers.BatchNormalization(),
            tf.keras.layers.Dense(hidden),
            tf.keras.layers.Dense(1),
        ]
    )
    model(tf.ones((1, 4)))
    return model


def random_model() -> tuple[tf.Module, DenseValues]:
    """The same model with random values everywhere."""
    model, rng = make_model(), np.random.default_rng(5)
    for variable in model.variables:
        variable.assign(rng.uniform(0.1, 1.0, variable.shape).astype(np.float32))
    return model, flat_values(model)


class Restored:
    """Restore with stock classes; which of TensorFlow's assertions hold."""

    def __init__(self, prefix: str, tables: str, *, with_model: bool, build_first: bool) -> None:
        optimizers: dict[str, Any] = {
            "same": STOCK_OPTIMIZERS,
            "no optimizer": dict.fromkeys(STOCK_OPTIMIZERS),
            "other optimizer": STOCK_OPTIMIZERS | {"users": stock.FTRL()},
            "fewer": {"users": STOCK_OPTIMIZERS["users"]},
            "renamed": {"plain": STOCK_OPTIMIZERS["plain"]},
        }[tables]
        if tables == "renamed":
            embedding = stock.TPUEmbeddingForServing(
                stock.FeatureConfig(stock.TableConfig(50, 1, name="plane")), None
            )
            if build_first:
                embedding.build()
        else:
            embedding = stock_embedding(optimizers, build=build_first)
        parts = {"embedding": embedding} | ({"model": make_model()} if with_model else {})
        status = tf.train.Checkpoint(**parts).restore(prefix)
        if not build_first:
            embedding.build()
        self.matched = holds(status.assert_existing_objects_matched)
        self.consumed = holds(status.assert_consumed)
        status.expect_partial()
        self.values = values_of(embedding)


def holds(assertion: Callable[[], object]) -> bool:
    try:
        assertion()
    except AssertionError:
        return False
    return True


def stock_written(kind: str, folder: Path) -> str:
    """A checkpoint with `CONTENTS` from TensorFlow itself."""
    optimizers = dict.fromkeys(STOCK_OPTIMIZERS) if kind == "no slots" else STOCK_OPTIMIZERS
    parts = {"embedding": stock_embedding(optimizers)}
    for name, variables in parts["embedding"]._variables.items():
        for slot, variable in variables.items():
            variable.assign(CONTENTS[name][slot.replace("parameters", "rows")])
    if kind == "model":
        parts["model"] = random_model()[0]
    prefix: str = tf.train.Checkpoint(**parts).save(str(folder / "ckpt"))
    return prefix


def written_checkpoints(snapshot: Snapshot, root: Path) -> dict[str, str]:
    """Checkpoints of a snapshot with a dense model, by what they hold."""
    return {
        "slots": write_checkpoint(snapshot, root / "slots", slice_bytes=777),
        "no slots": write_checkpoint(snapshot, root / "bare", slots=False),
        "model": write_checkpoint(snapshot, root / "model", model=make_model(), slice_bytes=1),
    }


def written_snapshot(root: Path) -> Snapshot:
    """`CONTENTS` and `random_model`."""
    model, values = random_model()
    variables = tuple(described(model))
    return open_snapshot(write_snapshot(root, SPEC, CONTENTS, dense=values, variables=variables))
