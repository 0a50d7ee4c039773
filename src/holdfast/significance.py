"""Are two things different beyond chance? Exact tests of paired outcomes, and many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
