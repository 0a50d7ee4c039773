"""The summary of a run: one row a trial, with its verdict. Made from records only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.canonical import SCHEMA
from holdfast.errors import EmptyValidSetError
from holdfast.grid import describe, points
from holdfast.planning import Plan
from holdfast.second_opinions import PREFIX
from holdfast.store import RunFolder
from holdfast.study import headline_constraint
from holdfast.trial import Trial
from holdfast.unlearning import UnlearningScore, score_of, settings_of
from holdfast.verdict import Judgement, Separation, judge, separation
from holdfast.wording import arm_name

LISTS = ("trials", "attempts", "answers", "suffixes", "empty")
"""Where the rows of a run's trials stand, in the order of a plan read back."""


def summarize(plan: Plan, store: RunFolder, complete: bool) -> dict[str, Any]:
    """summary.json as CONTRACTS lays it out, for the trials of the plan that are stored."""
    done = [trial for trial in plan.trials if store.has(trial.id)]
    rows = [row(plan, store, trial, done) for trial in done if trial.searches]
    return {
        "schema": SCHEMA,
        "study": plan.study.name,
        "study_hash": plan.hash,
        "complete": complete,
        "trials": rows,
        **{
            name: [make(plan, store, trial) for trial in done if trial.attack.listed == name]
            for name, make in (("attempts", attempt), ("answers", answer), ("suffixes", suffix))
        },
        "empty": [
            empty(plan, trial, why) for trial in plan.trials if (why := store.empty(trial.id))
        ],
        "unlearning": [score.model_dump(mode="json") for score in unlearning(plan, store, done)],
    }


def unlearning(plan: Plan, store: RunFolder, done: Sequence[Trial]) -> list[UnlearningScore]:
    """The score of every audit whose clamps were measured in what they leave known."""
    made = []
    for name in dict.fromkeys(trial.audit for trial in done if trial.is_audit):
        own = [trial for trial in done if trial.is_audit and trial.audit == name]
        rows = [(t.id, plan.points.get(t.id, {}), store.load(t.id)["result"]) for t in own]
        if settings := settings_of(rows):
            # A plan read back from a folder holds finished trials only: the study knows better.
            planned = max(len(own), len(points(plan.study.grid_of(name))))
            made.append(score_of(name, settings, planned - len(own)))
    return made


def headline(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the audits themselves that a reader should read first."""
    audits = [row for row in rows if row["control"] == "none"]
    if not audits:
        return []
    run: dict[str, list[str]] = {}
    for row in audits:
        run.setdefault(row["audit"], []).append(row["constraint"])
    return [row for row in audits if row["constraint"] == headline_constraint(run[row["audit"]])]


def siblings(trial: Trial, done: Sequence[Trial]) -> dict[str, Trial]:
    """The controls of an audit at the same grid point, by kind."""
    blank = {"control": None, "twin": None, "paths": None}
    key = trial.canonical() | blank
    return {
        other.control.kind: other
        for other in done
        if other.searches and other.control.kind != "none" and other.canonical() | blank == key
    }


def judgement(plan: Plan, store: RunFolder, trial: Trial, done: Sequence[Trial]) -> Judgement:
    """The verdict on an audit's trial, read beside its controls."""
    rule = plan.study.verdict
    audited = store.examples(trial.id)
    separations: list[Separation] = []
    for kind, other in siblings(trial, done).items():
        texts = store.load(other.id)["result"].get("forced_text")
        separations.append(separation(rule, kind, audited, store.examples(other.id), texts))
    return judge(rule, store.load(trial.id), separations)


def row(plan: Plan, store: RunFolder, trial: Trial, done: Sequence[Trial]) -> dict[str, Any]:
    """One trial's row. A control has no verdict: it is part of its audit's."""
    record = store.load(trial.id)
    result, checks = record["result"], record["result"]["checks"]
    measured = {m["name"]: m for m in result["measurements"]}
    norm, spec = measured["smallest_norm_relative"], trial.recovery
    assert spec is not None
    verdict = judgement(plan, store, trial, done) if trial.is_audit else None
    return _shared(plan, trial, record) | {
        "constraint": spec.constraint.kind,
        "order": spec.order,
        "control": trial.control.kind,
        "drift_relative_mean": checks["drift_relative_mean"],
        "drift_relative_max": checks["drift_relative_max"],
        "n_drift_undefined": checks["n_drift_undefined"],
        "preactivation_drift_max": checks["preactivation_drift_max"],
        "preactivation_drift_max_absolute": checks["preactivation_drift_max_absolute"],
        "norm_relative_median": norm["estimate"],
        "norm_relative_low": norm["low"],
        "norm_relative_high": norm["high"],
        "verdict": verdict.verdict if verdict else None,
        "sentence": verdict.sentence if verdict else result["outcome"]["sentence"],
        "separations": [s.model_dump(mode="json") for s in verdict.separations] if verdict else [],
        "judges": _judges(measured),
    }


def attempt(plan: Plan, store: RunFolder, trial: Trial) -> dict[str, Any]:
    """The row of an attempt in the prompt, apart from the searches' rows: it has no verdict.

    n_asked: prompts on which a template brings the behavior without the clamp, over which the rate
    is; n_recovered: those on which one did with it; turned_rate: of prompts on which the model does
    the opposite by itself, those that a template turns without the clamp. Drift is None, for
    `drift_reason`.
    """
    record = store.load(trial.id)
    result = record["result"]
    measured = {m["name"]: m for m in result["measurements"]}
    without = measured["without_clamp_rate"]
    return _shared(plan, trial, record) | {
        "attack": trial.attack.kind,
        "n_asked": result["funnel"]["stages"]["asked"],
        "without_clamp_rate": without["estimate"],
        "without_clamp_low": without["low"],
        "without_clamp_high": without["high"],
        "turned_rate": measured["turned_rate"]["estimate"],
        "templates": [
            counts
            | {
                name: measured[f"template.{counts['name']}.{name}"]
                for name in ("recovery_rate", "without_clamp_rate", "turned_rate")
            }
            for counts in result["templates"]
        ],
        "preactivation_drift_max": result["checks"]["preactivation_drift_max"],
        "drift_reason": result["checks"]["reason"],
    }


def answer(plan: Plan, store: RunFolder, trial: Trial) -> dict[str, Any]:
    """The row of answers begun for the model, or drawn, apart from the searches' rows: it has no
    verdict.

    n_asked: prompts of which it can be said; n_recovered: those on which the behavior came with the
    clamp on; table: every way the answers were made, and what came of it.
    """
    record = store.load(trial.id)
    result = record["result"]
    return _shared(plan, trial, record) | {
        "attack": trial.attack.kind,
        "label": trial.attack.label,
        "n_asked": result["funnel"]["stages"]["asked"],
        "table": result["table"],
        "drift_reason": result["checks"]["reason"],
    }


def suffix(plan: Plan, store: RunFolder, trial: Trial) -> dict[str, Any]:
    """The row of a soft suffix, apart from the searches' rows: it has no verdict.

    suffix: its fields; n_placeholder: prompts that the suffix brings back as it begins, before any
    search; n_searched: the others, over which the rate is. drift: from the same prompt with the
    suffix as it began, drift_original: from the prompt as it was, drift_placeholder: what of the
    latter is there before any search; drift_generated, drift_generated_original: the first two on
    the text that was generated, None where there is none. Means, relative to the features' norm.
    """
    record = store.load(trial.id)
    result = record["result"]
    stages, checks = result["funnel"]["stages"], result["checks"]
    measured = {m["name"]: m for m in result["measurements"]}
    return _shared(plan, trial, record) | {
        "attack": trial.attack.kind,
        "label": trial.attack.label,
        "suffix": result["suffix"],
        "n_placeholder": stages["valid"] - stages["searched"],
        "n_searched": stages["searched"],
        "without_clamp_rate": measured["without_clamp_rate"]["estimate"],
        "norm_relative_median": measured["norm_relative"]["estimate"],
        **{
            f"{name}_{figure}": checks.get(f"{name}_{figure}")
            for name in (
                "drift",
                "drift_original",
                "drift_placeholder",
                "drift_generated",
                "drift_generated_original",
            )
            for figure in ("relative_mean", "preactivation_max")
        },
    }


def empty(plan: Plan, trial: Trial, why: EmptyValidSetError) -> dict[str, Any]:
    """The row of a trial that had no prompt to search. name: what it is called on a page; funnel:
    stage → how many prompts came so far."""
    return {
        "id": trial.id,
        "audit": trial.audit,
        "behavior": trial.behavior.kind,
        "point": plan.points.get(trial.id, {}),
        "attack": trial.attack.kind,
        "control": trial.control.kind,
        "name": name_of(plan, trial),
        "sentence": str(why),
        "funnel": why.funnel,
    }


def name_of(plan: Plan, trial: Trial) -> str:
    """A trial by audit, constraint or attack, place on the grid, and what is searched for."""
    arm = [arm_name(trial.control.kind)] if trial.searches else []
    return ", ".join([trial.audit, trial.label, *describe(plan.points.get(trial.id, {})), *arm])


def _shared(plan: Plan, trial: Trial, record: Mapping[str, Any]) -> dict[str, Any]:
    """What every row says: which trial it is, how many prompts came how far, what came of it."""
    result = record["result"]
    stages, outcome = result["funnel"]["stages"], result["outcome"]
    recovery = next(m for m in result["measurements"] if m["name"] == "recovery_rate")
    return {
        "id": trial.id,
        "audit": trial.audit,
        "behavior": trial.behavior.kind,
        "point": plan.points.get(trial.id, {}),
        "n_tried": stages["tried"],
        "n_clean": stages["clean"],
        "n_suppressed": stages["suppressed"],
        "n_valid": stages["valid"],
        "n_clusters": recovery["n_clusters"],
        "n_recovered": stages["recovered"],
        "recovery_rate": recovery["estimate"],
        "ci_low": recovery["low"],
        "ci_high": recovery["high"],
        "outcome": outcome["outcome"],
        "sentence": outcome["sentence"],
        "seconds": record["run"]["seconds"],
    }


def beside(attempt: Mapping[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The headline rows of the audit an attempt belongs to, at the same point of the grid."""
    return [
        row
        for row in headline([row for row in rows if row["audit"] == attempt["audit"]])
        if attempt["point"].items() <= row["point"].items()
    ]


def _judges(measured: dict[str, Any]) -> dict[str, Any]:
    """Judge → recovery rate under it, where several read the replies; the last is of all."""
    return {
        name.removeprefix(PREFIX): {
            "n": m["n"], "recovery_rate": m["estimate"], "ci_low": m["low"], "ci_high": m["high"],
        }
        for name, m in measured.items()
        if name.startswith(PREFIX)
    }  # fmt: skip
