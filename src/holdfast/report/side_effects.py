"""What the intervention costs elsewhere: behaviors that it should have left alone."""

from __future__ import annotations

from typing import Any

from holdfast.report.data import AuditData, Point, ReportData
from holdfast.report.section import Section
from holdfast.triggers import PREFIX as TRIGGER
from holdfast.wording import points

PREFIX = "neighbor."
SCORE = "score."


def section(data: ReportData) -> Section:
    audits = [
        {
            "name": audit.name,
            "rows": neighbors(audit.headlines[0]),
            "scores": _scores(audit),
            "triggers": _triggers(audit),
        }
        for audit in data.audits
    ]
    context = {
        "audits": [
            audit for audit in audits if audit["rows"] or audit["scores"] or audit["triggers"]
        ],
        "without": [audit["name"] for audit in audits if not audit["rows"]],
    }
    return Section("side_effects", "Side effects of the clamp", context)


def _scores(audit: AuditData) -> list[dict[str, Any]]:
    """The behavior's own measures of the intervention, at every point that differs in them: the
    constraint of a search changes none."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in audit.points:
        own = [m for m in point.main.result["measurements"] if m["name"].startswith(SCORE)]
        n_features = sum(len(e["ids"]) for e in point.main.result["features"]["entries"])
        for m in own:
            key = (m["name"], n_features, m["estimate"], m["low"], m["high"])
            name = m["name"].removeprefix(SCORE)
            found.setdefault(key, {"name": name, "n_features": n_features, **_points(m)})
    return list(found.values())


def _triggers(audit: AuditData) -> list[dict[str, Any]]:
    """How often a conditional clamp acts, by set of prompts; none of an unconditional one."""
    measured = {m["name"]: m for m in audit.headlines[0].main.result["measurements"]}
    ending = ".prompts"
    return [
        {
            "name": name.removeprefix(TRIGGER).removesuffix(ending),
            "prompts": found,
            "tokens": measured[f"{name.removesuffix(ending)}.tokens"],
        }
        for name, found in measured.items()
        if name.startswith(TRIGGER) and name.endswith(ending)
    ]


def _points(measured: dict[str, Any]) -> dict[str, Any]:
    """A difference of shares in points, as signed text; "–" where it was not scored."""
    return {part: points(measured[part], 1) for part in ("estimate", "low", "high")} | {
        "n": measured["n"], "unit": measured["unit"],
    }  # fmt: skip


def neighbors(point: Point) -> list[dict[str, Any]]:
    """A row per neighbor; the same under every constraint, so a headline's are shown."""
    measured = {m["name"]: m for m in point.main.result["measurements"]}
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
                # Records of before this was measured are read as well.
                "left": measured.get(f"{PREFIX}{neighbor}.relative"),
            }
        )
    return rows
