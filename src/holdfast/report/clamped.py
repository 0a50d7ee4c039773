"""What was clamped: features with their scores, and the strength that was chosen."""

from __future__ import annotations

from typing import Any

from holdfast.interventions import INTERVENTIONS, InterventionKind
from holdfast.report.data import AuditData, ReportData
from holdfast.report.section import Section


def section(data: ReportData) -> Section:
    return Section("clamped", "What was clamped", {"audits": [_audit(a) for a in data.audits]})


def _formulas(intervention: dict[str, Any]) -> tuple[str, ...]:
    kind = INTERVENTIONS.parse(intervention)
    return kind.formulas if isinstance(kind, InterventionKind) else ()


def _audit(audit: AuditData) -> dict[str, Any]:
    main = audit.headlines[0].main
    found, entries = main.result["features"], []
    for entry in found["entries"]:
        # Features that the user gave have no scores.
        scores = entry["scores"] or [None] * len(entry["ids"])
        entries.append(entry | {"pairs": list(zip(entry["ids"], scores, strict=True))})
    offered = main.trial.described()["intervention"]
    return {
        "name": audit.name,
        "subject": main.trial.subject,
        "source": found["source"],
        "entries": entries,
        "n_features": len({(entry["site"], id_) for entry in entries for id_ in entry["ids"]}),
        "intervention": main.result["intervention"],
        "offered": offered.get("value"),
        "formulas": _formulas(main.result["intervention"]),
    }
