"""TensorFlow's own published tests of `TPUEmbeddingForServing`, with ours in its place.

They are TensorFlow's and not kept here. `MANTA_TF_TESTS` names a folder with files of its
repository, such as `tensorflow/python/tpu/tpu_embedding_for_serving_test.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

FOLDER = os.environ.get("MANTA_TF_TESTS")
FILES = sorted(Path(FOLDER).glob("*_test.py")) if FOLDER else []


@pytest.mark.skipif(not FOLDER, reason="MANTA_TF_TESTS is not set: no tests of TensorFlow's here")
def test_the_folder_holds_tests() -> None:
    assert FILES, FOLDER


@pytest.mark.parametrize("swap", ["class and lookup", "configs too"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tensorflows_own_tests_pass_with_ours(file: Path, swap: str) -> None:
    if swap == "configs too" and "for_serving" not in file.name:
        pytest.skip("TensorFlow's tests of its configs compare texts, such as TensorShape([2])")
    options = ["--configs"] if swap == "configs too" else []
    run = [sys.executable, "-m", "tests.support.published", *options, str(file)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
