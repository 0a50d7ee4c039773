"""Hold the clamped features exactly where fewer sites or positions are perturbed than held."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from holdfast.constraints import ConstraintKind, Promise, check_affine
from holdfast.errors import ConstraintError
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.ways import level_set
from holdfast.problem import Problem
from holdfast.subspace import FeasibleSet

REPEATS = (15, 150)
"""Passes forward and back that a step takes beside its own, a product J·u counted as two: 15 to 18
where four features are held at each of two sites, 33 where every slot with features to hold is
perturbed, 50 at 2,880 constraints with vectors at one of three layers (both of `several_layers`),
105 where a vector at one token holds ten more at three layers. Of these 60 are J itself, made anew
for every third step of a lane; where the set bends more it is made more often, up to once a step.
About 120 where vectors stand at every prompt token of three layers and ten more are held: 60 are J,
for the ten tokens alone, made anew at six steps of ten."""

SHARE_OF_EPS = 0.25
"""Share of the precision's epsilon below which a violation is rounding: 3e-8 in float32, below
the tolerance, and 2e-3 in bfloat16, where nothing finer can be told."""


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

    def feasible(self, problem: Problem) -> FeasibleSet:
        """Raises ConstraintError where the clamped sites lie below the perturbed ones, or where an
        SAE's features do not follow from encoder directions."""
        check_affine(problem, self.kind)
        if not problem.moved:
            raise ConstraintError(
                f"{self.kind} has nothing to hold: the clamped sites lie below "
                f"{problem.sites[0]}, where no perturbation can reach their features"
            )
        rounding = SHARE_OF_EPS * torch.finfo(problem.replay.base.dtype).eps
        return level_set(problem, FeatureMap.of(problem), max(self.tolerance, rounding))
