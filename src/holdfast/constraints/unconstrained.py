"""No constraint but the norm budget: how cheap the behavior is when the features may move."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.constraints import ConstraintKind, Promise
from holdfast.problem import Problem
from holdfast.subspace import Everything


class Unconstrained(ConstraintKind):
    """Any perturbation inside the ball."""

    kind: Literal["unconstrained"] = "unconstrained"

    @property
    def promise(self) -> Promise:
        return "nothing"

    @property
    def looser(self) -> None:
        return None

    def feasible(self, problem: Problem) -> Everything:
        n, _, d = problem.shape
        return Everything(torch.full((n,), d, device=problem.goal.device))
