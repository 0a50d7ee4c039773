"""The level set Φ = 0 where there are few constraints on few unknowns: J itself is at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from holdfast.jacobian.chords import Chords
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.frame import Frame
from holdfast.jacobian.offsets import Coordinates
from holdfast.jacobian.way_back import Steps, back
from holdfast.subspace import Iterate, norms
from holdfast.waiting import Question, perhaps, sent

NEAR = 0.1
"""How far from an iterate J may have been made, as a share of the residual's norm."""

FAR = 0.2
"""The same for the trial that a step leads to."""

TRIES, CUT = 4, 0.25
"""How many shares of a step are tried in turn before it is not taken, and each of the one before,
beginning with the step's reach."""

LEAP = 0.05
"""Share below which the whole step is tried first: the set does not bend so much, it has a jump
where a clamp switches on or off, and goes on behind it."""


@dataclass(frozen=True)
class Framed:
    """Perturbations at which no monitored feature moves, with a frame near the present ones.

    size [n]: the residual's norm at the perturbed slots; free [n]; tolerance: largest entry of Φ
    that counts as none; asked: which lanes are too far from the frame, if that is being asked. An
    iterate from which no share of a step ends in the set stays where it is.
    """

    coordinates: Coordinates
    frame: Frame
    size: Tensor
    free: Tensor
    tolerance: float
    asked: Question | None = None

    @property
    def features(self) -> FeatureMap:
        return self.coordinates.features

    @property
    def dimension(self) -> Tensor:
        return self.free

    def rows(self, rows: Tensor) -> Framed:
        return Framed(
            self.coordinates.rows(rows), self.frame.rows(rows), self.size[rows], self.free[rows],
            self.tolerance, None if self.asked is None else self.asked.rows(rows),
        )  # fmt: skip

    def asking(self, delta: Tensor) -> Framed:
        return replace(self, asked=Question.of(self._far(delta)))

    def around(self, at: Iterate) -> Framed:
        """With J made anew for the lanes that have gone too far from where it was made."""
        asked = self.asked or Question.of(self._far(at.delta))
        rows = sent(np.flatnonzero(asked.answer()), at.delta.device)
        return replace(self, frame=self.frame.anew(self.features, at.delta, rows), asked=None)

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        return self.coordinates.tangent(self.frame, at.delta, gradient)

    def retract(self, delta: Tensor) -> Tensor:
        """The set's point near each iterate; nearer to 0 if there is none within reach."""
        anywhere = torch.full((len(delta),), torch.inf, device=delta.device)
        return self.inside(delta, anywhere, Iterate.zero(delta))

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        """Restore inside the ball, after as much of the step as is worth it and leads back."""
        inward = self._inward(delta, radius, last)
        chords = Chords.of(self.coordinates, self.frame, self.tolerance, inward)
        bend, share = chords.reach(delta, radius, last)
        shares = share[:, None] * CUT ** torch.arange(TRIES, device=share.device)
        leap = torch.cat([torch.ones_like(shares[:, :1]), shares[:, :-1]], 1)
        shares = torch.where((bend < LEAP)[:, None], leap, shares)
        return back(chords, Steps(last.delta, delta - last.delta, shares, radius, FAR * self.size))

    def _inward(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor | None:
        """Along what steps that lead out of the ball are taken back into it; 0 for others."""
        over = norms(delta).flatten() > radius
        along = self.coordinates.inward(self.frame, last.delta) if perhaps(over) else None
        # The others are scaled, should their way back lead out: as if they stood by themselves.
        return None if along is None else torch.where(over[:, None, None], along, 0.0)

    def _far(self, delta: Tensor) -> Tensor:
        """[n] iterates too far from where J was made."""
        return self.frame.distance(delta) > NEAR * self.size
