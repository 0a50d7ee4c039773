"""Intervals and tests against published references, scipy, and what must hold for any data."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from holdfast.statistics import (
    Interval,
    Resampling,
    bootstrap,
    clustered_rate,
    corrected,
    crossed_bootstrap,
    difference,
    holm,
    paired_bootstrap,
    paired_ratio,
    paired_test,
    share_greater,
    wilson,
)

INF, NAN = math.inf, math.nan


def bounds(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def width(interval: Interval) -> float:
    return interval.high - interval.low


# --- Wilson ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (23, 24, 0.7976, 0.9926),
        (90, 91, 0.9404, 0.9981),
        (72, 91, 0.6968, 0.8621),
        (0, 24, 0.0, 0.1380),
        (43, 43, 0.9180, 1.0),
    ],
)
def test_wilson_gives_the_published_intervals(
    successes: int, n: int, low: float, high: float
) -> None:
    got = wilson(successes, n)
    assert_allclose(bounds(got), (low, high), atol=5e-5)
    assert got.estimate == successes / n
    assert (got.n, got.n_clusters, got.level) == (n, n, 0.95)


@given(n=st.integers(1, 400), share=st.floats(0, 1), level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_agrees_with_scipy(n: int, share: float, level: float) -> None:
    k = round(share * n)
    reference = scipy.stats.binomtest(k, n).proportion_ci(level, "wilson")
    assert_allclose(bounds(wilson(k, n, level)), (reference.low, reference.high), atol=1e-12)


@given(n=st.integers(1, 400), data=st.data())
def test_wilson_contains_its_estimate_and_grows_with_successes(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    got = wilson(k, n)
    assert 0 <= got.low <= got.estimate <= got.high <= 1
    assert width(wilson(k, n, 0.99)) > width(got)
    if k < n:
        more = wilson(k + 1, n)
        assert more.low > got.low
        assert more.high > got.high


def test_wilson_of_nothing_knows_nothing() -> None:
    got = wilson(0, 0)
    assert math.isnan(got.estimate)
    assert bounds(got) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_is_a_probability(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        wilson(1, 2, level)
    with pytest.raises(ValueError, match="level"):
        bootstrap([1.0, 2.0], level=level)


# --- Clustered rates ------------------------------------------------------------------------------


def test_a_rate_with_one_row_per_cluster_is_wilsons() -> None:
    values = [1] * 88 + [0]
    got = clustered_rate(values, [f"prompt {i}" for i in range(89)])
    assert bounds(got) == bounds(wilson(88, 89))
    assert (got.n, got.n_clusters) == (89, 89)
    assert bounds(clustered_rate(values)) == bounds(wilson(88, 89))


def test_clusters_widen_a_rate() -> None:
    # Six questions with the published numbers of rows (METHODS B), whole questions fail together.
    sizes = (15, 24, 6, 19, 17, 10)
    clusters = np.repeat(np.arange(6), sizes)
    values = np.isin(clusters, (0, 1, 3, 4)).astype(float)
    got = clustered_rate(values, clusters)
    assert (got.n, got.n_clusters) == (91, 6)
    assert width(got) > 2 * width(wilson(int(values.sum()), 91))


def test_a_clustered_rate_is_never_surer_than_independent_rows() -> None:
    # One failure in one of six clusters: their bootstrap alone would end at .967.
    clusters = np.repeat(np.arange(6), (15, 24, 6, 19, 17, 10))
    values = np.ones(91)
    values[3] = 0
    got, rows = clustered_rate(values, clusters), wilson(90, 91)
    assert got.low <= rows.low
    assert got.high >= rows.high


def test_full_agreement_of_six_clusters_is_no_certainty() -> None:
    got = clustered_rate(np.ones(91), np.repeat(np.arange(6), (15, 24, 6, 19, 17, 10)))
    assert bounds(got) == bounds(wilson(6, 6))
    assert (got.estimate, got.n, got.n_clusters) == (1.0, 91, 6)
    assert bounds(clustered_rate(np.zeros(12), [0, 1] * 6)) == bounds(wilson(0, 2))


def test_one_cluster_says_nothing_about_a_rate() -> None:
    assert bounds(clustered_rate([0, 1, 1], ["q"] * 3)) == (0.0, 1.0)


def test_unscored_rows_are_left_out_of_a_rate_and_counted() -> None:
    got = clustered_rate([1, NAN, 0, 1], ["a", "b", "c", "c"])
    assert (got.n, got.n_clusters, got.n_dropped) == (3, 2, 1)
    nothing = clustered_rate([NAN, NAN])
    assert math.isnan(nothing.estimate)
    assert bounds(nothing) == (0.0, 1.0)
    assert (nothing.n, nothing.n_dropped) == (0, 2)


def test_a_rate_refuses_values_that_are_no_shares() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        clustered_rate([0.0, 2.0])


# --- Bootstrap ------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_agrees_with_scipy(statistic: str) -> None:
    values = np.random.default_rng(3).gamma(2.0, size=101)
    function = {"mean": np.mean, "median": np.median}[statistic]
    reference = scipy.stats.bootstrap(
        (values,), function, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    got = bootstrap(values, statistic, resampling=Resampling(20_000))  # type: ignore[arg-type]
    assert got.estimate == pytest.approx(function(values), abs=1e-12)
    # The ends of 20,000 resamples scatter by about 2 % of the width.
    assert_allclose(bounds(got), reference, atol=0.05 * width(got))


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_a_resample_is_what_numpy_makes_of_the_repeated_rows(statistic: str) -> None:
    from holdfast import resampling

    rng = np.random.default_rng(0)
    values, units = rng.normal(size=30), rng.integers(7, size=30)
    units[:7] = np.arange(7)
    weights = rng.integers(0, 3, size=(50, 7))
    weights[:, 0] += 1
    make = {"mean": resampling._mean_of, "median": resampling._median_of}[statistic]
    function = {"mean": np.mean, "median": np.median}[statistic]
    expected = [function(np.repeat(values, row[units])) for row in weights]
    assert_allclose(make(values, units)(weights), expected, atol=1e-12)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_one_cluster_per_value_is_the_plain_bootstrap(statistic: str) -> None:
    values = np.random.default_rng(0).normal(size=40)
    plain = bootstrap(values, statistic)  # type: ignore[arg-type]
    clustered = bootstrap(values, statistic, [f"q{i}" for i in range(40)])  # type: ignore[arg-type]
    assert bounds(plain) == bounds(clustered)
    assert "rows independent" in plain.method
    assert "clusters resampled" in clustered.method


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_six_clusters_of_equal_values_are_six_observations(statistic: str) -> None:
    values = np.repeat([0.1, 0.9, 0.4, 0.7, 0.2, 0.5], 15)
    clusters = np.repeat(np.arange(6), 15)
    clustered = bootstrap(values, statistic, clusters)  # type: ignore[arg-type]
    ignoring = bootstrap(values, statistic)  # type: ignore[arg-type]
    assert width(clustered) > 2 * width(ignoring)
    assert (clustered.n, clustered.n_clusters) == (90, 6)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(300):
        per_cluster = rng.normal(size=25)
        values = np.repeat(per_cluster, 4) + 0.3 * rng.normal(size=100)
        got = bootstrap(values, clusters=np.repeat(np.arange(25), 4), resampling=Resampling(400))
        hits += got.low <= 0 <= got.high
    assert 0.88 <= hits / 300 <= 0.98  # the percentile interval of 25 units is a little short


def test_the_bootstrap_is_reproducible_and_its_seed_matters() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values) == bootstrap(values)
    assert bounds(bootstrap(values)) != bounds(bootstrap(values, resampling=Resampling(seed=1)))


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=30)
    whole = bootstrap(values, "median")
    monkeypatch.setattr("holdfast.resampling._MAX_ENTRIES", 1000)
    assert bootstrap(values, "median") == whole


def test_unscored_values_are_dropped_and_counted() -> None:
    got = bootstrap([1.0, NAN, 3.0, NAN], clusters=["a", "b", "c", "c"])
    assert (got.estimate, got.n, got.n_clusters, got.n_dropped) == (2.0, 2, 2, 2)


def test_too_little_data_has_no_interval() -> None:
    nothing = bootstrap([NAN])
    assert (nothing.n, nothing.n_clusters, nothing.n_dropped) == (0, 0, 1)
    assert math.isnan(nothing.estimate)
    one_unit = bootstrap([1.0, 3.0], clusters=["q", "q"])
    assert one_unit.estimate == 2.0
    assert math.isnan(one_unit.low)
    assert math.isnan(one_unit.high)


def test_infinite_values_have_a_median_and_no_mean() -> None:
    with pytest.raises(ValueError, match="median"):
        bootstrap([1.0, INF])
    got = bootstrap([1.0, 2.0, INF], "median")
    assert got.estimate == 2.0
    assert got.high == INF


def test_mismatched_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one cluster per value"):
        bootstrap([1.0, 2.0], clusters=["a"])
    with pytest.raises(ValueError, match="one length"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="one value per row"):
        bootstrap(np.zeros((2, 2)))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_the_bounds_of_a_mean_lie_among_the_values(values: list[float]) -> None:
    got = bootstrap(values, resampling=Resampling(200))
    slack = 1e-9 * max(1.0, *map(abs, values))
    assert min(values) - slack <= got.low <= got.high <= max(values) + slack


# --- Pairs ----------------------------------------------------------------------------------------


def test_a_paired_difference_removes_what_the_pairs_share() -> None:
    rng = np.random.default_rng(0)
    shared = 10 * rng.normal(size=50)
    a, b = shared + 1 + 0.1 * rng.normal(size=50), shared
    got = paired_bootstrap(a, b)
    assert got.estimate == pytest.approx(np.mean(a - b))
    assert 0.9 < got.low < got.high < 1.1
    assert paired_bootstrap([1.0, NAN, 4.0], [0.0, 1.0, NAN]).n_dropped == 2


def test_a_paired_ratio_is_the_median_of_the_ratios() -> None:
    got = paired_ratio([1.0, 2.0, 8.0], [1.0, 1.0, 1.0])
    assert got.estimate == pytest.approx(2.0)
    assert bounds(got) == pytest.approx((1.0, 8.0))
    # Between the two middle ratios the median is geometric: 2 and 8 give 4.
    assert paired_ratio([2.0, 8.0], [1.0, 1.0]).estimate == pytest.approx(4.0)


def test_costs_never_reached_count_by_rank() -> None:
    a, b = [1.0, 1.0, 1.0, INF, 3.0], [2.0, INF, INF, 1.0, 1.0]
    got = paired_ratio(a, b)  # ratios .5, 0, 0, inf, 3
    assert got.estimate == pytest.approx(0.5)
    assert bounds(got) == (0.0, INF)
    assert got.n_dropped == 0
    assert paired_ratio([INF] * 3, [1.0] * 3).estimate == INF
    assert paired_ratio([1.0] * 3, [INF] * 3).estimate == 0.0


def test_an_even_split_of_never_reached_is_a_ratio_of_one() -> None:
    assert paired_ratio([INF, 1.0], [1.0, INF]).estimate == 1.0


def test_pairs_without_a_ratio_are_dropped_and_counted() -> None:
    got = paired_ratio([INF, 0.0, NAN, 3.0, 3.0], [INF, 0.0, 1.0, 1.0, 1.0])
    assert (got.n, got.n_dropped) == (2, 3)
    assert got.estimate == pytest.approx(3.0)
    nothing = paired_ratio([INF], [INF])
    assert math.isnan(nothing.estimate)
    with pytest.raises(ValueError, match="at least 0"):
        paired_ratio([-1.0], [1.0])


COSTS = st.one_of(st.floats(1e-3, 1e3), st.just(INF))


@settings(deadline=None)
@given(st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=25))
def test_exchanging_the_sides_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    got, swapped = (
        paired_ratio(a, b, resampling=Resampling(200)),
        paired_ratio(b, a, resampling=Resampling(200)),
    )
    with np.errstate(divide="ignore"):
        assert_allclose(1 / np.float64(got.estimate), swapped.estimate, rtol=1e-9)
        assert_allclose(1 / np.array(bounds(got)), bounds(swapped)[::-1], rtol=1e-9)
    assert got.n == swapped.n
    assert not math.isnan(got.estimate) or got.n == 0


def test_share_greater_counts_ties_half() -> None:
    got = share_greater([2.0, 1.0, 1.0, INF, NAN], [1.0, 2.0, 1.0, INF, 0.0])
    assert (got.estimate, got.n, got.n_dropped) == (0.5, 4, 1)
    assert 0 < got.low < 0.5 < got.high < 1


def test_share_greater_of_untied_rows_is_wilsons() -> None:
    got = share_greater([2.0] * 7 + [0.0] * 3, [1.0] * 10)
    assert bounds(got) == bounds(wilson(7, 10))


def test_share_greater_is_wider_with_clusters() -> None:
    a = np.repeat([2.0, 0.0, 2.0, 2.0, 0.0, 2.0], 12)
    clusters = np.repeat(np.arange(6), 12)
    b = np.ones(72)
    assert width(share_greater(a, b, clusters)) > 2 * width(share_greater(a, b))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_shares_of_both_directions_add_up(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs).T
    clusters = np.arange(len(pairs)) // 2
    got, swapped = share_greater(a, b, clusters), share_greater(b, a, clusters)
    assert got.estimate + swapped.estimate == pytest.approx(1)
    assert got.low + swapped.high == pytest.approx(1)


# --- Tests ----------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 60))
def test_a_paired_test_of_single_rows_is_scipys_exact_binomial_test(
    only_a: int, only_b: int
) -> None:
    a = [1] * only_a + [0] * only_b + [1, 0, NAN]
    b = [0] * only_a + [1] * only_b + [1, 0, 1]
    discordant = only_a + only_b
    expected = scipy.stats.binomtest(only_a, discordant).pvalue if discordant else 1.0
    assert paired_test(a, b) == pytest.approx(expected, rel=1e-9)
    assert paired_test(a, b) == paired_test(b, a) == paired_test(a, b, list(range(len(a))))


def test_a_paired_test_takes_many_pairs() -> None:
    a = np.arange(5000) % 2 == 0
    assert paired_test(a, ~a) == 1.0
    assert paired_test(np.ones(5000), np.zeros(5000)) == 0.0  # 2^-4999, below the smallest float


def test_a_paired_test_of_clusters_is_the_share_of_sign_patterns() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(30) < 0.7, rng.random(30) < 0.4
    clusters = rng.integers(8, size=30)
    sums = [int(a[clusters == c].sum()) - int(b[clusters == c].sum()) for c in range(8)]
    patterns = np.array([[1 if i >> c & 1 else -1 for c in range(8)] for i in range(256)])
    expected = float((np.abs(patterns @ sums) >= abs(sum(sums))).mean())
    assert paired_test(a, b, clusters) == pytest.approx(expected, abs=1e-12)


def test_repeating_a_row_is_no_evidence() -> None:
    """Nine permutations of one question are one observation: nothing under p = 1 can come of it."""
    a, b = [1] * 18, [0] * 18
    assert paired_test(a, b) < 1e-4
    assert paired_test(a, b, ["q1"] * 9 + ["q2"] * 9) == 0.5
    assert paired_test(a, b, ["q1"] * 18) == 1.0
    assert paired_test([], []) == paired_test([1, NAN], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="0 or 1"):
        paired_test([0.5], [0.0])


# --- Differences of unpaired rates, several seeds -------------------------------------------------


@pytest.mark.parametrize(
    "one, other, low, high",
    [  # Newcombe (1998), table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_an_unpaired_difference_is_newcombes(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    found = difference(wilson(*one), wilson(*other))
    assert found.estimate == pytest.approx(one[0] / one[1] - other[0] / other[1])
    assert_allclose(bounds(found), (low, high), atol=5e-5)
    assert_allclose(bounds(difference(wilson(*other), wilson(*one))), (-high, -low), atol=5e-5)


def test_a_difference_needs_one_level() -> None:
    with pytest.raises(ValueError, match="one level"):
        difference(wilson(1, 2), wilson(1, 2, level=0.9))


def test_prompts_of_few_seeds_are_no_independent_observations() -> None:
    """What differs between seeds does not average out over prompts, and the other way round."""
    rng = np.random.default_rng(0)
    n_seeds, n_prompts = 5, 200
    seeds = np.repeat(np.arange(n_seeds), n_prompts)
    prompts = np.tile(np.arange(n_prompts), n_seeds)
    by_seed = rng.normal(size=n_seeds)[seeds]
    naive = bootstrap(by_seed + 0.1 * rng.normal(size=seeds.size))
    crossed = crossed_bootstrap(by_seed + 0.1 * rng.normal(size=seeds.size), seeds, prompts)
    assert width(crossed) > 5 * width(naive)
    same = rng.normal(size=n_prompts)[prompts]  # every seed says the same of a prompt
    once = bootstrap(same[:n_prompts])
    assert width(crossed_bootstrap(same, seeds, prompts)) == pytest.approx(width(once), rel=0.15)
    assert math.isnan(crossed_bootstrap(same, [0] * seeds.size, prompts).low)


def test_prompts_of_their_own_under_each_seed_are_taken_too() -> None:
    seeds, prompts = [0, 0, 1, 1], ["a", "b", "c", "d"]
    found = crossed_bootstrap([0, 1, 1, 1], seeds, prompts)
    assert found.estimate == 0.75 and 0 <= found.low < found.high <= 1


@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_the_least_is_what_full_disagreement_gives(drawn: list[tuple[int, float]]) -> None:
    """No outcome of so many units is below it, and full disagreement in all tests is at it."""
    n_units = [n for n, _ in drawn]
    full = corrected([paired_test(np.ones(n), np.zeros(n)) for n in n_units], n_units)
    assert_allclose([test.adjusted for test in full], [test.least for test in full])
    some = [paired_test(np.arange(n) < share * n, np.zeros(n)) for n, share in drawn]
    made = corrected(some, n_units)
    assert all(test.adjusted >= test.least - 1e-12 for test in made)
    assert [test.least for test in made] == [test.least for test in full]
    assert_array_equal([test.adjusted for test in made], holm(some))


def test_what_was_not_tested_corrects_nothing() -> None:
    one, none = corrected([2 / 2**6, NAN], [6, 0])
    assert one.tells and one.least == 2 / 2**6 and one.adjusted == one.p
    assert not none.tells and np.isnan(none.adjusted)
    assert [test.tells for test in corrected([2 / 2**6, 1.0], [6, 6])] == [False, False]
    assert [test.tells for test in corrected([2 / 2**6, 1.0], [6, 9])] == [True, True], (
        "Holm steps down: had all nine disagreed, six would be the only ones left"
    )
    with pytest.raises(ValueError, match="as many units"):
        corrected([0.5], [])


def test_holm_by_hand() -> None:
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04, and never falling again.
    assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert_array_equal(holm([0.9, 0.8]), [1.0, 1.0])
    assert_allclose(holm([0.01, NAN, 0.04]), [0.02, NAN, 0.04])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match="p-values"):
        holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_p_value_and_bonferroni(pvalues: list[float]) -> None:
    p, adjusted = np.array(pvalues), holm(pvalues)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, p.size * p) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_importing_is_light() -> None:
    code = (
        "import sys, holdfast.statistics; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
