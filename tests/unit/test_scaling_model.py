"""The cost model of `benchmarks.scaling`: cases computed by hand, and what must always hold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling.model import Case, Cost, Costs, Machine, Parts, Roles, busy, step
from benchmarks.scaling.predict import distinct
from benchmarks.scaling.simulate import simulated_step

_ZERO = Roles(ask=Cost(), take=Cost(), push=Cost(), answer=Cost(), apply=Cost())
_FREE = Costs(
    arena=_ZERO, tcp=_ZERO, compute=Cost(), reduce=Cost(), send_byte=0.0, receive_byte=0.0,
    checksum_byte=0.0, convert_number=0.0, wake=0.0, contention=1.0,
)  # fmt: skip
_ROLES = Roles(
    ask=Cost(message=20e-6),
    take=Cost(message=10e-6),
    push=Cost(message=30e-6),
    answer=Cost(message=50e-6, byte=0.1e-9, far_byte=0.05e-9),
    apply=Cost(message=60e-6, byte=0.1e-9),
)
_USUAL = replace(
    _FREE, arena=_ROLES, tcp=_ROLES, compute=Cost(byte=0.05e-9), reduce=Cost(row=5e-9, byte=0.1e-9),
    send_byte=0.1e-9, receive_byte=0.2e-9, checksum_byte=0.02e-9, wake=10e-6,
)  # fmt: skip

cases = st.builds(
    Case,
    shards=st.sampled_from([1, 2, 4, 8]),
    workers=st.sampled_from([1, 2, 4]),
    rows=st.sampled_from([100, 10_000, 200_000]),
    dim=st.sampled_from([16, 128]),
    transport=st.sampled_from(["arena", "tcp"]),
    lookahead=st.sampled_from([0, 1]),
)
machines = st.sampled_from(
    [Machine(cores=2), Machine(), Machine(bytes_per_s=3e9, round_trip_s=5e-5, shards_per_host=4)]
)


def test_one_shard_and_one_worker_wait_for_each_other() -> None:
    us = 1e-6
    roles = Roles(
        ask=Cost(step=us), take=Cost(step=2 * us), push=Cost(step=4 * us),
        answer=Cost(message=8 * us, row=0.1 * us), apply=Cost(message=16 * us, row=0.2 * us),
    )  # fmt: skip
    costs = replace(_FREE, arena=roles, compute=Cost(row=0.4 * us), wake=32 * us)
    case = Case(shards=1, workers=1, rows=10, dim=16)
    # gradients, push, (accept, update, accept the pull), gather, take; two wake-ups
    wanted = (0.4 * 10 + 4 + (16 + 0.2 * 10 + 8) + 0.1 * 10 + 2 + 2 * 32) * us
    assert step(case, costs, Machine(cores=2)).step_s == pytest.approx(wanted)
    assert simulated_step(case, costs, Machine(cores=2)) == pytest.approx(wanted)


def test_the_pull_is_asked_for_while_the_shard_updates() -> None:
    roles = replace(_ZERO, ask=Cost(step=3e-5), apply=Cost(message=5e-5))
    case = Case(shards=1, workers=1, rows=10, dim=16)
    costs = replace(_FREE, arena=roles)
    assert step(case, costs, Machine(cores=2)).step_s == pytest.approx(5e-5)
    assert step(case, costs, Machine(cores=1)).step_s == pytest.approx(8e-5)


def test_four_shards_on_two_cores_take_twice_as_long_as_two() -> None:
    costs = replace(_FREE, arena=replace(_ZERO, apply=Cost(message=5e-5)))
    for shards, wanted in ((1, 5e-5), (2, 5e-5), (4, 10e-5)):
        case = Case(shards=shards, workers=1, rows=10, dim=16)
        assert step(case, costs, Machine(cores=2)).step_s == pytest.approx(wanted)
        assert simulated_step(case, costs, Machine(cores=2)) == pytest.approx(wanted, rel=1e-3)


def test_bytes_of_messages() -> None:
    case = Case(shards=2, workers=1, rows=1_000, dim=64, tables=26, transport="tcp")
    description = 64 + 8 * (6 * 26 + 4)
    assert case.ask_bytes == description + 500 * 8
    assert case.answer_bytes == 64 + 500 * 256
    assert case.push_bytes == description + 500 * (8 + 256)
    assert replace(case, number_bytes=2).answer_bytes == 64 + 500 * 128


def test_a_full_network_card_bounds_the_step() -> None:
    case = Case(shards=4, workers=8, rows=100_000, dim=64, transport="tcp", lookahead=1)
    machine = Machine(bytes_per_s=1e9, shards_per_host=4)
    found = step(case, _FREE, machine)
    up = case.push_bytes + case.ask_bytes
    assert found.bound == "shard network"
    assert found.loads["shard network"] == pytest.approx(8 * 4 * up / 1e9)
    assert found.step_s >= found.loads["shard network"]


def test_the_arena_needs_no_network() -> None:
    case = Case(shards=2, workers=2, rows=1_000, dim=64)
    loads = busy(case, _USUAL, Machine(cores=2, bytes_per_s=1.0))
    assert set(loads) == {"worker CPU", "shard CPU", "cores"}


@settings(deadline=None)
@given(cases, machines)
def test_no_step_is_shorter_than_the_work_of_a_resource(case: Case, machine: Machine) -> None:
    found = step(case, _USUAL, machine)
    assert found.step_s >= max(found.loads.values())
    assert simulated_step(case, _USUAL, machine) >= 0.95 * max(found.loads.values())


@settings(deadline=None)
@given(cases, machines)
def test_more_of_anything_takes_no_less(case: Case, machine: Machine) -> None:
    now = step(case, _USUAL, machine).step_s
    for more in (
        replace(case, rows=2 * case.rows),
        replace(case, dim=2 * case.dim),
        replace(case, workers=2 * case.workers),
        replace(case, lookahead=0),
    ):
        assert step(more, _USUAL, machine).step_s >= now * (1 - 1e-12)
    slower = replace(machine, bytes_per_s=machine.bytes_per_s / 2)
    assert step(case, _USUAL, slower).step_s >= now * (1 - 1e-12)
    assert step(case, _USUAL.scaled(wake=2.0, send_byte=2.0), machine).step_s >= now * (1 - 1e-12)


@settings(deadline=None, max_examples=30)
@given(cases, machines)
def test_the_simulation_agrees_with_the_formula(case: Case, machine: Machine) -> None:
    formula = step(case, _USUAL, machine).step_s
    played = simulated_step(case, _USUAL, machine)
    assert 0.7 < formula / played < 1.5


def test_a_workers_parts_add_up() -> None:
    case = Case(shards=4, workers=2, rows=1_000, dim=64, transport="tcp")
    parts = Parts.of(case, _USUAL, Machine())
    moved = 4 * (case.push_bytes + case.ask_bytes) * 0.12e-9 + 4 * case.answer_bytes * 0.22e-9
    on_rows = 1_000 * 256 * 0.05e-9
    assert parts.worker().seconds() == pytest.approx(4 * 60e-6 + on_rows + moved)


def test_distinct_ids_of_zipf() -> None:
    assert distinct(1, 1_000) == pytest.approx(1.0)
    assert distinct(1e9, 1_000) == pytest.approx(1_000)
    chances = [r**-1.05 for r in range(1, 101)]
    total = sum(chances)
    exact = sum(1 - (1 - c / total) ** 50 for c in chances)
    assert distinct(50, 100) == pytest.approx(exact)
    assert distinct(100, 1_000) < distinct(200, 1_000) < 200
    assert math.isfinite(distinct(1e6))
