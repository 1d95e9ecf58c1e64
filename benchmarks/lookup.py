"""`LookupService` against stock TensorFlow on the same export: 26 features, dim 16, bags of 4.

Run it with `make bench`. All answer the same requests in this process, in turn, a few requests per
turn; printed are medians, the spread (10th to 90th percentile) and the ratios of the medians.
TensorFlow answers twice: as the SavedModel that it would serve, and as the function in it, called
with ragged tensors. The first line is the time of the kernel alone.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from ps.config import FeatureConfig, TableConfig
from ps.export import ExportWriter, open_export, write_rows
from ps.inputs import Bags
from ps.kernels.features import KEEP_IDS, combine_features_for
from ps.ragged import F32, I64, Ragged
from ps.spec import resolve
from serving.lookup import LookupService

FEATURES, DIM, ROWS, BAG = 26, 16, 100_000, 4
NAMES = [f"C{i}" for i in range(FEATURES)]
REQUESTS, TURNS = 8, 40
"""Different requests of one turn, and turns of each batch size."""

Ids = dict[str, I64]
Call = Callable[[], Any]
Asker = Callable[[Ids, I64], Call]
"""Makes a request of ids by feature, and the row splits of all."""


def make_service(root: Path) -> LookupService:
    rng = np.random.default_rng(0)
    tables = {name: TableConfig(ROWS, DIM, combiner="sum", name=name) for name in NAMES}
    spec = resolve({name: FeatureConfig(table) for name, table in tables.items()})
    with ExportWriter(root, spec, step=0, job="bench") as writer:
        for name in NAMES:
            rows = rng.normal(size=(ROWS, DIM)).astype(np.float32)
            write_rows(writer.row_file(name), 0, rows)
        writer.commit()
    return LookupService(open_export(root))


def make_stock(service: LookupService) -> Any:
    """A module whose `lookup` is stock TensorFlow's, and `serve` the same for flat inputs."""
    embedding = tf.tpu.experimental.embedding
    configs = {n: embedding.TableConfig(ROWS, DIM, combiner="sum", name=n) for n in NAMES}
    features = {n: embedding.FeatureConfig(configs[n]) for n in NAMES}
    module = tf.Module()
    module.tables = {n: tf.Variable(service.export.tables[n].rows_VD) for n in NAMES}
    variables = {configs[n]: module.tables[n] for n in NAMES}
    flat = [*NAMES, *(f"{n}_splits" for n in NAMES)]

    @tf.function(reduce_retracing=True)
    def lookup(inputs: dict[str, tf.RaggedTensor]) -> dict[str, tf.Tensor]:
        return embedding.serving_embedding_lookup(inputs, None, variables, features)

    @tf.function(input_signature=[{n: tf.TensorSpec([None], tf.int64, n) for n in flat}])
    def serve(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        ragged = tf.RaggedTensor.from_row_splits
        return lookup({n: ragged(inputs[n], inputs[f"{n}_splits"]) for n in NAMES})

    module.lookup, module.serve = lookup, serve
    return module


def kernel_alone(service: LookupService) -> Asker:
    """Everything is ready but the output."""
    kernel = combine_features_for("float32", DIM)
    tables = [service.export.tables[n].rows_VD for n in NAMES]
    first_row_F = np.array([rows.ctypes.data for rows in tables])
    sums_F, rows_F, keep_F = (np.full(FEATURES, x) for x in (0, ROWS, KEEP_IDS))
    no_weights = np.zeros(0, dtype=np.float32)

    def ask(ids: Ids, splits: I64) -> Call:
        splits_FS, ids_N = np.tile(splits, (FEATURES, 1)), np.concatenate(list(ids.values()))

        def call() -> F32:
            out_FBD = np.empty((FEATURES, splits.size - 1, DIM), dtype=np.float32)
            kernel(ids_N, no_weights, splits_FS, first_row_F, rows_F, sums_F, keep_F, out_FBD)
            return out_FBD

        return call

    return ask


def manta(service: LookupService) -> Asker:
    return lambda ids, splits: partial(
        service.lookup, {n: Bags(Ragged(i.copy(), splits)) for n, i in ids.items()}
    )


def tensorflow(stock: Any) -> Asker:
    ragged = tf.RaggedTensor.from_row_splits
    return lambda ids, splits: partial(stock.lookup, {n: ragged(i, splits) for n, i in ids.items()})


def saved_model(signature: Any) -> Asker:
    def ask(ids: Ids, splits: I64) -> Call:
        flat = ids | {f"{n}_splits": splits for n in NAMES}
        return partial(signature, **{n: tf.constant(a) for n, a in flat.items()})

    return ask


def milliseconds(askers: Sequence[Asker], batch: int) -> list[list[float]]:
    """Times of each; a request is made right before it is asked, as a server does."""
    rng = np.random.default_rng(batch)
    splits = np.arange(batch + 1, dtype=np.int64) * BAG
    times: list[list[float]] = [[] for _ in askers]
    for _ in range(TURNS):
        requests = [{n: rng.integers(0, ROWS, batch * BAG) for n in NAMES} for _ in range(REQUESTS)]
        for found, ask in zip(times, askers, strict=True):
            for ids in requests:
                call = ask(ids, splits)
                start = time.perf_counter()
                call()
                found.append((time.perf_counter() - start) * 1e3)
    return times


def check(askers: Sequence[Asker]) -> None:
    rng = np.random.default_rng(0)
    ids = {n: rng.integers(0, ROWS, 9) for n in NAMES}
    ours, *theirs = (ask(ids, np.array([0, 2, 2, 9]))() for ask in askers)
    for name, found in ours.items():
        for other in theirs:
            np.testing.assert_allclose(found, other[name], rtol=1e-5, atol=1e-5)


def shown(times: list[float], ours: list[float]) -> str:
    low, mid, high = np.percentile(times, [10, 50, 90])
    text = f"{mid:.3f} ({low:.3f}-{high:.3f})"
    return text if times is ours else f"{text} {mid / np.median(ours):.0f}x"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        service = make_service(Path(folder) / "export")
        stock = make_stock(service)
        tf.saved_model.save(stock, f"{folder}/stock", signatures=stock.serve)
        loaded = tf.saved_model.load(f"{folder}/stock")
        askers = (
            manta(service),
            saved_model(loaded.signatures["serving_default"]),
            tensorflow(stock),
        )
        check(askers)
        (alone,) = milliseconds([kernel_alone(service)], 1)
        print(f"one example, kernel alone: {np.median(alone) * 1e3:.1f} µs")
        print(f"{'batch':>5} {'manta ms':>22} {'SavedModel ms':>32} {'tf.function ms':>32}")
        for batch in (1, 64, 512):
            times = milliseconds(askers, batch)
            ours, saved, function = (shown(each, times[0]) for each in times)
            print(f"{batch:>5} {ours:>22} {saved:>32} {function:>32}")


if __name__ == "__main__":
    main()
