"""What a soft suffix climbs: a margin up to its goal, less what a monitor sees of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from holdfast.drift import squared_relative_drift
from holdfast.problem import Lanes, Problem
from holdfast.saes.bank import FeatureBank
from holdfast.steppers import Steepest
from holdfast.subspace import into_ball

LAST = 0.1
"""The last step's length, as a share of the first one's: a penalty has to be settled into."""


@dataclass(frozen=True)
class Objective:
    """`min(margin, goal) − weight · drift` of n rows, each a problem of its own.

    banks: the held features, site by site; reference: their codes [n s k] at the suffix columns of
    the replay with the suffix as it began; monitored [n s k] bool; weight: logits per unit of the
    squared relative drift.
    """

    lanes: Lanes
    goal: Tensor
    radius: Tensor
    weight: float
    banks: tuple[FeatureBank, ...]
    reference: tuple[Tensor, ...]
    monitored: tuple[Tensor, ...]

    @classmethod
    def of(cls, problem: Problem, positions: Tensor, weight: float) -> Objective:
        """positions [n p]: the monitored tokens, absolute, -1 for none."""
        replay = problem.replay
        frame = replay.frame
        banks = tuple(problem.held[site] for site in problem.moved)
        seen = (positions[:, :, None] == frame.positions[:, None, :]) & (positions >= 0)[..., None]
        columns = seen.any(1)[..., None]  # [n s 1]
        whole = cls(
            Lanes.of(problem, torch.arange(len(problem), device=positions.device)), problem.goal,
            problem.radius, weight, banks, (),
            tuple(columns & bank.valid[bank.slices(frame)][:, None] for bank in banks),
        )  # fmt: skip
        zero = torch.zeros(problem.shape, device=positions.device)
        every = torch.arange(len(problem), device=positions.device)
        with torch.no_grad():
            parts = replay.subject.batching.over(
                "steps", every, lambda rows: whole.rows(rows)._codes(zero[rows])
            )
        reference = tuple(torch.cat(own) for own in zip(*parts, strict=True))
        return cls(**{f.name: getattr(whole, f.name) for f in fields(cls)}
                   | {"reference": reference})  # fmt: skip

    def __len__(self) -> int:
        return len(self.goal)

    def rows(self, rows: Tensor) -> Objective:
        return Objective(
            self.lanes.rows(rows), self.goal[rows], self.radius[rows], self.weight, self.banks,
            tuple(z[rows] for z in self.reference), tuple(own[rows] for own in self.monitored),
        )  # fmt: skip

    def drift(self, delta: Tensor) -> Tensor:
        """[n] squared relative drift of the held codes at the monitored tokens, differentiable."""
        return squared_relative_drift(self._codes(delta), self.reference, self.monitored)

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The objective [n] and the margin [n], differentiable in delta [n q d_model]."""
        margin = self.lanes.margin(delta)
        value = torch.minimum(margin, self.goal)
        # Without a monitor its codes need not be run.
        return (value - self.weight * self.drift(delta) if self.weight else value), margin

    def _codes(self, delta: Tensor) -> list[Tensor]:
        replay = self.lanes.replay
        states = replay.suffix(delta, [bank.site for bank in self.banks])
        return [bank.activations(states[bank.site].leaving, replay.frame) for bank in self.banks]


@dataclass(frozen=True)
class Ended:
    """delta [n q d_model]: the iterate with the highest objective, the suffix as it began among
    them; objective, margin [n] of it; step [n]: when it was reached, 0 for none better."""

    delta: Tensor
    objective: Tensor
    margin: Tensor
    step: Tensor


def climb(objective: Objective, steps: int, lr: float) -> Ended:
    """Take all the steps, so that every weight has the same budget of them, inside the ball.

    Normalized ascent with momentum, as the audit's own search steps; lr: the first step's norm as a
    share of the radius.
    """
    whole = torch.arange(len(objective), device=objective.goal.device)
    parts = objective.lanes.replay.subject.batching.over(
        "steps", whole, lambda rows: _climb(objective.rows(rows), steps, lr)
    )
    return Ended(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Ended)})


def _climb(objective: Objective, steps: int, lr: float) -> Ended:
    replay, n = objective.lanes.replay, len(objective)
    delta = torch.zeros(
        n, replay.columns.shape[1], replay.base.shape[-1], device=replay.base.device
    )
    best, value = delta, torch.full((n,), -torch.inf, device=delta.device)
    reached = torch.full_like(value, torch.nan)
    at = torch.zeros(n, dtype=torch.long, device=delta.device)
    stepper = Steepest()
    state = stepper.start(delta)
    for step in range(steps + 1):
        leaf = delta.clone().requires_grad_(True)
        found, margin = objective(leaf)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        found = found.detach()
        better = found > value  # never true of NaN
        best = torch.where(better[:, None, None], delta, best)
        value, at = torch.where(better, found, value), torch.where(better, step, at)
        reached = torch.where(better, margin.detach(), reached)
        move, state = stepper.move(state, gradient)
        rate = lr * objective.radius * (1 - (1 - LAST) * step / steps)
        delta = into_ball(delta + rate[:, None, None] * move, objective.radius)
    return Ended(best, value, reached, at)
