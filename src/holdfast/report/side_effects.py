"""What the intervention costs elsewhere: behaviors that it should have left alone."""

from __future__ import annotations

from typing import Any

from holdfast.report.data import AuditData, ReportData
from holdfast.report.section import Section

PREFIX = "neighbor."


def section(data: ReportData) -> Section:
    audits = [{"name": audit.name, "rows": _rows(audit)} for audit in data.audits]
    context = {
        "audits": [audit for audit in audits if audit["rows"]],
        "without": [audit["name"] for audit in audits if not audit["rows"]],
    }
    return Section("side_effects", "Side effects of the clamp", context)


def _rows(audit: AuditData) -> list[dict[str, Any]]:
    """A row per neighbor; the same under every constraint, so the headline's are shown."""
    measured = {m["name"]: m for m in audit.headlines[0].main.result["measurements"]}
    rows = []
    for name, clean in measured.items():
        if not name.startswith(PREFIX) or not name.endswith(".clean"):
            continue
        neighbor = name.removeprefix(PREFIX).removesuffix(".clean")
        suppressed = measured[f"{PREFIX}{neighbor}.suppressed"]
        both = clean["estimate"] is not None and suppressed["estimate"] is not None
        rows.append(
            {
                "name": neighbor,
                "clean": clean,
                "suppressed": suppressed,
                "change": suppressed["estimate"] - clean["estimate"] if both else None,
            }
        )
    return rows
