"""TensorFlow's own published unit tests, run unchanged with our names in the place of its.

    python -m tests.support.published [--stock | --configs] FILE...

A test file is TensorFlow's and is not kept here: take it from its repository. By default only
`TPUEmbeddingForServing` and its lookup are ours; `--configs` swaps in TableConfig, FeatureConfig,
QuantizationConfig and the optimizers, too; `--stock` swaps nothing. Ends with 1 if a test failed,
or if a file has none.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import unittest
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from tensorflow.python import tpu
from tensorflow.python.compat import v2_compat
from tensorflow.python.tpu import tpu_embedding_for_serving, tpu_embedding_v2_utils

import ps.config
from serving.tf import EmbeddingForServing, serving_embedding_lookup

SERVING = {
    "TPUEmbeddingForServing": EmbeddingForServing,
    "cpu_embedding_lookup": serving_embedding_lookup,
}
CONFIGS = {
    name: getattr(ps.config, name)
    for name in ps.config.__all__
    if name not in ("CustomCombiner", "CustomOptimizer")
}


@contextmanager
def swapped(serving: bool, configs: bool) -> Iterator[None]:
    """TensorFlow's modules, as an import statement finds them, with our names in them."""
    with ExitStack() as stack:
        for module, names in (
            (tpu_embedding_for_serving, SERVING if serving else {}),
            (tpu_embedding_v2_utils, CONFIGS if configs else {}),
        ):
            double = SimpleNamespace(**(vars(module) | names))
            name = module.__name__.rpartition(".")[2]
            stack.enter_context(mock.patch.object(tpu, name, double))
        yield


def load(file: Path) -> ModuleType:
    """A test file as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # as unittest finds it
    spec.loader.exec_module(module)
    return module


def run(file: Path, *, serving: bool = True, configs: bool = False) -> unittest.TestResult:
    """Run one file's tests; they print as they go.

    Args:
        file: a test file of TensorFlow's repository.
        serving: swap in the class and the function.
        configs: swap in the configuration objects.
    """
    v2_compat.enable_v2_behavior()
    with swapped(serving, configs):
        tests = unittest.defaultTestLoader.loadTestsFromModule(load(file))
        return unittest.TextTestRunner(verbosity=2).run(tests)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.published")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--stock", action="store_true", help="swap nothing")
    group.add_argument("--configs", action="store_true", help="swap the config classes, too")
    parser.add_argument("files", nargs="+", type=Path)
    options: Any = parser.parse_args(arguments)
    failed = False
    for file in options.files:
        result = run(file, serving=not options.stock, configs=options.configs)
        bad = len(result.failures) + len(result.errors)
        done = result.testsRun - len(result.skipped)
        print(f"{file.name}: {done - bad} of {done} passed, {len(result.skipped)} skipped")  # noqa: T201
        failed |= bad > 0 or done == 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
