"""Constraints: what a recovery perturbation may do to the clamped features. One file a kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, SerializeAsAny

from holdfast.config import Kind
from holdfast.errors import ConstraintError
from holdfast.problem import Problem
from holdfast.registry import Registry
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.steppers import Steepest, Stepper
from holdfast.subspace import FeasibleSet

CONSTRAINTS = Registry(
    "constraints",
    {
        "unconstrained": "holdfast.constraints.unconstrained:Unconstrained",
        "gradient_projection": "holdfast.constraints.gradient_projection:GradientProjection",
        "encoder_null": "holdfast.constraints.encoder_null:EncoderNull",
        "one_sided": "holdfast.constraints.one_sided:OneSided",
        "feature_floor": "holdfast.constraints.feature_floor:FeatureFloor",
        "feature_hold": "holdfast.constraints.feature_hold:FeatureHold",
        "active_null": "holdfast.constraints.active_null:ActiveNull",
        "jacobian_null": "holdfast.constraints.jacobian_null:JacobianNull",
        "jacobian_probes": "holdfast.constraints.jacobian_probes:JacobianProbes",
        "decoder_null": "holdfast.constraints.decoder_null:DecoderNull",
        "undo_null": "holdfast.constraints.undo_null:UndoNull",
        "random_subspace": "holdfast.constraints.random_subspace:RandomSubspace",
    },
)


Promise = Literal["nothing", "preactivations", "codes", "floor", "active"]
"""nothing: held features may move. preactivations: none moves, on or off. codes: none that fires
moves, none comes on. floor: none falls. active: none moves, nor does any other feature of the SAE
that fires."""


class ConstraintKind(Kind):
    """A constraint."""

    @property
    def promise(self) -> Promise:
        """What every iterate keeps of the held features, up to rounding."""
        raise NotImplementedError

    @property
    def exact(self) -> bool:
        """Whether it promises anything of the held features."""
        return self.promise != "nothing"

    @property
    def sees_all(self) -> bool:
        """Whether it promises something of features that are not held, so that they have to be
        measured too."""
        return self.promise == "active"

    def adapted(self, staged: bool) -> str:
        """In what a search under it is not the published one that it is kept for, "" for nothing or
        for a constraint of this project. staged: searched by `recovery.schedule`."""
        return ""

    def repeats(self, n_sites: int) -> tuple[int, int]:
        """How often a step runs the blocks from the lowest perturbed to the last held site beside
        its own pass, to keep the iterate where the constraint wants it: at least, at most. A pass
        back counts as one."""
        return 0, 0

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
        """The set the search may move in. Raises ConstraintError if it cannot keep its promise."""
        raise NotImplementedError

    def acting(self, problem: Problem) -> Problem:
        """The problem as it is searched, where the constraint itself acts in the forward pass."""
        return problem


def check_affine(problem: Problem, kind: str) -> None:
    """Raise ConstraintError if unchanged encoder directions would not fix the held features."""
    for site in problem.moved:
        held = problem.held[site]
        if held.guarantee == "none":
            assert held.norm is not None
            raise ConstraintError(
                f"{kind} cannot hold the features at {site}: their SAE normalizes each token "
                f"({held.norm.norm}), so they depend on the residual's norm as well as on its "
                "encoder directions; use unconstrained or gradient_projection, which promise "
                "nothing, or an SAE with plain inputs"
            )


def only_site(problem: Problem, kind: str) -> FeatureBank:
    """The held features of a problem in which a perturbation can move those of its own site only.

    Raises ConstraintError if there is none or if features of a later site would move too.
    """
    if problem.sites != problem.moved:
        raise ConstraintError(
            f"{kind} holds the features of one site against a perturbation of the same site; here "
            f"{_listed(problem.sites)} is perturbed, and features at {_listed(problem.moved)} can "
            "move. Use feature_hold where every clamped site is perturbed, else jacobian_null"
        )
    if len(problem.sites) > 1:
        raise ConstraintError(
            f"{kind} holds the features of one site: a perturbation at {problem.sites[0]} moves "
            f"those at {_listed(problem.sites[1:])} through the blocks between. Use feature_hold"
        )
    return problem.held[problem.sites[0]]


def _listed(sites: Iterable[Site]) -> str:
    return ", ".join(map(str, sites)) or "no site"


Constraint = Annotated[SerializeAsAny[ConstraintKind], BeforeValidator(CONSTRAINTS.parse)]
