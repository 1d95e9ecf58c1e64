"""A request of one example."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.kernels import ours
from benchmarks.kernels.options import Options
from benchmarks.kernels.report import OURS, Cell, Section, Target, table
from benchmarks.kernels.timing import Contender, interleaved
from benchmarks.lookup import DIM, FEATURES, ROWS, make_service, make_stock

_MANTA_SERVICE, _TF = "Manta LookupService", "TF"
_REPEATS = 20
_TEXT = f"""\
Microseconds of one lookup of one example in process: {FEATURES} features of one id each, a table of
{ROWS:,} rows of dim {DIM} for each. *Manta* is one fused combine, called from Python;
*{_MANTA_SERVICE}* is the whole of `LookupService.lookup`; *TF* is `serving_embedding_lookup` in a
`tf.function`."""


def run(options: Options) -> Section:
    """One example, one id per feature."""
    import tensorflow as tf

    from ps.inputs import Bags
    from ps.ragged import Ragged

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        service = make_service(Path(folder) / "export")
        stock = make_stock(service).lookup
        splits = np.array([0, 1])
        ids = {name: rng.integers(0, ROWS, 1) for name in service.export.tables}
        bags = {name: Bags(Ragged(i, splits)) for name, i in ids.items()}
        ragged = {name: tf.RaggedTensor.from_row_splits(i, splits) for name, i in ids.items()}
        expected = {name: rows.numpy() for name, rows in stock(ragged).items()}
        for name, rows in service.lookup(bags).items():
            np.testing.assert_allclose(rows, expected[name], rtol=1e-6)
        contenders = [
            _repeated(OURS, ours.fused_lookup(service, bags)),
            _repeated(_MANTA_SERVICE, lambda: service.lookup(bags)),
            _repeated(_TF, lambda: stock(ragged)),
        ]
        timings = interleaved(contenders, options.cell_s)
    cell = options.done("small", Cell((str(FEATURES),), _REPEATS, timings))
    micros = timings[OURS].median / _REPEATS * 1e6
    what = f"one example, {FEATURES} features, dim {DIM}: one combine call"
    return Section(
        "Request of one example",
        _TEXT,
        [table("One example", ("features",), [cell], "µs")],
        [Target(what, 20, micros, unit=" µs", at_most=True)],
    )


def _repeated(name: str, call: Callable[[], object]) -> Contender:
    def calls() -> None:
        for _ in range(_REPEATS):
            call()

    return Contender(name, [calls])
