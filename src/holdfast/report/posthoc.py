"""Methods of one audit on the valid set that all of them share."""

from __future__ import annotations

from typing import Any

from holdfast.grid import describe
from holdfast.posthoc import MOVED, NEAR_ZERO, Row, common, evaluate
from holdfast.report.data import AuditData, ReportData
from holdfast.report.section import Section


def section(data: ReportData) -> Section | None:
    """None where no audit has two methods at one setting."""
    tables = [table for audit in data.audits for table in _tables(data, audit)]
    if not tables:
        return None
    context = {"tables": tables, "moved": MOVED, "near_zero": NEAR_ZERO}
    return Section("posthoc", "Methods on one valid set", context)


def _tables(data: ReportData, audit: AuditData) -> list[dict[str, Any]]:
    """A table for every point of the grid but for the axes of the search."""
    settings: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for point in audit.points:
        own = settings.setdefault(_setting(point.main.row["point"]), {})
        search = describe({p: v for p, v in point.main.row["point"].items() if _searches(p)})
        own[", ".join([point.constraint, *search])] = list(point.main.audited)
    for suffix in data.suffixes:
        at = _setting(suffix.row["point"])
        if suffix.trial.audit == audit.name and at in settings:
            # What the suffix's placeholder brings back by itself was not searched.
            searched = [row for row in suffix.rows if row["outcome"] != "placeholder"]
            settings[at][suffix.trial.label] = searched
    return [
        {
            "audit": ", ".join([audit.name, *at]),
            "n": len(common(methods)),
            "questions": any(_several(rows) for rows in methods.values()),
            "rows": evaluate(methods),
        }
        for at, methods in settings.items()
        if len(methods) > 1
    ]


def _setting(point: dict[str, Any]) -> tuple[str, ...]:
    return tuple(describe({path: v for path, v in point.items() if not _searches(path)}))


def _searches(path: str) -> bool:
    return path.startswith("recovery.")


def _several(rows: list[Row]) -> bool:
    """Whether a question has several prompts."""
    return len({row["cluster"] for row in rows}) < len(rows)
