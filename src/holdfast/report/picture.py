"""The two key results as one hand-made SVG: what a constraint leaks, and what recovery costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from holdfast.atomic import write_atomic
from holdfast.grid import describe
from holdfast.planning import Plan
from holdfast.report.data import LEAK, Arm, AuditData, ReportData, gather
from holdfast.report.figures import ARM_COLORS, CONSTRAINT_COLORS, color_of, jitter
from holdfast.report.verdicts import MARKS
from holdfast.store import RunFolder
from holdfast.wording import arm_name, norm, power, superscript

TOP, BOTTOM = 94, 56
"""Room for the titles and for the axes, in pixels."""


ROOM = 26
"""Characters that an audit's name and a point's have on one line."""

SHAPES = {"none": "l7 9l-7 9l-7 -9z", "wrong_target": "l8 15h-16z"}
"""A median's mark from its top: a diamond, a triangle; read without color."""


@dataclass(frozen=True)
class Axis:
    """A horizontal axis: values from `start` to `stop` on the pixels from `left` to `right`."""

    left: float
    right: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; what lies outside is put on the edge."""
        shown = math.log10(max(value, 10**self.start)) if self.log else value
        share = (shown - self.start) / (self.stop - self.start)
        return round(self.left + min(max(share, 0.0), 1.0) * (self.right - self.left), 1)


def write_picture(store: RunFolder, plan: Plan, path: Path) -> Path:
    """Write the picture of a run to `path`, from its records alone."""
    write_atomic(Path(path), draw(gather(store, plan)).encode())
    return Path(path)


def draw(data: ReportData) -> str:
    """The picture as SVG text, with its own colors for light and dark."""
    height = max(
        420, TOP + BOTTOM + 66 * len(data.audits), TOP + BOTTOM + 70 * len(data.constraints)
    )
    env = Environment(
        loader=PackageLoader("holdfast.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drift = Axis(34, 436, -10, 0, log=True)
    norms = Axis(496, 838, 0, _cap(data))
    bottom = height - BOTTOM
    return env.get_template("picture.svg.j2").render(
        study=data.study,
        complete=data.complete,
        width=920,
        height=height,
        top=TOP,
        bottom=bottom,
        drift=drift,
        leak=drift.at(LEAK),
        drift_ticks=[(drift.at(10.0**e), _tick(e)) for e in (-10, -8, -6, -4, -2, 0)],
        drift_lanes=_drift_lanes(data, drift, bottom),
        norms=norms,
        norm_ticks=[(norms.at(i * norms.stop / 5), f"{i * norms.stop / 5:.2g}") for i in range(6)],
        norm_lanes=[
            _norm_lane(audit, norms, TOP + (bottom - TOP) * i / len(data.audits))
            for i, audit in enumerate(data.audits)
        ],
        headlines=list(dict.fromkeys(p.constraint for a in data.audits for p in a.headlines)),
        arm_colors=ARM_COLORS,
    )


def _cap(data: ReportData) -> float:
    """The largest budget shown."""
    heads = [arm for audit in data.audits for arm in audit.headlines[0].arms]
    return max((arm.checks["budget_relative"] or 0.0 for arm in heads), default=0.0) or 1.0


def _tick(exponent: int) -> str:
    return f"10{superscript(exponent)}" if exponent else "1"


def _dots(xs: Sequence[float], middle: float, spread: float) -> str:
    """All dots of a lane as one path: a round cap on lines of no length."""
    ys = [middle + offset for offset in jitter(len(xs), spread)]
    return "".join(f"M{x:g} {y:.1f}h0" for x, y in zip(xs, ys, strict=True))


def _drift_lanes(data: ReportData, axis: Axis, bottom: float) -> list[dict[str, Any]]:
    lanes = []
    step = (bottom - TOP) / max(len(data.constraints), 1)
    for i, kind in enumerate(data.constraints):
        points = [point for point in data.points if point.constraint == kind]
        values = [v for point in points for v in point.main.values("preactivation_drift")]
        middle = median(values) if values else None
        y = TOP + step * (i + 0.5) + 8
        lanes.append(
            {
                "name": kind,
                "y": y,
                "title": y - 0.26 * step - 8,
                "color": color_of(kind, CONSTRAINT_COLORS, data.constraints),
                "dots": _dots([axis.at(v) for v in values], y, 0.4 * step),
                "x": None if middle is None else axis.at(middle),
                "text": f"{len(values)} prompts, median drift {power(middle)}",
            }
        )
    return lanes


def _norm_lane(audit: AuditData, axis: Axis, top: float) -> dict[str, Any]:
    point = audit.headlines[0]
    arms = [arm for arm in (point.main, point.arm("wrong_target")) if arm]
    verdict = point.main.row["verdict"]
    return {
        "name": audit.name,
        "y": top + 15,
        "verdict": verdict,
        "mark": MARKS[verdict],
        "known": {
            "holds": "holds by construction",
            "does_not_hold": "a second route is built in",
        }.get(audit.known_answer or "", _which(audit)),
        "arms": [_arm(arm, axis, top + 30 + 19 * i) for i, arm in enumerate(arms)],
    }


def _which(audit: AuditData) -> str:
    """Of a sweep, which point is shown."""
    if len(audit.headlines) == 1:
        return ""
    at = ", ".join(describe(audit.headlines[0].main.row["point"]))
    # The verdict stands at the other end of the line.
    room = max(0, ROOM - len(audit.name))
    at = at if len(at) <= room else f"{at[: room - 1].rstrip(', ')}…" if room > 6 else ""
    return f"first of {len(audit.headlines)}" + (f": {at}" if at else "")


def _arm(arm: Arm, axis: Axis, y: float) -> dict[str, Any]:
    values = arm.values("smallest_norm_relative")
    middle = arm.row["norm_relative_median"]
    name, n = arm_name(arm.kind), len(arm.audited)
    never = n - len(values)
    return {
        "y": y,
        "color": ARM_COLORS[arm.kind],
        "shape": SHAPES.get(arm.kind, SHAPES["none"]),
        "dots": _dots([axis.at(v) for v in values], y, 12),
        "x": None if middle is None else axis.at(middle),
        "text": (
            f"{name}: never reached on any of {n} prompts"
            if not values
            else f"{name}: never reached on {never} of {n} prompts, half or more"
            if middle is None
            else f"{name}: median {norm(middle)}, {never} of {n} never reached"
        ),
        "reached": f"{len(values)} / {n}",
        "never": not values,
    }
