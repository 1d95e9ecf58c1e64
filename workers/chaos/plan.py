"""Which faults come when: drawn from a seed, and pure.

`Planner` deals faults like cards: kinds and moments come in shuffled decks, so that a short run
sees every kind too, and chance decides the rest. It knows no clock and no process; the harness
carries the faults out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, get_args

import numpy as np

from ps.errors import ConfigError
from ps.loading import hint

Kind = Literal["shard", "worker", "driver", "node", "cut", "delay", "disk", "pause"]
"""The first four are ends by SIGKILL, of a node with everything on it. `cut` ends all connections
of a shard's workers, `delay` lets a shard stand still, `disk` lets a file operation of a shard
fail, `pause` is SIGSTOP and, later, SIGCONT."""
KINDS: tuple[Kind, ...] = get_args(Kind)
KILLS: frozenset[Kind] = frozenset({"shard", "worker", "driver", "node"})
DEFAULT_KINDS: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "node")
Moment = Literal["random", "snapshot", "recovery"]
"""`random` is any time, `snapshot` while a snapshot is written, `recovery` shortly after a kill."""
Role = Literal["shard", "worker", "driver", "node"]

MIN_GAP_S = 0.3
_MAX_RECOVERY_GAP_S = 10.0
_LONGEST_USEFUL_DEADLINE_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Victim:
    """Whom a fault hits.

    >>> str(Victim("shard", 1)), str(Victim("driver"))
    ('shard 1', 'driver')
    """

    role: Role
    index: int = 0

    def __str__(self) -> str:
        """As reports name it."""
        return self.role if self.role == "driver" else f"{self.role} {self.index}"


@dataclass(frozen=True, slots=True)
class Strike:
    """One thing done to one victim."""

    kind: Kind
    victim: Victim
    amount: float = 0.0
    """delay, pause: seconds. disk: which operation from now fails. driver: seconds until it is
    submitted again. 0 for others."""

    @property
    def kills(self) -> bool:
        """Whether a process ends by it."""
        return self.kind in KILLS


@dataclass(frozen=True, slots=True)
class Fault:
    """One or two strikes at one moment."""

    moment: Moment
    wait_s: float
    """Seconds after the last fault; at `snapshot`, the seconds before the harness looks out for
    one."""
    strikes: tuple[Strike, ...]

    @property
    def num_kills(self) -> int:
        """Strikes that end a process."""
        return sum(strike.kills for strike in self.strikes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What there is to hit."""

    shards: int
    workers: int
    nodes: int = 1
    """Ray nodes; the first one, which has the driver, is never hit."""

    def of(self, role: Role) -> list[Victim]:
        """All victims of a role."""
        counts = {"shard": self.shards, "worker": self.workers, "driver": 1}
        if role == "node":
            return [Victim("node", index) for index in range(1, self.nodes)]
        return [Victim(role, index) for index in range(counts[role])]


def parse_kinds(text: str, nodes: int) -> tuple[Kind, ...]:
    """Kinds from `shard,worker,…`.

    Raises:
        ConfigError: an unknown kind, none at all, or `node` with one node.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"--kinds: unknown kind '{name}'{hint(name, KINDS)}")
    if not names:
        raise ConfigError(f"--kinds: name at least one of {', '.join(KINDS)}")
    if "node" in names and nodes < 2:
        raise ConfigError("--kinds node needs --nodes 2 or more: the first node is never killed")
    return tuple(kind for kind in KINDS if kind in names)


class Deck(Generic[T]):
    """Deals cards in random order, and begins anew with all of them when none is left."""

    def __init__(self, cards: Sequence[T], rng: np.random.Generator) -> None:
        """Shuffled by `rng`; there must be a card."""
        self._cards = list(cards)
        self._rng = rng
        self._left: list[T] = []

    def deal(self) -> T:
        """The next card."""
        if not self._left:
            self._left = [self._cards[i] for i in self._rng.permutation(len(self._cards))]
        return self._left.pop()


_CARDS: dict[Kind, int] = {"shard": 3, "worker": 3, "driver": 2, "node": 1, "cut": 1, "delay": 1,
                           "disk": 1, "pause": 1}  # fmt: skip
_MOMENTS: tuple[Moment, ...] = ("random",) * 4 + ("snapshot",) * 2 + ("recovery",) * 2
_AT_ONCE = (1, 1, 1, 2)
_SAME_AGAIN = (True, False)
_LONG_PAUSE = (False, False, True)
_PAUSED: tuple[Role, ...] = ("shard", "worker", "driver")


@dataclass(slots=True)
class Planner:
    """An endless sequence of faults; the same arguments give the same ones."""

    targets: Targets
    kinds: tuple[Kind, ...]
    mean_gap_s: float
    """Mean of the exponentially distributed time between faults."""
    step_deadline_s: float | None = None
    """Of the job: some pauses last longer, so that a hanging process is taken for dead."""
    seed: Sequence[int] = (0,)
    _rng: np.random.Generator = field(init=False, repr=False)
    _kinds: Deck[Kind] = field(init=False, repr=False)
    _moments: Deck[Moment] = field(init=False, repr=False)
    _at_once: Deck[int] = field(init=False, repr=False)
    _again: Deck[bool] = field(init=False, repr=False)
    _long: Deck[bool] = field(init=False, repr=False)
    _last: Fault | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.mean_gap_s > 0:
            raise ConfigError(f"--mean-gap must be above 0 s, got {self.mean_gap_s:g}")
        self._rng = rng = np.random.default_rng(list(self.seed))
        self._kinds = Deck([kind for kind in self.kinds for _ in range(_CARDS[kind])], rng)
        self._moments = Deck(_MOMENTS, rng)
        self._at_once = Deck(_AT_ONCE, rng)
        self._again = Deck(_SAME_AGAIN, rng)
        self._long = Deck(_LONG_PAUSE, rng)

    @property
    def kills(self) -> bool:
        """Whether any fault ends a process."""
        return bool(KILLS & set(self.kinds))

    def next(self, most: int) -> Fault:
        """The next fault; of strikes that end a process, at most `most` (at least 1)."""
        after_kill = self._last is not None and self._last.num_kills > 0
        moment = self._moments.deal()
        if moment == "recovery" and not (after_kill and self._last_moment != "recovery"):
            moment = "random"  # there is nothing to recover from, or it would never end
        if moment == "recovery":
            wait_s = min(self._rng.exponential(1.0), _MAX_RECOVERY_GAP_S)
        else:
            wait_s = max(self._rng.exponential(self.mean_gap_s), MIN_GAP_S)
        self._last = fault = Fault(moment, float(wait_s), self._strikes(moment, most))
        return fault

    @property
    def _last_moment(self) -> Moment:
        return "random" if self._last is None else self._last.moment

    def _strikes(self, moment: Moment, most: int) -> tuple[Strike, ...]:
        if moment == "recovery" and self._again.deal():
            assert self._last is not None
            killed = [strike for strike in self._last.strikes if strike.kills]
            return (self._strike(killed[0].kind, killed[0].victim),)
        first = self._strike(self._kinds.deal())
        if not first.kills or most < 2 or self._at_once.deal() == 1:
            return (first,)
        others = [
            (kind, victim)
            for kind in self.kinds
            if kind in KILLS and kind != "node"
            for victim in self.targets.of(_role(kind))
            if victim != first.victim
        ]
        if first.kind == "node" or not others:
            return (first,)
        kind, victim = others[self._rng.integers(len(others))]
        return (first, self._strike(kind, victim))

    def _strike(self, kind: Kind, victim: Victim | None = None) -> Strike:
        if victim is None:
            role: Role = _role(kind)
            if kind == "pause":
                role = _PAUSED[self._rng.integers(len(_PAUSED))]
            victims = self.targets.of(role)
            victim = victims[self._rng.integers(len(victims))]
        return Strike(kind, victim, self._amount(kind))

    def _amount(self, kind: Kind) -> float:
        if kind == "driver":
            return float(self._rng.uniform(0.0, 2.0))
        if kind == "disk":
            return float(self._rng.integers(1, 21))
        if kind not in ("delay", "pause"):
            return 0.0
        deadline_s = self.step_deadline_s
        if kind == "pause" and deadline_s and deadline_s <= _LONGEST_USEFUL_DEADLINE_S:
            long = self._long.deal()
            if long:
                return 1.5 * deadline_s
        return float(10 ** self._rng.uniform(-1.0, 0.5))


def _role(kind: Kind) -> Role:
    """Whom a kind hits, where it says so."""
    if kind == "worker" or kind == "driver" or kind == "node":
        return kind
    return "shard"
