"""Corrections with a J that was made near by: each takes passes forward alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.jacobian.frame import Frame
from holdfast.jacobian.offsets import Coordinates
from holdfast.problem import TINY
from holdfast.subspace import Iterate, into_ball, norms

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

    def step(self, value: Tensor) -> Tensor:
        """What of coordinates [n q d_model] takes `value` [n s K] from Φ, to first order."""
        return -self._change(self.frame.correction(value))

    def anew(self, delta: Tensor, rows: Tensor) -> Chords:
        """With J made anew at vectors `delta` of some lanes."""
        if not len(rows):
            return self
        frame = self.frame.anew(self.coordinates.features, delta, rows)
        return Chords.of(self.coordinates, frame, self.tolerance, self.inward)

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
