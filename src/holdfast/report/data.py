"""What the sections of a report read: a run's records, gathered once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.grid import describe
from holdfast.made_from import KEY
from holdfast.planning import Plan
from holdfast.recovery import RecoverySpec
from holdfast.store import RunFolder
from holdfast.study import Audit, headline_constraint
from holdfast.summary import name_of, siblings, summarize
from holdfast.trial import Trial

FREE = ("unconstrained", "random_subspace")
"""The constraint that holds nothing: recovery under it says nothing about the clamp."""

LEAK = 1e-5
"""Pre-activation drift above which clamped features have moved: rounding stays far below it."""


Texts = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Trial id → example id → `prompt` or a condition → a text, for pages that are to show them."""


@dataclass(frozen=True)
class Arm:
    """A finished trial: an audit's own search, or one of its controls.

    audited: the examples that were searched; row: the trial's row of the summary.
    """

    trial: Trial
    record: Mapping[str, Any]
    audited: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.trial.control.kind

    @property
    def recovery(self) -> RecoverySpec:
        """How it searched."""
        assert self.trial.recovery is not None
        return self.trial.recovery

    @property
    def result(self) -> Mapping[str, Any]:
        result: Mapping[str, Any] = self.record["result"]
        return result

    @property
    def checks(self) -> Mapping[str, Any]:
        checks: Mapping[str, Any] = self.result["checks"]
        return checks

    def values(self, name: str) -> list[float]:
        """A column of the audited examples, without those that have no value."""
        return [float(row[name]) for row in self.audited if is_number(row[name])]

    def measured(self, name: str) -> Mapping[str, Any] | None:
        """A measurement by name; None where the trial did not make it."""
        found = [m for m in self.result["measurements"] if m["name"] == name]
        return found[0] if found else None

    @property
    def n_reached(self) -> int:
        """Prompts whose goal, their own clean margin, was reached inside the budget."""
        return len(self.values("smallest_norm_relative"))


@dataclass(frozen=True)
class Attempt:
    """A finished attack beside a search. rows: of audited prompts; of an attempt in the prompt one
    a prompt and template."""

    trial: Trial
    record: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]


MAY_MOVE = {"floor": "may rise", "codes": "off, may sink"}
"""Promise → what of a held feature's drift is allowed under it, if any is."""


@dataclass(frozen=True)
class Point:
    """An audit at one point of the grid, with the controls that are finished."""

    label: str
    main: Arm
    controls: tuple[Arm, ...]

    @property
    def constraint(self) -> str:
        return self.main.recovery.constraint.kind

    @property
    def free(self) -> bool:
        """Nothing was held, and nothing was to be."""
        return self.constraint in FREE

    @property
    def drift(self) -> float:
        """Largest drift of a held feature's pre-activation, relative; 0 where nothing was read."""
        value = self.main.checks["preactivation_drift_max"]
        return float(value) if is_number(value) else 0.0

    @property
    def may_move(self) -> str:
        """What a constraint that holds something lets held features do; empty for nothing."""
        return MAY_MOVE.get(self.main.checks.get("promise", "nothing"), "")

    @property
    def adapted(self) -> str:
        """In what the search is not the published one of its constraint; empty for nothing."""
        return self.main.recovery.adapted

    @property
    def leaks(self) -> bool:
        """Features were to be held, and what that meant was broken: by its own promise where the
        constraint has one (a feature may rise above a floor), else by any move."""
        broken = self.main.checks.get("broken_max")
        promised = self.main.checks.get("promise", "nothing") != "nothing" and is_number(broken)
        return not self.free and (float(broken or 0.0) if promised else self.drift) > LEAK

    @property
    def arms(self) -> tuple[Arm, ...]:
        return (self.main, *self.controls)

    def arm(self, kind: str) -> Arm | None:
        found = [arm for arm in self.arms if arm.kind == kind]
        return found[0] if found else None


@dataclass(frozen=True)
class AuditData:
    """An audit's points in the order of the study. headlines: those whose verdict counts."""

    name: str
    known_answer: str | None
    points: tuple[Point, ...]
    headlines: tuple[Point, ...]


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows. n_done: trials that have ended, also those that had no prompt to
    search; unfinished: what is known to be missing, by name; attempts: in the prompt, answers that
    were begun or drawn, and suffixes, which no verdict is read from; people: what people's labels
    amount to, a sheet each; texts: empty unless they are to be revealed."""

    study: str
    study_hash: str
    study_fields: Mapping[str, Any]
    summary: Mapping[str, Any]
    audits: tuple[AuditData, ...]
    complete: bool
    n_done: int
    unfinished: tuple[str, ...]
    attempts: tuple[Attempt, ...] = ()
    answers: tuple[Attempt, ...] = ()
    suffixes: tuple[Attempt, ...] = ()
    people: tuple[Mapping[str, Any], ...] = ()
    texts: Texts = field(default_factory=dict)

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(arm for a in self.audits for point in a.points for arm in point.arms)

    @property
    def records(self) -> tuple[Mapping[str, Any], ...]:
        """Of every finished trial, attempts included."""
        searches = tuple(arm.record for arm in self.arms)
        beside = (*self.attempts, *self.answers, *self.suffixes)
        return searches + tuple(each.record for each in beside)

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(point for audit in self.audits for point in audit.points)

    @property
    def constraints(self) -> tuple[str, ...]:
        """Kinds of constraint in the order of the study."""
        return tuple(dict.fromkeys(point.constraint for point in self.points))


def gather(store: RunFolder, plan: Plan, texts: Texts | None = None) -> ReportData:
    """Read a run's finished trials once, each verified, and judge them."""
    done = [trial for trial in plan.trials if store.has(trial.id)]
    unfinished = _unfinished(store, plan)
    # A plan read back from a folder holds its finished trials only: the summary knows better.
    written = store.summary()
    complete = not unfinished and (written is None or written["complete"])
    summary = summarize(plan, store, complete)
    if written is not None and KEY in written:  # so that a run knows whether the page is of it
        summary[KEY] = written[KEY]
    rows = {row["id"]: row for row in summary["trials"]}
    arms = {
        trial.id: Arm(
            trial=trial,
            record=store.load(trial.id),
            audited=tuple(row for row in store.examples(trial.id) if row["outcome"]),
            row=rows[trial.id],
        )
        for trial in done
        if trial.searches
    }
    attempts = _beside(store, done, summary, "attempts", "template")
    answers = _beside(store, done, summary, "answers", "arm")
    suffixes = _beside(store, done, summary, "suffixes", "outcome")
    known = {audit.name: audit for audit in plan.study.audits}
    names = dict.fromkeys(trial.audit for trial in done if trial.is_audit)
    return ReportData(
        study=plan.study.name,
        study_hash=plan.hash,
        study_fields=plan.study.canonical(),
        summary=summary,
        audits=tuple(_audit(name, known.get(name), done, arms) for name in names),
        complete=complete,
        n_done=len(done) + len(summary["empty"]),
        unfinished=unfinished,
        attempts=attempts,
        answers=answers,
        suffixes=suffixes,
        people=tuple(store.audits()),
        texts=texts or {},
    )


def _beside(
    store: RunFolder,
    done: Sequence[Trial],
    summary: Mapping[str, Any],
    listed: str,
    audited: str,
) -> tuple[Attempt, ...]:
    """The finished attacks of one list of the summary. audited: a column that is empty for prompts
    that are not."""
    rows = {row["id"]: row for row in summary[listed]}
    return tuple(
        Attempt(
            trial=trial,
            record=store.load(trial.id),
            rows=tuple(row for row in store.examples(trial.id) if row[audited]),
            row=rows[trial.id],
        )
        for trial in done
        if trial.id in rows
    )


def _unfinished(store: RunFolder, plan: Plan) -> tuple[str, ...]:
    """Planned trials that have not ended, and audits of the study without any trial."""
    begun = {trial.audit for trial in plan.trials}
    return tuple(
        name_of(plan, trial)
        for trial in plan.trials
        if not store.has(trial.id) and store.empty(trial.id) is None
    ) + tuple(f"all of {audit.name}" for audit in plan.study.audits if audit.name not in begun)


def _audit(
    name: str, audit: Audit | None, done: Sequence[Trial], arms: Mapping[str, Arm]
) -> AuditData:
    points = tuple(
        Point(
            label=", ".join([trial.label, *describe(arms[trial.id].row["point"])]),
            main=arms[trial.id],
            controls=tuple(arms[other.id] for other in siblings(trial, done).values()),
        )
        for trial in done
        if trial.audit == name and trial.is_audit
    )
    wanted = headline_constraint([point.constraint for point in points])
    return AuditData(
        name=name,
        known_answer=audit.known_answer if audit else None,
        points=points,
        headlines=tuple(p for p in points if p.constraint == wanted),
    )


def is_number(value: Any) -> bool:
    """Whether it was scored: neither null, nor NaN, nor infinite."""
    return value is not None and math.isfinite(value)
