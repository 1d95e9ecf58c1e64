"""`LookupService` against stock TensorFlow on the same export: 26 features, dim 16, bags of 4.

Run it with `make bench`. Both answer the same request in this process, in turn; printed are
medians, the spread (10th to 90th percentile) and the ratio of the medians.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from ps.config import FeatureConfig, TableConfig
from ps.export import ExportWriter, open_export, write_rows
from ps.inputs import Bags
from ps.ragged import Ragged
from ps.spec import resolve
from serving.lookup import LookupService

FEATURES, DIM, ROWS, BAG = 26, 16, 100_000, 4


def make_service(root: Path) -> LookupService:
    rng = np.random.default_rng(0)
    tables = {
        f"C{i}": TableConfig(ROWS, DIM, combiner="sum", name=f"C{i}") for i in range(FEATURES)
    }
    spec = resolve({name: FeatureConfig(table) for name, table in tables.items()})
    with ExportWriter(root, spec, step=0, job="bench") as writer:
        for name in tables:
            rows = rng.normal(size=(ROWS, DIM)).astype(np.float32)
            write_rows(writer.row_file(name), 0, rows)
        writer.commit()
    return LookupService(open_export(root))


def make_stock(service: LookupService) -> Callable[[dict[str, tf.RaggedTensor]], object]:
    embedding = tf.tpu.experimental.embedding
    names = list(service.export.tables)
    configs = {n: embedding.TableConfig(ROWS, DIM, combiner="sum", name=n) for n in names}
    variables = {configs[n]: tf.Variable(service.export.tables[n].rows_VD) for n in names}
    features = {n: embedding.FeatureConfig(configs[n]) for n in names}

    @tf.function(reduce_retracing=True)
    def lookup(inputs: dict[str, tf.RaggedTensor]) -> object:
        return embedding.serving_embedding_lookup(inputs, None, variables, features)

    return lookup


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        service = make_service(Path(folder) / "export")
        stock = make_stock(service)
        print(f"{'batch':>6} {'manta ms':>22} {'tensorflow ms':>22} {'ratio':>7}")
        for batch in (1, 64, 512):
            splits = np.arange(batch + 1, dtype=np.int64) * BAG
            ids = {n: rng.integers(0, ROWS, batch * BAG) for n in service.export.tables}
            ours = {n: Bags(Ragged(i, splits)) for n, i in ids.items()}
            theirs = {n: tf.RaggedTensor.from_row_splits(i, splits) for n, i in ids.items()}
            for name, rows in stock(theirs).items():
                np.testing.assert_allclose(service.lookup(ours)[name], rows, rtol=1e-5, atol=1e-5)
            pairs = [
                (seconds(lambda o=ours: service.lookup(o)), seconds(lambda t=theirs: stock(t)))
                for _ in range(200)
            ]
            low, mid, high = np.percentile(np.array(pairs) * 1e3, [10, 50, 90], axis=0)
            spread = [f"{m:.3f} ({a:.3f}-{b:.3f})" for a, m, b in zip(low, mid, high, strict=True)]
            print(f"{batch:>6} {spread[0]:>22} {spread[1]:>22} {mid[1] / mid[0]:>6.1f}x")


if __name__ == "__main__":
    main()
