"""Neither move the clamped features nor take back what the clamp added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from holdfast.constraints.in_place import HoldingKind
from holdfast.problem import Problem
from holdfast.sites import Site
from holdfast.subspace import Iterate, NullSpace, encoder_null, into_ball


@dataclass(frozen=True)
class WithoutUndo:
    """A null space without one more direction at each position; undo [n p d_model], unit vectors in
    that null space, or zero where the clamp added nothing."""

    space: NullSpace
    undo: Tensor

    @property
    def dimension(self) -> Tensor:
        return (self.space.dimension - 1).clamp_min(0)

    def rows(self, rows: Tensor) -> WithoutUndo:
        return replace(self, space=self.space.rows(rows), undo=self.undo[rows])

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        return self.retract(gradient)

    def retract(self, delta: Tensor) -> Tensor:
        delta = self.space.retract(delta)
        for _ in range(2):
            delta = delta - (delta * self.undo).sum(-1, keepdim=True) * self.undo
        return delta

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return into_ball(self.retract(delta), radius)


class UndoNull(HoldingKind):
    """Orthogonal to the held encoder columns and to the clamp's own displacement (METHODS C.5).

    A clamp to a negative value pushes the residual far from where it was, and features stay off
    while a perturbation pushes it most of the way back: recovered by hand, not by another route.
    What is left of the displacement inside the encoder's null space is forbidden too, at every
    position, as the reference has it.
    """

    kind: Literal["undo_null"] = "undo_null"

    def space(self, problem: Problem, site: Site) -> WithoutUndo:
        space = encoder_null(problem.held[site], problem.replay.frame)
        back = problem.replay.unclamped[site] - problem.replay.reference[site]
        undo = space.retract(back)
        # What rounding leaves of a displacement within the encoder's span is no direction.
        length = undo.norm(dim=-1, keepdim=True)
        real = length > 1e-5 * back.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return WithoutUndo(space, torch.where(real, undo / length.clamp_min(1e-30), 0.0))
