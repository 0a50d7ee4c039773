"""Hold the clamped features exactly, on one site: the iterate lives in the encoder's null space."""

from __future__ import annotations

from typing import Literal

from holdfast.constraints import ConstraintKind
from holdfast.problem import Problem
from holdfast.subspace import NullSpace


class EncoderNull(ConstraintKind):
    """`W_enc[:, S]ᵀ·δ = 0` at every perturbed position and every iterate.

    Not the gradient but the iterate is projected: Adam divides each coordinate by its own running
    scale, and that map leaves the null space (METHODS C.4-1). For SAEs whose features are functions
    of affine pre-activations (ReLU, JumpReLU) the held features then cannot change at all.
    """

    kind: Literal["encoder_null"] = "encoder_null"

    @property
    def exact(self) -> bool:
        return True

    def feasible(self, problem: Problem) -> NullSpace:
        held = problem.held
        return NullSpace.of(held.W_enc, held.valid, held.slices(problem.replay.frame))
