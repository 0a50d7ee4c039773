"""The smallest perturbation that reaches the goal, prompt by prompt, for audit and controls."""

from __future__ import annotations

from typing import Any

from holdfast.report.data import Arm, AuditData, Point, ReportData, is_number
from holdfast.report.figures import (
    ARM_COLORS,
    ARM_DASHES,
    Figure,
    color_of,
    figure,
    jitter,
    label_safe,
    lanes,
)
from holdfast.report.section import Section
from holdfast.wording import arm_name, norm, norm_range

SMALLEST = "smallest_norm_relative"


def section(data: ReportData) -> Section:
    audits, figures = [], []
    for index, audit in enumerate(data.audits):
        strip, curve = (
            _strip(index, audit),
            _curve(index, audit.name, audit.headlines[0], _height(audit)),
        )
        figures += [strip, curve]
        audits.append(
            {
                "name": audit.name,
                "strip": strip,
                "curve": curve,
                "headline": audit.headlines[0].label,
                "never": _never(audit.headlines[0]),
                "rows": [_row(point, arm) for point in audit.points for arm in point.arms],
            }
        )
    return Section("norms", "How much it takes: smallest norms", {"audits": audits}, tuple(figures))


def _row(point: Point, arm: Arm) -> dict[str, Any]:
    return {
        "label": point.label,
        "arm": arm_name(arm.kind),
        "n": len(arm.audited),
        "n_reached": arm.n_reached,
        "row": arm.row,
        "budget": arm.checks["budget_relative"],
        "passes": (arm.measured("lane_steps") or {}).get("estimate"),
        "repeats": _repeats(arm),
        "bare": arm.measured("gain_unclamped"),
    }


def _repeats(arm: Arm) -> str:
    """How often each of its passes ran the blocks between again, for the constraint alone."""
    least, most = arm.recovery.constraint.repeats(len(arm.checks.get("sites") or ()))
    if not most:
        return ""
    return f"{most}" if least == most else f"{least} to {most}"


def _never(point: Point) -> list[dict[str, Any]]:
    """Prompts without a smallest norm, which no figure of norms can show."""
    shared = point.main.result["funnel"]["dropped"]
    return [
        {
            "arm": arm_name(arm.kind),
            "n": len(arm.audited) - arm.n_reached,
            "of": len(arm.audited),
            "left_out": {
                reason: n
                for reason, n in arm.result["funnel"]["dropped"].items()
                if reason not in shared
            },
        }
        for arm in point.arms
    ]


def _kinds(audit: AuditData) -> list[str]:
    return list(dict.fromkeys(arm.kind for point in audit.points for arm in point.arms))


def _height(audit: AuditData) -> int:
    """Of both figures of an audit, in pixels."""
    return max(340, 90 + 27 * sum(len(point.arms) for point in audit.points))


def _strip(index: int, audit: AuditData) -> Figure:
    """A lane per constraint and arm: a dot a prompt, a diamond at the median."""
    from plotly import graph_objects as go

    kinds = _kinds(audit)
    rows = [(point, arm) for point in audit.points for arm in point.arms]
    labels = [f"{point.label} · {arm_name(arm.kind)}" for point, arm in rows]
    traces: list[Any] = []
    notes = []
    cap, longest = 0.0, 0.0
    for lane, (_, arm) in enumerate(rows):
        values, color = arm.values(SMALLEST), color_of(arm.kind, ARM_COLORS, kinds)
        cap = max(cap, *values, arm.checks["budget_relative"] or 0.0)
        longest = max([longest, *values, arm.row["norm_relative_high"] or 0.0])
        ids = [label_safe(str(r["id"])) for r in arm.audited if is_number(r[SMALLEST])]
        traces.append(
            go.Scatter(
                x=values, y=[lane + d for d in jitter(len(values), 0.62)], mode="markers",
                marker={"color": color, "size": 5, "opacity": 0.45}, text=ids,
                hovertemplate="%{text}: %{x:.3f}<extra></extra>",
            )
        )  # fmt: skip
        row = arm.row
        if row["norm_relative_median"] is not None:
            middle = row["norm_relative_median"]
            low, high = row["norm_relative_low"], row["norm_relative_high"]
            traces.append(
                go.Scatter(
                    x=[middle], y=[lane], mode="markers",
                    marker={
                        "symbol": "diamond", "size": 11, "color": color,
                        "line": {"width": 1.5, "color": "#ffffff"},
                    },
                    error_x={
                        "type": "data", "symmetric": False, "thickness": 2.5, "width": 0,
                        "color": color,
                        "array": [0 if high is None else high - middle],
                        "arrayminus": [0 if low is None else middle - low],
                    },
                    hovertemplate=f"median {norm(middle)} {norm_range(low, high)}<extra></extra>",
                )
            )  # fmt: skip
        notes.append(
            {
                "x": 1.01, "xref": "paper", "xanchor": "left", "y": lane, "yref": "y",
                "text": f"{arm.n_reached} / {len(arm.audited)}", "showarrow": False,
                "font": {"size": 12},
            }
        )  # fmt: skip
    notes.append(
        {
            "x": 1.01, "xref": "paper", "xanchor": "left", "y": -0.85, "yref": "y",
            "text": "reached", "showarrow": False, "font": {"size": 12},
        }
    )  # fmt: skip
    groups = [i for i, (_, arm) in enumerate(rows) if arm.kind == "none" and i]
    return figure(
        f"strip-{index}",
        f"Smallest norms of {audit.name}, a dot a prompt, by constraint and control",
        traces,
        {
            "height": _height(audit),
            "showlegend": False,
            "margin": {"l": 10, "r": 78, "t": 26, "b": 46},
            "xaxis": {
                "title": {"text": f"smallest norm, share of the residual's (budget {norm(cap)})"},
                # Where all is far below the budget the axis ends there, or no dot could be told.
                "range": [0, 1.03 * (longest if 0 < longest < cap / 3 else cap) or 1],
                "zeroline": False,
            },
            "yaxis": lanes(labels) | {"range": [len(rows) - 0.4, -1.1]},
            "annotations": notes,
            "shapes": [
                {
                    "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": i - 0.5, "y1": i - 0.5,
                    "line": {"color": "rgba(128,128,128,.35)", "width": 1},
                }
                for i in groups
            ],
        },
    )  # fmt: skip


def _curve(index: int, name: str, point: Point, height: int) -> Figure:
    """The share of audited prompts reached at each norm: what was never reached stays missing."""
    from plotly import graph_objects as go

    traces = []
    caps = [arm.checks["budget_relative"] or 0.0 for arm in point.arms]
    cap = max(caps + [v for arm in point.arms for v in arm.values(SMALLEST)]) or 1.0
    kinds = [arm.kind for arm in point.arms]
    for arm in point.arms:
        values, n = sorted(arm.values(SMALLEST)), max(len(arm.audited), 1)
        shares = [(i + 1) / n for i in range(len(values))]
        traces.append(
            go.Scatter(
                x=[0, *values, cap], y=[0, *shares, shares[-1] if shares else 0],
                mode="lines", name=arm_name(arm.kind),
                line={
                    "shape": "hv", "color": color_of(arm.kind, ARM_COLORS, kinds),
                    "width": 3 if arm.kind == "none" else 2,
                    "dash": ARM_DASHES.get(arm.kind, "longdashdot"),
                },
                hovertemplate="%{y:.0%} of prompts by norm %{x:.3f}",
            )
        )  # fmt: skip
    return figure(
        f"curve-{index}",
        f"Share of {name}'s prompts reached by norm, under {point.label}",
        traces,
        {
            "height": height,
            "margin": {"l": 58, "r": 16, "t": 26, "b": 46},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": {
                "title": {"text": f"smallest norm under {label_safe(point.label)}"},
                "range": [0, cap], "zeroline": False,
            },
            "yaxis": {
                "title": {"text": "share of prompts reached"}, "range": [-0.02, 1.02],
                "tickformat": ".0%", "zeroline": False,
            },
        },
    )  # fmt: skip
