"""The level set Φ = 0 where there are few constraints on few unknowns: J itself is at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.jacobian.chords import Chords, within
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.frame import Frame
from holdfast.jacobian.offsets import Coordinates
from holdfast.subspace import Iterate, norms
from holdfast.waiting import perhaps

NEAR = 0.1
"""How far from an iterate J may have been made, as a share of the residual's norm."""

FAR = 0.2
"""The same for the trial that a step leads to."""

CUTS = (1.0, 0.25, 0.0625)
"""Shares of a step's reach that are tried in turn before it is not taken."""

LEAP = 0.05
"""Share below which the whole step is tried first: the set does not bend so much, it has a jump
where a clamp switches on or off, and goes on behind it."""


@dataclass(frozen=True)
class Framed:
    """Perturbations at which no monitored feature moves, with a frame near the present ones.

    size [n]: the residual's norm at the perturbed slots; free [n]; tolerance: largest entry of Φ
    that counts as none. A step costs at most four restorations, and an iterate without one that
    ends in the set stays where it is.
    """

    coordinates: Coordinates
    frame: Frame
    size: Tensor
    free: Tensor
    tolerance: float

    @property
    def features(self) -> FeatureMap:
        return self.coordinates.features

    @property
    def dimension(self) -> Tensor:
        return self.free

    def rows(self, rows: Tensor) -> Framed:
        return Framed(
            self.coordinates.rows(rows), self.frame.rows(rows), self.size[rows], self.free[rows],
            self.tolerance,
        )  # fmt: skip

    def around(self, at: Iterate) -> Framed:
        """With J made anew for the lanes that have gone too far from where it was made."""
        return self._framed(at.delta, NEAR)

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        return self.coordinates.tangent(self.frame, at.delta, gradient)

    def retract(self, delta: Tensor) -> Tensor:
        """The set's point near each iterate; nearer to 0 if there is none within reach."""
        anywhere = torch.full((len(delta),), torch.inf, device=delta.device)
        return self.inside(delta, anywhere, Iterate.zero(delta))

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        """Restore inside the ball, after as much of the step as is worth it; at last after none."""
        inward = self._inward(delta, radius, last)
        own = self._framed(within(delta, radius, inward), FAR)
        chords = Chords.of(own.coordinates, own.frame, self.tolerance, inward)
        step = delta - last.delta
        bend, share = chords.reach(delta, radius, last)
        # The frame of a long way's end says little about a short way's.
        own = own._framed(last.delta + share[:, None, None] * step, FAR)
        chords = Chords.of(own.coordinates, own.frame, self.tolerance, inward)
        out, left = last.delta.clone(), torch.ones_like(bend, dtype=torch.bool)
        jumps = left & (bend < LEAP)
        for trying, length in ((jumps, torch.ones_like(share)), *((left, c * share) for c in CUTS)):
            rows = (trying & left).nonzero().flatten()
            if not len(rows) and trying is left:
                break
            if len(rows):
                trial = last.delta[rows] + length[rows, None, None] * step[rows]
                point, kept = chords.rows(rows).back(trial, radius[rows])
                out[rows] = torch.where(kept[:, None, None], point, out[rows])
                left[rows] = ~kept
        return out

    def _inward(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor | None:
        """Along what steps that lead out of the ball are taken back into it; 0 for others."""
        over = norms(delta).flatten() > radius
        along = self.coordinates.inward(self.frame, last.delta) if perhaps(over) else None
        # The others are scaled, should their way back lead out: as if they stood by themselves.
        return None if along is None else torch.where(over[:, None, None], along, 0.0)

    def _framed(self, delta: Tensor, most: float) -> Framed:
        away = self.frame.distance(delta) > most * self.size
        return replace(self, frame=self.frame.anew(self.features, delta, away))
