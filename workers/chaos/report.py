"""How `manta chaos` shows what happened: lines while it goes on, tables at the end, or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from workers.chaos.events import SPLIT, Recovery
from workers.chaos.plan import Kind
from workers.chaos.records import ChaosRecord, FaultRecord, RoundRecord

_PLAIN_WIDTH = 160
_SHOWN_DIFFERENCES = 10
_KILLED: dict[Kind, str] = {"shard": "kill", "worker": "kill", "driver": "kill", "node": "kill"}


class Lines:
    """Tells one line per fault, and notes, as they come."""

    def __init__(self, console: Console) -> None:
        """Print on a console."""
        self._console = console

    def struck(self, record: FaultRecord) -> None:
        """See `Listener`."""
        when = "" if record.moment == "random" else f" ({_MOMENTS[record.moment]})"
        self.note(
            f"round {record.round} {record.at_s:7.1f} s  {_what(record):<14} "
            f"{record.strike.victim!s:<9} at version {record.version}{when}"
        )

    def note(self, text: str) -> None:
        """See `Listener`."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


_MOMENTS = {"snapshot": "during a snapshot", "recovery": "during a recovery", "random": ""}


def show(record: ChaosRecord, console: Console) -> None:
    """Print the tables and the verdict."""
    if not console.is_terminal:  # in a log, lines are not to be folded at 80 columns
        console = Console(file=console.file, width=_PLAIN_WIDTH, color_system=None)
    if record.faults:
        console.print(_fault_table(record))
    if record.recovery_by_kind():
        console.print(_recovery_table(record))
    for name, value in _summary(record):
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)


def to_json(record: ChaosRecord) -> bytes:
    """The whole record as one JSON document."""
    document = {
        "job": record.job,
        "durability": record.durability,
        "seed": record.seed,
        "good": record.good,
        "kills": record.kills,
        "kills_wanted": record.kills_wanted,
        "faults": len(record.faults),
        "faults_by_kind": _counts(record),
        "recovery_s": {kind: asdict(s) for kind, s in record.recovery_by_kind().items()},
        "steps_replayed": sum(r.steps_replayed for r in record.rounds),
        "duplicates_dropped": sum(r.duplicates_dropped for r in record.rounds),
        "reference": _round_document(record.reference),
        "rounds": [_round_document(r) for r in record.rounds],
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)


def _fault_table(record: ChaosRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="faults", title_justify="left", pad_edge=False)
    for heading in ("round", "time s", "fault", "victim", "moment", "version", "recovery s"):
        right = heading in ("round", "time s", "version", "recovery s")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    table.add_column("notice + restart + restore + log + replay", no_wrap=True)
    table.add_column("action", no_wrap=True)
    table.add_column("replayed", justify="right", no_wrap=True)
    for fault in record.faults:
        after, recovery = fault.recovered_after_s, fault.recovery
        table.add_row(
            str(fault.round),
            f"{fault.at_s:.1f}",
            _what(fault),
            str(fault.strike.victim),
            fault.moment,
            str(fault.version),
            "never" if after is None else f"{after:.2f}",
            _split(fault),
            "" if recovery is None else recovery.action,
            "" if recovery is None else str(recovery.steps_replayed),
        )
    return table


def _split(fault: FaultRecord) -> str:
    noticed = fault.noticed_after_s
    if noticed is None or fault.recovery is None:
        return ""
    return " + ".join(f"{part:.2f}" for part in (noticed, *fault.recovery.split))


def _recovery_table(record: ChaosRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="recovery", title_justify="left", pad_edge=False)
    table.add_column("fault")
    for heading in ("count", "median s", "p90 s", "max s"):
        table.add_column(heading, justify="right")
    for kind, spread in record.recovery_by_kind().items():
        seconds = (spread.median_s, spread.p90_s, spread.max_s)
        table.add_row(kind, str(spread.count), *(f"{s:.2f}" for s in seconds))
    return table


def _summary(record: ChaosRecord) -> list[tuple[str, str]]:
    rounds = record.rounds
    reference = record.reference
    seconds = sum(r.seconds for r in rounds)
    faults = ", ".join(f"{count} {kind}" for kind, count in _counts(record).items())
    lines = [
        ("job", f"{record.job}, durability {record.durability}, seed {record.seed}"),
        ("undisturbed", f"{reference.steps} steps in {reference.seconds:.1f} s"),
        ("disturbed", f"{len(rounds)} rounds in {seconds:.1f} s"),
        ("kills", f"{record.kills}; faults: {faults or 'none'}"),
        ("drivers started", str(sum(r.driver_starts for r in rounds))),
        ("recoveries", str(sum(len(r.recoveries) for r in rounds))),
        ("steps replayed", str(sum(r.steps_replayed for r in rounds))),
        ("duplicates dropped", str(sum(r.duplicates_dropped for r in rounds))),
        ("snapshots", _snapshots(rounds)),
    ]
    if missed := sum(r.missed for r in rounds):
        lines.append(("strikes without a victim", str(missed)))
    if failures := [text for r in rounds for text in r.driver_failures]:
        lines.append(("drivers that ended by themselves", f"{len(failures)}; last: {failures[-1]}"))
    if left := [name for r in rounds for name in r.left_behind]:
        lines.append(("left behind by a driver that ended well", ", ".join(left)))
    lines += [(f"round {r.round} FAILED", r.failure) for r in rounds if r.failure is not None]
    for r in rounds:
        lines += _differences(r)
    lines.append(("bit-identical", _verdict(record)))
    return lines


def _snapshots(rounds: list[RoundRecord]) -> str:
    failed = sum(r.failed_snapshots for r in rounds)
    return f"{sum(r.snapshots for r in rounds)} written" + (
        f", {failed} failed or left out" if failed else ""
    )


def _differences(record: RoundRecord) -> list[tuple[str, str]]:
    if record.comparison is None:
        return []
    found = record.comparison.differences
    lines = [(f"round {record.round}", str(d)) for d in found[:_SHOWN_DIFFERENCES]]
    if len(found) > _SHOWN_DIFFERENCES:
        lines.append((f"round {record.round}", f"… {len(found) - _SHOWN_DIFFERENCES} more"))
    return lines


def _verdict(record: ChaosRecord) -> str:
    compared = [r.comparison for r in record.rounds if r.comparison is not None]
    differing = [c for c in compared if not c.identical]
    if differing:
        return str(differing[0])
    if not compared or any(r.failure is not None for r in record.rounds):
        return "unknown: a run did not end well"
    return str(compared[-1])


def _counts(record: ChaosRecord) -> dict[str, int]:
    counts: dict[str, int] = {}
    for fault in record.faults:
        counts[fault.strike.kind] = counts.get(fault.strike.kind, 0) + 1
    return dict(sorted(counts.items()))


def _what(fault: FaultRecord) -> str:
    strike = fault.strike
    if strike.kind in ("delay", "pause"):
        return f"{strike.kind} {strike.amount:.1f} s"
    if strike.kind == "disk":
        return f"disk, {strike.amount:.0f} on"
    return _KILLED.get(strike.kind, strike.kind)


def _round_document(record: RoundRecord) -> dict[str, Any]:
    comparison = record.comparison
    return {
        "round": record.round,
        "seconds": record.seconds,
        "steps": record.steps,
        "failure": record.failure,
        "identical": None if comparison is None else comparison.identical,
        "comparison": None if comparison is None else asdict(comparison),
        "faults": [_fault_document(fault) for fault in record.faults],
        "recoveries": [_recovery_document(recovery) for recovery in record.recoveries],
        "missed": record.missed,
        "snapshots": record.snapshots,
        "failed_snapshots": record.failed_snapshots,
        "steps_replayed": record.steps_replayed,
        "duplicates_dropped": record.duplicates_dropped,
        "driver_starts": record.driver_starts,
        "driver_failures": record.driver_failures,
        "left_behind": record.left_behind,
    }


def _fault_document(fault: FaultRecord) -> dict[str, Any]:
    return {
        "number": fault.number,
        "at_s": fault.at_s,
        "kind": fault.strike.kind,
        "victim": str(fault.strike.victim),
        "amount": fault.strike.amount,
        "moment": fault.moment,
        "version": fault.version,
        "recovered_after_s": fault.recovered_after_s,
        "noticed_after_s": fault.noticed_after_s,
        "recovery": None if fault.recovery is None else _recovery_document(fault.recovery),
    }


def _recovery_document(recovery: Recovery) -> dict[str, Any]:
    return {
        "cause": recovery.cause,
        "action": recovery.action,
        "step": recovery.step,
        "steps_replayed": recovery.steps_replayed,
        "total_s": recovery.total_s,
        **dict(zip(SPLIT, recovery.split, strict=False)),
    }
