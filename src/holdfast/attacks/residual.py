"""The residual search: the smallest vector that brings a behavior back, and what it moved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks import Attacked, AttackKind, Listed, TrialResult
from holdfast.batch import Batch
from holdfast.by_value import same
from holdfast.canonical import digest
from holdfast.controls import Case
from holdfast.edits import Perturbation
from holdfast.found import Found, result_of
from holdfast.generality import between_orders
from holdfast.openly import openly
from holdfast.paths import follow
from holdfast.perturbed import positions_of, sites_of
from holdfast.problem import Problem
from holdfast.prompt_rows import examples_of
from holdfast.recovery import Recovery, RecoverySpec, recover_together
from holdfast.regain import regain
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.stack import Search
from holdfast.unclamped import Unclamped
from holdfast.undone import Undone
from holdfast.variants import Recovered
from holdfast.verify import margin_in_order, verify

MOST_ROWS = 512
"""Rows that are searched together at most: a batch of so many is full, and more would gain little
and keep records waiting."""


class Residual(AttackKind):
    """A vector added to the residual stream, inside a constraint and a norm budget.

    How to search is the study's `recovery`.
    """

    kind: Literal["residual"] = "residual"
    searches: ClassVar[bool] = True
    listed: ClassVar[Listed] = "trials"

    def run(self, attacked: Attacked) -> TrialResult:
        """What `run_together` does with one."""
        ((_, result),) = self.run_together([attacked])
        return result

    def run_together(self, attacked: Sequence[Attacked]) -> Iterator[tuple[int, TrialResult]]:
        """posed → recovered, of all that can share a pass at once; then each verified → read as the
        behavior reads every other condition → through what it went."""
        for members in _sharing(attacked):
            own = [attacked[member] for member in members]
            if all(each.ballast for each in own):
                continue
            for member, each, (problem, recovery, spent) in zip(
                members, own, _searched(own), strict=True
            ):
                if each.ballast:
                    continue
                clock = time.perf_counter()
                with each.part():
                    result = _finished(each, problem, recovery)
                yield member, replace(result, seconds=spent + time.perf_counter() - clock)


def _searched(attacked: Sequence[Attacked]) -> Iterator[tuple[Problem, Recovery, float]]:
    """All of them searched as rows of one batch: of each its problem, what was found, and its
    seconds: what its constraint took by itself, and of the rest its share, by the lanes that were
    run for it."""
    clock = time.perf_counter()
    specs, cases = [_spec(each) for each in attacked], [each.case for each in attacked]
    searches = [
        Search(len(each.case.rows), spec, each.seed if spec.seed is None else spec.seed)
        for each, spec in zip(attacked, specs, strict=True)
    ]
    names = [each.name for each in attacked]
    with (
        cases[0].subject.batching.part(f"search {digest(names)[:16]}")
        if all(names)
        else nullcontext()
    ):
        whole = pose_together(specs, cases)
        found = recover_together(whole, searches)
    shared = time.perf_counter() - clock - sum(recovery.own_seconds for recovery in found)
    run = [int(recovery.lane_steps.sum()) for recovery in found]
    every = torch.arange(len(whole), device=whole.goal.device)
    parts = every.split([search.n for search in searches])
    for case, rows, recovery, lanes in zip(cases, parts, found, run, strict=True):
        own = whole if len(found) == 1 else whole.rows(rows)
        share = lanes / sum(run) if sum(run) else 1 / len(found)
        yield replace(own, batch=case.batch), recovery, recovery.own_seconds + share * shared


def _spec(attacked: Attacked) -> RecoverySpec:
    assert attacked.recovery is not None, "a trial that searches has a recovery"
    return attacked.recovery


def _finished(attacked: Attacked, problem: Problem, recovery: Recovery) -> TrialResult:
    """What there is to say of a recovery."""
    setting, case, spec = attacked.setting, attacked.case, _spec(attacked)
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
        problem.held if spec.constraint.sees_all or attacked.paths is not None else (),
    )
    turned = margin_in_order(case.subject, case.batch, case.edits, perturbation, not clamp_first)
    bare = Unclamped.of(setting, case, perturbation, checks.margin)
    regained = regain(setting, case, problem, perturbation, checks, clamp_first)
    back = regained.recovered.nonzero().flatten()
    own = Recovered.of(setting, case, problem, spec, recovery.delta, perturbation.positions, back)
    undone = Undone.of(own, back, checks.margin[back])
    paths = None
    if attacked.paths is not None:
        paths = follow(own, attacked.paths, attacked.seed, back)
        if attacked.paths.orders:
            paths.record["orders"] = between_orders(own, attacked.paths.scales)
        if attacked.paths.openly:
            paths.record["openly"] = openly(own)
    case.subject.begun.forget()
    found = Found(
        setting, case, problem, recovery, checks, turned, spec.constraint.promise, regained, undone,
        paths, bare,
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
    return pose_together([spec], [case])


def pose_together(specs: Sequence[RecoverySpec], cases: Sequence[Case]) -> Problem:
    """The rows of several cases, one after another, as one problem: prompts under the same edits,
    perturbed at the same sites and as many positions, to goals and budgets of their own."""
    spec, case = specs[0], cases[0]
    sites = _sites(spec, case)
    clamp_first = spec.order == "clamp_then_perturbation"
    batch = Batch.stacked([each.batch for each in cases])
    replay = Replay.record(
        case.subject,
        batch,
        sites,
        torch.cat([_positions(spec, each) for each in cases]),
        before=case.edits if clamp_first else (),
        after=() if clamp_first else case.edits,
        watch=[site for site in case.features.sites if site >= sites[0]],
    )
    reference = replay.residual().norm(dim=(1, 2))
    counts = [len(each.rows) for each in cases]
    radius = [
        budget.relative * own if budget.relative is not None
        else torch.full_like(own, budget.absolute or 0.0)
        for budget, own in zip([s.budget for s in specs], reference.split(counts), strict=True)
    ]  # fmt: skip
    return Problem(
        replay=replay,
        batch=batch,
        goal=torch.cat(
            [s.stop.clean_margin * each.clean_margin for s, each in zip(specs, cases, strict=True)]
        ),
        held={
            site: FeatureBank.of(case.subject.sae(site), case.features)
            for site in case.features.sites
        },
        reference_norm=reference,
        radius=torch.cat(radius),
        objective=spec.objective,
    )


def _sharing(attacked: Sequence[Attacked]) -> list[list[int]]:
    """Which of them can be rows of one batch, in order: alike in what a pass is made of and in how
    long they search, under any constraints, and no more rows than fill it.
    """
    groups: dict[Any, list[list[int]]] = {}
    for index, each in enumerate(attacked):
        case, spec = each.case, _spec(each)
        key = (
            id(case.subject), id(case.batch.readout), case.batch.forced is None, case.batch.n_read,
            _positions(spec, case).shape[1], spec.perturb, spec.order, spec.pace, spec.objective,
        )  # fmt: skip
        under = groups.setdefault(key, [])
        beside = next((own for own in under if _same_clamp(case, attacked[own[0]].case)), None)
        if beside is None:
            under.append([index])
        else:
            beside.append(index)
    return [
        [members[place] for place in batch]
        for under in groups.values()
        for members in under
        for batch in packed([len(attacked[member].case.rows) for member in members])
    ]


def _same_clamp(one: Case, other: Case) -> bool:
    """Whether rows of both can be run in one pass, and held: prompts of another seed may be under
    the same clamp. What else is known of features, such as scores, is each case's own."""
    return one.features.ids == other.features.ids and same(one.edits, other.edits)


def packed(counts: Sequence[int]) -> list[list[int]]:
    """Places of searches with so many rows each, in order, in batches of at most `MOST_ROWS` rows;
    one with more has a batch of its own."""
    batches: list[list[int]] = []
    rows = 0
    for place, n in enumerate(counts):
        if not batches or rows + n > MOST_ROWS:
            batches.append([])
            rows = 0
        batches[-1].append(place)
        rows += n
    return batches


def _sites(spec: RecoverySpec, case: Case) -> tuple[Site, ...]:
    subject = case.subject
    return sites_of(spec.perturb, tuple(case.features.sites), subject.name, subject.n_blocks)


def _positions(spec: RecoverySpec, case: Case) -> Tensor:
    return positions_of(spec.perturb, case.batch)
