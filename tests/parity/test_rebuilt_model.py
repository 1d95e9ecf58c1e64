"""A dense model that a manifest describes is built, or refused in one line: it may be damaged."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ps.errors import ConfigError
from workers.model import rebuild_model

DESCRIBED: dict[str, Any] = {
    "name": "two_tower",
    "params": {"user": ["u"], "item": ["i"], "mean": 3.5},
    "loss": "mse",
    "dense": [],
    "inputs": {"activations": {"u": [4], "i": [4]}, "num_dense": 0, "seed": 1, "batch_size": 8},
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", {}),
        ("name", None),
        ("params.user", None),
        ("params.mean", "x"),
        ("inputs.seed", -1),
        ("inputs.first_axes", []),
        ("inputs.batch_size", -1),
        ("dense", None),
        ("dense", ["x"]),
    ],
)
def test_a_bad_description_is_one_line(path: str, value: Any) -> None:
    rebuild_model(DESCRIBED)
    bad = copy.deepcopy(DESCRIBED)
    *parents, key = path.split(".")
    place = bad
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(ConfigError, match="model") as caught:
        rebuild_model(bad)
    assert "\n" not in str(caught.value)
