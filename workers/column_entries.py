"""Embedding columns in a job's YAML.

    columns:
      - categorical_column: {name: categorical_column_with_identity, key: user, num_buckets: 1000}
        dimension: 16
      - categorical_columns: [{...}, {...}]     # one table: `shared_embedding_columns`
        dimension: 8

Keys are the arguments of `ps.columns.embedding_column` and of the function that `name` names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ps import columns
from ps.columns import EmbeddingColumn, embedding_column, shared_embedding_columns
from ps.errors import ConfigError
from ps.initializers import Initializer
from ps.loading import build, hint

CATEGORICAL: dict[str, Callable[..., Any]] = {
    name: getattr(columns, name) for name in columns.__all__ if "categorical_column" in name
}
_TYPES = {"use_safe_embedding_lookup": bool, "shared_embedding_collection_name": str}
"""Of arguments whose types Python's own callers are trusted with: a text "false" would be true."""


def embedding_columns(entries: Sequence[Any], path: str = "columns") -> tuple[EmbeddingColumn, ...]:
    """Columns, and YAML mappings of them, as columns.

    Raises:
        ConfigError: names the path, what was seen and what is wanted.
    """
    made: list[EmbeddingColumn] = []
    for i, entry in enumerate(entries):
        if isinstance(entry, EmbeddingColumn):
            made.append(entry)
        else:
            made += _columns(entry, f"{path}[{i}]")
    return tuple(made)


def _columns(entry: Any, path: str) -> list[EmbeddingColumn]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: wanted a mapping, got {entry!r}")
    arguments = dict(entry)
    for name, kind in _TYPES.items():
        if name in arguments and not isinstance(arguments[name], kind):
            wanted = kind.__name__
            raise ConfigError(f"{path}.{name}: wanted a {wanted}, got {arguments[name]!r}")
    if "initializer" in arguments:
        arguments["initializer"] = build(
            Initializer, arguments["initializer"], f"{path}.initializer"
        )
    if "learning_rate_fn" in arguments:
        arguments["learning_rate_fn"] = _schedule(arguments["learning_rate_fn"], path)
    if "categorical_columns" in arguments:
        key = f"{path}.categorical_columns"
        inner = arguments["categorical_columns"]
        if not isinstance(inner, list) or not inner:
            raise ConfigError(f"{key}: wanted a list of columns, got {inner!r}")
        arguments["categorical_columns"] = [
            _categorical(column, f"{key}[{i}]") for i, column in enumerate(inner)
        ]
        return list(_call(shared_embedding_columns, arguments, path))
    if "categorical_column" in arguments:
        key = f"{path}.categorical_column"
        arguments["categorical_column"] = _categorical(arguments["categorical_column"], key)
    return [_call(embedding_column, arguments, path)]


def _categorical(value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: wanted a mapping with a `name`, got {value!r}")
    arguments = dict(value)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in CATEGORICAL:
        raise ConfigError(f"{path}.name: no column '{name}'{hint(str(name), CATEGORICAL)}")
    if "categorical_column" in arguments:  # of a weighted one
        key = f"{path}.categorical_column"
        arguments["categorical_column"] = _categorical(arguments["categorical_column"], key)
    return _call(CATEGORICAL[name], arguments, path)


def _schedule(value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}.learning_rate_fn: wanted a schedule by name, got {value!r}")
    return build(Callable[..., float] | None, value, f"{path}.learning_rate_fn")


def _call(function: Callable[..., Any], arguments: Mapping[str, Any], path: str) -> Any:
    known = inspect.signature(function).parameters
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{path}.{name}: unknown key{hint(str(name), list(known))}")
    try:
        return function(**arguments)
    except (ConfigError, TypeError, ValueError, OSError) as e:
        raise ConfigError(f"{path}: {e}") from None
