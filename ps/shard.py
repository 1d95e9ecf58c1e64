"""`ShardState`: one shard's rows, slots and dense slices, and when they may be read and changed.

Pure: no Ray, clock, thread or disk. In sync mode version v is the state after v steps. The version
t + 1 is made when the pushes of all workers for step t are in (`ps.reduction`). A pull names the
version it wants and is answered the moment that version is made, before anything later is applied;
with `ShardSpec.history`, also when that version has gone by, for a worker that does a step again.

In async mode a push is applied when it arrives, as a step of its own, and a pull takes what is
there; it waits only while the slowest worker is more than `max_staleness` steps behind (stale
synchronous parallel: Ho et al., NIPS 2013). The version is the slowest worker's number of steps.

Worker w's fence is the step that the shard expects of it next: pushes below it are dropped. What
outlives the process is made of two things: a `Cut` of all there is at one version, and a `LogEntry`
per version of what it changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from ps.cut import Cut
from ps.errors import ProtocolError
from ps.message_checks import check_fences, check_worker
from ps.messages import LATEST, LogEntry, Pull, Push, Rows, ShardStats
from ps.partition import Slab
from ps.ragged import F32
from ps.shard_counts import Counts
from ps.shard_spec import Mode, ShardSpec
from ps.shard_values import ShardValues, Touched

__all__ = ["MAX_STEPS_AHEAD", "Mode", "ShardSpec", "ShardState"]

Reply = Callable[[Rows], None]
MAX_STEPS_AHEAD = 64
"""Pushes of one worker that a shard keeps for others to catch up; workers send fewer."""


class ShardState:
    """One shard. Refuses pulls and pushes until `set_dense` has been called."""

    def __init__(self, spec: ShardSpec) -> None:
        self.spec = spec
        self.version = 0
        self._name = f"shard {spec.shard_id}"
        self._is_async = spec.mode == "async"
        self._values = ShardValues(spec)
        self._next_step = [0] * spec.num_workers
        self._durable = [0] * spec.num_workers  # never beyond `fences()`
        self._pushes: defaultdict[int, dict[int, Push]] = defaultdict(dict)
        self._entries = 0
        self._on_version: Callable[[LogEntry], None] | None = None
        self._armed: tuple[int, Callable[[Cut], None]] | None = None
        self._waiting: list[tuple[Pull, Reply]] = []
        self._flushes: list[tuple[int, int, Callable[[int], None]]] = []
        self._counts = Counts()

    # --- the state as a whole

    def set_dense(
        self,
        dense: F32,
        state: F32,
        slots: Mapping[str, F32] | None = None,
        version: int = 0,
        fences: Sequence[int] | None = None,
        entries_applied: int = 0,
    ) -> None:
        """Give the shard its slices of the flat dense vectors; it is ready from then on.

        What it had of pushes, history and cuts is forgotten.

        Args:
            dense: float32 [p], trainable.
            state: float32 [s], non-trainable.
            slots: float32 [p] per slot of the dense optimizer; None for their first values.
            version: number of steps that these values, and the tables, have behind them. In async
                mode that is the least fence, if they are given.
            fences: per worker, the step that is expected next; None for `version`.
            entries_applied: async mode: what the property is to start from.

        Raises:
            ProtocolError: fences of other workers than the shard has, or sync mode and one is not
                `version`.
        """
        fences = [version] * self.spec.num_workers if fences is None else list(fences)
        self._check_fences(fences, version)
        self.disarm()
        self._values.set_dense(dense, state, slots)
        self._pushes.clear()
        self._counts.pulls.clear()
        self.version = min(fences)
        self._next_step, self._durable = list(fences), list(fences)
        self._entries = entries_applied
        # Of versions gone by there is nothing left to answer with; who asked has to ask again.
        self._waiting = [(p, r) for p, r in self._waiting if not 0 <= p.version < self.version]
        self._go_on()

    def write_rows(
        self, table: str, first_local_row: int, rows: F32, slots: Mapping[str, F32]
    ) -> None:
        """Replace rows of a table and their slots, float32 [n, D] each, by those of a snapshot.

        The shard is not ready until `set_dense` says what version they belong to.

        Raises:
            ProtocolError: other slots than the table's, another shape or dtype, or rows that are
                not there; nothing has changed then.
        """
        self._values.write_rows(table, first_local_row, rows, slots)
        self._armed = None

    def fences(self) -> tuple[int, ...]:
        """Per worker: the step that comes next in the state that the shard has.

        In sync mode all are its version: pushes that wait for others are not in the state yet.
        """
        if self._is_async:
            return tuple(self._next_step)
        return (self.version,) * self.spec.num_workers

    @property
    def entries_applied(self) -> int:
        """`LogEntry.version` of the last one: the version, or in async mode the pushes applied."""
        return self._entries if self._is_async else self.version

    def slabs(self, table: str) -> Iterator[tuple[Slab, F32, dict[str, F32]]]:
        """(slab, its rows, its slots) of a table, as views, in local order."""
        return self._values.slabs(table)

    def dense(self) -> tuple[F32, dict[str, F32], F32]:
        """Views of (trainable slice, its slots, non-trainable slice)."""
        return self._values.dense()

    def check_version(self, version: int) -> None:
        """See that exactly `version` steps are applied, before the whole state is read.

        Raises:
            ProtocolError: more or fewer steps.
        """
        if self.version != version:
            raise ProtocolError(f"{self._name} is at version {self.version}, not {version}")

    def stats(self) -> ShardStats:
        """Counters and sizes; a shard without state has them too."""
        cut = self._values.cut
        return ShardStats(
            shard_id=self.spec.shard_id,
            version=self.version,
            rows_pulled=self._counts.rows_pulled,
            rows_pushed=self._values.rows_pushed,
            duplicates_dropped=self._counts.duplicates,
            num_rows=self._values.num_rows,
            size_bytes=self._values.size_bytes,
            staleness=self._counts.staleness,
            fences=self.fences(),
            expected=tuple(self._next_step),
            ready=self._values.is_ready,
            cut_version=self._armed[0] if self._armed else cut.version if cut else None,
            saved_bytes=cut.saved_bytes if cut else 0,
        )

    # --- what workers ask for

    def pull(self, pull: Pull, reply: Reply) -> None:
        """Answer through `reply`, at once or when the wanted version is made.

        Raises:
            ShardNotReadyError: no state yet.
            ProtocolError: the version has gone by, or a row is not on this shard.
        """
        self._check_pull(pull)
        if self._is_due(pull):
            reply(self._read(pull))
        else:
            self._waiting.append((pull, reply))

    def push(self, push: Push) -> None:
        """Take one worker's gradients; apply the step when all workers' are in (async: at once).

        A repeated push is dropped. The arrays must stay as they are until `done_step` is past it.

        Raises:
            ShardNotReadyError: no state yet.
            ProtocolError: a step of this worker is missing in between, it is too far ahead of the
                others, a row is not on this shard, or an array has the wrong shape.
        """
        self._values.check_push(push)
        check_worker(self._name, push.worker, self.spec.num_workers)
        expected = self._next_step[push.worker]
        if push.step < expected:
            self._counts.duplicates += 1
            return
        if push.step > expected:
            raise ProtocolError(
                f"{self._name}: worker {push.worker} pushed step {push.step}, "
                f"but step {expected} is next"
            )
        if self._is_async:
            touched = self._values.apply([push], push.step)
            self._next_step[push.worker] = push.step + 1  # not before: it may have failed
            self._entries += 1
            self._made(min(self._next_step), [push], touched)
            return
        if push.step >= self.version + MAX_STEPS_AHEAD:
            raise ProtocolError(
                f"{self._name}: worker {push.worker} pushed step {push.step}, "
                f"{MAX_STEPS_AHEAD} or more ahead of the slowest worker"
            )
        self._next_step[push.worker] = push.step + 1
        step = self.version
        self._pushes[push.step][push.worker] = push
        # At most one version can be made: each worker's steps come one after the other.
        if len(self._pushes.get(step, ())) == self.spec.num_workers:
            pushes = self._pushes[step]
            ranked = [pushes[worker] for worker in range(self.spec.num_workers)]
            touched = self._values.apply(ranked, step)
            del self._pushes[step]
            self._made(step + 1, ranked, touched)

    def done_step(self, worker: int) -> int:
        """Pushes of a worker for steps below this one are done with; their arrays are free again.

        They are applied, and durable if `on_version` is set.
        """
        if not 0 <= worker < self.spec.num_workers:
            return 0
        if self._on_version is not None:
            return self._durable[worker]
        return self._next_step[worker] if self._is_async else self.version

    def flush(self, worker: int, reply: Callable[[int], None]) -> None:
        """Call `reply` with the version when all pushes of a worker so far are done with.

        Raises:
            ShardNotReadyError: no state yet.
        """
        self._values.check_ready()
        self._flushes.append((worker, self._next_step[worker], reply))
        self._answer_flushes()

    def forget(self, replies: Collection[object]) -> None:
        """Drop the pulls and flushes that wait to be answered so: who asked is gone."""
        self._waiting = [(pull, reply) for pull, reply in self._waiting if reply not in replies]
        self._flushes = [flush for flush in self._flushes if flush[2] not in replies]

    # --- what makes it outlive the process

    @property
    def on_version(self) -> Callable[[LogEntry], None] | None:
        """Called with what each version (async: each push) changed, once it is made: a commit log.

        Where one is set, the state so far counts as durable; later pushes do by `mark_durable`.
        """
        return self._on_version

    @on_version.setter
    def on_version(self, call: Callable[[LogEntry], None] | None) -> None:
        self._on_version = call
        self._values.is_logged = call is not None
        self.mark_durable(self.fences())

    def mark_durable(self, fences: Sequence[int]) -> None:
        """Take note that pushes below each worker's fence would survive; answers flushes.

        Fences of a state that the shard has been taken back from do no harm.
        """
        self._durable = [
            max(old, min(new, applied))
            for old, new, applied in zip(self._durable, fences, self.fences(), strict=True)
        ]
        self._answer_flushes()

    def apply_entry(self, entry: LogEntry) -> None:
        """Do what a version of a log did; all of the shard is then as it was when that was made.

        `on_version` is not called: the entry is durable.

        Raises:
            ShardNotReadyError: no state yet.
            ProtocolError: another version is next, or it is not of this shard; nothing has changed.
        """
        self._values.check_entry(entry)
        if entry.version != self.entries_applied + 1:
            raise ProtocolError(
                f"{self._name}: log entry {entry.version} came after {self.entries_applied}"
            )
        self._check_fences(entry.fences, entry.version)
        self._values.apply_entry(entry)
        self._pushes.pop(self.version, None)
        self._next_step = [max(n, f) for n, f in zip(self._next_step, entry.fences, strict=True)]
        self._entries += 1
        self._counts.note_update()
        self.version, self._durable = min(entry.fences), list(entry.fences)
        self._go_on()

    def arm_cut(self, version: int, begin: Callable[[Cut], None]) -> None:
        """Call `begin` with a cut of the state at `version`: when that is made, or now if it is.

        The pushes of the next step then change no row that the cut has not copied or saved. In
        async mode the version is only what the cut is called, and it begins at once.

        Raises:
            ShardNotReadyError: no state yet.
            ProtocolError: the version has gone by, or there is a cut already.
        """
        self._values.check_ready()
        other = self.stats().cut_version
        if other is not None:
            raise ProtocolError(f"{self._name}: the cut of version {other} is not over")
        if not self._is_async and version < self.version:
            raise ProtocolError(
                f"{self._name} is at version {self.version}, too late for a cut of {version}"
            )
        self._armed = version, begin
        self._begin_cut()

    def disarm(self) -> None:
        """Forget the cut that is armed or running, if any; a running one has no next piece then."""
        self._armed = None
        self._values.close_cut()

    # --- how it goes on

    def _made(self, version: int, pushes: Sequence[Push], touched: Touched) -> None:
        """Pushes were applied."""
        self._counts.note_update(pushes)
        self.version = version
        if self._on_version is not None:
            self._on_version(self._values.entry(self.entries_applied, self.fences(), touched))
        self._go_on()

    def _go_on(self) -> None:
        """Do what has waited for this version; the rows stay as they are meanwhile."""
        self._begin_cut()
        self._answer_flushes()
        if not self._waiting:
            return
        due = [(p, reply) for p, reply in self._waiting if self._is_due(p)]
        self._waiting = [(p, reply) for p, reply in self._waiting if not self._is_due(p)]
        for pull, reply in due:
            reply(self._read(pull))

    def _answer_flushes(self) -> None:
        if not self._flushes:
            return
        due = [f for f in self._flushes if self.done_step(f[0]) >= f[1]]
        self._flushes = [f for f in self._flushes if self.done_step(f[0]) < f[1]]
        for _, _, reply in due:
            reply(self.version)

    def _begin_cut(self) -> None:
        if self._armed is None or not (self._is_async or self._armed[0] == self.version):
            return
        (version, begin), self._armed = self._armed, None
        try:
            begin(self._values.start_cut(version, self.fences(), self.entries_applied))
        except BaseException:  # nobody will read it
            self.disarm()
            raise

    def _is_due(self, pull: Pull) -> bool:
        if pull.version != LATEST:
            return pull.version <= self.version
        return pull.step - self.version <= self.spec.max_staleness

    def _read(self, pull: Pull) -> Rows:
        behind = 0 if pull.version == LATEST else self.version - pull.version
        rows = Rows(self.version - behind, *self._values.read(pull, behind))
        self._counts.rows_pulled += sum(local.size for local in pull.local_rows)
        if 0 <= pull.step - self._next_step[pull.worker] < MAX_STEPS_AHEAD:  # a push will follow
            self._counts.note_pull(pull.worker, pull.step, behind)
        return rows

    # --- what it refuses

    def _check_pull(self, pull: Pull) -> None:
        self._values.check_pull(pull)
        check_worker(self._name, pull.worker, self.spec.num_workers)
        oldest = self.version - self._values.num_old_versions
        if pull.version < oldest and pull.version != LATEST:
            kept = f", and keeps none before {oldest}" if oldest < self.version else ""
            raise ProtocolError(
                f"{self._name}: worker {pull.worker} wants version {pull.version} "
                f"for step {pull.step}, but the shard is at version {self.version}{kept}"
            )
        ahead = pull.version - self.version
        if pull.version == LATEST:
            ahead = pull.step - self.version - self.spec.max_staleness
        if ahead > MAX_STEPS_AHEAD:
            raise ProtocolError(
                f"{self._name}: worker {pull.worker} pulls for step {pull.step}, "
                f"more than {MAX_STEPS_AHEAD} ahead of the shard's version {self.version}"
            )

    def _check_fences(self, fences: Sequence[int], version: int) -> None:
        wanted = None if self._is_async else version
        check_fences(self._name, fences, self.spec.num_workers, wanted)
