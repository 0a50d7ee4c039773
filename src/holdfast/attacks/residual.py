"""The residual search: the smallest vector that brings a behavior back, and what it moved."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks import Attacked, AttackKind, Listed, TrialResult
from holdfast.controls import Case
from holdfast.edits import Perturbation
from holdfast.errors import StudyError
from holdfast.found import Found, examples_of, result_of
from holdfast.generality import between_orders
from holdfast.paths import follow
from holdfast.positions import check_possible, selected
from holdfast.problem import Problem
from holdfast.recovery import RecoverySpec, recover
from holdfast.regain import regain
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.variants import Recovered
from holdfast.verify import margin_in_order, verify


class Residual(AttackKind):
    """A vector added to the residual stream, inside a constraint and a norm budget.

    How to search is the study's `recovery`.
    """

    kind: Literal["residual"] = "residual"
    searches: ClassVar[bool] = True
    listed: ClassVar[Listed] = "trials"

    def run(self, attacked: Attacked) -> TrialResult:
        """posed → recovered → verified → read as the behavior reads every other condition → through
        what it went."""
        setting, case, spec = attacked.setting, attacked.case, attacked.recovery
        assert spec is not None
        problem = pose(spec, case)
        recovery = recover(problem, spec, attacked.seed)
        perturbation = Perturbation(
            case.batch.ids, _positions(spec, case), problem.replay.parts(recovery.delta)
        )
        clamp_first = spec.order == "clamp_then_perturbation"
        checks = verify(
            case.subject,
            case.batch,
            case.edits,
            perturbation,
            problem.held,
            {site: case.features.median_active(site) for site in problem.held},
            clamp_first,
        )
        turned = margin_in_order(
            case.subject, case.batch, case.edits, perturbation, not clamp_first
        )
        regained = regain(setting, case, problem, perturbation, checks, clamp_first)
        paths = None
        if attacked.paths is not None:
            back = regained.recovered.nonzero().flatten()
            own = Recovered.of(
                setting, case, problem, spec, recovery.delta, perturbation.positions, back
            )
            paths = follow(own, attacked.paths, attacked.seed, back)
            if attacked.paths.orders:
                paths.record["orders"] = between_orders(own, attacked.paths.scales)
        found = Found(
            setting, case, problem, recovery, checks, turned, spec.constraint.promise, regained,
            paths,
        )  # fmt: skip
        return TrialResult(
            result=result_of(found),
            tensors={
                "positions": perturbation.positions,
                **{str(site): delta for site, delta in perturbation.deltas.items()},
                **case.batch.readout.tensors,
            },
            examples=examples_of(found),
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
        objective=spec.objective,
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


def _positions(spec: RecoverySpec, case: Case) -> Tensor:
    """[n p] absolute positions that the policy names, -1 where a row has fewer."""
    frame = case.batch.frame()
    check_possible(spec.perturb.positions, frame)
    mask = selected(spec.perturb.positions, False, frame)
    if spec.perturb.answer:
        if case.batch.forced is None:
            raise StudyError(
                "perturb.answer adds positions of the answer, and this behavior is read at the "
                "last prompt token; leave it out"
            )
        begin = frame.prompt_length[:, None]
        mask = mask | ((frame.positions >= begin) & (frame.positions < begin + spec.perturb.answer))
    if not mask.any(1).all():
        raise StudyError(
            f"perturb.positions = {spec.perturb.positions!r} names no position in some prompts"
        )
    width = int(mask.sum(1).max())
    masked = torch.where(mask, frame.positions, -1)
    return masked.sort(1, descending=True).values[:, :width].flip(1)
