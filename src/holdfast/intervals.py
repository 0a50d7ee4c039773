"""An interval, and those that have a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


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
    return Interval(p, *score_bounds(p, n, level), level, "Wilson, rows independent", n, n)


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


def score_bounds(p: float, n: int, level: float) -> tuple[float, float]:
    """Ends of Wilson's interval of a share p of n rows (formula of METHODS G.5)."""
    check_level(level)
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At 0 and 1 the exact ends are 0 and 1; rounding would leave the estimate outside.
    return (0.0 if p == 0 else center - half), (1.0 if p == 1 else center + half)


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, as 0.95, got {level}")
