"""Shares of prompts: intervals that do not take rows of one question for many observations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from holdfast.intervals import Interval, score_bounds
from holdfast.resampling import RESAMPLING, Resampling, bootstrap
from holdfast.units import Clusters, count, pairs, scored


def clustered_rate(
    values: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    resampling: Resampling = RESAMPLING,
) -> Interval:
    """The share of successes among rows that come in clusters.

    `values` [n] are 0 or 1 (bool or number; 0.5 for a tie), NaN = not scored. The interval is

    - Wilson's where every row is a unit of its own (no clusters, or all different);
    - otherwise a bootstrap of the mean that resamples whole clusters, widened to Wilson's where it
      is the narrower of the two: with few clusters and a rate near 0 or 1 it has hardly any spread;
    - Wilson's over the *clusters* where all rows agree and a bootstrap has no spread at all;
    - [0, 1] where a single cluster holds all rows and they do not agree.
    """
    kept, units, dropped = scored(values, clusters)
    if kept.size and (kept.min() < 0 or kept.max() > 1):
        raise ValueError(f"a rate needs values in [0, 1], got {kept.min()} to {kept.max()}")
    n, n_units = kept.size, count(units)
    p = float(kept.mean()) if n else math.nan
    low, high = score_bounds(p, n, level)
    method = "Wilson, rows independent" if clusters is None else "Wilson, one row per cluster"
    if n_units < n:
        if kept.min() == kept.max():
            low, high = score_bounds(p, n_units, level)
            method = "Wilson over clusters, all rows agree"
        elif n_units == 1:
            low, high, method = 0.0, 1.0, "none, a single cluster"
        else:
            spread = bootstrap(kept, "mean", units, level, resampling)
            low, high = min(low, spread.low), max(high, spread.high)
            method = f"{spread.method}, at least Wilson's"
    return Interval(p, low, high, level, method, n, n_units, dropped)


def share_greater(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    resampling: Resampling = RESAMPLING,
) -> Interval:
    """The share of pairs with `a > b`, a tie counting one half; `a` and `b` [n].

    Compared by rank, so +inf on both sides is a tie. A pair with a NaN is dropped and counted. The
    interval is that of `clustered_rate`.
    """
    a, b = pairs(a, b)
    wins = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0))
    wins[np.isnan(a) | np.isnan(b)] = np.nan
    return clustered_rate(wins, clusters, level, resampling)
