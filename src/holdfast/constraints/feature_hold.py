"""Hold the clamped features exactly at several sites at once, inside the forward pass."""

from __future__ import annotations

from typing import Literal

from holdfast.constraints.in_place import HoldingKind
from holdfast.problem import Problem
from holdfast.sites import Site
from holdfast.subspace import NullSpace, encoder_null


class FeatureHold(HoldingKind):
    """Every held feature stays where the reference has it, at all clamped sites at once.

    The nearest residual with the reference's pre-activations, `h − Q·Qᵀ(h − reference)` with Q an
    orthonormal basis of the held encoder columns, takes the place of h at every clamped site. Every
    clamped site from the lowest perturbed one on has to be perturbed too, or nothing could be added
    there. With one site it is `encoder_null`.
    """

    kind: Literal["feature_hold"] = "feature_hold"

    def space(self, problem: Problem, site: Site) -> NullSpace:
        return encoder_null(problem.held[site], problem.replay.frame)
