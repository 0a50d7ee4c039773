"""The inner loop: many lanes climb their own margins at once, each inside its own set and ball.

Every lane is its own problem: steps are scaled by the lane's radius and gradients never mix, so a
batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from holdfast.problem import Lanes, Problem, relative_violation
from holdfast.steppers import Stepper
from holdfast.subspace import FeasibleSet, Iterate, norms

Trace = list[dict[str, float]]
"""Per step, over the lanes still searching: counts, sums of margin and norm, largest violation."""


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
    [n]: step of the first success, -1 for none; diverged [n]: met NaN or infinity.
    """

    delta: Tensor
    margin: Tensor
    reached_at: Tensor
    diverged: Tensor

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
    batch, and so do the other lanes of the same row. Raises OutOfMemoryError.
    """

    def piece(index: Tensor) -> tuple[Ascent, Trace]:
        # Its own trace: a piece that ran out of memory is done again.
        own: Trace | None = None if trace is None else []
        found = _ascend(problem, feasible, climb.part(index), steps, stepper, decay, own)
        return found, own or []

    whole = torch.arange(len(climb), device=climb.rows.device)
    parts = problem.replay.subject.batching.over("steps", whole, piece)
    if trace is not None:
        for _, own in parts:
            _add(trace, own)
    return Ascent.join([ascent for ascent, _ in parts])


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
    delta = sets.inside(climb.start, climb.radius, Iterate.zero(climb.start))
    best = delta.clone()
    best_margin = torch.full((n,), -torch.inf, device=device)
    reached_at = torch.full((n,), -1, device=device)
    diverged = torch.zeros(n, dtype=torch.bool, device=device)

    live = torch.arange(n, device=device)  # lanes still searching
    state = stepper.start(delta)
    for step in range(steps + 1):
        last = step == steps  # the final iterate is measured and not moved
        margin, gradient = _margin_and_gradient(lanes, delta, last)
        finite = torch.isfinite(margin) & torch.isfinite(gradient).all(-1).all(-1)
        reached = finite & (margin >= climb.goal[live])
        better = finite & (reached | (margin > best_margin[live]))
        best[live[better]] = delta[better]
        best_margin[live[better]] = margin[better]
        reached_at[live[reached]] = step
        diverged[live[~finite]] = True
        if trace is not None:
            trace.append(_noted(problem, delta, margin, climb.rows[live], reached))

        done = climb.rows[live[reached]]
        keep = finite & ~torch.isin(climb.rows[live], done)
        if last or not keep.any():
            break
        if not keep.all():
            index = keep.nonzero().flatten()
            live, lanes, sets = live[index], lanes.rows(index), sets.rows(index)
            delta, gradient = delta[index], gradient[index]
            state = tuple(part[index] for part in state)

        here = Iterate(delta, step)
        move, state = stepper.move(state, sets.tangent(gradient, here))
        rate = (climb.lr * climb.radius)[live] * (1 - (1 - decay) * step / steps)
        delta = sets.inside(delta + rate[:, None, None] * move, climb.radius[live], here)
    return Ascent(best, best_margin, reached_at, diverged)


def _margin_and_gradient(lanes: Lanes, delta: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """margin [n] and its gradient [n q d]; zeros where no step follows."""
    if last:
        with torch.no_grad():
            return lanes.margin(delta), torch.zeros_like(delta)
    leaf = delta.requires_grad_(True)
    margin = lanes.margin(leaf)
    (gradient,) = torch.autograd.grad(margin.sum(), leaf)
    delta.requires_grad_(False)
    return margin.detach(), gradient


def _noted(
    problem: Problem, delta: Tensor, margin: Tensor, rows: Tensor, reached: Tensor
) -> dict[str, float]:
    """This step's figures over the live lanes of a piece."""
    relative = norms(delta).flatten() / problem.reference_norm[rows]
    return {
        "n": len(rows),
        "n_reached": int(reached.sum()),
        "margin": float(margin.nan_to_num().sum()),
        "norm": float(relative.sum()),
        "violation": float(relative_violation(problem, delta, rows).max()),
    }


def _add(trace: Trace, own: Trace) -> None:
    """Add what a piece noted to what others did, step by step."""
    for step, noted in enumerate(own):
        if step == len(trace):
            trace.append({"n": 0, "n_reached": 0, "margin": 0.0, "norm": 0.0, "violation": 0.0})
        entry = trace[step]
        largest = max(entry["violation"], noted["violation"])
        for name, value in noted.items():
            entry[name] += value
        entry["violation"] = largest
