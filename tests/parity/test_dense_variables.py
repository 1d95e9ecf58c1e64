"""The dense model's variables by name, and where their first values come from."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from ps.errors import ConfigError
from workers.config import ModelConfig
from workers.dense import DenseStep
from workers.model import MODELS, ModelInputs

pytestmark = pytest.mark.parity


class Named(tf.Module):
    """Variables of the given names, attributes in the same order."""

    def __init__(self, inputs: ModelInputs, names: list[str]) -> None:
        super().__init__()
        self.all = [tf.Variable(np.float32(i), name=name) for i, name in enumerate(names)]

    def __call__(self, activations, dense, training):
        return tf.reduce_sum(activations["a"], axis=1) * tf.add_n(self.all)


@pytest.mark.parametrize("names", [["w_1", "w", "w"], ["w", "w", "w_1"], ["w", "w_1_1", "w_1"]])
def test_every_variable_has_a_name_of_its_own(
    monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setitem(MODELS, "named", Named)
    inputs = ModelInputs(activations={"a": (2,)}, num_dense=0, seed=0)
    step = DenseStep(ModelConfig(build="named", params={"names": names}), inputs, "mse")
    named = step.variables(*step.initial())
    assert [float(value) for value in named.values()] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("params", "num_dense", "reason"),
    [
        ({"user": ["a"], "item": ["b"]}, 0, "feature 'c' is in no tower and no bias"),
        ({"user": ["a"], "item": ["b"], "biases": ["c"]}, 2, "takes no dense columns"),
        ({"user": ["a"], "item": ["z"], "biases": ["b", "c"]}, 0, "item feature 'z' is unknown"),
        ({"user": ["a"], "item": ["c"], "biases": ["b"]}, 0, "user dim 2 and item dim 1 differ"),
    ],
)
def test_two_tower_refuses_inputs_it_would_not_use(
    params: dict[str, list[str]], num_dense: int, reason: str
) -> None:
    inputs = ModelInputs(activations={"a": (2,), "b": (2,), "c": (1,)}, num_dense=num_dense, seed=0)
    with pytest.raises(ConfigError, match=reason):
        DenseStep(ModelConfig(build="two_tower", params=params), inputs, "mse")
