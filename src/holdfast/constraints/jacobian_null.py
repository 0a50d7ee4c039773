"""Hold the clamped features exactly where fewer sites or positions are perturbed than held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.constraints import ConstraintKind, Promise, check_affine
from holdfast.errors import ConstraintError
from holdfast.jacobian import (
    FeatureMap,
    Solver,
    dense_is_cheaper,
    free_dimensions,
    restore,
    solver_at,
)
from holdfast.problem import Problem
from holdfast.subspace import into_ball

HALVINGS = 4
"""How often a step that cannot be restored is halved before it is not taken."""

SHARE_OF_EPS = 0.25
"""Share of the precision's epsilon below which a violation is rounding: 3e-8 in float32, below
the tolerance, and 2e-3 in bfloat16, where nothing finer can be told."""


@dataclass
class Trail:
    """Where n lanes of a climb are: the one thing about a set that changes.

    The search asks for tangent directions at its iterates without naming them; they are what it was
    last given. delta [n q d]: these; reach [n]: share of a step that could be restored last time;
    solver: what is known of the Jacobian. Before the first iterate it is at 0.
    """

    delta: Tensor
    reach: Tensor
    solver: Solver | None = None

    def rows(self, rows: Tensor) -> Trail:
        solver = None if self.solver is None else self.solver.rows(rows)
        return Trail(self.delta[rows], self.reach[rows], solver)


@dataclass(frozen=True)
class Level:
    """Perturbations at which no monitored feature moves: a curved set through 0.

    free [n]; tolerance: largest entry of Φ that counts as none.
    """

    features: FeatureMap
    free: Tensor
    tolerance: float
    dense: bool
    trail: Trail = field(repr=False, compare=False)

    @property
    def dimension(self) -> Tensor:
        return self.free

    def rows(self, rows: Tensor) -> Level:
        return Level(
            self.features.rows(rows), self.free[rows], self.tolerance, self.dense,
            self.trail.rows(rows),
        )  # fmt: skip

    def tangent(self, gradient: Tensor) -> Tensor:
        """Project onto the null space of J at the last iterate that `inside` gave back.

        What an earlier step's momentum has outside of it is taken away when the step is restored.
        """
        solver = self._solver(self.trail.delta)
        direction, self.trail.solver = solver.tangent(self.features, self.trail.delta, gradient)
        return direction

    def retract(self, delta: Tensor) -> Tensor:
        """The set's point near each iterate, wherever the search is; nearer to 0 if there is none
        within reach."""
        anywhere = torch.full_like(self.trail.reach, torch.inf)
        start = Trail(torch.zeros_like(delta), torch.ones_like(self.trail.reach))
        return self._restored(delta, anywhere, start)

    def inside(self, delta: Tensor, radius: Tensor) -> Tensor:
        """Restore into the ball: a scaled point is not in the set, so it is scaled and restored in
        turn. Where that fails, a shorter step from the last iterate is taken, at last none."""
        self.trail.delta = self._restored(delta, radius, self.trail)
        return self.trail.delta

    def _restored(self, delta: Tensor, radius: Tensor, trail: Trail) -> Tensor:
        step = into_ball(delta, radius) - trail.delta
        out = trail.delta.clone()
        reach = (2 * trail.reach).clamp_max(1.0)
        todo = torch.arange(len(delta), device=delta.device)
        if trail.solver is None:
            trail.solver = solver_at(self.features.at(trail.delta + step), self.dense)
        for _ in range(HALVINGS + 1):
            features, solver = self.features, trail.solver
            if len(todo) < len(delta):
                features, solver = features.rows(todo), solver.rows(todo)
            trial = trail.delta[todo] + reach[todo, None, None] * step[todo]
            point, kept, own = restore(features, solver, trial, radius[todo], self.tolerance)
            trail.solver = trail.solver.put(todo, own) if len(todo) < len(delta) else own
            out[todo[kept]] = point[kept]
            todo = todo[~kept]
            if not len(todo):
                break
            reach[todo] /= 2
        trail.reach = reach
        return out

    def _solver(self, delta: Tensor) -> Solver:
        if self.trail.solver is None:
            self.trail.solver = solver_at(self.features.at(delta), self.dense)
        return self.trail.solver


class JacobianNull(ConstraintKind):
    """Every held feature stays where the reference has it, wherever the perturbation lives.

    The true Jacobian of the held features' pre-activations: the gradient is projected onto its null
    space, and each iterate is put back by Gauss-Newton until no pre-activation differs by more than
    `tolerance`, in units of ‖a_i‖·‖h‖ (METHODS D.10). Held are all sites from the lowest perturbed
    one on, at every token from the first perturbed one on. Where every clamped site is perturbed,
    `feature_hold` finds about the same for less.

    In a coarse precision the tolerance is what rounding allows. A clamp that depends on the state
    makes steps in the features: an iterate never crosses one that cannot be restored.
    """

    kind: Literal["jacobian_null"] = "jacobian_null"
    tolerance: float = Field(1e-6, gt=0)

    @property
    def promise(self) -> Promise:
        return "preactivations"

    def feasible(self, problem: Problem) -> Level:
        check_affine(problem, self.kind)
        if not problem.moved:
            raise ConstraintError(
                f"{self.kind} has nothing to hold: the clamped sites lie below "
                f"{problem.sites[0]}, where no perturbation can reach their features"
            )
        features = FeatureMap.of(problem)
        zero = torch.zeros(problem.shape, device=problem.goal.device)
        rounding = SHARE_OF_EPS * torch.finfo(problem.replay.base.dtype).eps
        return Level(
            features=features,
            free=free_dimensions(features),
            tolerance=max(self.tolerance, rounding),
            dense=dense_is_cheaper(features),
            trail=Trail(zero, torch.ones(len(problem), device=zero.device)),
        )
