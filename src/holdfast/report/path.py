"""Through what the recovery went: its vector in parts, each added alone and left out."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from textwrap import wrap
from typing import Any

from holdfast.parts import EXACT
from holdfast.replays import ALONG, ROWS
from holdfast.report.data import ReportData, is_number
from holdfast.report.figures import Figure, figure
from holdfast.report.forcing import compared
from holdfast.report.section import Section

NAMES: Mapping[str, str] = {
    "clamped": "the clamped features",
    "other": "all other features",
    "residual": "what the SAE does not see",
    "top": "the features that change most",
    "seen": "projection on active decoder rows",
    "unseen": "the rest, orthogonal to it",
}
COLORS = {"alone": "#1f8ad2", "matched": "#12a594", "without": "#e8702a"}


def section(data: ReportData) -> Section | None:
    """None where no recovery was split."""
    audits: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for audit, point, paths in compared(data):
        if not paths["n"]:
            continue
        rows = _rows(paths)
        drawn = _figure(len(audits), audit.name, rows) if rows else None
        figures += [drawn] if drawn else []
        audits.append(
            {
                "name": audit.name, "label": point.label, "paths": paths, "rows": rows,
                "figure": drawn, "places": _places(paths), "undo": _undo(paths),
                "cosine": _cosine(paths),
                "everything": next(v for v in paths["variants"] if v["name"] == "all"),
            }
        )  # fmt: skip
    if not audits:
        return None
    return Section(
        "path", "Through what the recovery went", {"audits": audits, "exact": EXACT}, tuple(figures)
    )


def _rows(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    by_name = {row["name"]: row for row in paths["variants"]}
    return [
        {
            **part,
            "meaning": NAMES[part["name"]],
            "alone": by_name[part["name"]],
            "matched": by_name[f"{part['name']} x1"],
            "without": by_name.get(f"all but {part['name']}"),
            "shapley": {w: of.get(part["name"]) for w, of in paths["shapley"].items()},
        }
        for part in paths["parts"]
    ]


def _places(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sites and groups of positions, alone and left out."""
    by_name = {row["name"]: row for row in paths["variants"]}
    return [
        {"name": name.removeprefix("at "), "alone": row, "without": by_name[f"all but {name}"]}
        for name, row in by_name.items()
        if name.startswith("at ")
    ]


def _undo(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What of the vector takes the clamp back, alone and left out."""
    by_name = {row["name"]: row for row in paths["variants"]}
    return [
        {"name": meaning, "alone": by_name[name], "without": by_name[f"all but {name}"]}
        for name, meaning in (
            (ROWS, "in the span of the clamped decoder rows"),
            (ALONG, "along the clamp's displacement"),
        )
    ]


def _cosine(paths: Mapping[str, Any]) -> float | None:
    """Between what other features carry and what the SAE does not see, from the mean Gram matrix;
    None where one of them is nothing."""
    gram = paths["gram"]
    if gram is None or min(gram[1][1], gram[2][2]) < 1e-8:
        return None
    return float(gram[1][2] / sqrt(gram[1][1] * gram[2][2]))


def _figure(index: int, name: str, rows: list[dict[str, Any]]) -> Figure:
    """Share of prompts that each part brings back: alone, at the whole's norm, left out."""
    from plotly import graph_objects as go

    traces = []
    for key, meaning in (
        ("alone", "the part alone"),
        ("matched", "alone, at the whole vector's norm"),
        ("without", "everything but the part"),
    ):
        own = [r for r in rows if r[key] and is_number(r[key]["back"]["estimate"])]
        back = [r[key]["back"] for r in own]
        traces.append(
            go.Bar(
                x=["<br>".join(wrap(r["meaning"], 18)) for r in own],
                y=[b["estimate"] for b in back], name=meaning,
                marker={"color": COLORS[key]},
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                    "array": [b["high"] - b["estimate"] for b in back],
                    "arrayminus": [b["estimate"] - b["low"] for b in back],
                },
                hovertemplate="%{y:.0%}",
            )
        )  # fmt: skip
    return figure(
        f"path-{index}",
        f"Share of {name}'s recovered prompts that each part brings back, alone and left out",
        traces,
        {
            "height": 360,
            "barmode": "group",
            "margin": {"l": 58, "r": 16, "t": 26, "b": 60},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": {"zeroline": False, "automargin": True},
            "yaxis": {
                "title": {"text": "share of recovered prompts"}, "range": [0, 1.08],
                "tickformat": ".0%", "zeroline": False,
            },
        },
    )  # fmt: skip
