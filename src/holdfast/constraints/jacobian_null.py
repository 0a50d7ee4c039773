"""Hold the clamped features exactly where fewer sites or positions are perturbed than held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.constraints import ConstraintKind, Promise, check_affine
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.errors import ConstraintError
from holdfast.jacobian.feature_map import FeatureMap, perturbed_columns
from holdfast.jacobian.frame import Frame, few
from holdfast.jacobian.framed import Framed
from holdfast.jacobian.linearized import Linearized
from holdfast.jacobian.null_space import LEFT, correction, tangent
from holdfast.jacobian.offsets import Offsets, Plain
from holdfast.jacobian.preconditioners import Preconditioner, prepared
from holdfast.jacobian.restoration import SLACK, restore
from holdfast.problem import Problem
from holdfast.subspace import FeasibleSet, Iterate, into_ball, norms

HALVINGS = 4
"""How often a step that cannot be restored is halved before it is not taken."""

REPEATS = (30, 150)
"""Passes forward and back that a step takes beside its own, a product J·u counted as two: 33 where
every slot with features to hold is perturbed, 50 at 2,880 constraints with vectors at one of three
layers (both of `several_layers`), 105 where a vector at one token holds ten more at three layers.
Of these 60 are J itself, made anew for every third step of a lane; where the set bends more it is
made more often, up to once a step."""

SHARE_OF_EPS = 0.25
"""Share of the precision's epsilon below which a violation is rounding: 3e-8 in float32, below
the tolerance, and 2e-3 in bfloat16, where nothing finer can be told."""


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
        """Restore inside the ball. Where that fails, a shorter step is taken, at last none."""
        step = into_ball(delta, radius) - last.delta
        out = last.delta.clone()
        todo = torch.arange(len(delta), device=delta.device)
        own = self
        for halving in range(HALVINGS + 1):
            trial = last.delta[todo] + step[todo] / 2**halving
            point, kept = own._restored(trial, radius[todo])
            out[todo[kept]] = point[kept]
            if kept.all():
                break
            todo = todo[~kept]
            own = self.rows(todo)
        return out

    def _restored(self, trial: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        if self.in_place is None:
            return restore(self.features, self.near, trial, radius, self.tolerance)
        trial = into_ball(trial, radius)
        here = Linearized(self.features, trial)
        trial = trial - correction(here, self.near, LEFT * here.value.abs().amax((1, 2)))
        point = self.in_place.inside(trial, radius, Iterate.zero(trial))
        with torch.no_grad():
            held = self.features(point)[1].abs().amax((1, 2))
        short = norms(point).flatten() <= radius * (1 + SLACK)
        return point, (held <= self.tolerance) & short


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

    def feasible(self, problem: Problem) -> Level | Framed:
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
        near, free = prepared(features)
        in_place = _in_place(problem, features)
        if in_place is None and (used := few(features)) is not None:
            origin = torch.zeros(features.shape, device=used.device)
            fits = Offsets.fit(problem)
            coordinates = Offsets(features, problem.reference_norm) if fits else Plain(features)
            parts = problem.replay.subject.batching.over(
                "steps", torch.arange(len(problem), device=used.device),
                lambda rows: Frame.at(features.rows(rows), origin[rows], used),
            )  # fmt: skip
            frame = Frame.join(parts)
            return Framed(coordinates, frame, problem.reference_norm, free, tolerance)
        return Level(features, near, free, tolerance, in_place)


def _in_place(problem: Problem, features: FeatureMap) -> FeasibleSet | None:
    """What puts iterates back in one pass, where every monitored slot is perturbed; else None."""
    elsewhere = features.monitored & ~perturbed_columns(features.replay)[..., None]
    if not Offsets.fit(problem) or elsewhere.any() or len(problem.sites) < 2:
        return None
    hold = FeatureHold()
    return hold.feasible(hold.acting(problem))
