"""Features looked up together give what each gives alone, and are refused as the first bad one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps import feature_group, threads
from ps.config import COMBINERS, FeatureConfig, TableConfig
from ps.errors import InputError
from ps.export import open_export
from ps.feature_group import FeatureGroup, Source, groups_of
from ps.inputs import Bags, Dense, Ragged, Sparse
from ps.kernels import Kernel
from ps.lookup import lookup
from ps.quantized import quantized
from ps.ragged import F32
from ps.spec import FeatureSpec
from ps.threads import ONE_THREAD, Threads
from serving.lookup import AnyInput, LookupService
from tests.support.exports import write_export
from tests.support.reference import float32_rows, same_bits
from tests.support.strategies import WEIGHTS

ALONE = ["sequence", "shaped", "shaped sequence", "unknown"]
RAW = {"validate_weights_and_indices": False}


def features() -> dict[str, FeatureConfig]:
    """Tables of two dims and all combiners; features that share one, and that go alone."""
    tables = {c: TableConfig(6, 5, combiner=c, name=c) for c in COMBINERS}
    small = TableConfig(3, 2, combiner="sum", name="small")
    return {
        **{c: FeatureConfig(table) for c, table in tables.items()},
        **{f"raw {c}": FeatureConfig(table, **RAW) for c, table in tables.items()},  # type: ignore[arg-type]
        "small": FeatureConfig(small),
        "sequence": FeatureConfig(small, max_sequence_length=2),
        "shaped": FeatureConfig(tables["mean"], output_shape=[2]),
        "shaped sequence": FeatureConfig(small, max_sequence_length=2, output_shape=[2]),
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> LookupService:
    rng = np.random.default_rng(0)
    rows = {c: rng.normal(size=(6, 5)).astype(np.float32) for c in COMBINERS}
    rows["small"] = np.array([[-0.0] * 2, [1.5] * 2, [np.inf] * 2], dtype=np.float32)
    root = tmp_path_factory.mktemp("export")
    write_export(root, features(), rows)
    return LookupService(open_export(root))


def alone(service: LookupService, name: str, value: Any, threads: Threads = ONE_THREAD) -> F32:
    """The definition."""
    feature = service.feature(name)
    table = service.export.tables[feature.table]
    return lookup(feature, table.name, table.combiner, table.rows_VD, value, threads)


def outcome(call: Any) -> tuple[str, Any]:
    try:
        return "found", call()
    except InputError as e:
        return "refused", (type(e), str(e), e.feature)


@st.composite
def inputs(draw: st.DrawFn, names: list[str]) -> dict[str, AnyInput]:
    """Of a request whose features mostly agree about B, and are mostly right."""
    wild: list[list[int]] = [[0], [0], [-1], [6], [-1, 6, 2**40]]
    ids = st.integers(0, 2) | st.sampled_from(draw(st.sampled_from(wild)))
    num_examples = draw(st.integers(0, 3))
    weighted = draw(st.sampled_from([st.just(False), st.just(True), st.booleans()]))
    form = draw(
        st.sampled_from([*map(st.just, "bbbdr"), *map(st.sampled_from, ["bd", "bx", "bdrsmx"])])
    )

    def value() -> AnyInput:
        kind = draw(form)
        size = 2 if kind == "x" else num_examples
        if kind == "d":
            return Dense(np.array(draw(st.lists(ids, min_size=size, max_size=size)), np.int64))
        if kind == "m":
            return Dense(np.array([[draw(ids)]]))
        rows = [draw(st.lists(ids, max_size=3)) for _ in range(size)]
        weights = [[draw(WEIGHTS) for _ in row] for row in rows] if draw(weighted) else None
        bag = Ragged.from_lists(rows, weights)
        if kind == "s":
            coordinates = np.stack([np.repeat(np.arange(size), np.diff(bag.row_splits))] * 2, 1)
            return Sparse(coordinates, bag.ids, (size, 3), bag.weights)
        return bag if kind == "r" else Bags(bag)

    some = draw(st.sampled_from([names, [name for name in names if name not in ALONE]]))
    chosen = draw(st.lists(st.sampled_from(some), unique=True, max_size=6))
    return {name: value() for name in chosen}


def check(service: LookupService, request: dict[str, AnyInput]) -> None:
    kind, found = outcome(lambda: service.lookup(request))
    want_kind, wanted = outcome(lambda: {n: alone(service, n, v) for n, v in request.items()})
    assert kind == want_kind
    if kind == "refused":
        assert found == wanted
        return
    assert list(found) == list(request)
    assert all(same_bits(found[name], wanted[name]) for name in request)
    assert all(rows.flags.c_contiguous for rows in found.values())


def test_no_request_waits_for_a_compiler(
    service: LookupService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First in this file, so that nothing but the service has compiled for its dims."""
    monkeypatch.setattr(Kernel, "_compile", None)
    for weights in (None, [[1.0], [2.0, 3.0]]):
        bag = Ragged.from_lists([[0], [1, 2]], weights)
        coordinates = Sparse(np.array([[0, 0], [1, 0], [1, 1]]), bag.ids, (2, 2), bag.weights)
        for value in (Bags(bag), bag, coordinates, Dense(np.array([0, 1]))):
            for names in (["sum", "mean", "raw sqrtn"], ["small"], ["shaped"]):
                found = service.lookup(dict.fromkeys(names, value))
                assert all(same_bits(rows, alone(service, n, value)) for n, rows in found.items())
    service.lookup({"sequence": Bags(Ragged.from_lists([[0], [1, 2]]))})


@settings(max_examples=400)
@given(data=st.data())
def test_requests_give_what_each_feature_gives_alone(service: LookupService, data: Any) -> None:
    check(service, data.draw(inputs(sorted([*features(), "unknown"]))))


@settings(max_examples=100)
@given(data=st.data())
def test_threads_change_no_bit(service: LookupService, data: Any) -> None:
    many = LookupService(service.export, Threads(3))
    request = data.draw(inputs([n for n in features() if "s" in n]))
    with pytest.MonkeyPatch.context() as patch:
        for module in (feature_group, threads):
            patch.setattr(module, "MIN_PART_BYTES", 16)
        check(many, request)


def test_outputs_share_no_memory_with_each_other(service: LookupService) -> None:
    request = {c: Bags(Ragged.from_lists([[0], [1, 2]])) for c in COMBINERS}
    found = service.lookup(request)
    for name in COMBINERS:
        before = {other: found[other].copy() for other in COMBINERS if other != name}
        found[name].fill(7)
        assert all(same_bits(found[other], rows) for other, rows in before.items())
    assert same_bits(service.lookup(request)["sum"], alone(service, "sum", request["sum"]))
    assert request["sum"].entries.ids.tolist() == [0, 1, 2]


def test_a_gathered_row_keeps_the_sign_of_zero(service: LookupService) -> None:
    assert np.signbit(service.lookup({"small": Dense(np.array([0]))})["small"]).all()
    bag = Bags(Ragged.from_lists([[0]]))
    assert not np.signbit(service.lookup({"small": bag})["small"]).any()  # 0.0 + -0.0


def test_the_first_bad_feature_of_a_request_is_named(service: LookupService) -> None:
    good, bad = Bags(Ragged.from_lists([[0]])), Bags(Ragged.from_lists([[6]]))
    for order in (["mean", "sum"], ["sum", "mean"]):
        request: dict[str, AnyInput] = {"small": good, **dict.fromkeys(order, bad), "zzz": good}
        with pytest.raises(InputError, match=f"feature '{order[0]}': id 6 is not in"):
            service.lookup(request)


def test_requests_are_looked_up_in_one_group_per_form_and_dim(service: LookupService) -> None:
    sources = {
        name: Source(service.feature(name), table.combiner, table.rows_VD)
        for name in features()
        for table in [service.export.tables[service.feature(name).table]]
    }

    def names(threads: Threads, *forms: type) -> list[tuple[str, ...]]:
        pairs = zip(sources, forms * len(sources), strict=False)
        return [g.names for g in groups_of(sources, threads, *zip(*pairs, strict=True))]

    narrow = (*COMBINERS, *(f"raw {c}" for c in COMBINERS))
    assert names(ONE_THREAD, Bags) == [(*narrow, "shaped"), ("small",)]
    assert names(ONE_THREAD, Ragged) == [narrow, ("small",)]
    assert names(Threads(2), Dense) == [(*narrow, "shaped")]
    assert names(ONE_THREAD, Sparse) == []


def test_narrow_rows_are_read_as_their_float32() -> None:
    rows = quantized(np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), "int8")
    names = ("a", "b")
    sources = [Source(FeatureSpec(name=n, table="t"), "mean", rows) for n in names]
    values = {
        Dense: [Dense(np.array([5, 0])), Dense(np.array([1, 1]))],
        Bags: [Bags(Ragged.from_lists(ids)) for ids in ([[5, 0], []], [[-1, 3], [4]])],
    }
    for form, pair in values.items():
        found = FeatureGroup(form, sources, ONE_THREAD).lookup(dict(zip(names, pair, strict=True)))
        assert found is not None
        for source, value, got in zip(sources, pair, found, strict=True):
            assert same_bits(got, lookup(source.feature, "t", "mean", float32_rows(rows), value))


def test_tables_live_as_long_as_their_addresses() -> None:
    table = np.ones((3, 5), dtype=np.float32)
    source = Source(FeatureSpec(name="f", table="t"), "sum", table)
    group = FeatureGroup(Dense, [source], ONE_THREAD)
    del table, source
    junk = [np.zeros((3, 5), dtype=np.float32) for _ in range(100)]
    found = group.lookup({"f": Dense(np.array([2]))})
    assert found is not None
    assert junk
    assert found.tolist() == [[[1] * 5]]


def test_many_kinds_of_request_are_not_all_remembered(tmp_path: Path) -> None:
    table = TableConfig(2, 5, name="t")
    write_export(
        tmp_path,
        {f"f{i}": FeatureConfig(table) for i in range(20)},
        {"t": np.ones((2, 5), dtype=np.float32)},
    )
    service = LookupService(open_export(tmp_path))
    rng = np.random.default_rng(0)
    for _ in range(600):
        request = {f"f{i}": Dense(np.zeros(1, np.int64)) for i in rng.permutation(20)[:7]}
        assert list(service.lookup(request)) == list(request)
    assert service._groups.cache_info().currsize <= 256
    with pytest.raises(InputError, match="unknown feature"):
        service.lookup({"f" * 1000: Dense(np.zeros(1, np.int64))})
