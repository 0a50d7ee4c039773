"""The way back into Φ = 0, of many lanes at once that each are at a place of their own on it.

A trial is corrected until no feature moves. Then it may be too long, and is scaled into its ball
and corrected again. Where corrections do not end, the lane begins anew with a shorter step, until
there is none left to try; where they go slowly, or J was made too far away, J is made there first.
All but the corrections is seldom and dear, so the host has to know whose turn it is. A lane stays
where it is until the host does, which is a round later where it would have to wait (`waiting.py`),
and finds what it would have found.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum

import numpy as np
import torch
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

LATE = 8
"""Rounds that a scaling may take beside its corrections: what a lane waits for, at most twice, is
known and done two rounds later while others have theirs done."""


class Stage(IntEnum):
    """Where a lane is: at the end; being corrected; waiting for J to be made where it is, for being
    scaled, or for a shorter step."""

    ENDED = 0
    GOING = 1
    SLOW = 2
    LONG = 3
    LOST = 4


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
        share = self.shares.gather(1, number[:, None])
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
    def at(cls, x: Tensor, stage: Tensor, number: Tensor, scaled: Tensor) -> Place:
        """Before the first correction of a try, or after it was scaled."""
        none = torch.zeros_like(number)
        smallest = torch.full_like(x[:, 0, 0], torch.inf)
        return cls(x, stage, number, scaled, none, none, none > 0, smallest)

    def measured(self, held: Tensor, good: Tensor, fits: Tensor, tries: int) -> Place:
        """After a pass that found the largest entry `held` [n] of Φ, whether it counts as none, and
        whether the vectors fit into their balls. Lanes that wait for something are where they were.
        """
        stalls = self.stalls + ~(held <= FALLS * self.smallest)
        bad = ~torch.isfinite(held) | (stalls > STALLS) | (self.rounds == CHORDS)
        slow = (stalls == RENEW) & ~self.renewed
        full = self.scaled == RETURNS - 1
        there = torch.where(fits, Stage.ENDED, torch.where(full, Stage.LOST, Stage.LONG))
        on = torch.where(bad, Stage.LOST, torch.where(slow, Stage.SLOW, Stage.GOING))
        stage = torch.where(good, there, on)
        stage = torch.where((stage == Stage.LOST) & (self.number == tries - 1), Stage.ENDED, stage)
        going = self.stage == Stage.GOING
        return replace(
            self,
            stage=torch.where(going, stage, self.stage),
            rounds=self.rounds + going,
            stalls=torch.where(going, stalls, self.stalls),
            renewed=self.renewed | (going & (stage == Stage.SLOW)),
            smallest=torch.minimum(self.smallest, held),
        )

    def put(self, rows: Tensor, other: Place) -> Place:
        """With some lanes at other places."""
        pairs = zip(self._values(), other._values(), strict=True)
        return Place(*(mine.index_copy(0, rows, new) for mine, new in pairs))

    def rows(self, rows: Tensor) -> Place:
        return Place(*(value[rows] for value in self._values()))

    def _values(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class Walk:
    """Lanes [n] on their way: with which corrections, trying what, where, and what they learned."""

    lane: Tensor
    chords: Chords
    steps: Steps
    place: Place
    learned: Learned

    @classmethod
    def of(cls, chords: Chords, steps: Steps) -> Walk:
        """Before the first correction of the first try."""
        lane = torch.arange(len(steps.last), device=steps.last.device)
        first = torch.zeros_like(lane)
        return cls(lane, chords, steps, _begun(chords, steps, first), Learned())

    def rows(self, rows: Tensor) -> Walk:
        return Walk(
            self.lane[rows], self.chords.rows(rows), self.steps.rows(rows), self.place.rows(rows),
            self.learned.rows(rows),
        )  # fmt: skip

    def measured(self, held: Tensor, delta: Tensor) -> tuple[Walk, Tensor]:
        """After a pass that found Φ `held` [n s K] at vectors `delta`; and which lanes [n] that
        were being corrected are in the set and in their balls."""
        largest = held.abs().amax((1, 2))
        good = largest <= self.chords.tolerance
        fits = norms(delta).flatten() <= self.steps.radius * (1 + SLACK)
        place = self.place.measured(largest, good, fits, self.steps.tries)
        return replace(self, place=place), good & fits & (self.place.stage == Stage.GOING)

    def corrected(self, value: Tensor) -> Walk:
        """A correction further, after Φ had `value` [n s K]; lanes that do not go stay."""
        step, learned = self.learned.step(self.chords.step(value))
        going = (self.place.stage == Stage.GOING)[:, None, None]
        x = torch.where(going, self.place.x + step, self.place.x)
        return replace(self, place=replace(self.place, x=x), learned=learned)

    def renewed(self, slow: Tensor, delta: Tensor) -> Walk:
        """With J made anew for some lanes, at their vectors."""
        if not len(slow):
            return self
        stage = self.place.stage.index_fill(0, slow, Stage.GOING)
        return replace(
            self, chords=self.chords.anew(delta, slow), place=replace(self.place, stage=stage),
            learned=self.learned.without(slow),
        )  # fmt: skip

    def anew(self, lost: Tensor, long: Tensor, delta: Tensor) -> Walk:
        """With some lanes at the beginning of their next try, and some scaled."""
        place, learned = self.place, self.learned
        if len(lost):
            chords, steps = self.chords.rows(lost), self.steps.rows(lost)
            place = place.put(lost, _begun(chords, steps, place.number[lost] + 1))
            learned = learned.without(lost)
        if len(long):
            chords, steps = self.chords.rows(long), self.steps.rows(long)
            place = place.put(long, _scaled(chords, steps, place.rows(long), delta[long]))
            learned = learned.without(long)
        return replace(self, place=place, learned=learned)


def _begun(chords: Chords, steps: Steps, number: Tensor) -> Place:
    """At the beginning of the try of that number [n]."""
    trial = within(steps.trial(number), steps.radius, chords.inward)
    far = chords.frame.distance(trial) > steps.reach
    stage = torch.where(far, Stage.SLOW, Stage.GOING)
    return Place.at(chords.coordinates.written(trial), stage, number, torch.zeros_like(number))


def _scaled(chords: Chords, steps: Steps, place: Place, delta: Tensor) -> Place:
    """Brought from vectors `delta` into their balls."""
    scaled = place.scaled + 1
    # It moves features again: each time a little more room is made for the corrections.
    trial = within(delta, steps.radius * (1 - SHRINK * scaled), chords.inward)
    stage = torch.full_like(place.stage, Stage.GOING)
    return Place.at(chords.coordinates.written(trial), stage, place.number, scaled)


def back(chords: Chords, steps: Steps) -> Tensor:
    """Iterates [n q d_model] in the set and in their balls; `last` where no try ends there."""
    walk, behind, out = Walk.of(chords, steps), Behind(), steps.last.clone()
    behind.read(walk.place.stage)  # who begins too far from J: read behind the first pass
    for _ in range(steps.tries * RETURNS * (CHORDS + LATE)):
        value, held, delta = walk.chords.coordinates.moved(walk.place.x)
        walk, there = walk.measured(held, delta)
        out[walk.lane] = torch.where(there[:, None, None], delta, out[walk.lane])

        known = behind.read(walk.place.stage)
        if known is None:
            walk = walk.corrected(value)
            continue
        slow, long, lost, ended = (
            sent(np.flatnonzero(known == stage), out.device)
            for stage in (Stage.SLOW, Stage.LONG, Stage.LOST, Stage.ENDED)
        )
        if len(ended) == len(known):
            break
        walk = walk.renewed(slow, delta).corrected(value).anew(lost, long, delta)
        if len(slow) or len(long) or len(lost):
            behind.forget()  # what was asked last is not so any more
        elif 2 * len(ended) >= len(known):
            walk = walk.rows(sent(np.flatnonzero(known != Stage.ENDED), out.device))
            behind.forget()
    return out
