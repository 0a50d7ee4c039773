"""The smallest norm that reaches a goal, worked out instead of searched, where that can be done.

Where the margin is an affine function of the perturbation δ and the constraint a linear subspace
with projector P, the shortest δ with margin(δ) = goal is deficit · P∇ / ‖P∇‖², of norm
deficit / ‖P∇‖. Of a probe w on the mean of T perturbed tokens ∇ is w/T at each, so that this is
deficit · √T / ‖Pw‖ (METHODS I.4, its pooled form in the norm of the tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.problem import TINY, Lanes, Problem
from holdfast.subspace import Everything, FeasibleSet, NullSpace, NullSpacePerSlot


@dataclass(frozen=True)
class ClosedForm:
    """n rows; NaN where there is no closed form.

    norm [n]: the smallest that reaches the goal, in residual units, +inf if none does; share [n]:
    how much of the margin's gradient the constraint leaves, ‖P∇‖ / ‖∇‖.
    """

    norm: Tensor
    share: Tensor

    @classmethod
    def of(cls, problem: Problem, feasible: FeasibleSet) -> ClosedForm:
        rivals = problem.batch.rivals
        single = (rivals == rivals[:, :1]).all(1)  # the largest of several rivals has corners
        known = (
            problem.batch.readout.affine(problem.replay)
            and bool(single.any())
            and isinstance(feasible, Everything | NullSpace | NullSpacePerSlot)
        )
        if not known:
            nothing = torch.full_like(problem.goal, torch.nan)
            return cls(nothing, nothing)
        every = torch.arange(len(problem), device=problem.goal.device)
        batching = problem.replay.subject.batching
        parts = batching.over("steps", every, lambda rows: _of(problem, feasible, rows))
        norm, share = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(norm.where(single, torch.nan), share.where(single, torch.nan))


def _of(problem: Problem, feasible: FeasibleSet, rows: Tensor) -> tuple[Tensor, Tensor]:
    _, q, d = problem.shape
    zero = torch.zeros(len(rows), q, d, device=rows.device, requires_grad=True)
    margin = Lanes.of(problem, rows).margin(zero)
    (gradient,) = torch.autograd.grad(margin.sum(), zero)
    sets = feasible.rows(rows)
    free = sets.retract(gradient).norm(dim=(1, 2))
    free = torch.where(sets.dimension > 0, free, 0.0)
    deficit = (problem.goal[rows] - margin.detach()).clamp_min(0)
    norm = torch.where(free > 0, deficit / free.clamp_min(TINY), torch.inf)
    return torch.where(deficit > 0, norm, 0.0), free / gradient.norm(dim=(1, 2)).clamp_min(TINY)
