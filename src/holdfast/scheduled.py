"""A search of fixed stages, carried out: what `recovery.py` does where a schedule is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.ascent import Noted, Trace, pace
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.outcome import Best
from holdfast.problem import Lanes, Problem, violation_of
from holdfast.schedule import Checkpoint, Schedule, Stage
from holdfast.steppers import Adam
from holdfast.subspace import Charted, FeasibleSet, Iterate, into_ball, norms

if TYPE_CHECKING:
    from holdfast.stack import Stack

NO_CODES = 1e-8
"""Added to the norm of the reference's codes, as published."""


@dataclass(frozen=True)
class Watch:
    """Relative drift of the held codes at everything a perturbation can reach; 0 where nothing is.

    reference: codes [n s k] of each monitored site.
    """

    features: FeatureMap | None
    reference: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, problem: Problem) -> Watch:
        if not problem.moved:
            return cls(None)
        features = FeatureMap.of(problem)
        codes = tuple(
            bank.activations(y, features.replay.frame)
            for bank, (_, y) in zip(features.banks, features.reference, strict=True)
        )
        return cls(features, codes)

    def rows(self, rows: Tensor) -> Watch:
        if self.features is None:
            return self
        return Watch(self.features.rows(rows), tuple(z[rows] for z in self.reference))

    @torch.no_grad()
    def drift(self, delta: Tensor) -> Tensor:
        """[n] of perturbations [n q d_model]."""
        change = size = delta.new_zeros(len(delta))
        if self.features is None:
            return change
        replay, banks = self.features.replay, self.features.banks
        states = replay.suffix(delta, [bank.site for bank in banks])
        monitored = self.features.monitored.split([z.shape[2] for z in self.reference], 2)
        for bank, z_ref, own in zip(banks, self.reference, monitored, strict=True):
            z = bank.activations(states[bank.site].leaving, replay.frame)
            change = change + torch.where(own, z - z_ref, 0.0).square().sum((1, 2))
            size = size + torch.where(own, z_ref, 0.0).square().sum((1, 2))
        return change.sqrt() / (size.sqrt() + NO_CODES)


@dataclass
class Kept:
    """The iterate of each lane that the published rule takes so far. value [n]: its objective, less
    `weight` times the drift where no iterate was near enough."""

    rule: Checkpoint
    delta: Tensor
    value: Tensor
    near: Tensor

    @classmethod
    def none(cls, rule: Checkpoint, delta: Tensor) -> Kept:
        value = torch.full((len(delta),), -torch.inf, device=delta.device)
        return cls(rule, delta, value, torch.zeros_like(value, dtype=torch.bool))

    def offer(self, delta: Tensor, objective: Tensor, drift: Tensor) -> None:
        near = drift <= self.rule.drift
        value = torch.where(near, objective, objective - self.rule.weight * drift)
        # The first that is near enough replaces any that is not, and no other replaces it.
        better = torch.where(near == self.near, value > self.value, near)
        self.delta = torch.where(better[:, None, None], delta, self.delta)
        self.value = torch.where(better, value, self.value)
        self.near = self.near | near


@dataclass(frozen=True)
class Ended:
    """Where n rows ended: delta [n q d_model], its margin [n], and whether NaN was met [n]."""

    delta: Tensor
    margin: Tensor
    diverged: Tensor


def follow(stack: Stack, schedule: Schedule, rows: Tensor, best: Best, trace: Trace) -> None:
    """Take every step of the schedule for some rows of the stack."""
    watch = Watch.of(stack.problem) if schedule.checkpoint is not None else Watch(None)

    def piece(own: Tensor) -> tuple[Ended, Trace]:
        noted: Trace = []  # its own: a piece that ran out of memory is done again
        return _followed(stack, schedule, own, watch.rows(own), noted), noted

    parts = stack.problem.replay.subject.batching.over("steps", rows, piece)
    for own, (ended, noted) in zip(
        rows.split([len(e.margin) for e, _ in parts]), parts, strict=True
    ):
        trace += _reached_once([entry.to("cpu") for entry in noted])
        best.keep(own, ended.delta, ended.margin)
        best.steps[own] = schedule.steps
        best.count(own, torch.full_like(own, schedule.steps + 1))
        back = ended.margin > 0
        for row, ok, bad in zip(own.tolist(), back, ended.diverged, strict=True):
            best.outcomes[row] = "recovered" if ok else "diverged" if bad else "undecided"


def _reached_once(noted: Trace) -> Trace:
    """The entries of a piece with every row reaching its goal once, though none leaves for it."""
    out: Trace = []
    before = torch.zeros(0, dtype=torch.bool)
    for entry in noted:
        before = before if len(before) else torch.zeros_like(entry.reached)
        out.append(replace(entry, reached=entry.reached & ~before))
        before = before | entry.reached
    return out


def _followed(stack: Stack, schedule: Schedule, rows: Tensor, watch: Watch, noted: Trace) -> Ended:
    problem = stack.problem
    lanes, sets = Lanes.of(problem, rows), stack.feasible.rows(rows)
    radius = problem.radius[rows]
    delta = torch.zeros(len(rows), *problem.shape[1:], device=radius.device)
    diverged = torch.zeros(len(rows), dtype=torch.bool, device=radius.device)
    for stage in schedule.stages:
        climbing = lanes
        if stage.objective is not None:
            climbing = replace(lanes, problem=replace(problem, objective=stage.objective))
        own = slots_of(lanes, stage)[..., None]
        kept = None if schedule.checkpoint is None else Kept.none(schedule.checkpoint, delta)
        delta, bad = _stage(climbing, sets, stage, own, delta, radius, kept, watch, rows, noted)
        diverged |= bad
    with torch.no_grad():
        return Ended(delta, lanes.margin(delta), diverged)


def slots_of(lanes: Lanes, stage: Stage) -> Tensor:
    """[n q] bool: the slots that a stage searches."""
    columns, frame = lanes.replay.columns, lanes.replay.frame
    positions = frame.positions.gather(1, columns.clamp_min(0))
    answer = positions >= frame.prompt_length[:, None]
    wanted = {"all": torch.ones_like(answer), "answer": answer, "prompt": ~answer}[stage.at]
    return (wanted & (columns >= 0)).repeat(1, len(lanes.replay.sites))


def _stage(
    lanes: Lanes,
    sets: FeasibleSet,
    stage: Stage,
    own: Tensor,
    start: Tensor,
    radius: Tensor,
    kept: Kept | None,
    watch: Watch,
    rows: Tensor,
    noted: Trace,
) -> tuple[Tensor, Tensor]:
    """The iterate a stage leaves [n q d_model], and rows [n] that met NaN, which stay where they
    were. own [n q 1]: its slots."""
    stepper = Adam()
    delta, state = start, stepper.start(start)
    # Adam's moves come divided by √(q·d), the norm of its first step; the published rate is a
    # coordinate's.
    rate = stage.lr * (start.shape[1] * start.shape[2]) ** 0.5
    fixed = torch.where(own, 0.0, start)
    # The ball of the whole, in which a constraint looks at it; the stage's own is cut below.
    whole = (radius.square() + norms(fixed).flatten().square()).sqrt()
    diverged = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    still = torch.zeros(len(start), dtype=torch.long, device=start.device)
    for step in range(stage.steps):
        if isinstance(sets, Charted):
            sets = sets.asking(delta)
        margin, gradient = _climbed(lanes, delta)
        diverged |= ~(torch.isfinite(margin) & torch.isfinite(gradient).flatten(1).all(1))
        gradient = torch.where(own & ~diverged[:, None, None], gradient, 0.0)
        noted.append(_noted(lanes, len(noted), rows, delta, margin, diverged))
        here = Iterate(delta, step, gradient)
        if isinstance(sets, Charted):
            sets = sets.around(here)
        along = torch.where(own, sets.tangent(gradient, here), 0.0)
        move, state = stepper.move(state, along)
        length = rate * pace(still)[:, None, None]
        moved = sets.inside(
            delta + length * torch.where(own, move, 0.0), whole, replace(here, along=along)
        )
        moved = fixed + into_ball(torch.where(own, moved, 0.0), radius)
        delta = torch.where(diverged[:, None, None], delta, moved)
        still = torch.where((delta == here.delta).flatten(1).all(1), still + 1, 0)
        if kept is not None and ((step + 1) % kept.rule.every == 0 or step + 1 in (1, stage.steps)):
            with torch.no_grad():
                objective, _ = lanes.climbed(delta)
            kept.offer(delta, objective, watch.drift(delta))
    return (delta if kept is None else kept.delta), diverged


def _climbed(lanes: Lanes, delta: Tensor) -> tuple[Tensor, Tensor]:
    """margin [n], and the objective's gradient [n q d_model]."""
    leaf = delta.detach().clone().requires_grad_(True)
    climbed, margin = lanes.climbed(leaf)
    (gradient,) = torch.autograd.grad(climbed.sum(), leaf)
    return margin.detach(), gradient


def _noted(
    lanes: Lanes, step: int, rows: Tensor, delta: Tensor, margin: Tensor, diverged: Tensor
) -> Noted:
    problem = lanes.problem
    return Noted(
        step, rows, ~diverged, margin, norms(delta).flatten() / problem.reference_norm[rows],
        violation_of(problem, lanes.replay, delta), margin >= problem.goal[rows],
    )  # fmt: skip
