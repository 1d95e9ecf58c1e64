"""Nested dicts, lists and tuples of features, as TensorFlow nests them.

A leaf is whatever is not a mapping, list or tuple; this module never looks at one. The rules are
those of `tf.nest` and of TensorFlow's embedding API: leaves are found by their path, dict keys in
sorted order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ps.errors import InputError

T = TypeVar("T")


def flatten(structure: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their paths joined by "/": dict keys sorted, the rest in order.

    >>> list(flatten({"b": [1, 2], "a": 3}))
    [('a', 3), ('b/0', 1), ('b/1', 2)]
    """
    if not _is_nested(structure):
        yield path, structure
        return
    for key, item in _children(structure):
        yield from flatten(item, f"{path}/{key}" if path else key)


def select(inputs: object, config: object) -> list[tuple[str, Any, Any]]:
    """Each leaf of the inputs, with its path and the config's leaf of the same path.

    Only the joined paths count: a list matches a tuple, `{"a": {"b": x}}` a config keyed "a/b".

    Raises:
        InputError: an input without a config.
    """
    configs = dict(flatten(config))
    leaves = list(flatten(inputs))
    unknown = [path for path, _ in leaves if path not in configs]
    if unknown:
        raise InputError(
            f"Inputs are not a subset of feature_config: there is no {_quoted(unknown)} among "
            f"{_quoted(configs)}",
            unknown[0],
        )
    return [(path, leaf, configs[path]) for path, leaf in leaves]


def pack_like(structure: Any, leaves: Sequence[Any]) -> Any:
    """The same structure with these leaves, given in the order of `flatten`.

    Container types, key order and a defaultdict's factory are the structure's.
    """
    remaining = iter(leaves)
    packed = _pack(structure, remaining)
    assert next(remaining, remaining) is remaining, "more leaves than the structure holds"
    return packed


def check_same_structure(first: object, second: object) -> None:
    """Refuse what `tf.nest.assert_same_structure` refuses; leaves may be anything.

    Mappings of any two types agree, and so do lists; tuples must have one type.

    Raises:
        InputError: other keys, another length, or a leaf opposite a container.
        TypeError: containers of two types.
    """
    _check_same(first, second, "")


def _is_nested(structure: object) -> bool:
    return isinstance(structure, Mapping | list | tuple)


def _children(structure: Any) -> list[tuple[str, Any]]:
    if isinstance(structure, Mapping):
        return [(str(key), structure[key]) for key in _sorted_keys(structure)]
    names = getattr(structure, "_fields", range(len(structure)))
    return [(str(name), item) for name, item in zip(names, structure, strict=True)]


def _sorted_keys(mapping: Mapping[Any, Any]) -> list[Any]:
    """By value, as TensorFlow sorts, and by text where it cannot: keys of several types."""
    try:
        return sorted(mapping)
    except TypeError:
        return sorted(mapping, key=str)


def _pack(structure: Any, leaves: Iterator[Any]) -> Any:
    if not _is_nested(structure):
        return next(leaves)
    # `__class__` is the plain type where TensorFlow wraps a container to track it.
    kind: Any = structure.__class__
    if not isinstance(structure, Mapping):
        items = [_pack(item, leaves) for item in structure]
        return kind(*items) if hasattr(structure, "_fields") else kind(items)
    packed = {key: _pack(structure[key], leaves) for key in _sorted_keys(structure)}
    in_order = {key: packed[key] for key in structure}
    if isinstance(structure, defaultdict):
        return kind(structure.default_factory, in_order)
    return kind(in_order)


def _check_same(first: Any, second: Any, path: str) -> None:
    if not _is_nested(first) and not _is_nested(second):
        return
    if not (_is_nested(first) and _is_nested(second)):
        raise InputError(_differ(path, _kind(first), _kind(second)))
    if not _same_type(first, second):
        raise TypeError(_differ(path, _kind(first), _kind(second)))
    unequal = InputError(_differ(path, f"has {_keys(first)}", f"has {_keys(second)}"))
    if isinstance(first, Mapping) and set(first) != set(second):
        raise unequal
    for (key, one), (_, other) in zip(_children(first), _children(second), strict=False):
        _check_same(one, other, f"{path}/{key}" if path else key)
    if len(first) != len(second):  # after the items, as TensorFlow: they may differ in type
        raise unequal


def _same_type(first: Any, second: Any) -> bool:
    for kind in (Mapping, list):
        if isinstance(first, kind) and isinstance(second, kind):
            return True
    one, other = first.__class__, second.__class__
    if hasattr(one, "_fields") and hasattr(other, "_fields"):
        return bool(one.__name__ == other.__name__ and one._fields == other._fields)
    return one is other


def _kind(structure: Any) -> str:
    return f"is a {structure.__class__.__name__}" if _is_nested(structure) else "is a leaf"


def _differ(path: str, first: str, second: str) -> str:
    where = f" at '{path}'" if path else ""
    return (
        f"The two structures don't have the same nested structure{where}: "
        f"the first {first}, the second {second}"
    )


def _keys(structure: Any) -> str:
    return _quoted(key for key, _ in _children(structure))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"
