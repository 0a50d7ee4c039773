"""Methods side by side on the prompts that all of them were asked to bring back.

The post-hoc evaluator of METHODS J.4 with denominators that cannot be 0 (C.5): one valid set V for
every method, the held features read at the last prompt token, every question counting alike beside
every prompt counting alike, and intervals that resample whole questions. From stored rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from statistics import fmean
from typing import Any

from holdfast.config import Config
from holdfast.statistics import Interval, clustered_rate

Row = Mapping[str, Any]

MOVED = 1e-3
"""Rise of the held features, in activation units, from which on a method violates (METHODS J.4)."""

NEAR_ZERO = 1e-6
"""Norm of the held features, in activation units, below which a ratio to it would say nothing: the
published relative drift of 3e7 is one of these."""


class Share(Config):
    """A share with its interval; None where nothing was scored."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    n_clusters: int

    @classmethod
    def of(cls, found: Interval) -> Share:
        estimate, low, high = (
            float(value) if isfinite(value) else None
            for value in (found.estimate, found.low, found.high)
        )
        return cls(estimate=estimate, low=low, high=high, n=found.n, n_clusters=found.n_clusters)


class OnCommon(Config):
    """One method on V.

    n_own: prompts it was asked for itself, V's among them. recovered: share of V's prompts;
    by_question: mean over questions of the share of each; whole_questions: questions all of whose
    prompts came back. drift, drift_max: ‖Δz_S‖ at the readout, mean and largest; relative_mean:
    mean of it over the floored norm, of n_relative prompts; violating: share of prompts whose held
    features rose by more than MOVED; near_zero: share whose held features' norm is below NEAR_ZERO
    to begin with; None where the method's rows do not have the figure.
    """

    method: str
    n_own: int
    recovered: Share
    by_question: Share
    whole_questions: int
    drift: float | None
    drift_max: float | None
    relative_mean: float | None
    n_relative: int
    violating: Share | None
    near_zero: float | None


def common(methods: Mapping[str, Sequence[Row]]) -> list[str]:
    """The ids that every method has, in the order of the first."""
    ids = [{str(row["id"]) for row in rows} for rows in methods.values()]
    if not ids:
        return []
    shared = set.intersection(*ids)
    first = next(iter(methods.values()))
    return list(dict.fromkeys(str(row["id"]) for row in first if str(row["id"]) in shared))


def evaluate(methods: Mapping[str, Sequence[Row]]) -> list[OnCommon]:
    """Every method on the prompts common to all. Rows as `examples.parquet` has them: one a prompt,
    of the prompts that were searched."""
    ids = common(methods)
    made = []
    for name, rows in methods.items():
        of = {str(row["id"]): row for row in rows}
        made.append(_evaluated(name, len(of), [of[i] for i in ids]))
    return made


def _evaluated(name: str, n_own: int, rows: Sequence[Row]) -> OnCommon:
    hits = [float(row["recovered"]) for row in rows]
    clusters = [str(row["cluster"]) for row in rows]
    by: dict[str, list[float]] = {}
    for cluster, hit in zip(clusters, hits, strict=True):
        by.setdefault(cluster, []).append(hit)
    drift, rise, norm = (_known(rows, f"readout_{what}") for what in ("drift", "rise", "norm"))
    relative = [] if drift is None else [v for v in _read(rows, "readout_relative") if isfinite(v)]
    violating = None
    if rise is not None:
        violating = Share.of(clustered_rate([float(v > MOVED) for v in rise], clusters))
    return OnCommon(
        method=name,
        n_own=n_own,
        recovered=Share.of(clustered_rate(hits, clusters)),
        by_question=Share.of(clustered_rate([fmean(own) for own in by.values()], list(by))),
        whole_questions=sum(min(own) == 1.0 for own in by.values()),
        drift=fmean(drift) if drift else None,
        drift_max=max(drift) if drift else None,
        relative_mean=fmean(relative) if relative else None,
        n_relative=len(relative),
        violating=violating,
        near_zero=fmean(v < NEAR_ZERO for v in norm) if norm else None,
    )


def _known(rows: Sequence[Row], column: str) -> list[float] | None:
    """A column that every row has a number in; None otherwise, as for methods that do not measure
    it and for records of before it was measured."""
    values = _read(rows, column)
    return values if all(map(isfinite, values)) else None


def _read(rows: Sequence[Row], column: str) -> list[float]:
    read = (row.get(column) for row in rows)
    return [nan if value is None else float(value) for value in read]
