"""Constraints: what a recovery perturbation may do to the clamped features. One file a kind."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from holdfast.config import Kind
from holdfast.problem import Problem
from holdfast.registry import Registry
from holdfast.steppers import Steepest, Stepper
from holdfast.subspace import FeasibleSet

CONSTRAINTS = Registry(
    "constraints",
    {
        "unconstrained": "holdfast.constraints.unconstrained:Unconstrained",
        "gradient_projection": "holdfast.constraints.gradient_projection:GradientProjection",
        "encoder_null": "holdfast.constraints.encoder_null:EncoderNull",
    },
)


class ConstraintKind(Kind):
    """A constraint."""

    @property
    def exact(self) -> bool:
        """Whether every iterate satisfies it, up to rounding."""
        raise NotImplementedError

    @property
    def holds_exactly(self) -> bool:
        """Whether the held features must come out unmoved: exact, and not without a constraint."""
        return self.exact and self.looser is not None

    @property
    def looser(self) -> ConstraintKind | None:
        """A constraint that contains this one, to start warm from where this one fails."""
        from holdfast.constraints.unconstrained import Unconstrained

        return Unconstrained()

    @property
    def stepper(self) -> Stepper:
        """How the search steps under this constraint."""
        return Steepest()

    def feasible(self, problem: Problem) -> FeasibleSet:
        """The set the search may move in."""
        raise NotImplementedError


Constraint = Annotated[SerializeAsAny[ConstraintKind], BeforeValidator(CONSTRAINTS.parse)]
