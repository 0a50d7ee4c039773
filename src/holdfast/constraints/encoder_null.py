"""Hold the clamped features exactly, on one site: the iterate lives in the encoder's null space."""

from __future__ import annotations

from typing import Literal

from holdfast.constraints import ConstraintKind
from holdfast.errors import ConstraintError
from holdfast.problem import Problem
from holdfast.subspace import NullSpace


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
    def exact(self) -> bool:
        return True

    def feasible(self, problem: Problem) -> NullSpace:
        held = problem.held
        if held.guarantee == "none":
            assert held.norm is not None
            raise ConstraintError(
                f"encoder_null cannot hold the features at {held.site}: their SAE normalizes each "
                f"token ({held.norm.norm}), so they depend on the residual's norm as well as on "
                "its encoder directions; use unconstrained or gradient_projection, which promise "
                "nothing, or an SAE with plain inputs"
            )
        return NullSpace.of(held.W_enc, held.valid, held.slices(problem.replay.frame))
