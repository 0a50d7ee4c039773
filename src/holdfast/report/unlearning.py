"""What the clamps of a grid unlearn, what they cost elsewhere, and which one the pickers take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.behaviors.knowledge import FORGET, PREFIX, SUBSETS
from holdfast.grid import describe
from holdfast.report.data import Arm, AuditData, ReportData
from holdfast.report.section import Section
from holdfast.unlearning import UnlearningScore, sets_of

FIGURES = ("clean", "suppressed", "strict_clean", "strict_suppressed", "relative")


def section(data: ReportData) -> Section | None:
    """None where no audit measured what is known in every order."""
    named = {audit.name: audit for audit in data.audits}
    audits = [
        _audit(UnlearningScore.model_validate(score), named[score["audit"]])
        for score in data.summary["unlearning"]
    ]
    if not audits:
        return None
    return Section("unlearning", "What is unlearned, and at what cost", {"audits": audits})


def _audit(score: UnlearningScore, audit: AuditData) -> dict[str, Any]:
    arms = {point.main.trial.id: point.main for point in audit.points}
    headlines = {point.main.trial.id for point in audit.headlines}
    rows = []
    for index, setting in enumerate(score.settings):
        read = next((i for i in setting.trials if i in headlines), setting.trials[0])
        rows.append(
            {
                "setting": setting,
                "name": _name(setting.point),
                "picks": [pick.picker for pick in score.picks if pick.index == index],
                "row": arms[read].row,
            }
        )
    chosen = next((pick.index for pick in score.picks if pick.index is not None), 0)
    assert chosen is not None
    shown = arms[score.settings[chosen].trials[0]]
    return {
        "name": audit.name,
        "score": score,
        "sets": list(score.settings[0].by_set),
        "rows": rows,
        "picks": [
            (pick, None if pick.index is None else rows[pick.index]["name"]) for pick in score.picks
        ],
        "subsets": _subsets(shown),
        "subsets_of": rows[chosen]["name"],
    }


def _name(point: Mapping[str, Any]) -> str:
    return ", ".join(describe(dict(point))) or "as the study has it"


def _subsets(arm: Arm) -> list[dict[str, Any]]:
    """A row for every set of questions and subset of it, at one setting."""
    rows = []
    for name in (FORGET, *sets_of(arm.result)):
        for subset in SUBSETS:
            own = {f: arm.measured(f"{PREFIX}.{name}.{subset}.{f}") for f in FIGURES}
            strict = own["strict_clean"]
            assert strict is not None, "a trial measures all figures of a subset, or none"
            rows.append({"set": name, "subset": subset, "n": strict["n"], **own})
    return rows
