"""Through what the recovery went: its vector in parts, each added alone and left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from textwrap import wrap
from typing import Any

from holdfast.parts import EXACT
from holdfast.replays import ALONG, ROWS
from holdfast.report.data import ReportData, is_number
from holdfast.report.figures import DASHES, Figure, figure, label_safe
from holdfast.report.forcing import compared
from holdfast.report.section import Section
from holdfast.wording import NOTHING

NAMES: Mapping[str, str] = {
    "clamped": "the clamped features",
    "other": "all other features",
    "residual": "what the SAE does not see",
    "top": "the features that change most",
    "seen": "projection on active decoder rows",
    "unseen": "the rest, orthogonal to it",
    "sparse": "a few decoder rows, none subtracted",
    "encoder": "projection on active encoder columns",
    "principal": "where residuals vary most",
}
DIRECTIONS: Mapping[str, str] = {
    "undo": "the clamp's displacement, taken back",
    "answer_mean": "difference in means towards the answer",
    "gradient_inside": "the margin's gradient, inside the constraint",
}
ROUTES: Mapping[str, str] = {
    "direct": "nothing but the vector, and clamps above that read it",
    "no attention": "later MLPs answer, attention adds what it did",
    "no mlps": "later attention answers, MLPs add what they did",
    "no patterns": "attention looks where it did, all else answers",
}
PATTERNS = {"alone": "", "matched": "/", "without": "."}
FORESEEN = ("linear", "along")
NO_SWITCH = "error_unswitched"
COLORS = {"alone": "#1f8ad2", "matched": "#12a594", "without": "#e8702a"}


def section(data: ReportData) -> Section | None:
    """None where no recovery was split."""
    audits: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for audit, point, paths in compared(data):
        if not paths["n"]:
            audits.append({"name": audit.name, "label": point.label, "paths": paths})
            continue
        rows = _rows(paths)
        drawn = _figure(len(audits), audit.name, rows) if rows else None
        curves = _curves(len(audits), audit.name, rows)
        figures += [each for each in (drawn, curves) if each]
        audits.append(
            {
                "name": audit.name, "label": point.label, "paths": paths, "rows": rows,
                "figure": drawn, "curves": curves, "places": _places(paths), "undo": _undo(paths),
                "cosine": _cosine(paths), "likes": _likes(paths),
                "overlaps": _named(paths.get("overlaps"), DIRECTIONS),
                "routes": _routes(paths),
                "predicted": _foreseen(paths),
                "together": _together(paths),
                "everything": next(v for v in paths["variants"] if v["name"] == "all"),
            }
        )  # fmt: skip
    if not audits:
        return None
    return Section(
        "path", "Through what the recovery went", {"audits": audits, "exact": EXACT}, tuple(figures)
    )


def _likes(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parts beside what they are to be told from, all of the vector's norm."""
    by_name = {row["name"]: row for row in paths["variants"]}
    return [
        {
            "meaning": NAMES[part["name"]],
            "own": by_name.get(f"{part['name']} x1"),
            "another": by_name.get(f"{part['name']} of another"),
            "random": by_name.get(f"random in {part['name']}"),
        }
        for part in paths["parts"]
        if f"{part['name']} of another" in by_name or f"random in {part['name']}" in by_name
    ]


def _foreseen(paths: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was predicted, beside how well; none in records without both predictions."""
    predicted = paths.get("predicted") or {}
    if not predicted.keys() >= set(FORESEEN):
        return None
    return predicted | {kind: _agreed(predicted[kind]) for kind in FORESEEN}


def _agreed(of: Mapping[str, Any]) -> dict[str, Any]:
    """Agreement in words: a correlation with as many nines as it has, an error of a few hundredths
    of a percent as that."""
    r, error, smooth = (of[name]["estimate"] for name in ("correlation", "error", NO_SWITCH))
    return {
        **of,
        "r": NOTHING
        if r is None
        else "> 0.9999"
        if r > 0.9999
        else f"{r:.{4 if r > 0.99 else 2}f}",
        "off": _off(error),
        "off_smooth": None if smooth is None else _off(smooth),
        "n": of["error"]["n"],
    }


def _off(error: float | None) -> str:
    if error is None:
        return NOTHING
    return "<0.01%" if error < 1e-4 else f"{error:.{0 if error >= 0.1 else 2}%}"


def _named(
    rows: Sequence[Mapping[str, Any]] | None, names: Mapping[str, str]
) -> list[dict[str, Any]]:
    return [{**row, "meaning": names[row["name"]]} for row in rows or ()]


def _routes(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What comes back by each route; none where it was not asked for."""
    return _named((paths.get("routes") or {}).get("kept"), ROUTES)


def _together(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What two exact parts do beyond what each does alone."""
    found = paths.get("interactions", {})
    pairs = zip(found.get("margin", ()), found.get("back", ()), strict=True)
    return [
        {
            "pair": " and ".join(NAMES[name] for name in margin["parts"]),
            "margin": margin["beyond"], "back": back["beyond"],
        }
        for margin, back in pairs
    ]  # fmt: skip


def _rows(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    by_name = {row["name"]: row for row in paths["variants"]}
    lens = {row["name"]: row for row in (paths.get("routes") or {}).get("lens", ())}
    predicted = _foreseen(paths) or {kind: {"regained": {}} for kind in FORESEEN}
    foreseen = {kind: predicted[kind]["regained"] for kind in FORESEEN}
    return [
        {
            **part,
            "meaning": NAMES[part["name"]],
            "alone": by_name[part["name"]],
            "matched": by_name.get(f"{part['name']} x1"),
            "scales": _scales(paths, by_name, part["name"]),
            "lens": lens.get(part["name"]),
            "foreseen": {kind: of.get(part["name"]) for kind, of in foreseen.items()},
            "without": by_name.get(f"all but {part['name']}"),
            "shapley": {w: of.get(part["name"]) for w, of in paths["shapley"].items()},
        }
        for part in paths["parts"]
    ]


def _scales(
    paths: Mapping[str, Any], by_name: Mapping[str, Any], name: str
) -> list[tuple[float, Mapping[str, Any]]]:
    """The part at every norm it was brought to."""
    return [
        (scale, by_name[f"{name} x{scale:g}"])
        for scale in sorted(paths["spec"].get("part_scales", (1.0,)))
    ]


def _places(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sites and groups of positions, alone and left out."""
    by_name = {row["name"]: row for row in paths["variants"]}
    return [
        {
            "name": name.removeprefix("at "),
            "alone": row,
            "without": by_name[f"all but {name}"],
            "up_to": by_name.get(name.replace("at ", "up to ", 1)),
        }
        for name, row in by_name.items()
        if name.startswith("at ")
    ]


def _undo(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What of the vector takes the clamp back, alone and left out."""
    by_name = {row["name"]: row for row in paths["variants"]}
    return [
        {
            "name": meaning,
            "alone": by_name[name],
            "without": by_name[f"all but {name}"],
            "up_to": None,
        }
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
                marker={"color": COLORS[key], "pattern": {"shape": PATTERNS[key]}},
                error_y={
                    "type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
                    "color": "#808890",
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


def _curves(index: int, name: str, rows: list[dict[str, Any]]) -> Figure | None:
    """Share of prompts that each part brings back, over the norm it is brought to; None for one
    norm alone."""
    from plotly import graph_objects as go

    if not rows or len(rows[0]["scales"]) < 2:
        return None
    traces = []
    for place, row in enumerate(rows):
        own = [(s, v["back"]) for s, v in row["scales"] if is_number(v["back"]["estimate"])]
        traces.append(
            go.Scatter(
                x=[scale for scale, _ in own], y=[back["estimate"] for _, back in own],
                mode="lines+markers", name=row["meaning"],
                line={"dash": DASHES[place % len(DASHES)], "width": 2}, marker={"size": 6},
                hovertemplate="%{y:.0%} at %{x} times the norm",
            )
        )  # fmt: skip
    return figure(
        f"path-scales-{index}",
        f"Share of {label_safe(name)}'s recovered prompts that each part brings back, by its norm",
        traces,
        {
            "height": 340,
            "margin": {"l": 58, "r": 16, "t": 16, "b": 46},
            "legend": {"orientation": "v", "x": 1.02, "y": 1},
            "xaxis": {"title": {"text": "norm of the part, times the vector's"}, "zeroline": False},
            "yaxis": {
                "title": {"text": "share of recovered prompts"}, "range": [-0.03, 1.05],
                "tickformat": ".0%", "zeroline": False,
            },
        },
    )  # fmt: skip
