"""Whether the clamped features stayed put: from the saved perturbation, and along the steps."""

from __future__ import annotations

from statistics import median
from typing import Any

from holdfast.report.data import LEAK, ReportData, is_number
from holdfast.report.figures import (
    CONSTRAINT_COLORS,
    DASHES,
    Figure,
    color_of,
    figure,
    jitter,
    label_safe,
    lanes,
)
from holdfast.report.section import Section
from holdfast.undone import ARMS, FORCED, WHOLE
from holdfast.wording import power

FLOOR = 1e-10
"""Where a drift of exactly zero is drawn on a logarithmic axis."""


def section(data: ReportData) -> Section:
    rows: list[dict[str, Any]] = [
        {"audit": audit.name, "point": point, "checks": point.main.checks, "row": point.main.row,
         "median": (point.main.measured("preactivation_drift") or {}).get("estimate")}
        for audit in data.audits
        for point in audit.points
    ]  # fmt: skip
    figures = (_drift(data), _trace(data))
    read = [row for row in rows if is_number(row["checks"].get("preactivation_drift_answer_max"))]
    seen = [row for row in rows if is_number(row["checks"].get("others_drift_max"))]
    again = [row for row in rows if row["point"].main.measured("zero_reactivation_rate")]
    for row in again:
        row["within"], row["silent"], row["none_again"], row["turned"] = (
            row["point"].main.measured(name)
            for name in (
                "reactivated_within_eligible", "zero_reactivation_rate", "none_reactivated_rate",
                "other_order_rate",
            )
        )  # fmt: skip
    context = {
        "rows": rows, "along": read, "again": again, "seen": seen, "drift": figures[0],
        "trace": figures[1], "contrast": _contrast(data), "undone": _undone(data),
        "forced": FORCED,
        "adapted": dict.fromkeys((p.constraint, p.adapted) for p in data.points if p.adapted),
    }  # fmt: skip
    return Section("drift", "Did the clamped features stay put?", context, figures)


def _undone(data: ReportData) -> list[dict[str, Any]]:
    """How far every vector takes the clamp back, and what it does alone and without that; nothing
    where no prompt was recovered."""
    made = []
    for audit in data.audits:
        for point in audit.points:
            main = point.main
            told = main.result.get("undo")  # records of earlier versions have none
            if told is None or not told["n"]:
                continue
            arms = {
                name: {
                    figure: main.measured(f"undo.{name}.{figure}") for figure in ("rate", "margin")
                }
                for name in (WHOLE, *ARMS)
            }
            made.append(
                {"audit": audit.name, "point": point, "checks": main.checks, "undo": told,
                 "arms": arms}
            )  # fmt: skip
    return made


def _contrast(data: ReportData) -> dict[str, Any] | None:
    """The largest drift that leaks beside the largest of those that do not."""
    leaky = [p for p in data.points if p.leaks]
    exact = [p for p in data.points if not p.free and not p.leaks and 0 < p.drift <= LEAK]
    if not leaky or not exact:
        return None
    worst, best = max(leaky, key=lambda p: p.drift), max(exact, key=lambda p: p.drift)
    return {"leaky": worst, "exact": best, "factor": worst.drift / best.drift}


def _drift(data: ReportData) -> Figure:
    """A lane per constraint and audit, a dot a prompt, on a logarithmic axis."""
    from plotly import graph_objects as go

    rows = [
        (audit, point)
        for kind in data.constraints
        for audit in data.audits
        for point in audit.points
        if point.constraint == kind
    ]
    traces = []
    notes: list[dict[str, Any]] = [
        _note(-5.1, "right", "did not move (rounding) "),
        _note(-4.9, "left", " moved"),
        _note(1.01, "left", "median") | {"xref": "paper"},
    ]
    for lane, (_, point) in enumerate(rows):
        values = [max(v, FLOOR) for v in point.main.values("preactivation_drift")]
        color = color_of(point.constraint, CONSTRAINT_COLORS, data.constraints)
        traces.append(
            go.Scatter(
                x=values, y=[lane + d for d in jitter(len(values), 0.6)], mode="markers",
                marker={"color": color, "size": 5, "opacity": 0.4},
                hovertemplate="%{x:.1e}<extra></extra>",
            )
        )  # fmt: skip
        if values:
            middle = median(values)
            notes.append(
                {
                    "x": 1.01, "xref": "paper", "xanchor": "left", "y": lane, "yref": "y",
                    "text": power(middle), "showarrow": False, "font": {"size": 12},
                }
            )  # fmt: skip
            traces.append(
                go.Scatter(
                    x=[middle], y=[lane], mode="markers", hoverinfo="skip",
                    marker={
                        "symbol": "diamond", "size": 12, "color": color,
                        "line": {"width": 1.5, "color": "#ffffff"},
                    },
                )
            )  # fmt: skip
    return figure(
        "drift-strip",
        "Drift of the clamped features by constraint and audit, on a logarithmic axis",
        traces,
        {
            "height": 90 + 30 * len(rows),
            "showlegend": False,
            "margin": {"l": 10, "r": 84, "t": 26, "b": 48},
            "xaxis": {
                "type": "log", "range": [-10.2, 0.6], "dtick": 1, "exponentformat": "power",
                "title": {"text": "pre-activation drift, share of encoder norm × residual norm"},
                "zeroline": False,
            },
            "yaxis": lanes([f"{point.label} · {audit.name}" for audit, point in rows]),
            "shapes": [
                {
                    "type": "rect", "layer": "below", "yref": "paper", "y0": 0, "y1": 1,
                    "x0": 1e-11, "x1": LEAK, "line": {"width": 0},
                    "fillcolor": "rgba(31,138,210,.09)",
                }
            ],
            "annotations": notes,
        },
    )  # fmt: skip


def _note(x: float, anchor: str, text: str) -> dict[str, Any]:
    """A word above the plot."""
    return {
        "x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": anchor, "text": text,
        "showarrow": False, "font": {"size": 12},
    }  # fmt: skip


def _trace(data: ReportData) -> Figure:
    """The largest violation at each step of the first attempt, a line per audit and constraint."""
    from plotly import graph_objects as go

    traces = []
    for index, audit in enumerate(data.audits):
        for point in audit.points:
            steps = [
                entry
                for entry in point.main.result["trace"]
                if is_number(entry["violation_max"]) and entry["step"]
            ]
            name = label_safe(f"{point.label} · {audit.name}")
            traces.append(
                go.Scatter(
                    x=[entry["step"] for entry in steps],
                    y=[max(entry["violation_max"], FLOOR) for entry in steps],
                    mode="lines", name=name,
                    line={
                        "color": color_of(point.constraint, CONSTRAINT_COLORS, data.constraints),
                        "dash": DASHES[index % len(DASHES)], "width": 2,
                    },
                    hovertemplate=f"{name}, step %{{x}}: %{{y:.1e}}<extra></extra>",
                )
            )  # fmt: skip
    return figure(
        "drift-trace",
        "Largest violation of the constraint at each step of the search, on a logarithmic axis",
        traces,
        {
            "height": 400,
            "margin": {"l": 70, "r": 16, "t": 26, "b": 48},
            "legend": {"x": 1.01, "y": 1},
            "xaxis": {"title": {"text": "step of the first attempt"}, "zeroline": False},
            "yaxis": {
                "type": "log", "range": [-10.2, 0.4], "dtick": 2, "exponentformat": "power",
                "title": {"text": "largest violation"}, "zeroline": False,
            },
        },
    )  # fmt: skip
