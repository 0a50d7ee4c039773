"""How many prompts reached each stage, and why the others did not, for all of a trial too."""

from __future__ import annotations

from typing import Any

from holdfast.report.data import AuditData, ReportData
from holdfast.report.section import Section

STAGES = {
    "tried": "prompts of the test split",
    "clean": "behavior there without the clamp",
    "suppressed": "and gone with it",
    "valid": "audited: a search was made",
}


def section(data: ReportData) -> Section:
    """How many of each audit came how far; and which trials had nothing to search, by reason."""
    nothing: dict[str, list[str]] = {}
    for row in data.summary["empty"]:
        nothing.setdefault(row["sentence"], []).append(row["name"])
    shown = {"audits": [_bars(audit) for audit in data.audits], "nothing": nothing}
    return Section("funnel", "From prompts to results", shown)


def _bars(audit: AuditData) -> dict[str, Any]:
    funnel = audit.headlines[0].main.result["funnel"]
    stages, tried = funnel["stages"], max(funnel["stages"]["tried"], 1)
    bars = [
        {"name": name, "what": what, "n": stages[name], "width": 100 * stages[name] / tried}
        for name, what in STAGES.items()
    ]
    for point in audit.points:
        own = point.main.result["funnel"]["stages"]
        bars.append(
            {
                "name": "recovered",
                "what": f"under {point.label}",
                "n": own["recovered"],
                "width": 100 * own["recovered"] / tried,
                "leaks": point.leaks,
                "may_move": point.may_move,
                "free": point.free,
            }
        )
    return {
        "name": audit.name,
        "bars": bars,
        "dropped": funnel["dropped"],
        "splits": funnel["splits"],
        "collapsed": funnel.get("collapsed"),
    }
