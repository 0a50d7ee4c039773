"""The level set Φ = 0 where J is too large to keep: solves from products with J alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.linearized import Linearized
from holdfast.jacobian.null_space import LEFT, correction, tangent
from holdfast.jacobian.preconditioners import Preconditioner
from holdfast.jacobian.restoration import SLACK, restore
from holdfast.subspace import FeasibleSet, Iterate, into_ball, norms

TRIES, CUT = 3, 0.25
"""How many shares of what is put into the set are tried, each of the one before."""


@dataclass(frozen=True)
class Level:
    """Perturbations at which no monitored feature moves: a curved set through 0.

    near: a preconditioner from the reference; free [n]; tolerance: largest entry of Φ that counts
    as none; in_place: where every slot that has features to hold is perturbed, the set that
    `feature_hold` keeps an iterate in. It is this one: both are the vectors with Φ = 0. Only ways
    into it differ: one replaces residuals, in a single pass, the other goes the shortest way. So
    one Gauss-Newton correction takes away what a step does to first order, which is what decides
    where a search ends, and the rest is taken away in place.
    """

    features: FeatureMap
    near: Preconditioner
    free: Tensor
    tolerance: float
    in_place: FeasibleSet | None = None

    @property
    def dimension(self) -> Tensor:
        return self.free

    def rows(self, rows: Tensor) -> Level:
        return Level(
            self.features.rows(rows), self.near.rows(rows), self.free[rows], self.tolerance,
            None if self.in_place is None else self.in_place.rows(rows),
        )  # fmt: skip

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        # What an earlier step's momentum has outside of it goes when the step is restored.
        return tangent(Linearized(self.features, at.delta), self.near, gradient)

    def retract(self, delta: Tensor) -> Tensor:
        """The set's point near each iterate; nearer to 0 if there is none within reach."""
        anywhere = torch.full((len(delta),), torch.inf, device=delta.device)
        return self.inside(delta, anywhere, Iterate.zero(delta))

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        """Restore inside the ball. Where that fails no step is taken: a climb takes a shorter one
        next, so that nobody has to be asked here; where none follows, shorter ones are tried."""
        step, tries = into_ball(delta, radius) - last.delta, TRIES if last.gradient is None else 1
        out, todo, own = last.delta.clone(), torch.arange(len(step), device=step.device), self
        for number in range(tries):
            trial = last.delta[todo] + CUT**number * step[todo]
            point, kept = own._restored(trial, radius[todo], last.rows(todo))
            out[todo] = torch.where(kept[:, None, None], point, out[todo])
            if number + 1 == tries or kept.all():
                break
            todo = todo[~kept]
            own = self.rows(todo)
        return out

    def _restored(self, trial: Tensor, radius: Tensor, last: Iterate) -> tuple[Tensor, Tensor]:
        if self.in_place is None:
            return restore(self.features, self.near, trial, radius, self.tolerance)
        trial = into_ball(trial, radius)
        here = Linearized(self.features, trial)
        trial = trial - correction(here, self.near, LEFT * here.value.abs().amax((1, 2)))
        point = self.in_place.inside(trial, radius, last)
        with torch.no_grad():
            held = self.features(point)[1].abs().amax((1, 2))
        short = norms(point).flatten() <= radius * (1 + SLACK)
        return point, (held <= self.tolerance) & short
