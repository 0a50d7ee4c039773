"""Whether what was found for one order of a question's choices brings back another."""

from __future__ import annotations

from typing import Any

from holdfast.generality import MEANINGS
from holdfast.report.data import ReportData
from holdfast.report.section import Section


def section(data: ReportData) -> Section | None:
    """None where no audit lent vectors between orders."""
    audits: list[dict[str, Any]] = [
        {"name": audit.name, "label": point.label, "rows": rows}
        for audit in data.audits
        for point in audit.points
        if (rows := (point.main.result.get("paths") or {}).get("orders"))
    ]
    if not audits:
        return None
    context = {"audits": audits, "meanings": MEANINGS}
    return Section("generality", "Does one order's vector serve another?", context)
