"""The numbers of a sweep: what recovery, norm, drift and valid set do along one axis of a grid.

The valid set can change along an axis, so every rate is given twice: on the point's own valid set,
and on the prompts that are valid at every point of the line (METHODS B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite, isnan, nan, sqrt
from typing import Any

import numpy as np

from holdfast.grid import CONSTRAINT, axis_name, describe, is_numeric, label
from holdfast.report.data import AuditData, Point, is_number
from holdfast.statistics import (
    Corrected,
    Interval,
    bootstrap,
    clustered_rate,
    corrected,
    crossed_bootstrap,
    paired_test,
)

Row = Mapping[str, Any]
SEEDS = {
    "seed": "of the study: its prompts, its features and the starts of its searches",
    "recovery.seed": "of the search: its random starts, on the same prompts and features",
}
"""Axes that are seeds, and what each draws."""
NEIGHBOR = "neighbor"


@dataclass(frozen=True)
class Stop:
    """A point of a line. value: on the axis.

    rate, norm, area: on its own valid set; the same with `common_`: on the prompts valid at every
    point of the line, None if there are none. area: under the share of prompts whose goal is
    reached within a norm, up to the budget and in shares of it: free, from the smallest norms.
    step: whether the rate is that of the point before it, on the prompts valid at both, corrected
    along the line; None where there is no such point or prompt.
    """

    value: Any
    point: Point
    rate: Interval
    norm: Interval
    area: Interval
    common_rate: Interval | None
    common_norm: Interval | None
    step: Corrected | None = None

    @property
    def name(self) -> str:
        return label(self.value)

    @property
    def drift(self) -> float | None:
        """Median drift of a held pre-activation over the prompts, relative."""
        found = self.point.main.measured("preactivation_drift")
        return found["estimate"] if found else None

    @property
    def n_valid(self) -> int:
        return len(self.point.main.audited)

    @property
    def elsewhere(self) -> dict[str, tuple[Interval, Interval]]:
        """Behavior that the clamp should leave alone → its rate without and with the clamp, here:
        capability, or answers to benign prompts (over-refusal where they go)."""
        return neighbors_of(self.point)


@dataclass(frozen=True)
class Line:
    """The points that differ along one axis alone. name: what is the same on all of them."""

    name: str
    constraint: str
    stops: tuple[Stop, ...]
    n_common: int

    @property
    def one_valid_set(self) -> bool:
        """Whether every point has the same valid set, so that both rates are one."""
        return all(stop.n_valid == self.n_common for stop in self.stops)


@dataclass(frozen=True)
class Sweep:
    """One axis of an audit's grid."""

    audit: str
    path: str
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        return axis_name(self.path)

    @property
    def is_curve(self) -> bool:
        """At least three numbers: a curve can be drawn."""
        values = [stop.value for line in self.lines for stop in line.stops]
        return all(map(is_numeric, values)) and len(set(values)) >= 3


def sweeps_of(audit: AuditData) -> list[Sweep]:
    """Every axis along which the audit has at least two points, but for the constraint."""
    paths = dict.fromkeys(p for point in audit.points for p in point.main.row["point"])
    made = []
    for path in paths:
        if path == CONSTRAINT:
            continue
        groups: dict[tuple[str, ...], list[Point]] = {}
        for point in audit.points:
            at = point.main.row["point"]
            if path in at:
                rest = {other: value for other, value in at.items() if other != path}
                key = (point.constraint, *describe(rest))
                groups.setdefault(key, []).append(point)
        lines = tuple(_line(key, path, own) for key, own in groups.items() if len(own) > 1)
        if lines:
            made.append(Sweep(audit.name, path, lines))
    return made


def _line(key: Sequence[str], path: str, points: Sequence[Point]) -> Line:
    rows = [_by_prompt(point) for point in points]
    shared = set(rows[0]).intersection(*rows[1:])
    order = [prompt for prompt in rows[0] if prompt in shared]
    stops = []
    for point, own in zip(points, rows, strict=True):
        common = [own[prompt] for prompt in order]
        stops.append(
            Stop(
                value=point.main.row["point"][path],
                point=point,
                rate=_rate(point.main.audited),
                norm=_norm(point.main.audited),
                area=_area(point),
                common_rate=_rate(common) if common else None,
                common_norm=_norm(common) if common else None,
            )
        )
    if all(is_numeric(stop.value) for stop in stops):
        stops.sort(key=lambda stop: float(stop.value))
    return Line(", ".join(key), key[0], _tested(stops), len(order))


def _by_prompt(point: Point) -> dict[tuple[str, str], Row]:
    """Audited rows by id and text: under another seed an id can be another prompt."""
    return {(str(row["id"]), str(row["text_sha256"])): row for row in point.main.audited}


def _clusters(rows: Sequence[Row]) -> list[str]:
    return [str(row["cluster"]) for row in rows]


def _rate(rows: Sequence[Row]) -> Interval:
    return clustered_rate([float(row["recovered"]) for row in rows], _clusters(rows))


def neighbors_of(point: Point) -> dict[str, tuple[Interval, Interval]]:
    """Neighbor → (rate without the clamp, rate with it), as measured; {} where there is none."""
    found = {}
    for measured in point.main.result["measurements"]:
        prefix, _, rest = measured["name"].partition(".")
        name, _, condition = rest.rpartition(".")
        if prefix == NEIGHBOR and condition == "clean":
            suppressed = point.main.measured(f"{NEIGHBOR}.{name}.suppressed")
            if suppressed is not None:
                found[name] = (_stored(measured), _stored(suppressed))
    return found


def _stored(measured: Row) -> Interval:
    """A measurement as it was stored; what was not measured is NaN."""
    estimate, low, high = (
        nan if measured[name] is None else float(measured[name])
        for name in ("estimate", "low", "high")
    )
    return Interval(
        estimate, low, high, 0.95, measured["method"], measured["n"], measured["n_clusters"]
    )


def _norm(rows: Sequence[Row]) -> Interval:
    """Median smallest norm; a goal never reached counts as infinitely far."""
    return bootstrap([_smallest(row) for row in rows], "median", _clusters(rows))


def _smallest(row: Row) -> float:
    value = row["smallest_norm_relative"]
    return float(value) if is_number(value) else inf


def _area(point: Point) -> Interval:
    budget = float(point.main.checks["budget_relative"] or nan)
    rows = point.main.audited
    shares = [max(0.0, 1 - _smallest(row) / budget) for row in rows]
    return bootstrap(shares, "mean", _clusters(rows))


def _tested(stops: Sequence[Stop]) -> tuple[Stop, ...]:
    p, n_units = [nan], [0]
    for before, here in pairwise(stops):
        first, second = _by_prompt(before.point), _by_prompt(here.point)
        both = [(first[k], second[k]) for k in first if k in second]
        one, two = ([float(rows[i]["recovered"]) for rows in both] for i in (0, 1))
        units = _clusters([rows[0] for rows in both])
        p.append(paired_test(one, two, units) if both else nan)
        n_units.append(len(set(units)))
    return tuple(
        replace(stop, step=None if isnan(test.p) else test)
        for stop, test in zip(stops, corrected(p, n_units), strict=True)
    )


def success_curve(point: Point) -> tuple[list[float], list[float]]:
    """(norms, shares of audited prompts whose goal is reached within them), from 0 to the budget:
    what a search under any smaller budget would have reached, by its smallest norms."""
    found = sorted(v for v in map(_smallest, point.main.audited) if isfinite(v))
    n = max(len(point.main.audited), 1)
    shares = [(i + 1) / n for i in range(len(found))]
    budget = float(point.main.checks["budget_relative"] or 0.0)
    last = shares[-1] if shares else 0.0
    return [0.0, *found, max([budget, *found])], [0.0, *shares, last]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (drift, recovery) no other point beats: none with less drift and as much recovery, or
    more recovery and as little drift; by drift."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


# --- Seeds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seeds:
    """A line along seeds. drawn: what they draw, in words. rates: by seed; spread: their standard
    deviation; expected: what the prompts' number alone would make of equal rates; pooled: mean with
    seeds and prompts resampled, so that a prompt seen under several seeds counts once."""

    audit: str
    name: str
    drawn: str
    rates: tuple[tuple[str, Interval], ...]
    pooled: Interval
    spread: float
    expected: float
    n_prompts: int


def seeds_of(audit: AuditData) -> list[Seeds]:
    """Every line of the audit along an axis of seeds."""
    return [
        across_seeds(audit.name, line, SEEDS[sweep.path])
        for sweep in sweeps_of(audit)
        if sweep.path in SEEDS
        for line in sweep.lines
    ]


def across_seeds(audit: str, line: Line, drawn: str = SEEDS["seed"]) -> Seeds:
    """Seeds as a random effect beside prompts."""
    rows = [(stop.name, row) for stop in line.stops for row in stop.point.main.audited]
    units = _units([row for _, row in rows])
    pooled = crossed_bootstrap(
        [float(row["recovered"]) for _, row in rows], [seed for seed, _ in rows], units
    )
    estimates = np.array([stop.rate.estimate for stop in line.stops])
    mean = float(estimates.mean())
    variance = [mean * (1 - mean) / max(stop.rate.n_clusters, 1) for stop in line.stops]
    return Seeds(
        audit=audit,
        name=line.name,
        drawn=drawn,
        rates=tuple((stop.name, stop.rate) for stop in line.stops),
        pooled=pooled,
        spread=float(estimates.std(ddof=1)),
        expected=sqrt(float(np.mean(variance))),
        n_prompts=len(set(units)),
    )


def _units(rows: Sequence[Row]) -> list[str]:
    """What is resampled as one: a cluster of several texts, else the text itself, which under
    another seed can be another one of the same name."""
    texts: dict[str, dict[str, int]] = {}
    for row in rows:
        own = texts.setdefault(str(row["cluster"]), {})
        own[str(row["id"])] = 1
    return [
        str(row["cluster"]) if len(texts[str(row["cluster"])]) > 1 else str(row["text_sha256"])
        for row in rows
    ]
