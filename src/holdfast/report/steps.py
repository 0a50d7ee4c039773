"""What the first attempt did step by step: from the trace in every record."""

from __future__ import annotations

from holdfast.report.data import AuditData, Point, ReportData, is_number
from holdfast.report.figures import CONSTRAINT_COLORS, DASHES, Figure, color_of, label_safe
from holdfast.report.panels import band, panels
from holdfast.report.section import Section

MOST = len(DASHES)
"""Lines of one constraint, and so of one color, that can be told apart in a figure."""

FLOOR = 1e-10


def section(data: ReportData) -> Section | None:
    audits, figures = [], []
    for index, audit in enumerate(data.audits):
        shown = [p for p in audit.points if p.main.result["trace"]]
        if not shown:
            continue
        kept = _spread(shown)
        drawn = _figure(index, audit, kept, data)
        figures.append(drawn)
        left_out = len(shown) - len(kept)
        audits.append({"name": audit.name, "figure": drawn, "left_out": left_out})
    if not audits:
        return None
    return Section("steps", "Along the steps of the search", {"audits": audits}, tuple(figures))


def _spread(points: list[Point]) -> list[Point]:
    """At most `MOST` of each constraint, the first, the last and others evenly between."""
    kept = []
    for kind in dict.fromkeys(point.constraint for point in points):
        own = [point for point in points if point.constraint == kind]
        step = max(len(own) - 1, 1) / (MOST - 1)
        picks = range(len(own)) if len(own) <= MOST else [round(i * step) for i in range(MOST)]
        kept += [own[i] for i in picks]
    return kept


def _figure(index: int, audit: AuditData, points: list[Point], data: ReportData) -> Figure:
    traces = []
    for place, point in enumerate(points):
        style = {
            "color": color_of(point.constraint, CONSTRAINT_COLORS, data.constraints),
            "dash": DASHES[place % len(DASHES)],
        }
        trace = point.main.result["trace"]
        n = max(len(point.main.audited), 1)
        steps = [entry["step"] for entry in trace]
        columns = (
            [entry["n_reached"] / n for entry in trace],
            [entry["margin_mean"] for entry in trace],
            [entry["norm_relative_mean"] for entry in trace],
            [
                max(entry["violation_max"], FLOOR) if is_number(entry["violation_max"]) else None
                for entry in trace
            ],
        )
        for panel, values in enumerate(columns, 1):
            traces.append(
                band(panel, steps, values, label_safe(point.label), style, legend=panel == 1,
                     markers=False)
            )  # fmt: skip
    return panels(
        f"steps-{index}",
        f"Goal reached, margin, norm and violation of {audit.name} at each step of the search",
        traces,
        x=("step of the first attempt", ()),
        titles=(
            "goal reached", "mean margin of the rest, logits", "mean norm of the rest, relative",
            "largest violation",
        ),
        scales=("share", "free", "norm", "drift"),
    )  # fmt: skip
