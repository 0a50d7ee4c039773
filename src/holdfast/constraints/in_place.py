"""How a constraint on the residual of each site is kept at several sites at once.

A vector at one site moves the features of later ones, through the blocks between. So the constraint
acts inside the forward pass: at each clamped site and perturbed position, after clamp and
perturbation, the residual is replaced by the nearest one that the constraint allows. That is
causal, differentiable, and needs no Jacobian; what was really added at each slot is what is saved,
counted against the budget, and verified.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.constraints import ConstraintKind, Promise, check_affine
from holdfast.errors import ConstraintError
from holdfast.problem import Problem
from holdfast.replay import Replay
from holdfast.sites import Site
from holdfast.subspace import FeasibleSet, Iterate, norms
from holdfast.waiting import PASSES, looks, perhaps

SLACK = 1e-4
"""Relative amount by which a norm may exceed its budget."""

MAX_ROUNDS = 8
"""Most times an iterate is scaled into its ball and retracted again."""


class HoldingKind(ConstraintKind):
    """A constraint on how the residual of a site may differ from the reference.

    With one site the difference is the perturbation, and the search moves in that set directly.
    """

    @property
    def promise(self) -> Promise:
        return "preactivations"

    def repeats(self, n_sites: int) -> tuple[int, int]:
        # Put where it belongs, and once more after it is scaled into its ball.
        return (2, MAX_ROUNDS + 1) if n_sites > 1 else (0, 0)

    @abstractmethod
    def space(self, problem: Problem, site: Site) -> FeasibleSet:
        """The set that differences [n p d_model] at a held site have to stay in."""

    def acting(self, problem: Problem) -> Problem:
        self.check(problem)
        if _direct(problem):
            return problem
        hold = {
            site: Nearest(self.space(problem, site), problem.replay.reference[site])
            for site in problem.moved
        }
        return replace(problem, replay=replace(problem.replay, hold=hold))

    def feasible(self, problem: Problem) -> FeasibleSet:
        self.check(problem)
        spaces = [self.space(problem, site) for site in problem.moved]
        if _direct(problem):
            return spaces[0]
        n, _, d = problem.shape
        everything = torch.full((n,), d, device=problem.goal.device)
        free = torch.stack([everything, *(space.dimension for space in spaces)]).amin(0)
        return HeldInPlace(problem.replay, free)

    def check(self, problem: Problem) -> None:
        """Raise ConstraintError where the constraint could not keep its promise."""
        check_affine(problem, self.kind)
        if not problem.moved:
            raise ConstraintError(
                f"{self.kind} has nothing to hold: the clamped sites lie below "
                f"{problem.sites[0]}, where no perturbation can reach their features"
            )
        free = [site for site in problem.moved if site not in problem.sites]
        if free:
            raise ConstraintError(
                f"{self.kind} adds a vector at every clamped site, and "
                f"{', '.join(map(str, free))} is clamped but not perturbed; perturb every clamped "
                f"site from {problem.sites[0]} on, or use jacobian_null"
            )
        late = [s for edit in problem.replay.after for s in edit.sites if s in problem.sites]
        if late and not _direct(problem):
            raise ConstraintError(
                f"{self.kind} at several sites needs order clamp_then_perturbation: with the clamp "
                "last there is no vector that could be added after it"
            )


def _direct(problem: Problem) -> bool:
    return problem.sites == problem.moved and len(problem.sites) == 1


class _Set(Protocol):
    def rows(self, rows: Tensor) -> _Set: ...

    def retract(self, delta: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Nearest:
    """Replaces a residual by the nearest whose difference from the reference lies in `space`.

    reference [n p d_model].
    """

    space: _Set
    reference: Tensor

    def rows(self, rows: Tensor) -> Nearest:
        return Nearest(self.space.rows(rows), self.reference[rows])

    def __call__(self, x: Tensor) -> Tensor:
        return self.reference + self.space.retract(x - self.reference)


@dataclass(frozen=True)
class HeldInPlace:
    """Vectors that are what the forward pass makes of them; zero is one.

    An iterate is run once more without gradient, and what was really added at each slot takes its
    place. owner [n]: the constraint of each row, where there are several.
    """

    replay: Replay
    free: Tensor
    owner: Tensor | None = None

    @property
    def dimension(self) -> Tensor:
        return self.free

    def rows(self, rows: Tensor) -> HeldInPlace:
        owner = None if self.owner is None else self.owner[rows]
        return HeldInPlace(self.replay.rows(rows), self.free[rows], owner)

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        # The gradient has come through the retraction already.
        return gradient

    def retract(self, delta: Tensor) -> Tensor:
        with torch.no_grad():
            return self.replay.realized(delta)

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        """The budget binds what is really added: the iterate is scaled until that fits.

        Clipping what was retracted instead would break the later sites. The ratio of norms is right
        to first order, and at 0 anything fits, so a few rounds that shrink a little more each time
        always end.
        """
        kept = self.retract(delta)
        own, sets = torch.arange(len(kept), device=kept.device), self  # those that may be too long
        for attempt in range(MAX_ROUNDS):
            length, ball = norms(kept[own]).flatten(), radius[own]
            over = length > ball * (1 + SLACK)
            if not perhaps(over, attempt, PASSES):
                return kept
            index = sets._beside(over)
            if len(index) < len(own):
                own, sets = own[index], sets.rows(index)
                length, ball, over = length[index], ball[index], over[index]
            share = (ball / length).clamp_max(1.0) * (1 - 0.02 * attempt)
            shrunk = sets.retract(kept[own] * share[:, None, None])
            # Rows that fit stay as they are, or what they find would depend on those beside them.
            kept = kept.index_copy(0, own, torch.where(over[:, None, None], shrunk, kept[own]))
        over = norms(kept).flatten() > radius * (1 + SLACK)
        return torch.where(over[:, None, None], 0.0, kept)

    def _beside(self, some: Tensor) -> Tensor:
        """Rows of the constraints that have any of some rows [n] bool: those of a constraint are
        run in as many rounds as by itself. All where the device would be waited for."""
        if self.owner is None or looks(some.device) > 1:
            return torch.arange(len(some), device=some.device)
        return torch.isin(self.owner, self.owner[some]).nonzero().flatten()
