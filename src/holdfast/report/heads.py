"""Which heads carry the recovery: what each writes for the answer, and where it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.direct import CONDITIONS
from holdfast.report.data import ReportData
from holdfast.report.figures import Figure, figure, label_safe
from holdfast.report.forcing import compared
from holdfast.report.section import Section
from holdfast.wording import logits

WRITTEN = 8
"""Heads a layer, and layers, up to which a map has its numbers in it and can be read without color.
"""

TERMS: Mapping[str, str] = {
    "heads": "attention heads",
    "mlps": "MLPs",
    "embedding": "the embedding",
    "clamp": "the clamp",
    "perturbation": "the vector found",
    "biases": "biases",
    "blocks": "what blocks take away",
}


def section(data: ReportData) -> Section | None:
    """None where no recovery was looked into by head."""
    audits: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for audit, point, paths in compared(data):
        heads = paths.get("heads")
        if not paths["n"]:
            heads = {"reason": paths["reason"]}
        elif not heads:
            continue
        own: dict[str, Any] = {"name": audit.name, "label": point.label, "heads": heads}
        if not heads["reason"]:
            drawn = _figure(len(audits), audit.name, heads["heads"])
            figures.append(drawn)
            own |= {
                "n": paths["n"], "figure": drawn, "terms": _terms(heads),
                "movers": [row for row in heads["top"] if row["mover"]],
                "moved": _moved(heads),
                # Records of earlier versions do not say: shares were means over other prompts each.
                "n_both": next((row.get("n_both") for row in heads["top"]), None),
            }  # fmt: skip
        audits.append(own)
    if not audits:
        return None
    context = {"audits": audits, "conditions": CONDITIONS}
    return Section("heads", "Which heads carry the recovery", context, tuple(figures))


def _terms(heads: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Terms that are anything in some condition."""
    return [
        {**term, "meaning": TERMS[term["name"]]}
        for term in heads["terms"]
        if any(abs(term[condition]["estimate"]) > 1e-3 for condition in CONDITIONS)
    ]


def _moved(heads: Mapping[str, Any]) -> dict[str, float] | None:
    """What heads that write for the answer and look at it add up to in each condition, and where
    they look in the mean, over the prompts that have both answers; None without any."""
    movers = [row for row in heads["top"] if row["mover"]]
    if not movers:
        return None
    made = {c: sum(row[c]["estimate"] for row in movers) for c in CONDITIONS}
    return made | {
        f"{c}_looks": sum(row["attends"][c]["target"] for row in movers) / len(movers)
        for c in CONDITIONS
    }


def _figure(index: int, name: str, heads: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """A map of heads by layer in every condition, on one scale."""
    from plotly import graph_objects as go

    largest = max(abs(v) for rows in heads.values() for row in rows for v in row)
    few = len(heads["clean"]) <= WRITTEN and len(heads["clean"][0]) <= WRITTEN
    traces = []
    for place, condition in enumerate(CONDITIONS):
        axis = "" if place == 0 else str(place + 1)
        traces.append(
            go.Heatmap(
                z=heads[condition], xaxis=f"x{axis}", yaxis="y", zmin=-largest, zmax=largest,
                texttemplate="%{text}" if few else None,
                text=[[logits(v) for v in row] for row in heads[condition]] if few else None,
                colorscale="RdBu", reversescale=True, showscale=place == len(CONDITIONS) - 1,
                colorbar={"title": {"text": "logits"}, "thickness": 10},
                hovertemplate=f"{condition}<br>%{{y}}.%{{x}}: %{{z:.2f}}<extra></extra>",
            )
        )  # fmt: skip
    width = 1 / len(CONDITIONS)
    axes = {
        f"xaxis{'' if i == 0 else i + 1}": {
            "domain": [i * width, (i + 0.9) * width], "title": {"text": f"head, {condition}"},
            "tickformat": "d", "zeroline": False, "showgrid": False,
        }
        for i, condition in enumerate(CONDITIONS)
    }  # fmt: skip
    n_layers = len(heads[CONDITIONS[0]])
    return figure(
        f"heads-{index}",
        f"What each head writes for {label_safe(name)}'s answer, clean, suppressed and recovered",
        traces,
        {
            "height": max(220, 60 + (24 if few else 16) * n_layers),
            "margin": {"l": 50, "r": 16, "t": 16, "b": 46},
            "yaxis": {
                "title": {"text": "layer"}, "tickformat": "d", "zeroline": False, "showgrid": False,
            },
            **axes,
        },
    )  # fmt: skip
