"""Intervals of means, medians and ratios, from what resampling the independent units gives.

Percentile intervals (Efron and Tibshirani 1993, ch. 13) whose ends are order statistics: nothing is
interpolated where values may be infinite, so these need no special care.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holdfast.intervals import Interval, check_level, score_bounds
from holdfast.units import Clusters, Floats, count, pairs, scored

Statistic = Literal["mean", "median"]

# Entries of the largest [resamples, rows] table the bootstrap holds at a time (32 MB).
_MAX_ENTRIES = 4_000_000


@dataclass(frozen=True)
class Resampling:
    """How often the units are drawn, and from which seed."""

    n: int = 2000
    seed: int = 0


RESAMPLING = Resampling()


def bootstrap(
    values: ArrayLike,
    statistic: Statistic = "mean",
    clusters: Clusters | None = None,
    level: float = 0.95,
    resampling: Resampling = RESAMPLING,
) -> Interval:
    """Percentile bootstrap of the mean or median of `values` [n].

    With `clusters` [n] whole clusters are drawn with replacement, as many as there are. The median
    takes infinite values by rank (see `_midpoint`); the mean refuses them. With no row the
    estimate is NaN, with fewer than two independent units the bounds are NaN.
    """
    check_level(level)
    kept, units, dropped = scored(values, clusters)
    if statistic == "mean" and np.isinf(kept).any():
        raise ValueError("the mean of infinite values says nothing: ask for the median")
    n, n_units = kept.size, count(units)
    method = _method(statistic, clusters is not None)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, level, method, 0, 0, dropped)
    of_weights = (_mean_of if statistic == "mean" else _median_of)(kept, units)
    estimate = float(of_weights(np.ones((1, n_units), dtype=np.int64))[0])
    if n_units < 2:
        return Interval(estimate, math.nan, math.nan, level, method, n, n_units, dropped)
    rng = np.random.default_rng(resampling.seed)
    chunk = max(1, _MAX_ENTRIES // n)
    draws = np.concatenate(
        [
            of_weights(_resample(rng, min(chunk, resampling.n - start), n_units))
            for start in range(0, resampling.n, chunk)
        ]
    )
    return Interval(estimate, *_ends(draws, level), level, method, n, n_units, dropped)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    statistic: Statistic = "mean",
    clusters: Clusters | None = None,
    level: float = 0.95,
    resampling: Resampling = RESAMPLING,
) -> Interval:
    """Bootstrap of `a - b` over pairs, `a` and `b` [n] in the same order of examples.

    A pair with a NaN on either side, or infinite with the same sign on both, has no difference:
    it is dropped and counted.
    """
    a, b = pairs(a, b)
    with np.errstate(invalid="ignore"):
        return bootstrap(a - b, statistic, clusters, level, resampling)


def paired_ratio(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    resampling: Resampling = RESAMPLING,
) -> Interval:
    """The median of `a / b` over pairs of costs, `a` and `b` [n], each at least 0.

    The median of log(a / b) is bootstrapped and exponentiated, so that exchanging `a` and `b`
    inverts the interval. +inf means "never reached" and counts by rank: a never reached is a ratio
    of +inf, b never reached a ratio of 0. Where neither was reached (or both cost 0) there is no
    ratio: the pair is dropped and counted, like one with a NaN.
    """
    a, b = pairs(a, b)
    if (a < 0).any() or (b < 0).any():
        raise ValueError("a ratio of costs needs values of at least 0")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(a) - np.log(b)
    log = bootstrap(logs, "median", clusters, level, resampling)
    estimate, low, high = (float(np.exp(x)) for x in (log.estimate, log.low, log.high))
    method = log.method.replace("median", "median ratio")
    return replace(log, estimate=estimate, low=low, high=high, method=method)


def ratio_of_means(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    resampling: Resampling = RESAMPLING,
) -> Interval:
    """The mean of `a` over the mean of `b`, rows [n] in the same order, `b` at least 0.

    Bootstrap over rows, or over whole clusters. A row with a NaN on either side is dropped and
    counted. Where all of `b` is 0 there is no ratio: the estimate is NaN; resamples in which it is
    so say nothing and are left out, and the ends lie between two draws where their number asks for
    it. Where all resamples agree on a share in [0, 1] a bootstrap has
    no spread, and the interval is Wilson's over the units that `b` counts in. With fewer than two
    independent units the bounds are NaN.
    """
    check_level(level)
    a, b = pairs(a, b)
    if (b < 0).any():
        raise ValueError("a ratio of means needs a denominator of at least 0")
    missing = np.isnan(a) | np.isnan(b)
    a, b = np.where(missing, np.nan, a), np.where(missing, np.nan, b)
    kept, units, dropped = scored(a, clusters)
    n, n_units = kept.size, count(units)
    how = "clusters resampled" if clusters is not None else "rows independent"
    method = f"bootstrap of the ratio of means, {how}"
    above = np.bincount(units, weights=kept, minlength=n_units)
    below = np.bincount(units, weights=b[~missing], minlength=n_units)
    if not below.sum():
        return Interval(math.nan, math.nan, math.nan, level, method, n, n_units, dropped)
    estimate = float(above.sum() / below.sum())
    low = high = math.nan
    if n_units > 1:
        weights = _resample(np.random.default_rng(resampling.seed), resampling.n, n_units)
        total = weights @ below
        draws = (weights @ above)[total > 0] / total[total > 0]
        low, high = (float(q) for q in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
        if draws.min() == draws.max() and estimate <= 1:
            low, high = score_bounds(estimate, int((below > 0).sum()), level)
            method = "Wilson over units, all resamples agree"
    return Interval(estimate, low, high, level, method, n, n_units, dropped)


def crossed_bootstrap(
    values: ArrayLike,
    rows: Clusters,
    columns: Clusters,
    level: float = 0.95,
    resampling: Resampling = RESAMPLING,
) -> Interval:
    """Percentile bootstrap of the mean of `values` [n] with two random effects.

    `rows` [n] and `columns` [n] (a value's seed and its prompt) are resampled independently, and a
    value counts with the product of the two counts (the pigeonhole bootstrap, Owen 2007: it errs
    to the wide side). So neither many prompts under few seeds nor many seeds on few prompts pass
    for independent observations. `n_clusters` is the smaller number of units; with fewer than two
    of either the bounds are NaN. NaN values are left out.
    """
    check_level(level)
    kept, of_rows, dropped = scored(values, rows)
    _, of_columns, _ = scored(values, columns)
    n_units = count(of_rows), count(of_columns)
    method = "bootstrap of the mean, both effects resampled"
    estimate = float(kept.mean()) if kept.size else math.nan
    if min(n_units) < 2:
        return Interval(
            estimate, math.nan, math.nan, level, method, kept.size, min(n_units), dropped
        )
    rng = np.random.default_rng(resampling.seed)
    draws: list[float] = []
    while len(draws) < resampling.n:
        one, other = (_resample(rng, 1, units)[0] for units in n_units)
        weights = one[of_rows] * other[of_columns]
        if weights.any():  # a draw may meet no value where not every seed has every prompt
            draws.append(float(weights @ kept / weights.sum()))
    return Interval(estimate, *_ends(draws, level), level, method, kept.size, min(n_units), dropped)


def _method(statistic: Statistic, clustered: bool) -> str:
    how = "clusters resampled" if clustered else "rows independent"
    return f"bootstrap of the {statistic}, {how}"


def _ends(draws: ArrayLike, level: float) -> tuple[float, float]:
    """The ends are the same number of draws away from their side, so that swapping the sign of the
    values swaps the interval."""
    ranked = np.sort(draws)
    outside = int((1 - level) / 2 * ranked.size)
    return float(ranked[outside]), float(ranked[ranked.size - 1 - outside])


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
