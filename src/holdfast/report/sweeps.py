"""Curves along the axes of a grid, with intervals, on own and on common valid sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.grid import CONSTRAINT, describe, points
from holdfast.report.curves import (
    Line,
    Stop,
    Sweep,
    pareto,
    seeds_of,
    success_curve,
    sweeps_of,
)
from holdfast.report.data import AuditData, ReportData
from holdfast.report.figures import (
    ARM_COLORS,
    CONSTRAINT_COLORS,
    DASHES,
    SYMBOLS,
    Figure,
    color_of,
    label_safe,
    shade,
)
from holdfast.report.panels import SCALES, band, panel, panels
from holdfast.report.section import Section
from holdfast.statistics import Interval
from holdfast.study import headline_constraint

BUDGET = "recovery.budget."
FLOOR = 1e-10


def section(data: ReportData) -> Section | None:
    """None where no grid varies anything but the constraint."""
    audits, figures = [], []
    for index, audit in enumerate(data.audits):
        sweeps = sweeps_of(audit)
        if not sweeps:
            continue
        drawn = []
        for number, sweep in enumerate(sweeps):
            own = _figures(f"{index}-{number}", sweep, data.constraints)
            figures += own
            drawn.append(
                {
                    "sweep": sweep,
                    "figures": own,
                    "random": _has_random(sweep),
                    "neighbors": _neighbors(sweep),
                }
            )
        front = _pareto(index, audit, data.constraints)
        figures += [front] if front else []
        audits.append(
            {
                "name": audit.name,
                "sweeps": drawn,
                "pareto": front,
                "seeds": seeds_of(audit),
                "missing": _missing(data, audit),
            }
        )
    if not audits:
        return None
    return Section("sweeps", "Along the axes of the grid", {"audits": audits}, tuple(figures))


def _missing(data: ReportData, audit: AuditData) -> list[str]:
    """Points of the study's grid that have no result."""
    own = next((a for a in data.study_fields["audits"] if a["name"] == audit.name), None)
    if own is None:
        return []
    grid = data.study_fields["grid"] if own["grid"] is None else own["grid"]
    shown = [{p: v for p, v in at.items() if len(grid[p]) > 1} for at in points(grid)]
    there = {_words(point.main.row["point"], point.constraint) for point in audit.points}
    fixed = audit.points[0].constraint
    named = [_words(at, at.get(CONSTRAINT, fixed)) for at in shown]
    return [", ".join(words) for words in named if words not in there]


def _words(at: dict[str, Any], constraint: str) -> tuple[str, ...]:
    return (constraint, *describe(at))


def _has_random(sweep: Sweep) -> bool:
    return any(stop.point.arm("random_features") for line in sweep.lines for stop in line.stops)


def _neighbors(sweep: Sweep) -> list[str]:
    """Behaviors beside the audited one that some point measured."""
    stops = [stop for line in sweep.lines for stop in line.stops]
    return list(dict.fromkeys(name for stop in stops for name in stop.elsewhere))


def _figures(id_: str, sweep: Sweep, order: Sequence[str]) -> list[Figure]:
    if not sweep.is_curve:
        return []
    made = [_curves(id_, sweep, order)]
    if sweep.path.startswith(BUDGET):
        made.append(_success(id_, sweep, order))
    else:
        made.append(_spread(id_, sweep))
    return made


def _style(sweep: Sweep, index: int, line: Line, order: Sequence[str]) -> dict[str, Any]:
    of_kind = [other for other in sweep.lines[:index] if other.constraint == line.constraint]
    return {
        "color": color_of(line.constraint, CONSTRAINT_COLORS, order),
        "dash": DASHES[len(of_kind) % len(DASHES)],
        "symbol": SYMBOLS[index % len(SYMBOLS)],
    }


def _curves(id_: str, sweep: Sweep, order: Sequence[str]) -> Figure:
    """Recovery, smallest norm, drift and valid set in four panels over one axis."""
    traces = [
        trace
        for index, line in enumerate(sweep.lines)
        for trace in (*_traces(line, _style(sweep, index, line, order)), *_random(line))
    ]
    marked = sorted({float(stop.value) for line in sweep.lines for stop in line.stops})
    return panels(
        f"sweep-{id_}",
        f"Recovery, smallest norm, drift and valid prompts of {sweep.audit} along {sweep.name}",
        traces,
        x=(sweep.name, marked),
        titles=(
            "recovered",
            "median smallest norm, share of the residual's",
            "median drift, relative",
            "valid prompts",
        ),
        scales=("share", "norm", "drift", "count"),
    )


def _traces(line: Line, style: dict[str, Any]) -> list[Any]:
    """A line in each panel; where valid sets differ, also on the prompts that all of them have."""
    xs, name = [stop.value for stop in line.stops], label_safe(line.name)
    drifts = [None if stop.drift is None else max(stop.drift, FLOOR) for stop in line.stops]
    made = [
        band(1, xs, [stop.rate for stop in line.stops], name, style),
        band(2, xs, [stop.norm for stop in line.stops], name, style, legend=False),
        band(3, xs, drifts, name, style, legend=False),
        band(4, xs, [stop.n_valid for stop in line.stops], name, style, legend=False),
    ]
    if line.n_common and not line.one_valid_set:
        faint = {"color": style["color"], "dash": "dot", "open": True}
        named = f"{name}, prompts valid at every point ({line.n_common})"
        for panel, values in (
            (1, [stop.common_rate for stop in line.stops]),
            (2, [stop.common_norm for stop in line.stops]),
        ):
            made.append(band(panel, xs, values, named, faint, legend=panel == 1, bars=False))
    return made


def _random(line: Line) -> list[Any]:
    """The same number of random features: how often they suppress, and what comes back then."""
    arms = [(stop, stop.point.arm("random_features")) for stop in line.stops]
    there = [(stop, arm) for stop, arm in arms if arm is not None]
    if not there:
        return []
    style = {"color": ARM_COLORS["random_features"], "dash": "dash"}
    searched = [(stop, arm) for stop, arm in there if arm.audited]
    name = "random features"
    rates = [_interval(arm.row) for _, arm in searched]
    counts = [arm.row["n_valid"] for _, arm in there]
    return [
        band(1, [stop.value for stop, _ in searched], rates, name, style, legend=False),
        band(4, [stop.value for stop, _ in there], counts, name, style),
    ]


def _interval(row: Any) -> Interval:
    low, high = row["ci_low"], row["ci_high"]
    n = row["n_valid"]
    return Interval(row["recovery_rate"], low, high, 0.95, "as stored", n, row["n_clusters"])


def _success(id_: str, sweep: Sweep, order: Sequence[str]) -> Figure:
    """What the largest budget's smallest norms say of all smaller ones, and what these found."""
    from plotly import graph_objects as go

    traces = []
    for index, line in enumerate(sweep.lines):
        style = _style(sweep, index, line, order)
        largest = max(line.stops, key=lambda stop: float(stop.value))
        xs, ys = success_curve(largest.point)
        traces.append(
            go.Scatter(
                x=xs, y=ys, mode="lines", name=label_safe(line.name),
                line={"shape": "hv", "color": style["color"], "width": 2,
                      "dash": DASHES[index % len(DASHES)]},
                hovertemplate="%{y:.0%} within %{x:.3f}",
            )
        )  # fmt: skip
        found = [(_budget(stop), stop.point.main.measured("goal_rate")) for stop in line.stops]
        seen = [(x, goal["estimate"]) for x, goal in found if goal is not None]
        traces.append(
            go.Scatter(
                x=[x for x, _ in seen], y=[y for _, y in seen], mode="markers", showlegend=False,
                marker={"color": style["color"], "size": 9, "symbol": f"{style['symbol']}-open",
                        "line": {"width": 2}},
                hovertemplate="budget %{x:.3f}: goal reached on %{y:.0%}<extra></extra>",
            )
        )  # fmt: skip
    return panel(
        f"success-{id_}",
        f"Share of {sweep.audit}'s prompts whose goal is reached within a budget",
        traces,
        ("norm or budget, share of the residual's", SCALES["norm"]),
        ("goal reached", SCALES["share"]),
    )


def _spread(id_: str, sweep: Sweep) -> Figure:
    """How the smallest norms are distributed at every point, under the constraint that a reader
    should look at first: the share of prompts whose goal is reached within a norm."""
    from plotly import graph_objects as go

    own = headline_constraint(list(dict.fromkeys(line.constraint for line in sweep.lines)))
    traces = []
    for index, line in enumerate(line for line in sweep.lines if line.constraint == own):
        for place, stop in enumerate(line.stops):
            xs, ys = success_curve(stop.point)
            name = f"{sweep.name} {stop.name}" + (f", {line.name}" if index else "")
            traces.append(
                go.Scatter(
                    x=xs, y=ys, mode="lines", name=label_safe(name),
                    line={"shape": "hv", "width": 2, "dash": DASHES[(index + place) % len(DASHES)],
                          "color": shade(place, len(line.stops))},
                    hovertemplate="%{y:.0%} within %{x:.3f}",
                )
            )  # fmt: skip
    return panel(
        f"spread-{id_}",
        f"Distribution of {sweep.audit}'s smallest norms at every point along {sweep.name}",
        traces,
        ("smallest norm, share of the residual's", SCALES["norm"]),
        (f"goal reached under {own}", SCALES["share"]),
    )


def _budget(stop: Stop) -> float:
    return float(stop.point.main.checks["budget_relative"] or 0.0)


def _pareto(index: int, audit: AuditData, order: Sequence[str]) -> Figure | None:
    """Recovery against drift: up and to the left is the stronger finding against the clamp.

    None where no point drifts ten times as much as another: then there is nothing to trade.
    """
    from plotly import graph_objects as go

    found = []
    for point in audit.points:
        drift = (point.main.measured("preactivation_drift") or {}).get("estimate")
        rate = point.main.row["recovery_rate"]
        if drift is not None and rate is not None:
            found.append((point, max(float(drift), FLOOR), float(rate)))
    drifts = [drift for _, drift, _ in found]
    if len(found) < 3 or max(drifts) < 10 * min(drifts):
        return None
    front = pareto([(x, y) for _, x, y in found])
    traces = [
        go.Scatter(
            x=[found[i][1] for i in front], y=[found[i][2] for i in front], mode="lines",
            line={"shape": "hv", "color": "rgba(128,128,128,.7)", "width": 1.5, "dash": "dot"},
            name="no other point has less drift and more recovery", hoverinfo="skip",
        )
    ]  # fmt: skip
    for place, kind in enumerate(dict.fromkeys(point.constraint for point, _, _ in found)):
        own = [entry for entry in found if entry[0].constraint == kind]
        traces.append(
            go.Scatter(
                x=[x for _, x, _ in own], y=[y for _, _, y in own], mode="markers",
                name=label_safe(kind), text=[label_safe(point.label) for point, _, _ in own],
                marker={"color": color_of(kind, CONSTRAINT_COLORS, order), "size": 10,
                        "symbol": SYMBOLS[place % len(SYMBOLS)],
                        "opacity": 0.75, "line": {"width": 1, "color": "#ffffff"}},
                hovertemplate="%{text}: %{y:.0%} at drift %{x:.1e}<extra></extra>",
            )
        )  # fmt: skip
    return panel(
        f"pareto-{index}",
        f"Recovery against drift of {audit.name}, a dot a point of the grid",
        traces,
        ("median drift of a held pre-activation (log scale)", SCALES["drift"] | {"dtick": 1}),
        ("recovered", SCALES["share"]),
    )
