"""Strict YAML to config objects: unknown keys, wrong types and near misses are one-line errors.

`build` follows the type hints of dataclasses. A class family named in `FAMILIES` is written
`{name: Adagrad, learning_rate: 0.1}`, or just `Adagrad`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ps.errors import ConfigError
from ps.initializers import INITIALIZERS, Initializer
from ps.optimizers import OPTIMIZERS, SCHEDULES, Optimizer

T = TypeVar("T")

FAMILIES: dict[Any, Mapping[str, type]] = {Optimizer: OPTIMIZERS, Initializer: INITIALIZERS}


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping and apply `path.to.key=value` overrides (values are YAML too).

    Raises:
        ConfigError: no such file, bad YAML, not a mapping, or a bad override.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as e:
        raise ConfigError(f"config {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path}: not a text file") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"config {path}: {' '.join(str(e).split())}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"config {path}: the top level must be a mapping")
    for override in overrides:
        _apply(value, override)
    return value


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML would keep the last one silently."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for every mapping before `<<` is merged into it."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' stands twice", key.start_mark
                )
            seen.add(str(key.value))
        super().flatten_mapping(node)


def _apply(config: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: write path.to.key=value")
    *parents, last = path.split(".")
    node: Any = config
    for key in parents:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: '{key}' is not a mapping")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML") from None


def build(kind: Any, value: Any, path: str = "") -> Any:
    """`value`, as YAML gives it, as an object of type `kind`.

    Raises:
        ConfigError: names the path, what was seen and what is wanted.
    """
    if kind is Any:
        return value
    if kind in FAMILIES:
        return _named(FAMILIES[kind], value, path)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _union(get_args(kind), value, path)
    if origin is Literal:
        return _choice(get_args(kind), value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(path, "a list", value)
        item = get_args(kind)[0]
        return tuple(build(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _wrong(path, "a mapping", value)
        item = get_args(kind)[1]
        return {str(k): build(item, v, _join(path, k)) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path)
    return _scalar(kind, value, path)


def _dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(path, "a mapping", value)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in value:
        if key not in fields:
            raise ConfigError(f"{_join(path, key)}: unknown key{hint(key, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if name not in value
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{_join(path, missing[0])}: missing")
    hints = get_type_hints(kind)
    arguments = {name: build(hints[name], v, _join(path, name)) for name, v in value.items()}
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{path}: {e}" if path else str(e)) from None


def _named(family: Mapping[str, type], value: Any, path: str) -> Any:
    fields = dict(value) if isinstance(value, dict) else {"name": value}
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in family:
        known = ", ".join(sorted(family))
        raise ConfigError(
            f"{_join(path, 'name')}: {name!r} is not one of {known}{hint(str(name), family)}"
        )
    return build(family[name], fields, path)


def _union(options: Sequence[Any], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [o for o in options if o is not type(None)]
    # The first error is reported: let it be that of the kind that was meant.
    rest.sort(key=lambda o: dataclasses.is_dataclass(o) != isinstance(value, dict))
    if isinstance(value, dict) and any(get_origin(o) is Callable_ for o in rest):
        return _named(SCHEDULES, value, path)
    errors = []
    for option in rest:
        if get_origin(option) is Callable_:
            continue
        try:
            return build(option, value, path)
        except ConfigError as e:
            errors.append(e)
    raise errors[0] if errors else _wrong(path, "nothing", value)


Callable_ = get_origin(Callable[..., Any])


def _choice(choices: Sequence[Any], value: Any, path: str) -> Any:
    if value not in choices:
        names = [str(c) for c in choices]
        raise ConfigError(
            f"{path}: {value!r} is not one of {', '.join(names)}{hint(str(value), names)}"
        )
    return value


def _scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise _wrong(path, "a number", value) from None
    if kind is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(path, _WORDS.get(kind, kind.__name__), value)
    return value


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
          Path: "a path"}  # fmt: skip


def _wrong(path: str, wanted: str, value: Any) -> ConfigError:
    return ConfigError(f"{path or 'config'}: wanted {wanted}, got {value!r}")


def hint(name: object, known: Mapping[str, Any] | Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(known))}"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
