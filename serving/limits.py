"""What one request may ask for. Beyond any of these the server answers 413."""

from __future__ import annotations

from dataclasses import dataclass

from ps.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one lookup request, checked before memory is taken for it."""

    max_body_bytes: int = 16 * 2**20
    """Length of the body; checked while it arrives."""
    max_ids: int = 1_000_000
    """Ids or raw values, plus bags, over all features."""
    max_values: int = 2**25
    """float32 numbers in the answer, over all features (2²⁵ are 128 MiB)."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"Limits: `{name}` must be an int >= 1, got {value!r}")
