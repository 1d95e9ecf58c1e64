"""The parts of the benchmark, each in a process of its own.

TensorFlow's allocator keeps for ever what it once had, and the next part needs the memory.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

from benchmarks.kernels.options import Options
from benchmarks.kernels.report import Section

PARTS = ("combine", "quantized", "steps", "updates", "hashmap", "small")

_ENVIRONMENT = {
    # Huge pages for everything that malloc takes from the system, TensorFlow's and torch's too.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Threads of OpenMP that wait for work must not take a core from whoever comes next.
    "GOMP_SPINCOUNT": "1000",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
}


def run_apart(part: str, options: Options) -> Section:
    """Run a part in a new process, which gets the environment that it needs."""
    os.environ.update(_ENVIRONMENT)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_run, part, options).result()


def _run(part: str, options: Options) -> Section:
    import tensorflow as tf
    import torch

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.get_logger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch|fbgemm_gpu|tensorflow")
    logging.disable(logging.INFO)  # FBGEMM tells all its arguments
    section: Section = import_module(f"benchmarks.kernels.{part}").run(options)
    return section
