"""Combining rows inside the compiled step: `tensor_core_shape` and custom combiners.

The host ships the distinct rows of a table and, per feature, int32 indices [B, W] into them with
the number of ids of each example; everything here is TensorFlow that XLA compiles with the model,
and its gradient comes back per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from ps.config import CustomCombiner
from ps.errors import ConfigError
from workers.model import find_function
from workers.shapes import DeviceLookup


class DeviceCombine:
    """The features that a step combines itself, as a function of rows and indices."""

    def __init__(self, lookups: Sequence[DeviceLookup]) -> None:
        """Import custom combiners.

        Raises:
            ConfigError: no such function.
        """
        self._lookups = tuple(lookups)
        self._functions = {
            lookup.feature: _function(lookup.table, lookup.combiner)
            for lookup in lookups
            if isinstance(lookup.combiner, CustomCombiner)
        }

    def check(self) -> None:
        """Run every combiner once, on one empty example.

        Raises:
            ConfigError: a custom combiner fails, or does not give one vector of D numbers.
        """
        for lookup in self._lookups:
            rows, indices = tf.zeros((1, lookup.dim)), tf.zeros((1, lookup.width), tf.int32)
            name = f"table '{lookup.table}': its custom combiner"
            try:
                found = self._combined(lookup, rows, indices, tf.zeros(1, tf.int32))
            except (TypeError, ValueError, tf.errors.OpError) as e:
                reason = str(e).strip().splitlines() or [repr(e)]
                raise ConfigError(f"{name}: {reason[-1].strip()}") from e
            if tuple(found.shape) != (1, lookup.dim):
                raise ConfigError(f"{name} gives {list(found.shape[1:])}, wanted [{lookup.dim}]")

    def __call__(
        self, rows: Mapping[str, Any], indices: Mapping[str, Any], valency: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Activations by feature.

        Args:
            rows: float32 [number of rows, D] per table.
            indices: int32 [B, W] per feature.
            valency: int32 [B] per feature; entries behind it are padding.
        """
        out = {}
        for lookup in self._lookups:
            name = lookup.feature
            combined = self._combined(lookup, rows[lookup.table], indices[name], valency[name])
            out[name] = tf.reshape(combined, [-1, *lookup.shape])
        return out

    def _combined(self, lookup: DeviceLookup, rows: Any, indices: Any, valency: Any) -> Any:
        """float32 [B, D]: Σ mask·row, over max(count, 1) for mean, or what a function makes."""
        counts = tf.sequence_mask(valency, lookup.width)[..., tf.newaxis]
        vectors_BWD = tf.where(counts, tf.gather(rows, indices), 0.0)
        if lookup.feature in self._functions:
            function = self._functions[lookup.feature]
            return tf.vectorized_map(
                lambda example: function(*example),
                (valency, vectors_BWD),
                fallback_to_while_loop=False,
            )
        total = tf.reduce_sum(vectors_BWD, axis=1)
        if lookup.combiner == "sum":
            return total
        return total / tf.maximum(tf.cast(valency, tf.float32), 1.0)[:, tf.newaxis]


def _function(table: str, combiner: CustomCombiner) -> Callable[..., Any]:
    found = combiner.combiner_computation
    return find_function(found, f"tables.{table}.combiner") if isinstance(found, str) else found
