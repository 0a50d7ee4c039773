"""Recovery or forcing: what vectors that nobody searched for do in the recovery's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from textwrap import wrap
from typing import Any

from holdfast.baselines import MEANINGS
from holdfast.replays import EVERYBODY
from holdfast.report.data import AuditData, Point, ReportData, is_number
from holdfast.report.figures import Figure, figure, label_safe
from holdfast.report.section import Section
from holdfast.statistics import SIGNIFICANT, Corrected, corrected

COLORS = {
    "random": "#8a8f98",
    "undo": "#e8702a",
    "transfer": "#8250c4",
    "answer_mean": "#d0479f",
    "gradient": "#12a594",
}
SYMBOLS = {
    "random": "circle",
    "undo": "square",
    "transfer": "diamond",
    "answer_mean": "triangle-up",
    "gradient": "cross",
}
"""A kind's mark; open, on a dotted line, where the vector may move the features."""
FOUND = "#1f8ad2"


def section(data: ReportData) -> Section | None:
    """None where no trial was compared with baselines."""
    audits: list[dict[str, Any]] = []
    figures = []
    for audit, point, paths in compared(data):
        if not paths["n"]:
            audits.append({"name": audit.name, "label": point.label, "paths": paths})
            continue
        rows, drawn = _rows(paths), _figure(len(audits), audit, point, paths)
        figures.append(drawn)
        audits.append(
            {
                "name": audit.name, "label": point.label, "paths": paths, "rows": rows,
                "scales": paths["spec"]["scales"], "figure": drawn,
                "random": paths.get("random"), "best": best_of(rows, paths["n"]),
                "fewer": [row for row in rows if row["scored"] and row["n"] < paths["n"]],
                "as_is": next(row for row in paths["baselines"] if row["name"] == "undo"),
                "as_is_test": as_often_as_found(paths["baselines"])["undo"],
                "tells": any(test.tells for test in as_often_as_found(paths["baselines"]).values()),
                "n_units": _found(paths)["back"]["n_clusters"],
                "found": _found(paths),
                "holds": not point.free and not point.leaks,
            }
        )  # fmt: skip
    if not audits:
        return None
    title = "Recovery or forcing: baselines of the same norm"
    context = {"audits": audits, "significant": SIGNIFICANT}
    return Section("forcing", title, context, tuple(figures))


def compared(data: ReportData) -> list[tuple[AuditData, Point, Mapping[str, Any]]]:
    """Every audit's points whose recovery was compared with variants, with what was found."""
    return [
        (audit, point, paths)
        for audit in data.audits
        for point in audit.points
        if (paths := point.main.result.get("paths"))
    ]


def _rows(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each baseline, with what it does at each scale. n: prompts it is scored on, at
    every scale; test: that it does as much as the vector found, at the smallest."""
    scales = paths["spec"]["scales"]
    by_name = {row["name"]: row for row in paths["baselines"]}
    tests = as_often_as_found(paths["baselines"])
    rows = []
    for name, meaning in MEANINGS.items():
        found = [by_name.get(f"{name} x{scale:g}") for scale in scales]
        if name == "nothing":
            found = [by_name["nothing"]] * len(scales)
        own = [row for row in found if row is not None]
        if len(own) < len(scales):
            continue
        rows.append(
            {
                "name": name,
                "meaning": meaning,
                "inside": name.endswith("_inside"),
                "scored": is_number(own[0]["back"]["estimate"]),
                "n": min(row["back"]["n"] for row in own),
                "at": own,
                "test": tests[own[0]["name"]],
                "reason": own[0]["back"]["reason"],
            }
        )
    return rows


def _found(paths: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vector itself, added again."""
    row: Mapping[str, Any] = next(row for row in paths["variants"] if row["name"] == EVERYBODY)
    return row


def as_often_as_found(baselines: Sequence[Mapping[str, Any]]) -> dict[str, Corrected]:
    """Baseline → the test that it brings back as often as the vector found, among all of them."""
    p = [row["p"] if is_number(row["p"]) else nan for row in baselines]
    found = corrected(p, [row["back"]["n_clusters"] for row in baselines])
    return {row["name"]: test for row, test in zip(baselines, found, strict=True)}


def best_of(rows: Sequence[Mapping[str, Any]], n: int) -> dict[str, Mapping[str, Any] | None]:
    """Of those that hold the features, and of those that need not: who brings back most at the
    smallest scale; None where there are none. Only of baselines that are scored on all n prompts:
    the others have another rate to beat."""
    best: dict[str, Mapping[str, Any] | None] = {}
    for key, inside in (("inside", True), ("free", False)):
        own = [
            row
            for row in rows
            if row["scored"]
            and row["inside"] == inside
            and row["name"] != "nothing"
            and row["at"][0]["back"]["n"] == n
        ]
        best[key] = max(own, key=lambda row: row["at"][0]["back"]["estimate"], default=None)
    return best


def _figure(index: int, audit: AuditData, point: Point, paths: Mapping[str, Any]) -> Figure:
    """Share of recovered prompts that each baseline brings back, by its norm."""
    from plotly import graph_objects as go

    scales = paths["spec"]["scales"]
    traces = [
        go.Scatter(
            x=[1], y=[_found(paths)["back"]["estimate"]], mode="markers", name="the vector found",
            marker={"symbol": "star", "size": 15, "color": FOUND},
            hovertemplate="the vector found<extra></extra>",
        )
    ]  # fmt: skip
    for row in _rows(paths):
        if row["name"] == "nothing" or not row["scored"]:
            continue
        kind = row["name"].removesuffix("_inside")
        back = [at["back"] for at in row["at"]]
        color = COLORS.get(kind, "#999933")
        traces.append(
            go.Scatter(
                x=scales, y=[b["estimate"] for b in back], mode="lines+markers",
                name="<br>".join(wrap(label_safe(row["meaning"]), 40)),
                line={"color": color, "width": 2, "dash": "solid" if row["inside"] else "dot"},
                marker={
                    "size": 8,
                    "symbol": SYMBOLS.get(kind, "circle") + ("" if row["inside"] else "-open"),
                },
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                    "array": [_gap(b["high"], b["estimate"]) for b in back],
                    "arrayminus": [_gap(b["estimate"], b["low"]) for b in back],
                },
                hovertemplate="%{y:.0%} at %{x} times the norm",
            )
        )  # fmt: skip
    return figure(
        f"forcing-{index}",
        f"Share of {audit.name}'s recovered prompts that each baseline brings back, by its norm",
        traces,
        {
            "height": 470,
            "margin": {"l": 58, "r": 16, "t": 26, "b": 46},
            "legend": {"orientation": "v", "x": 1.02, "y": 1, "font": {"size": 11}},
            "xaxis": {
                "title": {"text": f"norm, times the recovery's under {label_safe(point.label)}"},
                "type": "log", "tickmode": "array", "tickvals": sorted({1.0, *scales}),
                "ticktext": [f"{scale:g}" for scale in sorted({1.0, *scales})], "zeroline": False,
            },
            "yaxis": {
                "title": {"text": "share of recovered prompts"}, "range": [-0.03, 1.05],
                "tickformat": ".0%", "zeroline": False,
            },
        },
    )  # fmt: skip


def _gap(high: float, low: float) -> float:
    return high - low if is_number(high) and is_number(low) else 0.0
