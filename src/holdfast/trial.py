"""A trial: the whole method as a straight line. Read this file first.

It never branches on a kind: behaviors, constraints and controls answer for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from holdfast.behaviors import Behavior
from holdfast.canonical import digest, trial_id
from holdfast.config import Config
from holdfast.constraints import Promise
from holdfast.controls import Case, Control
from holdfast.discovery import Discovery
from holdfast.edits import Perturbation
from holdfast.errors import EmptyValidSetError, StudyError
from holdfast.interventions import Intervention
from holdfast.measure import Measurement, median, rate
from holdfast.positions import check_possible, selected
from holdfast.problem import Problem
from holdfast.recovery import Recovery, RecoverySpec, recover, summary_of
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sae import Guarantee
from holdfast.setting import Data, Setting, prepare
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.verify import Checks, verify


class SAEIdentity(Config):
    """An SAE as a trial knows it: where it reads, and the hash of its files."""

    site: str
    sha256: str


class SubjectIdentity(Config):
    """A subject as a trial knows it: a name and hashes, never a path."""

    name: str
    weights_sha256: str
    dtype: str
    attention: str
    quantization: str | None = None
    prepend_bos: bool = False
    saes: tuple[SAEIdentity, ...]


class Trial(Config):
    """Everything that changes numbers. Its canonical JSON is its identity."""

    audit: str
    seed: int
    subject: SubjectIdentity
    twin: SubjectIdentity | None
    data: Data
    behavior: Behavior
    discovery: Discovery
    intervention: Intervention
    recovery: RecoverySpec
    control: Control

    def canonical(self) -> dict[str, Any]:
        """As plain JSON types, without the paths of what is known by its hash."""
        return self.model_dump(mode="json", by_alias=True, context={"identity": True})

    @property
    def id(self) -> str:
        """16 hex digits of sha256 over the canonical JSON and the schema version."""
        return trial_id(self.canonical())


@dataclass
class Lab:
    """The loaded subjects of a run, and the settings that several trials share."""

    subjects: dict[str, Subject]
    _settings: dict[str, Setting] = field(default_factory=dict)

    def subject(self, identity: SubjectIdentity) -> Subject:
        return self.subjects[digest(identity.model_dump(mode="json"))]

    def setting(self, trial: Trial, identity: SubjectIdentity) -> Setting:
        """The audit's setting on a subject, prepared once."""
        parts = trial.canonical()
        names = ("seed", "data", "behavior", "discovery", "intervention")
        key = digest([identity.model_dump(mode="json"), *(parts[name] for name in names)])
        if key not in self._settings:
            self._settings[key] = prepare(
                self.subject(identity), trial.behavior, trial.discovery, trial.intervention,
                trial.data, trial.seed,
            )  # fmt: skip
        return self._settings[key]

    def twin_setting(self, trial: Trial) -> Setting:
        """The setting on the ignorant twin. Raises StudyError if the study names none."""
        if trial.twin is None:
            raise StudyError(
                f"audit {trial.audit!r}: the control 'ignorant' needs a subject trained without "
                "the knowledge; name it under [ignorant], or leave the control out"
            )
        return self.setting(trial, trial.twin)


@dataclass(frozen=True)
class TrialResult:
    """What a trial found: `result` of the record, the saved tensors, a row for every prompt."""

    result: dict[str, Any]
    tensors: dict[str, Tensor]
    examples: list[dict[str, Any]]


def run_trial(trial: Trial, lab: Lab) -> TrialResult:
    """clean → suppressed → valid → recovered → verified."""
    setting = lab.setting(trial, trial.subject)
    case = trial.control.case(setting, lambda: lab.twin_setting(trial))
    _require_prompts(trial, setting, case)
    problem = pose(trial.recovery, case)
    recovery = recover(problem, trial.recovery, trial.seed)
    perturbation = Perturbation(
        case.batch.ids, _positions(trial.recovery, case), problem.replay.parts(recovery.delta)
    )
    checks = verify(
        case.subject,
        case.batch,
        case.edits,
        perturbation,
        problem.held,
        {site: case.features.median_active(site) for site in problem.held},
        trial.recovery.order == "clamp_then_perturbation",
    )
    return TrialResult(
        result=_result(
            setting, case, problem, recovery, checks, trial.recovery.constraint.promise
        ),
        tensors={
            "positions": perturbation.positions,
            **{str(site): delta for site, delta in perturbation.deltas.items()},
        },
        examples=_examples(setting, case, problem, recovery, checks),
    )


def pose(spec: RecoverySpec, case: Case) -> Problem:
    """The search problem of a case. Raises StudyError if no held feature could be moved."""
    sites = _sites(spec, case)
    clamp_first = spec.order == "clamp_then_perturbation"
    replay = Replay.record(
        case.subject,
        case.batch,
        sites,
        _positions(spec, case),
        before=case.edits if clamp_first else (),
        after=() if clamp_first else case.edits,
        watch=[site for site in case.features.sites if site >= sites[0]],
    )
    reference = replay.residual().norm(dim=(1, 2))
    radius = torch.full_like(reference, spec.budget.absolute or 0.0)
    if spec.budget.relative is not None:
        radius = spec.budget.relative * reference
    return Problem(
        replay=replay,
        batch=case.batch,
        goal=spec.stop.clean_margin * case.clean_margin,
        held={
            site: FeatureBank.of(case.subject.sae(site), case.features)
            for site in case.features.sites
        },
        reference_norm=reference,
        radius=radius,
    )


def _sites(spec: RecoverySpec, case: Case) -> tuple[Site, ...]:
    """The perturbed sites, in forward order; the clamped ones if the study names none."""
    named = {Site.parse(site) for site in spec.perturb.sites} or set(case.features.sites)
    sites = tuple(sorted(named))
    if sites[-1].depth > case.subject.n_blocks:
        raise StudyError(
            f"{case.subject.name} has {case.subject.n_blocks} blocks, so there is no "
            f"site {sites[-1]} to perturb"
        )
    return sites


def _weakest(problem: Problem) -> Guarantee:
    """What unchanged pre-activations guarantee, at the held site where that is least."""
    order: tuple[Guarantee, ...] = ("none", "margin", "exact")
    return min((bank.guarantee for bank in problem.held.values()), key=order.index)


def _positions(spec: RecoverySpec, case: Case) -> Tensor:
    """[n p] absolute positions that the policy names, -1 where a row has fewer."""
    frame = case.batch.frame()
    check_possible(spec.perturb.positions, frame)
    mask = selected(spec.perturb.positions, False, frame)
    if not mask.any(1).all():
        raise StudyError(
            f"perturb.positions = {spec.perturb.positions!r} names no position in some prompts"
        )
    width = int(mask.sum(1).max())
    masked = torch.where(mask, frame.positions, -1)
    return masked.sort(1, descending=True).values[:, :width].flip(1)


def _require_prompts(trial: Trial, setting: Setting, case: Case) -> None:
    if len(case.rows):
        return
    funnel = _funnel(setting, case, None)
    stages = ", ".join(f"{name} {n}" for name, n in funnel["stages"].items())
    raise EmptyValidSetError(
        f"audit {trial.audit!r}, control {trial.control.kind!r}: no prompt is left to search "
        f"({stages}). With no clean prompts the model does not show the behavior; with no "
        "suppressed ones the intervention does not remove it: try another strength, more features "
        "or another site",
        funnel["stages"],
    )


def _funnel(setting: Setting, case: Case, recovered: Tensor | None) -> dict[str, Any]:
    """How many prompts reached each stage, and why the others did not."""
    stages = {
        "tried": len(setting.test),
        "clean": int(setting.clean.sum()),
        "suppressed": int(setting.suppressed.sum()),
        "valid": len(case.rows),
    }
    if recovered is not None:
        stages["recovered"] = int(recovered.sum())
    reasons: dict[str, int] = {}
    for reason in _dropped(setting, case).values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return {"stages": stages, "dropped": reasons, "splits": setting.sizes}


def _dropped(setting: Setting, case: Case) -> dict[str, str]:
    """Example id → why it is not audited."""
    dropped = dict(case.dropped)
    for row, example in enumerate(setting.test.ids):
        if not setting.clean[row]:
            dropped[example] = "the clean model does not show the behavior"
        elif not setting.suppressed[row]:
            dropped[example] = "the intervention does not suppress it"
    return dropped


def _result(
    setting: Setting,
    case: Case,
    problem: Problem,
    recovery: Recovery,
    checks: Checks,
    promise: Promise,
) -> dict[str, Any]:
    clusters = case.batch.clusters
    recovered = checks.recovered
    smallest = recovery.smallest_norm.double() / problem.reference_norm.double()
    reached = ~smallest.isnan()
    measurements: list[Measurement] = [
        rate("recovery_rate", recovered, clusters),
        rate("goal_rate", reached, clusters),
        median(
            # Never reached counts as infinitely far: a median over the prompts that did reach the
            # goal would flatter whoever reaches it seldom.
            "smallest_norm_relative", "share of the residual's norm",
            smallest.nan_to_num(nan=torch.inf), clusters,
            "half of the prompts or more never reached the goal inside the budget",
        ),
        median(
            "drift_relative", "share of the features' norm", checks.drift_relative, clusters,
            "no held feature is active in the reference or on the fit split",
        ),
        median(
            "preactivation_drift", "share of encoder norm x residual norm",
            checks.preactivation_drift, clusters,
        ),
    ]  # fmt: skip
    for name, (batch, clean, suppressed) in setting.neighbors.items():
        measurements.append(rate(f"neighbor.{name}.clean", clean > 0, batch.clusters))
        measurements.append(rate(f"neighbor.{name}.suppressed", suppressed > 0, batch.clusters))
    drift = checks.drift_relative
    return {
        "funnel": _funnel(setting, case, recovered),
        "outcome": summary_of(recovery.outcomes),
        "measurements": [m.model_dump(mode="json") for m in measurements],
        "checks": {
            "preactivation_drift_max": float(checks.preactivation_drift.max()),
            "preactivation_drift_max_absolute": float(checks.preactivation_drift_absolute.max()),
            "drift_relative_mean": float(drift.nanmean()),
            "drift_relative_max": float(drift.nan_to_num(-1.0).max())
            if drift.isfinite().any()
            else float("nan"),
            "drift_absolute_max": float(checks.drift_absolute.max()),
            "n_drift_undefined": int(drift.isnan().sum()),
            "drift_assigned_mean": float(checks.drift_assigned.nanmean()),
            "clamp_mismatch_mean": float(checks.clamp_mismatch.nanmean()),
            "firings_kept_mean": float(checks.firings_kept.nanmean()),
            "displacement_mean": float(checks.displacement.nanmean()),
            "gate_flips": int(checks.gate_flips.sum()),
            "n_overtaken": int((checks.overtaken > 0).sum()),
            "rounding_floor_mean": float(checks.rounding_floor.mean()),
            "rounding_floor_max": float(checks.rounding_floor.max()),
            "preactivation_drift_mean": float(checks.preactivation_drift.mean()),
            "preactivation_drift_elsewhere_max": float(checks.preactivation_drift_elsewhere.max()),
            "undo_cosine_mean": float(checks.undo_cosine.nanmean()),
            "decoder_share_mean": float(checks.decoder_share.nanmean()),
            "guarantee": _weakest(problem),
            "sites": [str(site) for site in problem.sites],
            "norm_relative_max": float(checks.norm_relative.max()),
            "budget_relative": float((problem.radius / problem.reference_norm).max()),
            "promise": promise,
            "exact": promise != "nothing",
            "broken_max": float(checks.broken(promise).max()),
            "broken_mean": float(checks.broken(promise).mean()),
            "null_dimension": int(recovery.null_dimension.min()),
            "replay_error": float((checks.margin - recovery.margin.double()).abs().max()),
        },
        "features": case.features.model_dump(mode="json"),
        "intervention": setting.intervention.model_dump(mode="json"),
        "trace": list(recovery.trace),
    }


def _examples(
    setting: Setting, case: Case, problem: Problem, recovery: Recovery, checks: Checks
) -> list[dict[str, Any]]:
    """A row for every prompt of the test split; NaN and empty text where it was not audited."""
    dropped = _dropped(setting, case)
    audited = {example: row for row, example in enumerate(case.batch.ids)}
    columns = {f.name: getattr(checks, f.name) for f in fields(Checks)}
    columns["smallest_norm"] = recovery.smallest_norm
    columns["smallest_norm_relative"] = recovery.smallest_norm / problem.reference_norm
    columns["goal"] = problem.goal
    columns["steps"] = recovery.steps.double()
    rows = []
    for index, example in enumerate(setting.test.ids):
        row = audited.get(example)
        rows.append(
            {
                "id": example,
                "cluster": setting.test.clusters[index],
                "group": setting.test.groups[index],
                "text_sha256": digest(setting.test.texts[index]),
                "clean_margin": float(setting.clean_margin[index]),
                "suppressed_margin": float(setting.suppressed_margin[index]),
                "dropped": dropped.get(example, ""),
                "outcome": "" if row is None else recovery.outcomes[row],
                "recovered": row is not None and bool(checks.recovered[row]),
                **{
                    name: float("nan") if row is None else float(values[row])
                    for name, values in columns.items()
                },
            }
        )
    return rows
