"""The published way, kept as a baseline: project the gradient, then let Adam step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.constraints import ConstraintKind, Promise
from holdfast.errors import ConstraintError
from holdfast.problem import Problem
from holdfast.saes.bank import FeatureBank
from holdfast.steppers import Adam
from holdfast.subspace import Everything, FeasibleSet, Iterate, PerSlot, into_ball


@dataclass(frozen=True)
class ProjectedGradient:
    """Gradients go through `I − A(AᵀA + ridge·I)⁻¹Aᵀ`; iterates are left where Adam puts them.

    projector [g d d] float32; slice_of [n].
    """

    projector: Tensor
    free: Tensor
    slice_of: Tensor

    @property
    def dimension(self) -> Tensor:
        return self.free[self.slice_of]

    def rows(self, rows: Tensor) -> ProjectedGradient:
        return replace(self, slice_of=self.slice_of[rows])

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        if len(self.projector) == 1:
            return gradient @ self.projector[0]
        return torch.bmm(gradient, self.projector[self.slice_of])

    def retract(self, delta: Tensor) -> Tensor:
        return delta

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return into_ball(delta, radius)


class GradientProjection(ConstraintKind):
    """What the released code of arXiv 2606.18322 does (core.py, METHODS C.2): it leaks.

    At several sites each vector's gradient is projected off the encoder columns held at its own
    site, as the published per-layer projection does (METHODS D.6, E), so that what reaches later
    features through the blocks between leaks too.

    ridge: added to AᵀA before inverting, 1e-4 as published.
    """

    kind: Literal["gradient_projection"] = "gradient_projection"
    ridge: float = Field(1e-4, gt=0)

    @property
    def promise(self) -> Promise:
        return "nothing"

    def adapted(self, staged: bool) -> str:
        return "" if staged else "it looks for the smallest norm; published are fixed steps of Adam"

    @property
    def stepper(self) -> Adam:
        return Adam()

    def feasible(self, problem: Problem) -> FeasibleSet:
        if not set(problem.sites) & set(problem.moved):
            raise ConstraintError(
                f"{self.kind} projects a site's gradient off the features held there, and no "
                f"perturbed site has any: perturbed are {', '.join(map(str, problem.sites))}, held "
                f"features that can move are at {', '.join(map(str, problem.moved)) or 'no site'}. "
                "Perturb a clamped site, or use jacobian_null"
            )
        parts = tuple(self._at(problem, problem.held.get(site)) for site in problem.sites)
        return parts[0] if len(parts) == 1 else PerSlot(parts)

    def _at(self, problem: Problem, held: FeatureBank | None) -> FeasibleSet:
        """The set at one perturbed site; where nothing is held nothing is projected."""
        n, _, d = problem.shape
        if held is None:
            return Everything(torch.full((n,), d, device=problem.goal.device))
        A = held.W_enc.double()
        k = A.shape[2]
        ridge = self.ridge * torch.eye(k, dtype=A.dtype, device=A.device)
        inner = torch.linalg.solve(A.mT @ A + ridge, A.mT)
        eye = torch.eye(d, dtype=A.dtype, device=A.device)
        projector = (eye - A @ inner).float()
        return ProjectedGradient(
            projector, d - held.valid.sum(1), held.slices(problem.replay.frame)
        )
