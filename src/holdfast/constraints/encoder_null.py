"""Hold the clamped features exactly, on one site: the iterate lives in the encoder's null space."""

from __future__ import annotations

from typing import Literal

from holdfast.constraints import ConstraintKind, Promise, check_affine, only_site
from holdfast.problem import Problem
from holdfast.subspace import NullSpace, encoder_null


class EncoderNull(ConstraintKind):
    """`W_enc[:, S]ᵀ·δ = 0` at every perturbed position and every iterate.

    Not the gradient but the iterate is projected: Adam divides each coordinate by its own running
    scale, and that map leaves the null space (METHODS C.4-1).

    What that guarantees depends on the SAE. Where each feature is a function of its own affine
    pre-activation (ReLU, JumpReLU, gated; centered and scaled inputs too) the held features cannot
    change at all. Of a TopK the pre-activations stay, but another feature may overtake a held one
    among the k largest: that is measured for every prompt, and a prompt where it happened does not
    count as recovered. Where a token's norm enters (layer_norm, constant_norm_rescale) these
    are no affine functions of the residual, and the constraint is refused.
    """

    kind: Literal["encoder_null"] = "encoder_null"

    @property
    def promise(self) -> Promise:
        return "preactivations"

    def feasible(self, problem: Problem) -> NullSpace:
        held = only_site(problem, self.kind)
        check_affine(problem, self.kind)
        return encoder_null(held, problem.replay.frame)
