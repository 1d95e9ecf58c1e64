"""A row's first value depends on (seed, table, id) alone, and has the promised distribution."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.config import FeatureConfig, TableConfig
from ps.errors import ConfigError
from ps.initializers import (
    INITIALIZERS,
    Constant,
    Initializer,
    RandomNormal,
    RandomUniform,
    RowIdInitializer,
    TruncatedNormal,
    table_key,
)
from ps.kernels.random import normal_rows, truncated_normal_rows, uniform_rows
from ps.ragged import I64
from ps.spec import resolve
from tests.support import reference as twin
from tests.support.reference import key_that_draws, same_bits
from tests.support.strategies import frozen

RANDOM = [TruncatedNormal(0.5, 0.1), RandomNormal(-1.0, 2.0), RandomUniform(-3.0, 5.0)]
ALL = [*RANDOM, Constant(2.5), RowIdInitializer(7)]
KEYS = st.integers(0, 2**64 - 1)
IDS = st.lists(st.integers(0, 2**45), max_size=12)
few = settings(max_examples=60)


def i64(values: Any) -> I64:
    return np.array(values, dtype=np.int64)


def draw_that_gives(u: float) -> int:
    """64 bits whose place in (0, 1) is u."""
    return int(u * 2**64)


@few
@given(key=KEYS, ids=IDS, dim=st.sampled_from([1, 3, 17]))
def test_uniform_rows_equal_their_twin_bit_for_bit(key: int, ids: list[int], dim: int) -> None:
    args = (np.uint64(key), i64(ids), dim, -0.05, 0.05)
    got = uniform_rows(*args)
    assert same_bits(got, twin.uniform_rows(*args))
    assert same_bits(got, uniform_rows(args[0], frozen(args[1]), *args[2:]))


@few
@given(key=KEYS, ids=IDS, dim=st.sampled_from([1, 3, 17]))
def test_normal_rows_equal_their_twin_to_the_last_place(key: int, ids: list[int], dim: int) -> None:
    args = (np.uint64(key), i64(ids), dim, 0.0, 0.25)
    for kernel, plain in [
        (normal_rows, twin.normal_rows),
        (truncated_normal_rows, twin.truncated_normal_rows),
    ]:
        got, want = kernel(*args), plain(*args)
        # Both quantiles are good to 1e-15; that can fall on either side of a float32's border.
        np.testing.assert_array_max_ulp(got, want, maxulp=1)
        assert same_bits(got, kernel(args[0], frozen(args[1]), *args[2:]))


@pytest.mark.parametrize("initializer", ALL, ids=repr)
@few
@given(data=st.data(), ids=IDS)
def test_a_row_is_the_same_in_any_order_and_any_company(
    initializer: Initializer, data: Any, ids: list[int]
) -> None:
    key = table_key(1, "ads")
    together = initializer.rows(key, i64(ids), 5)
    places = data.draw(st.permutations(range(len(ids))).map(lambda p: p[: len(p) // 2 + 1]))
    apart = initializer.rows(key, i64([ids[p] for p in places]), 5)
    assert apart.shape == (len(places), 5)
    assert same_bits(apart, together[places] if ids else apart)


@pytest.mark.parametrize("initializer", RANDOM, ids=repr)
def test_tables_seeds_ids_and_columns_all_differ(initializer: Initializer) -> None:
    ids = np.arange(1000)
    draws = [
        initializer.rows(table_key(seed, table), ids, 4)
        for seed, table in [(0, "a"), (1, "a"), (0, "b"), (10, ""), (1, "0")]
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert np.mean(a == b) < 0.001
        assert len(np.unique(a)) > 0.99 * a.size
        assert abs(np.corrcoef(a[:-1, 0], a[1:, 0])[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("initializer", "row_0", "row_far"),
    [
        (RandomUniform(0.0, 1.0), [0.68548703, 0.87685001], [0.41011518, 0.00822363]),
        (RandomNormal(0.0, 1.0), [0.48309827, 1.1593833], [-0.22724871, -2.3988364]),
        (TruncatedNormal(0.0, 1.0), [0.4594579, 1.0789869], [-0.21674134, -1.8720537]),
    ],
    ids=repr,
)
def test_values_stay_what_they_are_from_release_to_release(
    initializer: Initializer, row_0: list[float], row_far: list[float]
) -> None:
    assert table_key(1, "ads") == 7365538102399264885
    rows = initializer.rows(table_key(1, "ads"), i64([0, 10**12]), 2)
    np.testing.assert_allclose(rows, [row_0, row_far], rtol=1e-5)


def test_splitmix64_gives_the_published_sequence() -> None:
    """First outputs for seed 1234567 (Vigna's splitmix64.c)."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    assert [twin.mix64((1234567 + gamma * (i + 1)) & mask) for i in range(3)] == published
    got = uniform_rows(np.uint64(1234567), np.arange(3), 1, 0.0, 1.0)[:, 0]
    np.testing.assert_allclose(got, np.array(published) / 2.0**64, rtol=1e-7)


@pytest.mark.parametrize(
    ("initializer", "mean", "std", "low", "high"),
    [
        (TruncatedNormal(0.5, 0.1), 0.5, 0.1 * 0.8796257, 0.3, 0.7),
        (RandomNormal(-1.0, 2.0), -1.0, 2.0, -np.inf, np.inf),
        (RandomUniform(-3.0, 5.0), 1.0, 8 / np.sqrt(12), -3.0, 5.0),
        (Constant(2.5), 2.5, 0.0, 2.5, 2.5),
    ],
    ids=lambda v: repr(v) if isinstance(v, Initializer) else "",
)
def test_moments_and_range(
    initializer: Initializer, mean: float, std: float, low: float, high: float
) -> None:
    values = initializer.rows(table_key(3, "t"), np.arange(40_000), 5).astype(np.float64)
    error = 4 * std / np.sqrt(values.size)  # four standard errors of a mean
    assert abs(values.mean() - mean) <= error
    assert abs(values.std() - std) <= error
    assert values.min() >= low - 1e-7
    assert values.max() <= high + 1e-7


def test_the_default_of_a_table_is_a_truncated_normal_scaled_by_its_dim() -> None:
    spec = resolve([FeatureConfig(TableConfig(50_000, 16))]).tables[0]
    assert spec.initializer == TruncatedNormal(0.0, 0.25)
    values = spec.initializer.rows(table_key(0, spec.name), np.arange(50_000), 16)
    assert values.std() == pytest.approx(0.2200, abs=5e-4)
    assert 0.499 < np.abs(values).max() <= 0.5


def test_normal_values_match_their_quantiles() -> None:
    """Kolmogorov-Smirnov distance of 100,000 values: 1.63/√n is the 1 % point."""
    values = np.sort(normal_rows(table_key(5, "t"), np.arange(100_000), 1, 0.0, 1.0)[:, 0])
    want = np.array([NormalDist().cdf(float(v)) for v in values])
    got = (np.arange(values.size) + 0.5) / values.size
    assert np.abs(got - want).max() < 1.63 / np.sqrt(values.size)


@pytest.mark.parametrize(
    "u", [2.0**-50, 1e-12, 1e-7, 0.001, 0.0749, 0.0751, 0.3, 0.5, 0.7, 0.9249, 0.9251, 1 - 1e-12]
)
def test_quantiles_are_accurate_everywhere(u: float) -> None:
    key = key_that_draws(draw_that_gives(u))
    exact_u = twin.unit(int(key), 0)
    assert exact_u == pytest.approx(u, rel=1e-2)
    got = normal_rows(key, i64([0]), 1, 0.0, 1.0)[0, 0]
    want = NormalDist().inv_cdf(exact_u)
    assert got == pytest.approx(want, rel=2.0**-23, abs=1e-15)


@pytest.mark.parametrize("bits", [0, 1, 2**63, 2**64 - 1, 2**64 - 2**11])
def test_the_ends_of_the_sequence_stay_inside_every_distribution(bits: int) -> None:
    key, ids = key_that_draws(bits), i64([0])
    normal = normal_rows(key, ids, 1, 0.0, 1.0)[0, 0]
    assert np.isfinite(normal)
    assert abs(normal) < 8.5
    assert abs(truncated_normal_rows(key, ids, 1, 0.0, 0.25)[0, 0]) <= 0.5
    assert 0.0 <= uniform_rows(key, ids, 1, 0.0, 1.0)[0, 0] <= 1.0


def test_row_ids_are_their_own_values() -> None:
    ids = i64([3, 0, 10**6])
    np.testing.assert_array_equal(
        RowIdInitializer(5).rows(np.uint64(0), ids, 2), [[8, 8], [5, 5], [1_000_005, 1_000_005]]
    )


@pytest.mark.parametrize("initializer", ALL, ids=repr)
def test_calling_an_initializer_as_tensorflow_does_gives_a_whole_table(
    initializer: Initializer,
) -> None:
    table = initializer((6, 3), dtype=np.float32)
    assert table.shape == (6, 3)
    assert table.dtype == np.float32
    assert same_bits(table, initializer.rows(table_key(0, ""), np.arange(6), 3))


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"minval 2.0 is above maxval 1.0"):
        RandomUniform(2.0, 1.0)


def test_every_initializer_has_a_name_for_yaml() -> None:
    assert {type(i) for i in ALL} == set(INITIALIZERS.values())
    assert all(cls.__name__ == name for name, cls in INITIALIZERS.items())
