"""The names of a checkpoint: keys of tensors, and the object graph that TensorFlow matches them by.

The graph is a `TrackableObjectGraph`: node 0 is the `tf.train.Checkpoint`, children are its
attributes, and a variable's node says under which key its value is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tensorflow.core.protobuf import trackable_object_graph_pb2

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
SAVE_COUNTER = "save_counter"
_VALUE = "VARIABLE_VALUE"
_SUFFIX = f"/.ATTRIBUTES/{_VALUE}"


def escape(name: str) -> str:
    """A local name as a part of a key.

    >>> escape("a.b/c")
    'a..b.Sc'
    """
    return name.replace(".", "..").replace("/", ".S")


def unescape(part: str) -> str:
    """A part of a key as the local name that it was.

    >>> unescape("a..b.Sc")
    'a.b/c'
    """
    return re.sub(r"\.(.)", lambda m: "/" if m[1] == "S" else m[1], part)


def key_of(path: str, name: str) -> str:
    """The key of the variable that is called `name` under a path of attributes.

    >>> key_of("embedding", "video/momenta")
    'embedding/video.Smomenta/.ATTRIBUTES/VARIABLE_VALUE'
    """
    return f"{path}/{escape(name)}{_SUFFIX}"


def name_in(path: str, key: str) -> str | None:
    """The name of the variable with this key, None if it is not one right under the path."""
    if not key.startswith(f"{path}/") or not key.endswith(_SUFFIX):
        return None
    part = key[len(path) + 1 : -len(_SUFFIX)]
    return None if "/" in part else unescape(part)


def new_graph() -> Any:
    """A graph of a checkpoint without attributes."""
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.nodes.add()
    return graph


def parse_graph(serialized: bytes) -> Any:
    """A graph as a checkpoint holds it."""
    return trackable_object_graph_pb2.TrackableObjectGraph.FromString(serialized)


def add_variables(graph: Any, attribute: str, names: Iterable[str]) -> None:
    """Give the root an attribute with one variable per name."""
    node = _add_child(graph, 0, attribute)
    for name in names:
        _add_variable(graph, node, name, key_of(attribute, name))


def add_save_counter(graph: Any) -> str:
    """Give the root its save counter, without which no restore counts as complete; its key."""
    key = SAVE_COUNTER + _SUFFIX
    _add_variable(graph, 0, SAVE_COUNTER, key)
    return key


def _add_child(graph: Any, parent: int, name: str) -> int:
    number = len(graph.nodes)
    graph.nodes.add().has_checkpoint_values.value = True
    graph.nodes[parent].has_checkpoint_values.value = True
    child = graph.nodes[parent].children.add()
    child.node_id, child.local_name = number, name
    return number


def _add_variable(graph: Any, parent: int, name: str, key: str) -> None:
    attribute = graph.nodes[_add_child(graph, parent, name)].attributes.add()
    attribute.name, attribute.full_name, attribute.checkpoint_key = _VALUE, name, key
