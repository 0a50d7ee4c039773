"""Intervals and tests for what a study reports: rates, medians, paired differences, p-values.

Every n counts audited rows; clusters are the independent units behind them (questions, prompts).
Many rows of one question are not many observations (METHODS B and G.5: 91 flips of 6 questions),
so wherever `clusters` is given whole clusters are resampled, and `Interval.method` says which of
the two was done. NaN means "not scored": such rows are left out and counted in `n_dropped`.

Bootstrap intervals are percentile intervals (Efron and Tibshirani 1993, ch. 13) whose ends are
order statistics: nothing is interpolated, so infinite values need no special care there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Statistic = Literal["mean", "median"]
Clusters = Sequence[Hashable] | NDArray[np.generic]
Floats = NDArray[np.float64]

# Entries of the largest [resamples, rows] table the bootstrap holds at a time (32 MB).
_MAX_ENTRIES = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A number and where it may lie.

    `low` and `high` bound `estimate` at `level` (0.95 = 95 %); both are NaN where the data cannot
    say, and `estimate` is NaN where no row was scored. `n` counts the rows used, `n_clusters` the
    independent units among them (`n` itself where no clusters were given, which `method` says),
    `n_dropped` the rows that were left out because they were not scored or not comparable.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n: int
    n_clusters: int
    n_dropped: int = 0


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share, the n rows taken as independent (Wilson 1927).

    With n = 0 nothing is known: the estimate is NaN and the interval [0, 1].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}")
    p = successes / n if n else math.nan
    return Interval(p, *_score_bounds(p, n, level), level, "Wilson, rows independent", n, n)


def clustered_rate(
    values: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The share of successes among rows that come in clusters.

    `values` [n] are 0 or 1 (bool or number; 0.5 for a tie), NaN = not scored. The interval is

    - Wilson's where every row is a unit of its own (no clusters, or all different);
    - otherwise a bootstrap of the mean that resamples whole clusters, widened to Wilson's where it
      is the narrower of the two: with few clusters and a rate near 0 or 1 it has hardly any spread;
    - Wilson's over the *clusters* where all rows agree and a bootstrap has no spread at all;
    - [0, 1] where a single cluster holds all rows and they do not agree.
    """
    kept, units, dropped = _scored(values, clusters)
    if kept.size and (kept.min() < 0 or kept.max() > 1):
        raise ValueError(f"a rate needs values in [0, 1], got {kept.min()} to {kept.max()}")
    n, n_units = kept.size, _count(units)
    p = float(kept.mean()) if n else math.nan
    low, high = _score_bounds(p, n, level)
    method = "Wilson, rows independent" if clusters is None else "Wilson, one row per cluster"
    if n_units < n:
        if kept.min() == kept.max():
            low, high = _score_bounds(p, n_units, level)
            method = "Wilson over clusters, all rows agree"
        elif n_units == 1:
            low, high, method = 0.0, 1.0, "none, a single cluster"
        else:
            spread = bootstrap(kept, "mean", units, level, n_resamples, seed)
            low, high = min(low, spread.low), max(high, spread.high)
            method = f"{spread.method}, at least Wilson's"
    return Interval(p, low, high, level, method, n, n_units, dropped)


def bootstrap(
    values: ArrayLike,
    statistic: Statistic = "mean",
    clusters: Clusters | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean or median of `values` [n].

    With `clusters` [n] whole clusters are drawn with replacement, as many as there are. The median
    takes infinite values by rank (see `_midpoint`); the mean refuses them. With no row the
    estimate is NaN, with fewer than two independent units the bounds are NaN.
    """
    _check_level(level)
    kept, units, dropped = _scored(values, clusters)
    if statistic == "mean" and np.isinf(kept).any():
        raise ValueError("the mean of infinite values says nothing: ask for the median")
    n, n_units = kept.size, _count(units)
    method = _method(statistic, clusters is not None)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, level, method, 0, 0, dropped)
    of_weights = (_mean_of if statistic == "mean" else _median_of)(kept, units)
    estimate = float(of_weights(np.ones((1, n_units), dtype=np.int64))[0])
    if n_units < 2:
        return Interval(estimate, math.nan, math.nan, level, method, n, n_units, dropped)
    rng = np.random.default_rng(seed)
    chunk = max(1, _MAX_ENTRIES // n)
    draws = np.concatenate(
        [
            of_weights(_resample(rng, min(chunk, n_resamples - start), n_units))
            for start in range(0, n_resamples, chunk)
        ]
    )
    draws.sort()
    # The two ends are the same number of draws away from their side, so swapping the sign of the
    # values swaps the interval.
    outside = int((1 - level) / 2 * n_resamples)
    low, high = float(draws[outside]), float(draws[n_resamples - 1 - outside])
    return Interval(estimate, low, high, level, method, n, n_units, dropped)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Statistic = "mean",
    clusters: Clusters | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap of `a - b` over pairs, `a` and `b` [n] in the same order of examples.

    A pair with a NaN on either side, or infinite with the same sign on both, has no difference:
    it is dropped and counted.
    """
    a, b = _pairs(a, b)
    with np.errstate(invalid="ignore"):
        return bootstrap(a - b, statistic, clusters, level, n_resamples, seed)


def paired_ratio(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The median of `a / b` over pairs of costs, `a` and `b` [n], each at least 0.

    The median of log(a / b) is bootstrapped and exponentiated, so that exchanging `a` and `b`
    inverts the interval. +inf means "never reached" and counts by rank: a never reached is a ratio
    of +inf, b never reached a ratio of 0. Where neither was reached (or both cost 0) there is no
    ratio: the pair is dropped and counted, like one with a NaN.
    """
    a, b = _pairs(a, b)
    if (a < 0).any() or (b < 0).any():
        raise ValueError("a ratio of costs needs values of at least 0")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(a) - np.log(b)
    log = bootstrap(logs, "median", clusters, level, n_resamples, seed)
    estimate, low, high = (float(np.exp(x)) for x in (log.estimate, log.low, log.high))
    method = log.method.replace("median", "median ratio")
    return replace(log, estimate=estimate, low=low, high=high, method=method)


def ratio_of_means(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of `a` over the mean of `b`, rows [n] in the same order, `b` at least 0.

    Bootstrap over rows, or over whole clusters. A row with a NaN on either side is dropped and
    counted. Where all of `b` is 0 there is no ratio: the estimate is NaN; resamples in which it is
    so say nothing and are left out. Where all resamples agree on a share in [0, 1] a bootstrap has
    no spread, and the interval is Wilson's over the units that `b` counts in. With fewer than two
    independent units the bounds are NaN.
    """
    _check_level(level)
    a, b = _pairs(a, b)
    if (b < 0).any():
        raise ValueError("a ratio of means needs a denominator of at least 0")
    missing = np.isnan(a) | np.isnan(b)
    a, b = np.where(missing, np.nan, a), np.where(missing, np.nan, b)
    kept, units, dropped = _scored(a, clusters)
    n, n_units = kept.size, _count(units)
    how = "clusters resampled" if clusters is not None else "rows independent"
    method = f"bootstrap of the ratio of means, {how}"
    above = np.bincount(units, weights=kept, minlength=n_units)
    below = np.bincount(units, weights=b[~missing], minlength=n_units)
    if not below.sum():
        return Interval(math.nan, math.nan, math.nan, level, method, n, n_units, dropped)
    estimate = float(above.sum() / below.sum())
    low = high = math.nan
    if n_units > 1:
        weights = _resample(np.random.default_rng(seed), n_resamples, n_units)
        total = weights @ below
        draws = (weights @ above)[total > 0] / total[total > 0]
        low, high = (float(q) for q in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
        if draws.min() == draws.max() and estimate <= 1:
            low, high = _score_bounds(estimate, int((below > 0).sum()), level)
            method = "Wilson over units, all resamples agree"
    return Interval(estimate, low, high, level, method, n, n_units, dropped)


def share_greater(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The share of pairs with `a > b`, a tie counting one half; `a` and `b` [n].

    Compared by rank, so +inf on both sides is a tie. A pair with a NaN is dropped and counted. The
    interval is that of `clustered_rate`.
    """
    a, b = _pairs(a, b)
    wins = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0))
    wins[np.isnan(a) | np.isnan(b)] = np.nan
    return clustered_rate(wins, clusters, level, n_resamples, seed)


def paired_test(a: ArrayLike, b: ArrayLike, clusters: Clusters | None = None) -> float:
    """Exact two-sided p-value that paired yes/no outcomes `a` and `b` [n] have the same rate.

    Under that hypothesis the difference of a whole cluster could as well have the other sign: the
    p-value is the share of all sign patterns whose sum is at least as far from zero. Where every
    row is a cluster of its own this is McNemar's exact test; of clusters it takes no more than
    their number for evidence. Pairs with a NaN are left out; 1.0 where nothing differs.
    """
    a, b = _pairs(a, b)
    difference, units, _ = _scored(a - b, clusters)
    if not np.isin(difference, (-1.0, 0.0, 1.0)).all():
        raise ValueError("expected outcomes of 0 or 1, or NaN where not scored")
    sums = np.bincount(units, weights=difference).astype(np.int64) if units.size else units
    chances = np.ones(1)  # of the sums −reach … reach, in steps of one
    for size in np.abs(sums[sums != 0]):
        wider = np.zeros(chances.size + 2 * size)
        wider[: chances.size] += chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    reach, seen = chances.size // 2, abs(int(sums.sum()))
    return min(1.0, float(chances[np.abs(np.arange(-reach, reach + 1)) >= seen].sum()))


def difference(a: Interval, b: Interval) -> Interval:
    """`a − b` of two rates measured on different prompts, each with its own interval.

    The square-and-add bounds of Newcombe (1998, method 10), which with Wilson's intervals are his;
    with intervals that respect clusters, so does this (Zou and Donner 2008). Both must have one
    level. NaN where either was not measured.
    """
    if a.level != b.level:
        raise ValueError(f"expected intervals of one level, got {a.level} and {b.level}")
    estimate = a.estimate - b.estimate
    low = estimate - math.hypot(a.estimate - a.low, b.high - b.estimate)
    high = estimate + math.hypot(a.high - a.estimate, b.estimate - b.low)
    method = f"Newcombe, unpaired ({a.method}; {b.method})"
    n, n_clusters, dropped = (
        getattr(a, name) + getattr(b, name) for name in ("n", "n_clusters", "n_dropped")
    )
    return Interval(estimate, low, high, a.level, method, n, n_clusters, dropped)


def crossed_bootstrap(
    values: ArrayLike,
    rows: Clusters,
    columns: Clusters,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean of `values` [n] with two random effects.

    `rows` [n] and `columns` [n] (a value's seed and its prompt) are resampled independently, and a
    value counts with the product of the two counts (the pigeonhole bootstrap, Owen 2007: it errs
    to the wide side). So neither many prompts under few seeds nor many seeds on few prompts pass
    for independent observations. `n_clusters` is the smaller number of units; with fewer than two
    of either the bounds are NaN. NaN values are left out.
    """
    _check_level(level)
    kept, of_rows, dropped = _scored(values, rows)
    _, of_columns, _ = _scored(values, columns)
    n_units = _count(of_rows), _count(of_columns)
    method = "bootstrap of the mean, both effects resampled"
    estimate = float(kept.mean()) if kept.size else math.nan
    if min(n_units) < 2:
        return Interval(
            estimate, math.nan, math.nan, level, method, kept.size, min(n_units), dropped
        )
    rng = np.random.default_rng(seed)
    draws: list[float] = []
    while len(draws) < n_resamples:
        one, other = (_resample(rng, 1, units)[0] for units in n_units)
        weights = one[of_rows] * other[of_columns]
        if weights.any():  # a draw may meet no value where not every seed has every prompt
            draws.append(float(weights @ kept / weights.sum()))
    draws.sort()
    outside = int((1 - level) / 2 * n_resamples)
    low, high = draws[outside], draws[n_resamples - 1 - outside]
    return Interval(estimate, low, high, level, method, kept.size, min(n_units), dropped)


def holm(pvalues: ArrayLike) -> Floats:
    """Holm's step-down adjusted p-values, in the order given [m] (Holm 1979).

    NaN stays NaN and does not count as a test.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if ((p < 0) | (p > 1)).any():
        raise ValueError("expected p-values in [0, 1]")
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    factors = np.arange(order.size, 0, -1)
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted


SIGNIFICANT = 0.05
"""Below this a corrected p-value is taken for a finding."""


@dataclass(frozen=True)
class Corrected:
    """One of several paired tests that were made at once.

    p: by itself; adjusted: after Holm; both NaN where nothing was tested. n_units: independent
    units that were compared; least: what `adjusted` would be if all units of all these tests had
    disagreed, the same way.
    """

    p: float
    adjusted: float
    n_units: int
    least: float

    @property
    def tells(self) -> bool:
        """Whether any outcome could have been a finding. Where none could, a large p-value is the
        number of units and no sign that two rates are alike."""
        return self.least < SIGNIFICANT


def corrected(pvalues: ArrayLike, n_units: Sequence[int]) -> list[Corrected]:
    """Exact paired tests made at once, `pvalues` [m] each over so many independent units [m].

    n units that all disagree one way have 2 of 2ⁿ sign patterns at least as far out. Holm's
    adjusted p-values rise in every p-value, so no outcome makes one smaller than all of them
    together at these least values. NaN is no test, and stays NaN.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.shape != (len(n_units),):
        raise ValueError(f"expected as many units as p-values, got {len(n_units)} for {p.shape}")
    floor = np.array([min(1.0, 2.0 ** (1 - n)) for n in n_units], dtype=np.float64)
    least = holm(np.where(np.isnan(p), np.nan, floor))
    return [
        Corrected(float(own), float(adjusted), n, float(low))
        for own, adjusted, low, n in zip(p, holm(p), least, n_units, strict=True)
    ]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, as 0.95, got {level}")


def _score_bounds(p: float, n: int, level: float) -> tuple[float, float]:
    """Ends of Wilson's interval of a share p of n rows (formula of METHODS G.5)."""
    _check_level(level)
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and 1 the exact ends are 0 and 1; rounding would leave the estimate outside.
    return (0.0 if p == 0 else center - half), (1.0 if p == 1 else center + half)


def _method(statistic: Statistic, clustered: bool) -> str:
    how = "clusters resampled" if clustered else "rows independent"
    return f"bootstrap of the {statistic}, {how}"


def _count(units: NDArray[np.int64]) -> int:
    return int(units.max()) + 1 if units.size else 0


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected pairs of one length, got shapes {a.shape} and {b.shape}")
    return a, b


def _scored(values: ArrayLike, clusters: Clusters | None) -> tuple[Floats, NDArray[np.int64], int]:
    """The values that are not NaN, their cluster's number in 0, 1, …, and how many were dropped."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"expected one value per row, got shape {x.shape}")
    if clusters is not None and len(clusters) != x.size:
        raise ValueError(f"expected one cluster per value, got {len(clusters)} for {x.size}")
    scored = ~np.isnan(x)
    kept = x[scored]
    if clusters is None:
        units = np.arange(kept.size)
    else:
        # Numbered by first appearance: works for any hashable, and mixes of them.
        numbers: dict[Hashable, int] = {}
        names = [c for c, keep in zip(clusters, scored, strict=True) if keep]
        units = np.array([numbers.setdefault(c, len(numbers)) for c in names], dtype=np.int64)
    return kept, units, int(x.size - kept.size)


def _resample(rng: np.random.Generator, n_draws: int, n_units: int) -> NDArray[np.int64]:
    """How often each unit is drawn in each resample, [n_draws, n_units]."""
    drawn = rng.integers(n_units, size=(n_draws, n_units))
    drawn += np.arange(n_draws)[:, None] * n_units
    counts = np.bincount(drawn.ravel(), minlength=n_draws * n_units)
    return counts.reshape(n_draws, n_units)


def _mean_of(values: Floats, units: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Floats]:
    sums = np.bincount(units, weights=values)
    sizes = np.bincount(units)
    return lambda weights: (weights @ sums) / (weights @ sizes)


def _median_of(values: Floats, units: NDArray[np.int64]) -> Callable[[NDArray[np.int64]], Floats]:
    order = np.argsort(values)
    ranked, owner = values[order], units[order]

    def median(weights: NDArray[np.int64]) -> Floats:
        seen = np.cumsum(weights[:, owner], axis=1)
        total = seen[:, -1:]
        below = ranked[np.argmax(seen > (total - 1) // 2, axis=1)]
        above = ranked[np.argmax(seen > total // 2, axis=1)]
        return _midpoint(below, above)

    return median


def _midpoint(below: Floats, above: Floats) -> Floats:
    """The mean of the two middle values; 0 where they are −inf and +inf.

    There exactly half of the values are −inf and half +inf (each side fails where the other gets
    there), and 0 is the only answer that changes sign with the values.
    """
    opposed = np.isneginf(below) & np.isposinf(above)
    with np.errstate(invalid="ignore"):
        return np.where(opposed, 0.0, below / 2 + above / 2)
