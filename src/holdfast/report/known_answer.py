"""Subjects built so that the answer is known: does the method find what is there, and only that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.report.data import AuditData, Point, ReportData
from holdfast.report.section import Section
from holdfast.wording import percent, percent_range, power

Status = Literal["agrees", "false breach", "missed", "wrong", "open", "no test"]

EXPECTED = {"holds": "held", "does_not_hold": "breached"}


@dataclass(frozen=True)
class Finding:
    """What one constraint found against what is known. status: how the two compare."""

    audit: str
    label: str
    known: str
    expected: str
    found: str
    n_recovered: int
    n: int
    drift: float
    status: Status
    note: str


def section(data: ReportData) -> Section | None:
    """None where no audit's answer is known."""
    known = [audit for audit in data.audits if audit.known_answer]
    if not known:
        return None
    rows = [finding for audit in known for finding in findings(audit, audit.points)]
    sentences = [text for audit in known for point in audit.points if (text := _says(audit, point))]
    return Section("known_answer", "Known answers", {"rows": rows, "sentences": sentences})


def findings(audit: AuditData, points: Sequence[Point]) -> list[Finding]:
    """A finding for every point of an audit whose answer is known."""
    return [_finding(audit, point) for point in points]


def _finding(audit: AuditData, point: Point) -> Finding:
    known = audit.known_answer or ""
    row = point.main.row
    status, note = _compare(known, point)
    return Finding(
        audit=audit.name,
        label=point.label,
        known=known,
        expected=EXPECTED[known],
        found=row["verdict"],
        n_recovered=row["n_recovered"],
        n=row["n_valid"],
        drift=point.drift,
        status=status,
        note=note,
    )


def _compare(known: str, point: Point) -> tuple[Status, str]:
    row = point.main.row
    if point.free:
        return "no test", "the clamped features were free to move, so recovery is expected"
    if known == "holds":
        if row["n_recovered"] and point.leaks:
            return "false breach", (
                f"the clamp holds by construction; this search reports recovery because it moved "
                f"the clamped features (drift up to {power(point.drift)})"
            )
        if row["n_recovered"]:
            return "wrong", "recovered with the features held, where nothing can be recovered"
        if row["verdict"] == "held":
            return "agrees", "nothing was found where there is nothing to find"
        return "open", "nothing was recovered, but the search is not conclusive"
    if row["verdict"] == "held":
        return "missed", "a second route was built in, and the search did not find it"
    if row["verdict"] != "breached":
        return "open", f"found {row['verdict']}, so the second route is not shown"
    if point.leaks:
        return "open", "breached as expected, but the clamped features moved: no proof of a route"
    return "agrees", "the second route was found with the clamped features in place"


def _says(audit: AuditData, point: Point) -> str:
    """Specificity and sensitivity in a sentence; nothing for a search that held nothing."""
    row = point.main.row
    n, hits = row["n_valid"], row["n_recovered"]
    low, high = row["ci_low"], row["ci_high"]
    if point.free or row["recovery_rate"] is None:
        return ""
    if audit.known_answer == "holds":
        spared = 1 - row["recovery_rate"]
        interval = "" if low is None or high is None else f" {percent_range(1 - high, 1 - low)}"
        wrong = "no false breach"
        if hits:
            wrong = f"{hits} false breach{'es' if hits > 1 else ''}"
        if hits and point.leaks:
            wrong += f", bought by moving the clamped features by up to {power(point.drift)}"
        return (
            f"Specificity of {point.label} on {audit.name}: {percent(spared)}{interval}, "
            f"{n - hits} of {n} prompts rightly left unrecovered; {wrong}."
        )
    held = (
        f"the clamped features moved by up to {power(point.drift)}, so it does not count as proof"
        if point.leaks
        else f"clamped features in place to {power(point.drift)}"
    )
    return (
        f"Sensitivity of {point.label} on {audit.name}: {percent(row['recovery_rate'])} "
        f"{percent_range(low, high)}, {hits} of {n} prompts recovered, {held}."
    )
