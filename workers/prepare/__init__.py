"""Raw public data sets (or made-up ones of any size) -> Parquet folders that a job can train on.

Nothing here imports Ray or TensorFlow. Every function writes one folder holding `train.parquet`,
`test.parquet` and `dataset.json`, and returns the `PrepareReport` that `dataset.json` was written
from. A folder appears whole or not at all.
"""

from workers.prepare.criteo import prepare_criteo
from workers.prepare.movielens import prepare_movielens
from workers.prepare.report import PrepareReport
from workers.prepare.synthetic import prepare_synthetic

__all__ = ["PrepareReport", "prepare_criteo", "prepare_movielens", "prepare_synthetic"]
