"""Several searches as rows of one problem: they share every forward pass and nothing else.

On a small model, or with few prompts left, a step costs what its launches cost, however many rows
it has. So the constraints, targets and budgets of an audit are laid end to end: each row keeps the
set, the ball, the goal and the step rule of its own search, and what it finds is what it would find
alone, up to rounding.

A constraint that runs the model itself within a step does so for its own rows, but for those that
are kept in the forward pass: these share that pass too, whichever constraints theirs are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.constraints import ConstraintKind
from holdfast.constraints.in_place import HeldInPlace
from holdfast.per_row import Dealt, Free, HoldPerRow, SetPerRow, StepperPerRow
from holdfast.problem import Problem
from holdfast.steppers import Stepper
from holdfast.subspace import FeasibleSet
from holdfast.timed import Stopwatch, TimedHold, TimedSet, shares

if TYPE_CHECKING:
    from holdfast.recovery import RecoverySpec


@dataclass(frozen=True)
class Search:
    """One search of a stack: how many of the stack's rows are its own, following those of the
    search before; how it searches them; and the seed of its random starts: the spec's, or the
    study's where it has none."""

    n: int
    spec: RecoverySpec
    seed: int


@dataclass(frozen=True)
class Posed:
    """A constraint, and the rows [n] of a stack that are searched inside it."""

    rows: Tensor
    problem: Problem
    feasible: FeasibleSet
    stepper: Stepper

    @classmethod
    def of(cls, problem: Problem, rows: Tensor, constraint: ConstraintKind) -> Posed:
        acting = constraint.acting(problem)
        return cls(rows, acting, constraint.feasible(acting), constraint.stepper)

    @property
    def in_pass(self) -> bool:
        """Whether its rows are kept where they belong by the forward pass."""
        return isinstance(self.feasible, HeldInPlace)


@dataclass(frozen=True)
class Stack:
    """N rows, each under the constraint of its own search.

    problem: with what constraints do in the forward pass; loose: without; clocks: of each search,
    for what its constraint takes by itself: in sets, which others may share, in the pass, and in a
    looser one's place (`charge`).
    """

    searches: tuple[Search, ...]
    loose: Problem
    problem: Problem
    posed: tuple[Posed, ...]
    feasible: FeasibleSet
    stepper: Stepper
    clocks: tuple[tuple[Stopwatch, ...], ...]

    @classmethod
    def of(cls, problem: Problem, searches: Sequence[Search]) -> Stack:
        """searches: of all rows of the problem, alike in all but constraint, budget, goal and
        seed. Raises ConstraintError if a constraint cannot keep its promise."""
        assert sum(search.n for search in searches) == len(problem)
        assert len({search.spec.pace for search in searches}) == 1, "searches of different length"
        return cls._under([search.spec.constraint for search in searches], problem, searches)

    @classmethod
    def _under(
        cls, kinds: Sequence[ConstraintKind], loose: Problem, searches: Sequence[Search]
    ) -> Stack:
        """kinds: the constraint of each search; equal ones are posed once."""
        device = loose.goal.device
        distinct = list(dict.fromkeys(kinds))
        number = torch.as_tensor([distinct.index(kind) for kind in kinds], device=device)
        counts = torch.as_tensor([search.n for search in searches], device=device)
        owner = number.repeat_interleave(counts)
        posed = []
        for index, kind in enumerate(distinct):
            rows = (owner == index).nonzero().flatten()
            posed.append(Posed.of(loose if len(distinct) == 1 else loose.rows(rows), rows, kind))
        in_pass = Stopwatch()
        sets = [in_pass if part.in_pass else Stopwatch() for part in posed]
        holds = [Stopwatch(outer=clock) for clock in sets]
        problem = posed[0].problem if len(posed) == 1 else _acting(loose, posed, owner, holds)
        return cls(
            tuple(searches), loose, problem, tuple(posed), _sets(problem, posed, owner, sets),
            StepperPerRow.of([part.stepper for part in posed], owner),
            tuple((sets[index], holds[index], Stopwatch()) for index in number.tolist()),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.loose)

    @property
    def spec(self) -> RecoverySpec:
        """How long the searches are, which is the same for all of them."""
        return self.searches[0].spec

    @property
    def parts(self) -> Iterator[tuple[Search, slice]]:
        """Every search with its rows."""
        begin = 0
        for search in self.searches:
            yield search, slice(begin, begin + search.n)
            begin += search.n

    @property
    def seeds(self) -> list[int]:
        """[N] the seed of each row's search."""
        return [search.seed for search in self.searches for _ in range(search.n)]

    def looser(self) -> tuple[Stack, Tensor] | None:
        """The same rows under constraints that contain their own, and for which of them [N] there
        is one; None if for no row."""
        kinds = [search.spec.constraint.looser for search in self.searches]
        there = torch.zeros(len(self), dtype=torch.bool, device=self.loose.goal.device)
        for (_, rows), kind in zip(self.parts, kinds, strict=True):
            there[rows] = kind is not None
        if not there.any():
            return None
        eased = [
            search.spec.constraint if kind is None else kind
            for search, kind in zip(self.searches, kinds, strict=True)
        ]
        return Stack._under(eased, self.loose, self.searches), there

    def charge(self, looser: Stack, rows: Tensor, passes: Tensor) -> None:
        """Let each search pay for what the constraints of a looser stack took by themselves.

        rows, passes [n]: the rows whose lanes were run there, and how often.
        """
        lanes = [
            int(passes[(rows >= own.start) & (rows < own.stop)].sum()) for _, own in self.parts
        ]
        for (*_, for_it), seconds in zip(self.clocks, shares(looser.clocks, lanes), strict=True):
            for_it.seconds += seconds


def _sets(
    problem: Problem, posed: Sequence[Posed], owner: Tensor, clocks: Sequence[Stopwatch]
) -> FeasibleSet:
    """Of each constraint's rows its own set; but one of all that are held in the forward pass, as a
    pass does to every row what the row's constraint wants. clocks: of each constraint, the same
    where the set is."""
    distinct = list(dict.fromkeys(clocks))
    keeper = torch.as_tensor([distinct.index(clock) for clock in clocks], device=owner.device)
    keeper = keeper[owner]
    made: list[FeasibleSet] = []
    for index, clock in enumerate(distinct):
        own = [part for part, its in zip(posed, clocks, strict=True) if its is clock]
        feasible = own[0].feasible
        if len(own) > 1:
            free = torch.zeros_like(owner)
            for part in own:
                free[part.rows] = part.feasible.dimension
            rows = (keeper == index).nonzero().flatten()
            feasible = HeldInPlace(problem.replay, free).rows(rows)
        made.append(TimedSet(feasible, clock))
    return made[0] if len(made) == 1 else SetPerRow(Dealt.to(made, keeper))


def _acting(
    loose: Problem, posed: Sequence[Posed], owner: Tensor, clocks: Sequence[Stopwatch]
) -> Problem:
    """The rows of all constraints with what each of them does in the forward pass."""
    own = [part.problem.replay.hold for part in posed]
    sites = {site for holds in own for site in holds}
    if not sites:
        return loose
    hold = {
        site: HoldPerRow(
            Dealt.to(
                [
                    TimedHold(holds[site], clock) if site in holds else Free()
                    for holds, clock in zip(own, clocks, strict=True)
                ],
                owner,
            )
        )
        for site in sites
    }
    return replace(loose, replay=replace(loose.replay, hold=hold))
