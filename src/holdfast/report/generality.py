"""Whether what was found for one order of a question's choices brings back another, and whether
it brings back the answer where no choices are shown."""

from __future__ import annotations

from typing import Any

from holdfast import openly
from holdfast.generality import MEANINGS
from holdfast.report.data import ReportData
from holdfast.report.section import Section


def section(data: ReportData) -> Section | None:
    """None where no audit lent vectors between orders or asked without choices."""
    audits, asked = (_recorded(data, name) for name in ("orders", "openly"))
    if not audits and not asked:
        return None
    context = {
        "audits": audits, "meanings": MEANINGS, "asked": asked, "conditions": openly.MEANINGS,
    }  # fmt: skip
    return Section("generality", "Does a vector serve beyond its own prompt?", context)


def _recorded(data: ReportData, name: str) -> list[dict[str, Any]]:
    """What the audits' own searches recorded under a name, where they did."""
    return [
        {"name": audit.name, "label": point.label, "made": made}
        for audit in data.audits
        for point in audit.points
        if (made := (point.main.result.get("paths") or {}).get(name))
    ]
