"""Restoration with a J that was made near by: a correction takes passes forward alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.jacobian.frame import Frame
from holdfast.jacobian.learned import Learned
from holdfast.jacobian.offsets import Coordinates
from holdfast.jacobian.restoration import SHRINK, SLACK
from holdfast.problem import TINY
from holdfast.subspace import Iterate, into_ball, norms
from holdfast.waiting import Behind

CHORDS = 20
"""Most corrections of an iterate before it is measured against its ball."""

FALLS = 0.8
"""Share of its least so far to which a correction has to take a violation. J made anew costs as
much as a dozen or more corrections, so that slow ones are worth their passes."""

STALLS = 3
"""How often a violation may fail to fall so before its lane is given up."""

RENEW = 2
"""How often it fails to before J is made anew where the lane is, once."""

RETURNS = 4
"""How often an iterate is scaled into its ball and corrected again."""

BEND = 0.5
"""Most that the way back may measure, as a share of the step it follows."""


@dataclass(frozen=True)
class Chords:
    """The way back into Φ = 0 from n trial iterates near a frame, whose center is at `origin`.

    inward [n q d_model]: along what an iterate is made shorter; None: by scaling it.
    """

    coordinates: Coordinates
    frame: Frame
    origin: Tensor
    tolerance: float
    inward: Tensor | None = None

    @classmethod
    def of(
        cls, coordinates: Coordinates, frame: Frame, tolerance: float, inward: Tensor | None = None
    ) -> Chords:
        return cls(coordinates, frame, coordinates.written(frame.center), tolerance, inward)

    def rows(self, rows: Tensor) -> Chords:
        return Chords(
            self.coordinates.rows(rows), self.frame.rows(rows), self.origin[rows], self.tolerance,
            None if self.inward is None else self.inward[rows],
        )  # fmt: skip

    def reach(self, trial: Tensor, radius: Tensor, last: Iterate) -> tuple[Tensor, Tensor]:
        """[n] the share of a step from `last` to `trial` from which the set bends away too far, at
        most 1, and the share that is worth taking, at most that.

        To second order, from one correction: what the set bends away under a step grows with the
        square of its length. So the step is cut until the way back is at most `BEND` of it, and to
        where the objective's gain along step and way back together is largest. A step that is
        normalized would else circle around a maximum on a set that bends more than the objective.
        """
        at = within(trial, radius, self.inward)
        x = self.coordinates.written(at)
        step = self.frame.correction(self.coordinates.moved(x)[0])
        ahead, back = norms(at - last.delta).flatten(), norms(step).flatten()
        share = (BEND * ahead / back.clamp_min(TINY)).nan_to_num(0.0).clamp_max(1.0)
        if last.gradient is None or last.along is None:
            return share, share
        x = x - self._change(step)
        there = within(self.coordinates.vectors(x), radius, self.inward)
        slope = _dot(last.along, at - last.delta)
        bend = _dot(last.gradient, there - last.delta) - slope
        best = torch.where(
            (slope > 0) & (bend < 0), -slope / (2 * bend).clamp_max(-TINY), torch.inf
        )
        return share, torch.minimum(share, best)

    def back(self, trial: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Iterates [n q d] in the set and in balls of radius [n]; which ones [n] got there."""
        out, kept = trial.clone(), torch.zeros(len(trial), dtype=torch.bool, device=trial.device)
        todo, own = torch.arange(len(trial), device=trial.device), self
        for attempt in range(RETURNS):
            room = radius[todo] * (1 - SHRINK * attempt)
            x, good = own._onto(within(trial[todo], room, own.inward))
            delta = own.coordinates.vectors(x)
            trial = trial.index_copy(0, todo, delta)
            fits = norms(delta).flatten() <= radius[todo] * (1 + SLACK)
            fine = good & fits
            out[todo] = torch.where(fine[:, None, None], delta, out[todo])
            kept[todo] = fine
            again = (good & ~fits).nonzero().flatten()
            if not len(again):
                break
            todo, own = todo[again], own.rows(again)
        return out, kept

    def _onto(self, trial: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates where Φ = 0, and which lanes [n] came there."""
        x = self.coordinates.written(trial)
        smallest = torch.full((len(x),), torch.inf, device=x.device)
        stalls = torch.zeros(len(x), dtype=torch.long, device=x.device)
        own, renewed = self, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        learned, behind = Learned(), Behind()
        for rounds in range(CHORDS + 1):
            value, held = self.coordinates.moved(x)
            largest = held.abs().amax((1, 2))
            good = largest <= self.tolerance
            stalls = stalls + ~(largest <= FALLS * smallest)
            going = ~good & torch.isfinite(largest) & (stalls <= STALLS)
            if behind.none(going):
                break
            smallest = torch.minimum(smallest, largest)
            slow = going & (stalls == RENEW) & ~renewed
            # None can be before it has failed that often; then J is dearer than a look.
            if rounds >= RENEW and slow.any():
                renewed, here = renewed | slow, self.coordinates.vectors(x)
                frame = own.frame.anew(self.coordinates.features, here, slow)
                own = Chords.of(self.coordinates, frame, self.tolerance)
                learned = learned.without(slow)
            step, learned = learned.step(-own._change(own.frame.correction(value)))
            x = torch.where(going[:, None, None], x + step, x)
        return x, good

    def _change(self, step: Tensor) -> Tensor:
        return self.coordinates.change(self.frame.center, self.origin, step)


def within(delta: Tensor, radius: Tensor, inward: Tensor | None) -> Tensor:
    """Vectors [n q d_model] that are longer than radius [n] made shorter: along `inward`, as far as
    that leads into the ball; the rest, or all where there is no such direction, by scaling."""
    if inward is None:
        return into_ball(delta, radius)
    size, slope = _dot(inward, inward).clamp_min(TINY), _dot(delta, inward)
    beyond = _dot(delta, delta) - radius.square()
    left = slope.square() - size * beyond  # the length is least where this is 0
    back = (slope - left.clamp_min(0).sqrt()) / size
    move = (beyond > 0) & (slope > 0)
    return into_ball(delta - torch.where(move, back, 0.0)[:, None, None] * inward, radius)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((1, 2))
