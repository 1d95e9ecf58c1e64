"""`EmbeddingForServing`: a stand-in for TensorFlow's `TPUEmbeddingForServing`.

It is a subclass: how variables are made, named, tracked and restored (before or after they exist,
from a SparseCore checkpoint, too) stays TensorFlow's own code, so checkpoint keys cannot drift
apart, and `isinstance` checks pass. Ours are the configs it also takes, the lookup
(`serving.tf.lookup`), and `from_export`, whose tables are not variables but an export's files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import tensorflow as tf

from ps.config import FeatureConfig, TableConfig
from ps.errors import ExportError
from ps.export import Export, ExportTable
from ps.structures import flatten
from serving.tf.lookup import serving_embedding_lookup
from serving.tf.stock import StockTables, stock_optimizer

_Stock: Any = tf.tpu.experimental.embedding.TPUEmbeddingForServing
_TPU_STRATEGIES = (tf.distribute.TPUStrategy, tf.distribute.experimental.TPUStrategy)


class EmbeddingForServing(_Stock):
    """Embedding tables as variables on the CPU, to look up, to restore and to save.

    Checkpoint keys, for the attribute `embedding` of a `tf.train.Checkpoint`, are TensorFlow's:
    `embedding/<table>` and `embedding/<table>.S<slot>`, so a file written with either class
    restores into the other. Give `optimizer=None` to restore no slots. The tables are made on first
    use, also when that is inside a `tf.function`.

    A TensorFlow TableConfig is changed as TensorFlow does: `name` None becomes `table_<i>`,
    `optimizer` None becomes the one given here, and both stay. A Manta TableConfig cannot change:
    the same name and optimizer hold for this object only.

    >>> embedding = EmbeddingForServing(feature_config, optimizer=None)  # doctest: +SKIP
    >>> tf.train.Checkpoint(embedding=embedding).restore(path)  # doctest: +SKIP
    >>> embedding({"user": tf.constant([3, 1])})  # doctest: +SKIP
    """

    def __init__(
        self,
        feature_config: Any,
        optimizer: Any,
        experimental_sparsecore_restore_info: dict[str, Any] | None = None,
    ) -> None:
        """Name the tables; nothing is allocated yet.

        Args:
            feature_config: FeatureConfig objects, ours or TensorFlow's, in any nesting.
            optimizer: for tables without one of their own, ours or TensorFlow's; it decides which
                slots there are. None is no slots.
            experimental_sparsecore_restore_info: as TensorFlow's class takes it, and unused there.

        Raises:
            ValueError: two tables of one name, or an unsupported optimizer.
            RuntimeError: under a TPU strategy.
        """
        del experimental_sparsecore_restore_info
        tables = StockTables()
        # TensorFlow's own `__init__` finds itself by its module's name for it, which whoever swaps
        # in this class has replaced. It would only go on to its base and check the strategy.
        super(_Stock, self).__init__(
            tf.nest.map_structure(tables.feature_config, feature_config), stock_optimizer(optimizer)
        )
        self._strategy = tf.distribute.get_strategy()
        if isinstance(self._strategy, _TPU_STRATEGIES):
            raise RuntimeError("Serving on TPU is not yet supported.")
        given = dict.fromkeys(feature.table for _, feature in flatten(feature_config))
        self._given = _Given(feature_config, {table: tables.table(table) for table in given})

    @classmethod
    def from_export(cls, export: Export, feature_config: Any = None) -> EmbeddingForServing:
        """Serve the memory-mapped tables of an export, without a copy in memory.

        The result looks up, eagerly and in a `tf.function`; its `embedding_tables` are read-only
        NumPy arrays. It has no variables, so it can be neither restored nor saved.

        Args:
            export: from `ps.export.open_export`.
            feature_config: whose tables the export has, by name; None for the export's features, a
                dict by feature name.

        Raises:
            ExportError: the export lacks a table, or it has another shape there.
        """
        return _ExportEmbedding(export, feature_config)

    def build(self) -> None:
        """Make the variables, outside of any graph that is being traced."""
        with tf.init_scope():
            super().build()

    @property
    def embedding_tables(self) -> dict[Any, Any]:
        """The tables' variables, float32 [V, D], by the TableConfig objects given."""
        tables = super().embedding_tables
        return {given: tables[stock] for given, stock in self._given.tables.items()}

    def embedding_lookup(self, features: Any, weights: Any = None) -> Any:
        """See `serving_embedding_lookup`."""
        return serving_embedding_lookup(
            features, weights, self.embedding_tables, self._given.feature_config
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """The caller's objects. In an object of its own, which TensorFlow neither wraps nor tracks."""

    feature_config: Any
    tables: dict[Any, Any]
    """TensorFlow's TableConfig for each one given."""


class _ExportEmbedding(EmbeddingForServing):
    """Tables that are an export's files."""

    def __init__(self, export: Export, feature_config: Any) -> None:
        if feature_config is None:
            feature_config = _features_of(export)
        super().__init__(feature_config, optimizer=None)
        rows = {given: _rows(export, stock) for given, stock in self._given.tables.items()}
        self._export = _Mapped(export, rows)

    def build(self) -> None:
        """Nothing to make: the files are there."""

    @property
    def embedding_tables(self) -> dict[Any, Any]:
        """The tables, float32 [V, D], memory-mapped and read-only, by TableConfig."""
        return dict(self._export.rows)

    @property
    def variables(self) -> NoReturn:
        """There are none.

        Raises:
            ExportError: always.
        """
        self._refuse("has no variables")

    def _trackable_children(self, *args: Any, **kwargs: Any) -> NoReturn:
        # What checkpoints and SavedModels ask for: without this they would leave out the tables.
        self._refuse("can be neither restored from nor saved to a checkpoint or SavedModel")

    def _refuse(self, what: str) -> NoReturn:
        raise ExportError(
            f"an embedding that serves export '{self._export.export.path}' from its files {what}; "
            "`EmbeddingForServing(feature_config, optimizer)` holds variables"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Mapped:
    export: Export
    rows: dict[Any, Any]


def _features_of(export: Export) -> dict[str, FeatureConfig]:
    def config(table: ExportTable) -> TableConfig:
        return TableConfig(
            table.vocabulary_size, table.dim, combiner=table.combiner, name=table.name
        )

    tables = {name: config(table) for name, table in export.tables.items()}
    return {
        name: FeatureConfig(
            tables[feature.table],
            feature.max_sequence_length,
            feature.validate_weights_and_indices,
            feature.output_shape,
        )
        for name, feature in export.features.items()
    }


def _rows(export: Export, stock_table: Any) -> Any:
    name, shape = stock_table.name, (stock_table.vocabulary_size, stock_table.dim)
    if name not in export.tables:
        raise ExportError(
            f"export '{export.path}' has no table '{name}', only {sorted(export.tables)}"
        )
    rows_VD = export.tables[name].rows_VD
    if rows_VD.shape != shape:
        raise ExportError(
            f"export '{export.path}': table '{name}' is {list(rows_VD.shape)}, "
            f"but its TableConfig says {list(shape)}"
        )
    return rows_VD
