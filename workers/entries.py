"""Tables and features as a job's YAML has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ps.config import Combiner, CustomCombiner, FeatureConfig, QuantizationConfig, TableConfig
from ps.errors import ConfigError
from ps.initializers import Initializer
from ps.optimizers import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """One table; the keys are those of `TableConfig`."""

    vocabulary_size: int
    dim: int
    combiner: Combiner | CustomCombiner = "mean"
    initializer: Initializer | None = None
    optimizer: Optimizer | None = None
    quantization_config: QuantizationConfig | None = None
    combine_on: Literal["worker", "shard"] = "worker"
    """Where the rows of a bag become one vector. `shard` sends parts of sums instead of rows, which
    is less where bags are long; the last bits then depend on the number of shards."""

    def table_config(self, name: str) -> TableConfig:
        """The entry as the table of that name.

        Raises:
            ConfigError: names the table and the argument.
        """
        try:
            return TableConfig(
                vocabulary_size=self.vocabulary_size,
                dim=self.dim,
                initializer=self.initializer,
                optimizer=self.optimizer,
                combiner=self.combiner,
                name=name,
                quantization_config=self.quantization_config,
            )
        except ConfigError as e:
            raise ConfigError(f"tables.{name}: {e}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureEntry:
    """One feature; the keys are those of `FeatureConfig`, and the columns it reads."""

    table: str
    column: str | None = None
    """Integer or list-of-integers column; None is the feature's own name."""
    weights: str | None = None
    """List column with one weight per id, None for no weights. In a sequence they matter to `sum`
    above all (see `uses_weights`); and serving, as TensorFlow's, takes none for sequences."""
    max_sequence_length: int = 0
    validate_weights_and_indices: bool = True
    output_shape: int | tuple[int, ...] | None = None
    """For a worker's batch of B examples: B vectors in all, or a multiple."""
    tensor_core_shape: tuple[int | None, ...] | None = None

    def feature_config(self, name: str, table: TableConfig) -> FeatureConfig:
        """The entry as a feature of that table.

        Raises:
            ConfigError: names the feature and the argument.
        """
        try:
            return FeatureConfig(
                table,
                self.max_sequence_length,
                self.validate_weights_and_indices,
                self.output_shape,
                tensor_core_shape=self.tensor_core_shape,
            )
        except ConfigError as e:
            raise ConfigError(f"features.{name}: {e}") from None
