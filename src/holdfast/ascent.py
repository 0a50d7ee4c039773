"""The inner loop: many lanes climb their own margins at once, each inside its own set and ball.

Every lane is its own problem: steps are scaled by the lane's radius and gradients never mix, so a
batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from holdfast.problem import Lanes, Problem, violation_of
from holdfast.steppers import Stepper
from holdfast.subspace import Charted, FeasibleSet, Iterate, norms
from holdfast.waiting import Behind, sent, waits

STILL = 3
"""Steps in a row that may leave a lane exactly where it was; then it has ended."""

SHORTER = 0.25
"""Share of a step that left a lane where it was that is tried in the next: there was no way back
into the set from it."""

LEAVE = 8
"""Lanes that have ended leave when they are one in so many, where the host has to wait for a
device: looking up who stays is a wait, and a batch with an eighth less is hardly faster."""


@dataclass(frozen=True)
class Noted:
    """A step of n lanes: the row of each, whether it is still searching, its margin, its norm
    relative to the residual's, its violation, and whether it reached its goal there."""

    step: int
    rows: Tensor
    searching: Tensor
    margin: Tensor
    norm: Tensor
    violation: Tensor
    reached: Tensor

    def to(self, device: str) -> Noted:
        names = ("rows", "searching", "margin", "norm", "violation", "reached")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


Trace = list[Noted]


@dataclass(frozen=True)
class Climb:
    """Where n lanes start and what they are to reach.

    rows [n]: the problem's row of each lane; start [n q d]; goal [n]: a margin, in logits; radius
    [n]: of the ball; lr [n]: the norm of a step as a share of the radius.
    """

    rows: Tensor
    start: Tensor
    goal: Tensor
    radius: Tensor
    lr: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, index: Tensor) -> Climb:
        return Climb(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def join(parts: Sequence[Climb]) -> Climb:
        names = [f.name for f in fields(Climb)]
        return Climb(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


@dataclass(frozen=True)
class Ascent:
    """How n lanes ended.

    delta [n q d]: the first iterate to reach the goal, else the best; margin [n] of it; reached_at
    [n]: step of the first success, -1 for none; diverged [n]: met NaN or infinity; passes [n]: how
    often the lane was run, or had to be: once another lane of its row has made it needless, what
    lanes run that stand in another piece does not count, or the count would depend on memory.
    """

    delta: Tensor
    margin: Tensor
    reached_at: Tensor
    diverged: Tensor
    passes: Tensor

    @property
    def reached(self) -> Tensor:
        return self.reached_at >= 0

    @staticmethod
    def join(parts: Sequence[Ascent]) -> Ascent:
        names = [f.name for f in fields(Ascent)]
        return Ascent(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def ascend(
    problem: Problem,
    feasible: FeasibleSet,
    climb: Climb,
    steps: int,
    stepper: Stepper,
    decay: float = 1.0,
    trace: Trace | None = None,
) -> Ascent:
    """Climb until a lane's goal is reached or the steps are used up.

    The step length falls linearly to `decay` times itself. Lanes that reached their goal leave the
    batch, and so do other lanes of the same row in balls as large, and lanes that a step no longer
    moves. Raises OutOfMemoryError.
    """

    def piece(index: Tensor) -> tuple[Ascent, Trace]:
        # Its own trace: a piece that ran out of memory is done again.
        own: Trace | None = None if trace is None else []
        found = _ascend(problem, feasible, climb.part(index), steps, stepper, decay, own)
        return found, own or []

    whole = torch.arange(len(climb), device=climb.rows.device)
    parts = problem.replay.subject.batching.over("steps", whole, piece)
    if trace is not None:
        # What reads it sums search by search and step by step: a GPU is not waited for each time.
        trace += [noted.to("cpu") for _, own in parts for noted in own]
    found = Ascent.join([ascent for ascent, _ in parts])
    return found if len(parts) == 1 else replace(found, passes=_needed(climb, found))


def _needed(climb: Climb, found: Ascent) -> Tensor:
    """[n] passes of lanes up to the first success of their row in a ball no larger than theirs."""
    lanes: dict[int, list[tuple[float, int]]] = {}
    rows, radius, reached = climb.rows.tolist(), climb.radius.tolist(), found.reached_at.tolist()
    for row, ball, step in zip(rows, radius, reached, strict=True):
        if step >= 0:
            lanes.setdefault(row, []).append((ball, step + 1))
    needed = [
        min([own, *(step for ball, step in lanes.get(row, ()) if ball <= mine)])
        for row, mine, own in zip(rows, radius, found.passes.tolist(), strict=True)
    ]
    return torch.as_tensor(needed, dtype=torch.long, device=climb.rows.device)


def _ascend(
    problem: Problem,
    feasible: FeasibleSet,
    climb: Climb,
    steps: int,
    stepper: Stepper,
    decay: float,
    trace: Trace | None,
) -> Ascent:
    """The lanes of one piece."""
    n, device = len(climb), climb.start.device
    lanes, sets = Lanes.of(problem, climb.rows), feasible.rows(climb.rows)
    stepper = stepper.rows(climb.rows)
    delta = sets.inside(climb.start, climb.radius, Iterate.zero(climb.start))
    best = delta.clone()
    best_margin = torch.full((n,), -torch.inf, device=device)
    reached_at = torch.full((n,), -1, device=device)
    diverged = torch.zeros(n, dtype=torch.bool, device=device)
    passes = torch.zeros(n, dtype=torch.long, device=device)
    # The smallest ball in which each row has got there.
    least = torch.full((len(problem),), torch.inf, device=device)

    live = torch.arange(n, device=device)  # lanes in the batch
    searching = torch.ones_like(diverged)  # of these: which have not ended
    state = stepper.start(delta)
    still = torch.zeros(n, dtype=torch.long, device=device)
    behind = Behind()
    for step in range(steps + 1):
        last = step == steps  # the final iterate is measured and not moved
        if isinstance(sets, Charted) and not last:
            sets = sets.asking(delta)
        margin, gradient = _margin_and_gradient(lanes, delta, last)
        passes[live] += searching
        finite = torch.isfinite(margin) & torch.isfinite(gradient).all(-1).all(-1)
        reached = searching & finite & (margin >= climb.goal[live])
        better = reached | (searching & finite & (margin > best_margin[live]))
        best[live] = torch.where(better[:, None, None], delta, best[live])
        best_margin[live] = torch.where(better, margin, best_margin[live])
        reached_at[live] = torch.where(reached, step, reached_at[live])
        diverged[live] |= searching & ~finite
        if trace is not None:
            trace.append(_noted(step, lanes, delta, margin, climb.rows[live], searching, reached))

        rows, radius = climb.rows[live], climb.radius[live]
        least.scatter_reduce_(0, rows, torch.where(reached, radius, torch.inf), "amin")
        searching = searching & finite & (still < STILL) & (radius < least[rows])
        if last:
            break
        # A lane that has ended keeps what it found, and costs its share of the steps until then.
        known = behind.read(searching)
        if known is not None and not known.all():
            if not known.any():
                break
            if (~known).sum() * (LEAVE if waits(device) else len(known)) >= len(known):
                behind.forget()
                index = sent(np.flatnonzero(known), device)
                live, lanes, sets = live[index], lanes.rows(index), sets.rows(index)
                delta, gradient, still = delta[index], gradient[index], still[index]
                stepper, state = stepper.rows(index), tuple(part[index] for part in state)
                searching = searching[index]
        gradient = torch.where(searching[:, None, None], gradient, 0.0)  # it may be NaN

        here = Iterate(delta, step, gradient)
        if isinstance(sets, Charted):
            sets = sets.around(here)
        along = sets.tangent(gradient, here)
        here = replace(here, along=along)
        move, state = stepper.move(state, along)
        rate = (climb.lr * climb.radius)[live] * (1 - (1 - decay) * step / steps) * pace(still)
        delta = sets.inside(delta + rate[:, None, None] * move, climb.radius[live], here)
        still = torch.where((delta == here.delta).flatten(1).all(1), still + 1, 0)
    return Ascent(best, best_margin, reached_at, diverged, passes)


def pace(still: Tensor) -> Tensor:
    """[n] the share of its step that a lane takes which so many steps in a row have left alone."""
    return SHORTER ** still.clamp_max(STILL - 1)


def _margin_and_gradient(lanes: Lanes, delta: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """margin [n], and the gradient [n q d] of what is climbed; zeros where no step follows."""
    if last:
        with torch.no_grad():
            return lanes.margin(delta), torch.zeros_like(delta)
    leaf = delta.requires_grad_(True)
    climbed, margin = lanes.climbed(leaf)
    (gradient,) = torch.autograd.grad(climbed.sum(), leaf)
    delta.requires_grad_(False)
    return margin.detach(), gradient


def _noted(
    step: int,
    lanes: Lanes,
    delta: Tensor,
    margin: Tensor,
    rows: Tensor,
    searching: Tensor,
    reached: Tensor,
) -> Noted:
    relative = norms(delta).flatten() / lanes.problem.reference_norm[rows]
    violation = violation_of(lanes.problem, lanes.replay, delta)
    return Noted(step, rows, searching, margin, relative, violation, reached)
