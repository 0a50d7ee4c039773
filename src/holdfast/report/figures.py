"""Figures as plotly's JSON, and the colors that every figure shares.

The page draws them with one small script that also picks ink and grid for light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from markupsafe import Markup

ARM_COLORS = {
    "none": "#1f8ad2",
    "wrong_target": "#e8702a",
    "no_clamp": "#12a594",
    "ignorant": "#d0479f",
    "random_features": "#7a8b99",
}
"""After Paul Tol's vibrant scheme: told apart with any color vision, on white and on black."""

ARM_DASHES = {
    "none": "solid",
    "wrong_target": "dashdot",
    "no_clamp": "dot",
    "ignorant": "dash",
    "random_features": "longdash",
}
"""So that lines are told apart without color as well."""

CONSTRAINT_COLORS = {
    "unconstrained": "#8a8f98",
    "gradient_projection": "#d98a1f",
    "encoder_null": "#1f8ad2",
    "feature_hold": "#2a9d5c",
    "jacobian_null": "#6f5fd0",
    "jacobian_probes": "#cc6677",
    "feature_floor": "#aa4499",
    "one_sided": "#44aa99",
    "decoder_null": "#999933",
    "undo_null": "#b0447f",
    "active_null": "#ee7733",
    "random_subspace": "#7a6a53",
}
SPARE = ("#4b5563", "#c2772e", "#5e9fa3", "#b56576")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Figure:
    """A figure on the page. label: what it shows, for readers who cannot see it."""

    id: str
    label: str
    height: int
    json: Markup


def figure(id_: str, label: str, traces: Sequence[Any], layout: dict[str, Any]) -> Figure:
    """Check traces and layout with plotly and write them down."""
    from plotly import graph_objects as go

    drawn = go.Figure(list(traces), layout | {"template": "none"})
    return Figure(id_, label, int(layout["height"]), script_safe(drawn.to_json()))


def script_safe(json: str) -> Markup:
    """JSON that may stand between script tags: nothing in it can close them."""
    for character in "<>&\u2028\u2029":
        json = json.replace(character, f"\\u{ord(character):04x}")
    return Markup(json)


def label_safe(text: str) -> str:
    """Text for a label: plotly reads some tags there."""
    return escape(text, quote=False)


def color_of(kind: str, known: dict[str, str], order: Sequence[str]) -> str:
    """The kind's color; kinds from plug-ins get a spare one by their place in `order`."""
    if kind in known:
        return known[kind]
    others = [other for other in order if other not in known]
    return SPARE[others.index(kind) % len(SPARE)]


def shade(place: int, n: int) -> str:
    """A color for each of n values in order, from orange to blue: seen on white and on black."""
    along = place / max(n - 1, 1)
    mixed = (
        round(a + (b - a) * along) for a, b in zip((232, 112, 42), (31, 138, 210), strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def jitter(n: int, width: float) -> list[float]:
    """n offsets in ±width/2 that look random and are always the same (golden ratio)."""
    return [((i * 0.6180339887498949) % 1 - 0.5) * width for i in range(n)]


def lanes(labels: Sequence[str]) -> dict[str, Any]:
    """A vertical axis with one named lane a row, the first on top."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": [label_safe(label) for label in labels],
        "range": [len(labels) - 0.4, -0.6],
        "zeroline": False,
        "showgrid": False,
        "automargin": True,
    }
