"""No held feature may fall: for clamps that switch features on."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.constraints import Promise
from holdfast.constraints.in_place import HoldingKind
from holdfast.polyhedron import Polyhedron
from holdfast.problem import Problem
from holdfast.sites import Site


class FeatureFloor(HoldingKind):
    """`z_i ≥ z_i of the reference` for every held feature: what a clamp that induces refusal claims
    is that these features stay on (METHODS D.10), not that they stay equal.

    A feature that does not fire in the reference cannot fall and is free.
    """

    kind: Literal["feature_floor"] = "feature_floor"

    @property
    def promise(self) -> Promise:
        return "floor"

    def space(self, problem: Problem, site: Site) -> Polyhedron:
        bank, frame = problem.held[site], problem.replay.frame
        z = bank.activations(problem.replay.reference[site].double(), frame)
        on = z > 0
        return Polyhedron(
            A=bank.W_enc,
            slice_of=bank.slices(frame),
            equal=torch.zeros_like(on),
            bounded=on,
            sign=-torch.ones_like(z),
            bound=torch.zeros_like(z),
        )
