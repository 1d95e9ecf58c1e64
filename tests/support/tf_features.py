"""Features, tables, ids and calls for the tests of `serving.tf`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from serving.tf import serving_embedding_lookup

embedding = tf.tpu.experimental.embedding
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "Adagrad": {"initial_accumulator_value": 0.25},
    "AdagradMomentum": {"momentum": 0.5},
    "Adam": {},
    "FTRL": {"initial_accumulator_value": 0.5},
}


def call(feature: Any, table: Any, ids: Any, weights: Any = None) -> Any:
    weights = None if weights is None else {"f": weights}
    return serving_embedding_lookup({"f": ids}, weights, {feature.table: table}, {"f": feature})[
        "f"
    ]


def feature(combiner: str = "sum", configs: Any = embedding, **options: Any) -> Any:
    return configs.FeatureConfig(configs.TableConfig(5, 2, combiner=combiner, name="t"), **options)


def ragged(values: list[list[Any]], dtype: Any = tf.int64) -> Any:
    return tf.ragged.constant(values, dtype=dtype, row_splits_dtype=tf.int64)


def sparse(values: list[list[Any]], dtype: Any = tf.int64) -> Any:
    return ragged(values, dtype).to_sparse()


def rows(shape: Any, dtype: Any = tf.float32) -> Any:
    """Row i of a table is [2i + 1, 2i + 2]."""
    return tf.cast(tf.reshape(tf.range(1, 1 + shape[0] * shape[1]), shape), dtype)


def table(configs: Any, name: str | None, combiner: str = "sum", **options: Any) -> Any:
    return configs.TableConfig(
        5, 2, combiner=combiner, name=name, **{"initializer": rows} | options
    )


def optimizer(configs: Any, name: str | None) -> Any:
    return None if name is None else getattr(configs, name)(**OPTIMIZERS[name])
