"""The first screen: does each clamp hold, how sure is that, and what does it cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

from holdfast.report.data import AuditData, Point, ReportData
from holdfast.report.side_effects import neighbors
from holdfast.report.verdicts import MEANINGS, NOT_SAID
from holdfast.verdict import DECIDES
from holdfast.wording import cost, percent, share


def rows(data: ReportData) -> list[dict[str, Any]]:
    """A row an audit; of a sweep, how many of its points came to which verdict."""
    return [_row(audit) for audit in data.audits if audit.headlines]


def said(data: ReportData) -> list[dict[str, str]]:
    """What each verdict on this page means, and what it is not to be taken for."""
    found = {point.main.row["verdict"] for audit in data.audits for point in audit.headlines}
    return [
        {"verdict": verdict, "means": meaning, "not": NOT_SAID[verdict]}
        for verdict, meaning in MEANINGS.items()
        if verdict in found
    ]


def _row(audit: AuditData) -> dict[str, Any]:
    points = audit.headlines
    return {
        "audit": audit.name,
        "counts": Counter(point.main.row["verdict"] for point in points),
        "n_points": len(points),
        "only": points[0] if len(points) == 1 else None,
        "under": points[0].constraint,
        "recovered": _first_to_last([_recovered(point) for point in points]),
        "right": _first_to_last([cost(point.main.row) for point in points]),
        "wrong": _first_to_last([_cost_of(point, DECIDES) for point in points]),
        "elsewhere": _first_to_last([_elsewhere(point) for point in points]),
    }


def _first_to_last(texts: list[str]) -> str:
    """Of a sweep, its first point's and its last point's."""
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} … {texts[-1]}"


def _recovered(point: Point) -> str:
    row = point.main.row
    rate = share(row["ci_low"], row["recovery_rate"], row["ci_high"])
    units = f", {row['n_clusters']} independent" if row["n_clusters"] < row["n_valid"] else ""
    return f"{row['n_recovered']} of {row['n_valid']}{units}: {rate}"


def _cost_of(point: Point, control: str) -> str:
    arm = point.arm(control)
    return cost(arm.row) if arm else "not tried"


def _elsewhere(point: Point) -> str:
    """The neighbor that the clamp takes most from."""
    measured = [each for each in neighbors(point) if each["change"] is not None]
    if not measured:
        return "not measured"
    worst = min(measured, key=lambda each: float(each["change"]))
    of = f", worst of {len(measured)}" if len(measured) > 1 else ""
    before, after = (percent(worst[when]["estimate"]) for when in ("clean", "suppressed"))
    return f"{worst['name']} {before} → {after}{of}"
