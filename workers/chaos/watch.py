"""What the shards' counters say of a run as a whole: how far it is, and what was dropped. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.chaos.cluster import ShardView


@dataclass(slots=True)
class Watch:
    """The counters of all shards over time, through ends and new processes."""

    snapshot_every: int = 0
    """Steps between snapshots; 0 for none."""
    version: int | None = None
    """That all shards have, None while one of them is not at work."""
    reached: int = -1
    """The highest `version` there was."""
    advanced_at_s: float = 0.0
    """When `reached` grew last."""
    stepped: bool = False
    """Whether a step was made since the first look."""
    cutting: bool = False
    """Whether a snapshot was being cut or written at the last look, or was due just then."""
    _dropped: dict[str, int] = field(default_factory=dict)
    _living: tuple[str, ...] = ()

    def see(self, shards: Sequence[ShardView | None], now: float) -> None:
        """Take in what the shards say now."""
        before = self.version
        views = [view for view in shards if view is not None]
        whole = bool(views) and len(views) == len(shards)
        self.version = min(view.version for view in views) if whole else None
        if self.version is not None and self.version > self.reached:
            self.stepped |= self.reached >= 0
            self.reached, self.advanced_at_s = self.version, now
        for view in views:
            seen = self._dropped.get(view.process, 0)
            self._dropped[view.process] = max(seen, view.duplicates_dropped)
        self._living = tuple(view.process for view in views) or self._living
        self.cutting = any(_cuts(view) for view in views) or self._crossed(before)

    def duplicates_dropped(self, at_end: int | None = None) -> int:
        """Over all processes of all shards; what one dropped after the last look is not in it.

        Args:
            at_end: what those that were there at the end said then, if they did.
        """
        of_living = sum(self._dropped.get(process, 0) for process in self._living)
        of_dead = sum(self._dropped.values()) - of_living
        return of_dead + max(of_living, at_end or 0)

    def _crossed(self, before: int | None) -> bool:
        """Whether a boundary lies between two looks: a small snapshot is written in between."""
        every = self.snapshot_every
        if not every or before is None or self.version is None:
            return False
        return self.version // every > before // every


def _cuts(view: ShardView) -> bool:
    return view.cut_version is not None and view.version >= view.cut_version
