"""Are two things different beyond chance? Exact tests of paired outcomes, and many at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from holdfast.units import Clusters, Floats, pairs, scored


def paired_test(a: ArrayLike, b: ArrayLike, clusters: Clusters | None = None) -> float:
    """Exact two-sided p-value that paired yes/no outcomes `a` and `b` [n] have the same rate.

    Under that hypothesis the difference of a whole cluster could as well have the other sign: the
    p-value is the share of all sign patterns whose sum is at least as far from zero. Where every
    row is a cluster of its own this is McNemar's exact test; of clusters it takes no more than
    their number for evidence. Pairs with a NaN are left out; 1.0 where nothing differs.
    """
    a, b = pairs(a, b)
    difference, units, _ = scored(a - b, clusters)
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
