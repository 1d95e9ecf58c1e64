"""Calls to actors: their results in time, and their errors as they were raised there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from ps.cluster import free_resources
from ps.errors import JobError, MantaError


def gather(
    refs: Sequence[Any],
    timeout_s: float,
    what: str,
    asking: Mapping[str, float] | None = None,
) -> list[Any]:
    """All results; raises the first error at once, even while others are still waiting.

    Args:
        refs: one per worker.
        timeout_s: for all of them.
        what: what workers do, for the message: "<n> workers had not <what> after …".
        asking: resources that each asks for, if it may be waiting for them.

    Raises:
        JobError: not all are there within the time.
    """
    pending = list(refs)
    deadline = time.monotonic() + timeout_s
    while pending:
        ready, pending = ray.wait(
            pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic())
        )
        if not ready:
            hint = ""
            if asking is not None:
                hint = f"; each asks for {asking}, the cluster has {free_resources()} free"
            raise JobError(
                f"{len(pending)} of {len(refs)} workers had not {what} after {timeout_s:g} s{hint}"
            )
        ray.get(ready)
    results: list[Any] = ray.get(list(refs))
    return results


@contextmanager
def unwrapped() -> Iterator[None]:
    """Errors raised inside actors as they were raised there; a dead actor as a `JobError`."""
    try:
        yield
    except ray.exceptions.RayError as e:
        error = plain_error(e)
        raise error from (None if isinstance(error, MantaError) else e)


def plain_error(error: BaseException) -> BaseException:
    """What an actor raised, or a `JobError` about a dead one."""
    cause = error
    while isinstance(cause, ray.exceptions.RayTaskError):
        cause = cause.cause
    if isinstance(cause, MantaError):
        return cause
    if isinstance(cause, ray.exceptions.RayError):
        return JobError(_first_line(cause))
    if cause is not error:
        return JobError(f"a worker failed: {type(cause).__name__}: {_first_line(cause)}")
    return error


def succeeded(ref: Any) -> bool:
    """Whether a call that is done came back without an error."""
    try:
        ray.get(ref, timeout=0)
    except ray.exceptions.RayError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Of an actor that could not start, Ray gives the traceback: the last line says why.
    return f"{lines[0]} {lines[-1]}" if "creation task" in lines[0] else lines[0]
