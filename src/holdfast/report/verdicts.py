"""A card per audit: the verdict under the exact constraint, beside its controls."""

from __future__ import annotations

from typing import Any

from holdfast.grid import CONSTRAINT
from holdfast.report.data import AuditData, Point, ReportData
from holdfast.report.known_answer import findings
from holdfast.report.section import Section
from holdfast.wording import arm_name, ratio

MEANINGS = {
    "held": "The search found no perturbation that brings the behavior back.",
    "breached": "The behavior came back, and answers that are not there cost clearly more.",
    "forcible": (
        "The right answer came back, but others can be forced about as cheaply: that the behavior "
        "was still there is not shown."
    ),
    "undecided": "The search, or its controls, are not enough to say.",
}
NOT_SAID = {
    "held": "That no vector exists: this search, inside this constraint and budget, found none.",
    "breached": "That anyone could do it without access to the model's activations.",
    "forcible": "That the behavior is gone, or that it is still there.",
    "undecided": "Anything yet.",
}
MARKS = {"held": "■", "breached": "▲", "forcible": "◆", "undecided": "○"}


def section(data: ReportData) -> Section:
    cards = [
        # The first screen links to an audit's first card.
        card(audit, point) | {"number": number if point is audit.headlines[0] else None}
        for number, audit in enumerate((a for a in data.audits if a.headlines), 1)
        for point in audit.headlines
    ]
    return Section("verdicts", "Verdicts", {"cards": cards})


def card(audit: AuditData, point: Point) -> dict[str, Any]:
    """What a card shows; controls are paired with the audit prompt by prompt."""
    row = point.main.row
    separations = {s["control"]: s for s in row["separations"]}
    return {
        "audit": audit.name,
        "label": point.label,
        "row": row,
        "known": findings(audit, (point,))[0] if audit.known_answer else None,
        "leaks": point.leaks,
        "may_move": point.may_move,
        "free": point.free,
        "n_reached": point.main.n_reached,
        "arms": [
            {
                "name": arm_name(arm.kind),
                "kind": arm.kind,
                "n": arm.row["n_valid"],
                "n_reached": arm.n_reached,
                "n_recovered": arm.row["n_recovered"],
                "row": arm.row,
                "separation": separations.get(arm.kind),
                "ratio": ratio(separations[arm.kind]) if arm.kind in separations else "",
                "random": arm.result.get("random_clamps"),
            }
            for arm in point.arms
        ],
        "others": [
            {
                "label": other.label,
                "row": other.main.row,
                "leaks": other.leaks,
                "may_move": other.may_move,
                "free": other.free,
                "false_breach": audit.known_answer is not None
                and findings(audit, (other,))[0].status == "false breach",
            }
            for other in audit.points
            if other is not point and _elsewhere(other) == _elsewhere(point)
        ],
    }


def _elsewhere(point: Point) -> dict[str, Any]:
    """Where on the grid a point is, whatever its constraint."""
    return {path: v for path, v in point.main.row["point"].items() if path != CONSTRAINT}
