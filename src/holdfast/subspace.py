"""The set a perturbation may move in: everything, or the null space of some encoder columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.saes.bank import FeatureBank
from holdfast.spans import Spans


@dataclass(frozen=True)
class Iterate:
    """Where n lanes of a climb are: delta [n q d_model], in the set; step: how many came before.

    gradient [n q d_model]: the objective's there; along [n q d_model]: what of it is tangent to the
    set. Both are None where no gradient was taken: then what follows is no step of a climb.
    """

    delta: Tensor
    step: int = 0
    gradient: Tensor | None = None
    along: Tensor | None = None

    @classmethod
    def zero(cls, like: Tensor) -> Iterate:
        """Before the first step."""
        return cls(torch.zeros_like(like))

    def rows(self, rows: Tensor) -> Iterate:
        """Some of the lanes."""
        some = (None if x is None else x[rows] for x in (self.gradient, self.along))
        return Iterate(self.delta[rows], self.step, *some)


class FeasibleSet(Protocol):
    """Where the search may go, for n rows; 0 is in it, and what is in it is so scaled down, up to
    another retraction.

    dimension [n]: free dimensions a slot has, at the site where it has fewest. 0 means that nothing
    can be searched.
    """

    @property
    def dimension(self) -> Tensor: ...

    def rows(self, rows: Tensor) -> FeasibleSet:
        """The sets of some rows, in order; repeats are allowed."""
        ...

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        """What of an objective gradient [n q d_model] the method steps along at an iterate."""
        ...

    def retract(self, delta: Tensor) -> Tensor:
        """An iterate [n q d_model] put back into the set after a step."""
        ...

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        """An iterate put back into the set and into balls of radius [n]. last: where the step to it
        began, for sets from which a step can be too long to come back."""
        ...


@runtime_checkable
class Charted(Protocol):
    """A feasible set that keeps what it found out near an iterate, to use it for the next steps."""

    def asking(self, delta: Tensor) -> FeasibleSet:
        """The same set, which has asked the device what it has to know around iterates [n q
        d_model]. It is told them before the objective is run there: `around` then reads the answer
        while the device has that to do. Without it `around` has to wait."""
        ...

    def around(self, at: Iterate) -> FeasibleSet:
        """The same set, as it is best described near an iterate."""
        ...


def norms(delta: Tensor) -> Tensor:
    """[n 1 1] Frobenius norm of each row of [n q d_model]."""
    return delta.norm(dim=(1, 2), keepdim=True)


def into_ball(delta: Tensor, radius: Tensor) -> Tensor:
    """Scale rows that are longer than radius [n] back to it."""
    length = norms(delta)
    limit = radius[:, None, None]
    return torch.where(length > limit, delta * (limit / length.clamp_min(1e-30)), delta)


@dataclass(frozen=True)
class Everything:
    """No constraint but the ball."""

    dimension: Tensor

    def rows(self, rows: Tensor) -> Everything:
        return Everything(self.dimension[rows])

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        return gradient

    def retract(self, delta: Tensor) -> Tensor:
        return delta

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return into_ball(delta, radius)


@dataclass(frozen=True)
class NullSpace:
    """The orthogonal complement of what some columns span, exact at every iterate.

    slice_of [n]: the span that each row is orthogonal to.
    """

    spans: Spans
    slice_of: Tensor

    @classmethod
    def of(cls, columns: Tensor, valid: Tensor, slice_of: Tensor) -> NullSpace:
        """The null space of `columns` [g d k] (those that are `valid` [g k]), group by group."""
        return cls(Spans.among(columns, valid), slice_of)

    @property
    def dimension(self) -> Tensor:
        return (self.spans.basis.shape[1] - self.spans.rank)[self.slice_of]

    def rows(self, rows: Tensor) -> NullSpace:
        return replace(self, slice_of=self.slice_of[rows])

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        return self.retract(gradient)

    def retract(self, delta: Tensor) -> Tensor:
        # Twice: the second pass removes what the first one's rounding left ("twice is enough").
        every = self.spans.basis
        basis = every[0] if len(every) == 1 else every[self.slice_of]
        for _ in range(2):
            delta = delta - (delta @ basis) @ basis.mT
        return delta

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return into_ball(self.retract(delta), radius)


def encoder_null(bank: FeatureBank, frame: Frame) -> NullSpace:
    """What moves none of a bank's features: the orthogonal complement of their encoder columns, row
    by row."""
    return NullSpace(bank.encoder_spans, bank.slices(frame))


def decoder_null(bank: FeatureBank, frame: Frame) -> NullSpace:
    """What is orthogonal to everything that a bank's features write, row by row."""
    return NullSpace(bank.decoder_spans, bank.slices(frame))


@dataclass(frozen=True)
class NullSpacePerSlot:
    """A null space of its own for every slot of one site.

    space: of the n·p slots, row by row; there [n p] bool: slots that exist.
    """

    space: NullSpace
    there: Tensor

    @property
    def free(self) -> Tensor:
        """[n p] dimensions that each slot has left, 0 where there is no slot."""
        return torch.where(self.there, self.space.dimension.view_as(self.there), 0)

    @property
    def dimension(self) -> Tensor:
        """Of the slot that has most: a row can be searched if any of its slots can."""
        return self.free.amax(1)

    def rows(self, rows: Tensor) -> NullSpacePerSlot:
        p = self.there.shape[1]
        slots = (rows[:, None] * p + torch.arange(p, device=rows.device)).flatten()
        return NullSpacePerSlot(self.space.rows(slots), self.there[rows])

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        return self.retract(gradient)

    def retract(self, delta: Tensor) -> Tensor:
        return self.space.retract(delta.flatten(0, 1)[:, None]).view_as(delta)

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return into_ball(self.retract(delta), radius)


@dataclass(frozen=True)
class PerSlot:
    """A set of its own for the slots of each site, in the order of the sites."""

    parts: tuple[FeasibleSet, ...]

    @property
    def dimension(self) -> Tensor:
        return torch.stack([part.dimension for part in self.parts]).amin(0)

    def rows(self, rows: Tensor) -> PerSlot:
        return PerSlot(tuple(part.rows(rows) for part in self.parts))

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        m = len(self.parts)
        slots = zip(self.parts, gradient.chunk(m, 1), at.delta.chunk(m, 1), strict=True)
        return torch.cat([p.tangent(x, Iterate(own, at.step)) for p, x, own in slots], 1)

    def retract(self, delta: Tensor) -> Tensor:
        pieces = delta.chunk(len(self.parts), 1)
        return torch.cat([p.retract(x) for p, x in zip(self.parts, pieces, strict=True)], 1)

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return into_ball(self.retract(delta), radius)
