"""Hold the clamped features exactly where fewer sites or positions are perturbed than held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.constraints import ConstraintKind, Promise, check_affine
from holdfast.errors import ConstraintError
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.frame import Frame
from holdfast.jacobian.framed import Framed
from holdfast.jacobian.linearized import Linearized
from holdfast.jacobian.null_space import tangent
from holdfast.jacobian.offsets import Offsets, Plain
from holdfast.jacobian.preconditioners import FEW, Preconditioner, prepared
from holdfast.jacobian.restoration import restore
from holdfast.problem import Problem
from holdfast.subspace import Iterate, into_ball

HALVINGS = 4
"""How often a step that cannot be restored is halved before it is not taken."""

REPEATS = (35, 200)
"""Passes forward and back that the solves of a step take: 46 to 197 as counted in six cases of
sites and positions on a tiny model, 37 and 73 by the stored timings of `several_layers`, where the
probes take 21. How many they are depends on how far Φ is from linear: no bound."""

SHARE_OF_EPS = 0.25
"""Share of the precision's epsilon below which a violation is rounding: 3e-8 in float32, below
the tolerance, and 2e-3 in bfloat16, where nothing finer can be told."""


@dataclass(frozen=True)
class Level:
    """Perturbations at which no monitored feature moves: a curved set through 0.

    near: a preconditioner from the reference; free [n]; tolerance: largest entry of Φ that counts
    as none.
    """

    features: FeatureMap
    near: Preconditioner
    free: Tensor
    tolerance: float

    @property
    def dimension(self) -> Tensor:
        return self.free

    def rows(self, rows: Tensor) -> Level:
        return Level(
            self.features.rows(rows), self.near.rows(rows), self.free[rows], self.tolerance
        )

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        # What an earlier step's momentum has outside of it goes when the step is restored.
        return tangent(Linearized(self.features, at.delta), self.near, gradient)

    def retract(self, delta: Tensor) -> Tensor:
        """The set's point near each iterate; nearer to 0 if there is none within reach."""
        anywhere = torch.full((len(delta),), torch.inf, device=delta.device)
        return self.inside(delta, anywhere, Iterate.zero(delta))

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        """Restore inside the ball. Where that fails, a shorter step is taken, at last none."""
        step = into_ball(delta, radius) - last.delta
        out = last.delta.clone()
        todo = torch.arange(len(delta), device=delta.device)
        features, near = self.features, self.near
        for halving in range(HALVINGS + 1):
            trial = last.delta[todo] + step[todo] / 2**halving
            point, kept = restore(features, near, trial, radius[todo], self.tolerance)
            out[todo[kept]] = point[kept]
            if kept.all():
                break
            todo = todo[~kept]
            features, near = self.features.rows(todo), self.near.rows(todo)
        return out


class JacobianNull(ConstraintKind):
    """Every held feature stays where the reference has it, wherever the perturbation lives.

    The true Jacobian of the held features' pre-activations: the gradient is projected onto its null
    space, and each iterate is put back by Gauss-Newton until no pre-activation differs by more than
    `tolerance`, in units of ‖a_i‖·‖h‖ (METHODS D.10). Held are all sites from the lowest perturbed
    one on, at every token from the first perturbed one on. Where every clamped site is perturbed
    and nothing later is to be held, `feature_hold` finds about the same for less.

    In a coarse precision the tolerance is what rounding allows. A clamp that depends on the state
    makes steps in the features: an iterate never crosses one that cannot be restored.
    """

    kind: Literal["jacobian_null"] = "jacobian_null"
    tolerance: float = Field(1e-6, gt=0)

    @property
    def promise(self) -> Promise:
        return "preactivations"

    def repeats(self, n_sites: int) -> tuple[int, int]:
        return REPEATS

    def feasible(self, problem: Problem) -> Level:
        """Raises ConstraintError where the clamped sites lie below the perturbed ones, or where an
        SAE's features do not follow from encoder directions."""
        check_affine(problem, self.kind)
        if not problem.moved:
            raise ConstraintError(
                f"{self.kind} has nothing to hold: the clamped sites lie below "
                f"{problem.sites[0]}, where no perturbation can reach their features"
            )
        features = FeatureMap.of(problem)
        rounding = SHARE_OF_EPS * torch.finfo(problem.replay.base.dtype).eps
        tolerance = max(self.tolerance, rounding)
        import os
        near, free = prepared(features)
        used = features.monitored.flatten(1).any(0).nonzero().flatten()
        if os.environ.get("OLD") or not len(used) <= FEW or len(used) * features.shape[1] * features.shape[2] > 2**20:
            return Level(features, near, free, tolerance)
        frame = Frame.at(features, torch.zeros(features.shape, device=used.device), used)
        coordinates = (
            Offsets(features, problem.reference_norm) if Offsets.fit(problem) else Plain(features)
        )
        return Framed(features, coordinates, frame, problem.reference_norm, free, tolerance)
