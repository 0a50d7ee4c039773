"""What was checked before anything was searched, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.finding import Finding, tally
from holdfast.report.data import ReportData
from holdfast.report.section import Section


def section(data: ReportData) -> Section | None:
    """None where no record says anything of it: such a run was made before there were checks."""
    findings = found(data)
    if not findings:
        return None
    failed = sorted((f for f in findings if not f.passed), key=lambda f: not f.stops)
    places = _places(findings)
    unchecked = sum("preflight" not in record["run"] for record in data.records)
    context: dict[str, Any] = {
        "tally": tally(findings),
        "failed": failed,
        "checks": [_check(own, places) for own in _by_check(findings)],
        "places": places,
        "n_unchecked": unchecked,
        "n_trials": len(data.records),
    }
    return Section("preflight", "What was checked before", context)


def found(data: ReportData) -> list[Finding]:
    """Every finding of the run's trials, once."""
    written = (finding for record in data.records for finding in record["run"].get("preflight", ()))
    return list(dict.fromkeys(map(Finding.model_validate, written)))


def n_faults(data: ReportData) -> int:
    """How many faults the run went on despite."""
    return sum(finding.stops for finding in found(data))


def _places(findings: list[Finding]) -> list[str]:
    return list(dict.fromkeys(finding.where for finding in findings))


def _by_check(findings: Sequence[Finding]) -> list[list[Finding]]:
    names = dict.fromkeys(finding.check for finding in findings)
    return [[f for f in findings if f.check == name] for name in names]


def _check(own: Sequence[Finding], places: Sequence[str]) -> dict[str, Any]:
    """A check with what it found in every place; what is the same in several is said once."""
    where = list(dict.fromkeys(finding.where for finding in own))
    return {
        "check": own[0].check,
        "where": where,
        "everywhere": where == list(places),
        "failed": sorted({f.level for f in own if not f.passed}, reverse=True),
        "expected": _told([(f.where, f.expected) for f in own]),
        "measured": _told([(f.where, f.measured) for f in own]),
    }


def _told(said: Sequence[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """Texts with the places each holds for; no places where all have one text."""
    texts = dict.fromkeys(text for _, text in said)
    if len(texts) == 1:
        return [([], text) for text in texts]
    return [
        (list(dict.fromkeys(where for where, other in said if other == text)), text)
        for text in texts
    ]
