"""Measurements: a figure with its unit, its interval, and what could not be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.config import Config
from holdfast.statistics import (
    Interval,
    bootstrap,
    clustered_rate,
    paired_bootstrap,
    ratio_of_means,
    wilson,
)


class Measurement(Config):
    """One figure over prompts.

    estimate, low, high: None where nothing was scored or the value is infinite; method: of the
    interval, and whether it respects clusters; n: prompts scored; n_unscored: prompts without a
    value, for `reason`.
    """

    name: str
    unit: str
    estimate: float | None
    low: float | None
    high: float | None
    method: str
    n: int
    n_unscored: int
    n_clusters: int
    reason: str = ""

    @property
    def plain(self) -> dict[str, Any]:
        """As plain JSON types, for a record."""
        return self.model_dump(mode="json")


def measured(name: str, unit: str, interval: Interval, reason: str) -> Measurement:
    """An interval with its name and unit; reason: why rows, or all, are unscored."""

    def number(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return Measurement(
        name=name,
        unit=unit,
        estimate=number(interval.estimate),
        low=number(interval.low),
        high=number(interval.high),
        method=interval.method,
        n=interval.n,
        n_unscored=interval.n_dropped,
        n_clusters=interval.n_clusters,
        reason=reason if interval.n_dropped or not np.isfinite(interval.estimate) else "",
    )


def rate(name: str, hits: Tensor, clusters: Sequence[str]) -> Measurement:
    """Share of prompts [n] bool: Wilson if every prompt is its own cluster, else by cluster."""
    values = hits.double().cpu().numpy()
    if len(set(clusters)) == len(clusters):
        interval = wilson(int(values.sum()), len(values))
    else:
        interval = clustered_rate(values, clusters)
    return measured(name, "share of prompts", interval, "")


def rate_where(
    name: str, hits: Tensor, scored: Tensor, clusters: Sequence[str], reason: str
) -> Measurement:
    """Share of the scored prompts; hits, scored [n] bool, the others are unscored for `reason`."""
    values = hits.double().masked_fill(~scored, torch.nan).cpu().numpy()
    return measured(name, "share of prompts", clustered_rate(values, clusters), reason)


def median(
    name: str, unit: str, values: Tensor, clusters: Sequence[str], reason: str = ""
) -> Measurement:
    """Median over prompts [n] with a cluster-bootstrap interval.

    NaN is unscored for `reason`. Infinite values count by rank; an infinite median or bound is
    stored as None, also for `reason`.
    """
    interval = bootstrap(values.double().cpu().numpy(), "median", clusters)
    return measured(name, unit, interval, reason)


def share(
    name: str, values: Tensor, clusters: Sequence[str], reason: str = "", unit: str = ""
) -> Measurement:
    """Mean of values [n] in [0, 1], with the interval of a rate; NaN is unscored for `reason`."""
    interval = clustered_rate(values.double().cpu().numpy(), clusters)
    return measured(name, unit or "share of prompts", interval, reason)


def mean(
    name: str, unit: str, values: Tensor, clusters: Sequence[str], reason: str = ""
) -> Measurement:
    """Mean over prompts [n] with a cluster-bootstrap interval; NaN is unscored for `reason`."""
    interval = bootstrap(values.double().cpu().numpy(), "mean", clusters)
    return measured(name, unit, interval, reason)


def difference(
    name: str, unit: str, a: Tensor, b: Tensor, clusters: Sequence[str], reason: str = ""
) -> Measurement:
    """Mean of a − b over pairs of prompts [n] with a paired, clustered bootstrap interval."""
    first, second = (values.double().cpu().numpy() for values in (a, b))
    return measured(name, unit, paired_bootstrap(first, second, "mean", clusters), reason)


def relative(
    name: str, after: Tensor, before: Tensor, clusters: Sequence[str], nothing: str
) -> Measurement:
    """What is left of a share: the rate after over the rate before, both [n] bool of the same
    prompts. It has no value, for a reason, where nothing was there before; `nothing` says what is
    missing where there are no prompts at all."""
    first, second = (values.double().cpu().numpy() for values in (after, before))
    reason = "the rate before is 0: nothing can be left of it" if len(first) else nothing
    return measured(
        name, "share of the rate before", ratio_of_means(first, second, clusters), reason
    )
