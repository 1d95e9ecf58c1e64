"""TensorFlow's side of serving: its lookup API over our tables, and exports it can load."""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "EmbeddingForServing": "serving.tf.embedding",
    "serving_embedding_lookup": "serving.tf.lookup",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
