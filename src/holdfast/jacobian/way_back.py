"""The way back into Φ = 0, of many lanes at once that each are at a place of their own on it.

A trial is corrected until no feature moves. Then it may be too long, and is scaled into its ball
and corrected again. Where corrections do not end, the lane begins anew with a shorter step, at last
with none; where they go slowly, or J was made too far away, J is made there first. All but the
corrections is seldom and dear, so the host has to know whose turn it is. A lane stays where it is
until the host does, which is a round later where it would have to wait (`waiting.py`), and finds
what it would have found.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.jacobian.chords import Chords, within
from holdfast.jacobian.learned import Learned
from holdfast.jacobian.restoration import SHRINK, SLACK
from holdfast.subspace import norms
from holdfast.waiting import Behind, sent

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

ENDED, GOING, SLOW, LONG, LOST = range(5)
"""Where a lane is: at the end; being corrected; waiting for J; to be scaled; for a shorter step."""


@dataclass(frozen=True)
class Steps:
    """What n lanes try: to go from `last` [n q d_model] along `step`, as far as each of shares
    [n t] of it in turn, into balls of radius [n]. reach [n]: how far from where a try begins J may
    have been made.
    """

    last: Tensor
    step: Tensor
    shares: Tensor
    radius: Tensor
    reach: Tensor

    def rows(self, rows: Tensor) -> Steps:
        return Steps(
            self.last[rows], self.step[rows], self.shares[rows], self.radius[rows],
            self.reach[rows],
        )  # fmt: skip

    @property
    def tries(self) -> int:
        return self.shares.shape[1]

    def trial(self, number: Tensor) -> Tensor:
        """[n q d_model] of the try of that number [n]."""
        share = self.shares.gather(1, number.clamp_max(self.tries - 1)[:, None])
        return self.last + share[..., None] * self.step


@dataclass(frozen=True)
class Place:
    """Where n lanes are on their way.

    x [n q d_model]: coordinates; stage [n]; number [n]: of the try; scaled [n]: how often it was;
    and of the corrections since then: rounds and stalls [n], renewed [n] bool, smallest [n].
    """

    x: Tensor
    stage: Tensor
    number: Tensor
    scaled: Tensor
    rounds: Tensor
    stalls: Tensor
    renewed: Tensor
    smallest: Tensor

    @classmethod
    def before(cls, steps: Steps) -> Place:
        """Before the first try."""
        none = torch.zeros(len(steps.last), dtype=torch.long, device=steps.last.device)
        return cls(
            steps.last, none + LOST, none - 1, none, none, none, none > 0,
            torch.full_like(steps.radius, torch.inf),
        )  # fmt: skip

    def begun(self, chords: Chords, steps: Steps, delta: Tensor) -> Place:
        """Lanes that are to be scaled or to go less far, at vectors `delta`, where they begin."""
        lost = self.stage == LOST
        number = torch.where(lost, self.number + 1, self.number)
        scaled = torch.where(lost, 0, self.scaled + 1)
        # Scaling moves features again: each time a little more room is made for the correction.
        room = steps.radius * (1 - SHRINK * scaled)
        trial = torch.where(lost[:, None, None], steps.trial(number), delta)
        trial = within(trial, room, chords.inward)
        far = lost & (chords.frame.distance(trial) > steps.reach)
        none = torch.zeros_like(number)
        return Place(
            chords.coordinates.written(trial), torch.where(far, SLOW, GOING), number, scaled,
            none, none, none > 0, torch.full_like(self.smallest, torch.inf),
        )  # fmt: skip

    def measured(self, held: Tensor, good: Tensor, fits: Tensor, tries: int) -> Place:
        """After a pass that found the largest entry `held` [n] of Φ, whether it counts as none, and
        whether the vectors fit into their balls. Only lanes that are being corrected change."""
        stalls = self.stalls + ~(held <= FALLS * self.smallest)
        slow = (stalls == RENEW) & ~self.renewed
        lost = ~torch.isfinite(held) | (stalls > STALLS) | (self.rounds == CHORDS)
        lost = torch.where(good, ~fits & (self.scaled == RETURNS - 1), lost)
        stage = torch.where(slow, SLOW, GOING)
        stage = torch.where(good, torch.where(fits, ENDED, LONG), stage)
        stage = torch.where(lost, torch.where(self.number == tries - 1, ENDED, LOST), stage)
        going = self.stage == GOING
        return replace(
            self,
            stage=torch.where(going, stage, self.stage),
            rounds=self.rounds + going,
            stalls=torch.where(going, stalls, self.stalls),
            renewed=self.renewed | (going & (stage == SLOW)),
            smallest=torch.minimum(self.smallest, held),
        )

    def corrected(self, step: Tensor) -> Place:
        going = (self.stage == GOING)[:, None, None]
        return replace(self, x=torch.where(going, self.x + step, self.x))

    def resumed(self, rows: Tensor) -> Place:
        """Some lanes have got what they waited for where they are."""
        return replace(self, stage=self.stage.index_fill(0, rows, GOING))

    def put(self, rows: Tensor, other: Place) -> Place:
        """With some lanes at other places."""
        return Place(*(
            mine.index_copy(0, rows, new)
            for mine, new in zip(self._values(), other._values(), strict=True)
        ))  # fmt: skip

    def rows(self, rows: Tensor) -> Place:
        return Place(*(value[rows] for value in self._values()))

    def _values(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


def back(chords: Chords, steps: Steps) -> Tensor:
    """Iterates [n q d_model] in the set and in their balls; `last` where no try ends there."""
    out, lanes = steps.last.clone(), torch.arange(len(steps.last), device=steps.last.device)
    at = Place.before(steps).begun(chords, steps, steps.last)
    learned, behind = Learned(), Behind()
    behind.read(at.stage)
    for _ in range(steps.tries * RETURNS * (CHORDS + 4)):
        value, held, delta = chords.coordinates.moved(at.x)
        largest = held.abs().amax((1, 2))
        good = largest <= chords.tolerance
        fits = norms(delta).flatten() <= steps.radius * (1 + SLACK)
        fine = (at.stage == GOING) & good & fits
        out[lanes] = torch.where(fine[:, None, None], delta, out[lanes])
        at = at.measured(largest, good, fits, steps.tries)

        known = behind.read(at.stage)
        if known is None:
            known = np.full(len(lanes), GOING)
        if not known.any():
            break
        slow, ready = _rows(known == SLOW, out), _rows((known == LONG) | (known == LOST), out)
        if len(slow):
            chords, at = chords.anew(delta, slow), at.resumed(slow)
            learned = learned.without(slow)
        step, learned = learned.step(chords.step(value))
        at = at.corrected(step)
        if len(ready):
            begun = at.rows(ready).begun(chords.rows(ready), steps.rows(ready), delta[ready])
            at, learned = at.put(ready, begun), learned.without(ready)
        if len(slow) or len(ready):
            behind.forget()  # what was asked last is not so any more
        elif 2 * np.count_nonzero(known) <= len(known):
            own = _rows(known != ENDED, out)
            chords, steps, at = chords.rows(own), steps.rows(own), at.rows(own)
            learned, lanes = learned.rows(own), lanes[own]
            behind.forget()
    return out


def _rows(which: NDArray[np.bool_], like: Tensor) -> Tensor:
    return sent(np.flatnonzero(which), like.device)
