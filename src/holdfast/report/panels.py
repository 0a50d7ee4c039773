"""A panel, or four small ones over one horizontal axis, and lines with intervals in them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from holdfast.measure import Measurement
from holdfast.report.figures import Figure, figure
from holdfast.statistics import Interval

_COLUMNS = ((0.0, 0.46), (0.57, 1.0))
_ROWS = ((0.56, 1.0), (0.0, 0.40))
HEIGHT, HEIGHT_OF_ONE = 560, 340

SCALES: dict[str, dict[str, Any]] = {
    "share": {"range": [-0.03, 1.04], "tickformat": ".0%"},
    "norm": {"rangemode": "tozero"},
    "drift": {"type": "log", "exponentformat": "power", "range": [-10.2, 0.4], "dtick": 2},
    "count": {"rangemode": "tozero"},
    "free": {},
}
"""What an axis of each kind of figure looks like."""


def band(
    panel: int,
    xs: Sequence[Any],
    ys: Sequence[Interval | Measurement | float | None],
    name: str,
    style: dict[str, Any],
    legend: bool = True,
    bars: bool = True,
    markers: bool = True,
) -> Any:
    """A line in panel 1 to 4, with error bars where its values are intervals.

    What is infinite or was not measured leaves a gap; a bound that is infinite has no bar.
    """
    from plotly import graph_objects as go

    inside = [y if isinstance(y, Interval | Measurement) else None for y in ys]
    middle = [y.estimate if isinstance(y, Interval | Measurement) else y for y in ys]
    up = [0.0 if y is None else _gap(y.high, y.estimate) for y in inside]
    down = [0.0 if y is None else _gap(y.estimate, y.low) for y in inside]
    suffix = "" if panel == 1 else str(panel)
    symbol = style.get("symbol", "circle") + ("-open" if style.get("open") else "")
    marker = {"color": style["color"], "size": 7, "symbol": symbol}
    return go.Scatter(
        x=list(xs),
        y=[None if value is None or not isfinite(value) else value for value in middle],
        mode="lines+markers" if markers else "lines",
        name=name,
        legendgroup=name,
        showlegend=legend,
        xaxis=f"x{suffix}",
        yaxis=f"y{suffix}",
        line={"color": style["color"], "dash": style["dash"], "width": 2},
        marker=marker,
        error_y={
            "type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 3,
            "thickness": 1.3, "color": style["color"],
            "visible": bars and any(y is not None for y in inside),
        },
        hovertemplate=f"{name}<br>%{{x}}: %{{y:.3g}}<extra></extra>",
    )  # fmt: skip


def _gap(high: float | None, low: float | None) -> float:
    """The length of a bar between two ends; 0 where one is not finite."""
    if high is None or low is None or not isfinite(high) or not isfinite(low):
        return 0.0
    return max(0.0, high - low)


def panel(
    id_: str,
    what: str,
    traces: Sequence[Any],
    x: tuple[str, dict[str, Any]],
    y: tuple[str, dict[str, Any]],
) -> Figure:
    """x, y: what an axis is called, and what else plotly is to know of it."""
    axes = {
        name: {"title": {"text": title}, "zeroline": False, **more}
        for name, (title, more) in (("xaxis", x), ("yaxis", y))
    }
    layout = {
        "height": HEIGHT_OF_ONE,
        "margin": {"l": 64, "r": 16, "t": 46, "b": 48},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    return figure(id_, what, traces, layout | axes)


def panels(
    id_: str,
    what: str,
    traces: Sequence[Any],
    x: tuple[str, Sequence[float]],
    titles: Sequence[str],
    scales: Sequence[str],
) -> Figure:
    """x: the axis' name, and the values to mark on it (none: plotly's choice)."""
    name, values = x
    layout: dict[str, Any] = {
        "height": HEIGHT,
        "margin": {"l": 58, "r": 16, "t": 84, "b": 46},
        "legend": {"orientation": "h", "y": 1.12, "yanchor": "bottom", "x": 0},
        "annotations": [],
    }
    # Values that span orders of magnitude are told apart on a logarithmic axis only.
    log = bool(values) and min(values) > 0 and max(values) / min(values) >= 8
    for index, (title, scale) in enumerate(zip(titles, scales, strict=True)):
        suffix = "" if index == 0 else str(index + 1)
        columns, rows = _COLUMNS[index % 2], _ROWS[index // 2]
        across: dict[str, Any] = {
            "domain": list(columns), "anchor": f"y{suffix}", "zeroline": False,
            "title": {"text": name if index > 1 else ""},
        }  # fmt: skip
        if values:
            across |= {"tickmode": "array", "tickvals": list(values)}
            across |= {"ticktext": [f"{value:g}" for value in values]}
            across |= {"type": "log"} if log else {}
        layout[f"xaxis{suffix}"] = across
        layout[f"yaxis{suffix}"] = {
            "domain": list(rows), "anchor": f"x{suffix}", "zeroline": False, **SCALES[scale],
        }  # fmt: skip
        layout["annotations"].append(
            {
                "text": f"<b>{title}</b>", "showarrow": False, "xref": "paper", "yref": "paper",
                "x": columns[0], "y": rows[1], "xanchor": "left", "yanchor": "bottom",
            }
        )  # fmt: skip
    return figure(id_, what, traces, layout)
