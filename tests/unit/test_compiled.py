"""Kernels are compiled once: for any kind of array, by one process of many, anew after a change."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ps.kernels import compiled
from tests.support.strategies import frozen, unaligned

SOURCE = """
import numpy as np
from ps.kernels import kernel

@kernel(writes=("out",))
def double(values, factor, out):
    for i in range(values.size):
        out[i] = values[i] * factor
"""
RACE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from doubling import double
sys.stdin.readline()  # all processes are up
out = np.zeros(3, np.float32)
double(np.ones(3, np.float32), np.float32(2), out)
assert out.tolist() == [2, 2, 2]
print(sum(double._call.stats.cache_misses.values()))
"""


def module(folder: Path) -> ModuleType:
    """A fresh import of the kernel in `folder`, whose machine code is kept beside it."""
    path = folder / "doubling.py"
    if not path.exists():
        path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("doubling", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def doubled(loaded: ModuleType) -> int:
    """Runs the kernel; returns how often it was compiled rather than loaded."""
    out = np.zeros(2, dtype=np.float32)
    loaded.double(np.array([1, 2], dtype=np.float32), np.float32(2), out)
    assert out.tolist() == [2, 4]
    return sum(loaded.double._call.stats.cache_misses.values())


def test_one_compilation_takes_ordinary_read_only_and_unaligned_arrays(tmp_path: Path) -> None:
    double = module(tmp_path).double
    values = np.array([1, 2], dtype=np.float32)
    for given in (values, frozen(values), unaligned(values)):
        for out in (np.zeros(2, dtype=np.float32), unaligned(np.zeros(2, dtype=np.float32))):
            double(given, np.float32(3), out)
            assert out.tolist() == [3, 6]
    assert len(double._call.signatures) == 1


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    double = module(tmp_path).double
    values, out = np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.float32)
    double(values, np.float32(3), out)
    for given, into in [
        (values.astype(np.float64), out),
        (values.reshape(1, 2), out),
        (np.ones(4, dtype=np.float32)[::2], out),
        (values, frozen(out)),
    ]:
        with pytest.raises(TypeError, match="No matching definition"):
            double(given, np.float32(3), into)


def test_the_first_call_may_not_set_another_layout(tmp_path: Path) -> None:
    values, out = np.ones(4, dtype=np.float32)[::2], np.zeros(2, dtype=np.float32)
    with pytest.raises(TypeError, match="C-contiguous"):
        module(tmp_path).double(values, np.float32(3), out)


def test_written_parameters_must_exist() -> None:
    with pytest.raises(AssertionError, match="no parameters"):
        compiled.kernel(writes=("other",))(lambda out: None)


def test_machine_code_is_loaded_again_until_a_kernel_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "helper.py"
    helper.write_text("")
    monkeypatch.setattr(compiled, "_SOURCES", [helper])
    assert doubled(module(tmp_path)) == 1
    assert doubled(module(tmp_path)) == 0
    helper.write_text("# another helper\n")
    assert doubled(module(tmp_path)) == 1


def test_of_many_processes_one_compiles(tmp_path: Path) -> None:
    module(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    race = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    for process in race:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    misses = [process.communicate(timeout=60)[0].strip() for process in race]
    assert sorted(misses) == ["0", "0", "1"]
