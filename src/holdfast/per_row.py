"""Rows of one batch that each answer to an owner: a set, a hold or a step rule of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from holdfast.recorded import Hold
from holdfast.steppers import State, Stepper
from holdfast.subspace import Charted, FeasibleSet, Iterate


class HasRows(Protocol):
    def rows(self, rows: Tensor) -> Self: ...


T = TypeVar("T", bound=HasRows)


@dataclass(frozen=True)
class Owners:
    """Which of m owners each of n rows has: number [n]. A device is waited for when rows are first
    looked up, and so whenever some have left the batch, and not in each step."""

    number: Tensor
    m: int

    @cached_property
    def own(self) -> tuple[Tensor, ...]:
        """The rows of each owner, in order."""
        return tuple((self.number == i).nonzero().flatten() for i in range(self.m))

    @cached_property
    def back(self) -> Tensor:
        """[n] where each row stands if the owners' rows are laid end to end."""
        return torch.cat(self.own).argsort()

    def rows(self, rows: Tensor) -> Owners:
        """Those of some rows, in the order given; repeats are allowed."""
        return Owners(self.number[rows], self.m)


@dataclass(frozen=True)
class Dealt(Generic[T]):
    """n rows dealt to several owners: each has a part, for its own rows in the order in which they
    stand here."""

    parts: tuple[T, ...]
    owners: Owners

    @classmethod
    def to(cls, parts: Sequence[T], owner: Tensor) -> Dealt[T]:
        """owner [n]: the part that each row belongs to."""
        return cls(tuple(parts), Owners(owner, len(parts)))

    @property
    def own(self) -> tuple[Tensor, ...]:
        """The rows of each part, in order."""
        return self.owners.own

    def rows(self, rows: Tensor) -> Dealt[T]:
        """Some rows, in the order given; repeats are allowed. Parts left without a row are gone."""
        within = torch.cat([torch.arange(len(own), device=rows.device) for own in self.own])
        within = within[self.owners.back][rows]
        owner = self.owners.number[rows]
        here = owner.unique(sorted=True)
        parts = [self.parts[i].rows(within[owner == i]) for i in here.tolist()]
        return Dealt.to(parts, torch.searchsorted(here, owner))

    def each(self, act: Callable[[T, Tensor], Tensor]) -> Tensor:
        """[n …] from every part and its rows, put back in order."""
        made = [act(part, own) for part, own in zip(self.parts, self.own, strict=True)]
        return made[0] if len(made) == 1 else torch.cat(made)[self.owners.back]


@dataclass(frozen=True)
class SetPerRow:
    """A feasible set of its own for the rows of each owner."""

    sets: Dealt[FeasibleSet]

    @property
    def dimension(self) -> Tensor:
        return self.sets.each(lambda part, own: part.dimension)

    def rows(self, rows: Tensor) -> SetPerRow:
        return SetPerRow(self.sets.rows(rows))

    def asking(self, delta: Tensor) -> SetPerRow:
        return self._charted(lambda part, own: part.asking(delta[own]))

    def around(self, at: Iterate) -> SetPerRow:
        return self._charted(lambda part, own: part.around(at.rows(own)))

    def _charted(self, act: Callable[[Charted, Tensor], FeasibleSet]) -> SetPerRow:
        """With another set for each that keeps something of where its rows are."""
        pairs = zip(self.sets.parts, self.sets.own, strict=True)
        parts = (act(p, own) if isinstance(p, Charted) else p for p, own in pairs)
        return SetPerRow(Dealt(tuple(parts), self.sets.owners))

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        return self.sets.each(lambda part, own: part.tangent(gradient[own], at.rows(own)))

    def retract(self, delta: Tensor) -> Tensor:
        return self.sets.each(lambda part, own: part.retract(delta[own]))

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return self.sets.each(
            lambda part, own: part.inside(delta[own], radius[own], last.rows(own))
        )


def set_by_owner(owner: Tensor, made: Callable[[int, Tensor], FeasibleSet]) -> FeasibleSet:
    """One set for rows of several owners [n]; made: of an owner's number and its rows, in order."""
    numbers, own = owner.unique(sorted=True, return_inverse=True)
    sets = [made(int(k), (owner == k).nonzero().flatten()) for k in numbers]
    return sets[0] if len(sets) == 1 else SetPerRow(Dealt.to(sets, own))


@dataclass(frozen=True)
class Free:
    """Does nothing to a residual."""

    def rows(self, rows: Tensor) -> Free:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class HoldPerRow:
    """A hold of its own for the rows of each owner."""

    holds: Dealt[Hold]

    def rows(self, rows: Tensor) -> HoldPerRow:
        return HoldPerRow(self.holds.rows(rows))

    def __call__(self, x: Tensor) -> Tensor:
        return self.holds.each(lambda part, own: part(x[own]))


@dataclass(frozen=True)
class StepperPerRow:
    """A step rule of its own for the rows of each owner.

    Every rule keeps its state for all rows, and looks at its own.
    """

    steppers: tuple[Stepper, ...]
    owners: Owners

    @classmethod
    def of(cls, steppers: Sequence[Stepper], owner: Tensor) -> Stepper:
        """owner [n]: which of the steppers each row has. Equal ones become one."""
        distinct = tuple(dict.fromkeys(steppers))
        if len(distinct) == 1:
            return distinct[0]
        number = [distinct.index(stepper) for stepper in steppers]
        of_row = torch.as_tensor(number, device=owner.device)[owner]
        return cls(distinct, Owners(of_row, len(distinct)))

    def rows(self, rows: Tensor) -> StepperPerRow:
        return StepperPerRow(self.steppers, self.owners.rows(rows))

    def start(self, delta: Tensor) -> State:
        return tuple(part for stepper in self.steppers for part in stepper.start(delta))

    def move(self, state: State, gradient: Tensor) -> tuple[Tensor, State]:
        moves, after, begin = torch.zeros_like(gradient), [], 0
        for stepper, own in zip(self.steppers, self.owners.own, strict=True):
            end = begin + len(stepper.start(gradient[:0]))  # the rule's part of the state
            mine = state[begin:end]
            move, changed = stepper.move(tuple(part[own] for part in mine), gradient[own])
            moves[own] = move
            after += [part.index_copy(0, own, new) for part, new in zip(mine, changed, strict=True)]
            begin = end
        return moves, tuple(after)
