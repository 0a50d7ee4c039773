"""Search: bring the behavior back inside constraint ∩ ball, then find the smallest norm that does.

Every row is its own problem: steps are scaled by the row's own budget and gradients never mix, so a
batch changes nothing. A failed search proves nothing, so `not_recovered` is said only after the
checks of `_try_harder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from holdfast.canonical import digest
from holdfast.config import Config
from holdfast.constraints import Constraint
from holdfast.positions import Where
from holdfast.problem import Lanes, Problem, relative_violation
from holdfast.steppers import Stepper
from holdfast.subspace import FeasibleSet

Outcome = Literal["recovered", "not_recovered", "undecided", "infeasible", "diverged"]

BACK = 0.01
"""Share of the goal from which a margin counts as positive beyond rounding."""

SENTENCES: dict[Outcome, str] = {
    "recovered": "the behavior came back inside the constraint and the budget",
    "not_recovered": (
        "nothing found over 3 learning rates x 3 seeds and a warm start from the looser "
        "constraint, and doubling the steps changed nothing"
    ),
    "undecided": "nothing found, but longer searches were still finding more when they stopped",
    "infeasible": "the held features leave no direction to search in",
    "diverged": "the search met NaN or infinite values",
}


class Perturb(Config):
    """Where the perturbation lives. sites: empty for the intervention's own."""

    sites: tuple[str, ...] = ()
    positions: Where = "last_prompt"


class Budget(Config):
    """The norm budget: relative to the suppressed residual at the perturbed positions, or absolute.

    A Frobenius norm over all perturbed sites and positions, in residual units if absolute.
    """

    relative: float | None = Field(None, gt=0)
    absolute: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_two(self) -> Budget:
        if (self.relative is None) == (self.absolute is None):
            raise ValueError("a budget is either `relative` or `absolute`")
        return self


class Stop(Config):
    """When a search has succeeded: the margin reaches this share of the prompt's clean margin."""

    clean_margin: float = Field(1.0, gt=0)


class RecoverySpec(Config):
    """How to spec. Everything here changes numbers, so it is part of a trial's identity.

    order: who has the last word at one site. steps: steps of the first attempt. lr: the norm of a
    step as a share of the budget. refine_steps: steps of a bisection round, refine_lr: the norm of
    its first step as a share of the round's ball. tolerance: relative width at which the smallest
    norm is known. doublings: how often the steps are doubled before the answer is `undecided`.
    """

    order: Literal["clamp_then_perturbation", "perturbation_then_clamp"] = "clamp_then_perturbation"
    constraint: Constraint
    perturb: Perturb = Perturb()
    budget: Budget = Budget(relative=0.25)
    stop: Stop = Stop()
    steps: int = Field(100, ge=1)
    lr: float = Field(0.1, gt=0)
    refine_steps: int = Field(30, ge=1)
    refine_lr: float = Field(0.5, gt=0)
    tolerance: float = Field(0.005, gt=0, lt=1)
    doublings: int = Field(2, ge=1)


@dataclass(frozen=True)
class Recovery:
    """What the search found for n rows.

    delta [n p d_model]: the smallest success, else the iterate with the highest margin; margin
    [n] in logits; norm [n]; smallest_norm [n]: NaN where the goal was never reached; outcomes;
    steps [n]: steps of the attempt that decided; null_dimension [n]; trace: the first
    attempt, one entry a step.
    """

    delta: Tensor
    margin: Tensor
    smallest_norm: Tensor
    outcomes: tuple[Outcome, ...]
    steps: Tensor
    null_dimension: Tensor
    trace: tuple[dict[str, float], ...] = field(repr=False)

    @property
    def norm(self) -> Tensor:
        return self.delta.norm(dim=(1, 2))


@dataclass(frozen=True)
class Ascent:
    """The end of one batched ascent over n lanes.

    delta: the first iterate to reach the goal, else the best; reached_at [n]: step of the first
    success, -1 for none; diverged [n].
    """

    delta: Tensor
    margin: Tensor
    reached_at: Tensor
    diverged: Tensor

    @property
    def reached(self) -> Tensor:
        return self.reached_at >= 0


def norms(delta: Tensor) -> Tensor:
    """[n 1 1] Frobenius norm of each row of [n p d_model]."""
    return delta.norm(dim=(1, 2), keepdim=True)


def into_ball(delta: Tensor, radius: Tensor) -> Tensor:
    """Scale rows that are longer than radius [n] back to it."""
    length = norms(delta)
    limit = radius[:, None, None]
    return torch.where(length > limit, delta * (limit / length.clamp_min(1e-30)), delta)


def ascend(
    problem: Problem,
    feasible: FeasibleSet,
    rows: Tensor,
    start: Tensor,
    goal: Tensor,
    radius: Tensor,
    lr: Tensor,
    steps: int,
    stepper: Stepper,
    decay: float = 1.0,
    trace: list[dict[str, float]] | None = None,
) -> Ascent:
    """Climb the margin of each lane, inside the set and the ball, until its goal is reached.

    rows [n]: the problem's row of each lane; start [n p d], goal [n], radius [n], lr [n] (norm of a
    step as a share of the radius), which falls linearly to `decay` times itself. Lanes that reached
    their goal leave the batch.
    """
    size = problem.replay.subject.batch_size
    if len(rows) > size:
        parts = [
            ascend(
                problem, feasible, rows[i], start[i], goal[i], radius[i], lr[i], steps, stepper,
                decay, trace,
            )  # fmt: skip
            for i in torch.arange(len(rows), device=rows.device).split(size)
        ]
        names = ("delta", "margin", "reached_at", "diverged")
        return Ascent(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})

    n = len(start)
    best = start.clone()
    best_margin = torch.full((n,), -torch.inf, device=start.device)
    reached_at = torch.full((n,), -1, device=start.device)
    diverged = torch.zeros(n, dtype=torch.bool, device=start.device)

    live = torch.arange(n, device=start.device)  # lanes still searching
    lanes, sets = Lanes.of(problem, rows), feasible.rows(rows)
    delta = start.clone()
    state = stepper.start(delta)
    for step in range(steps + 1):
        delta = delta.detach().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            margin = lanes.margin(delta)
        gradient = torch.autograd.grad(margin.sum(), delta)[0] if step < steps else None
        delta, margin = delta.detach(), margin.detach()

        finite = torch.isfinite(margin)
        if gradient is not None:
            finite &= torch.isfinite(gradient).all(-1).all(-1)
        reached = finite & (margin >= goal[live])
        better = finite & (reached | (margin > best_margin[live]))
        best[live[better]] = delta[better]
        best_margin[live[better]] = margin[better]
        reached_at[live[reached]] = step
        diverged[live[~finite]] = True
        if trace is not None:
            _note(trace, step, problem, delta, margin, rows[live], reached)

        keep = finite & ~reached
        if reached.any():
            # Other lanes of a row that reached its goal have nothing left to find.
            keep &= ~torch.isin(rows[live], rows[live[reached]])
        if gradient is None or not keep.any():
            break
        if not keep.all():
            index = keep.nonzero().flatten()
            live, lanes, sets = live[index], lanes.rows(index), sets.rows(index)
            delta, gradient = delta[index], gradient[index]
            state = tuple(part[index] for part in state)

        move, state = stepper.move(state, sets.tangent(gradient))
        rate = (lr * radius)[live] * (1 - (1 - decay) * step / steps)
        delta = sets.retract(delta + rate[:, None, None] * move)
        delta = into_ball(delta, radius[live])
    return Ascent(best, best_margin, reached_at, diverged)


def _note(
    trace: list[dict[str, float]],
    step: int,
    problem: Problem,
    delta: Tensor,
    margin: Tensor,
    rows: Tensor,
    reached: Tensor,
) -> None:
    """Add this step's figures over the live lanes to what other chunks noted for it."""
    while len(trace) <= step:
        trace.append({"n": 0, "n_reached": 0, "margin": 0.0, "norm": 0.0, "violation": 0.0})
    entry = trace[step]
    relative = delta.norm(dim=(1, 2)) / problem.reference_norm[rows]
    entry["n"] += len(rows)
    entry["n_reached"] += int(reached.sum())
    entry["margin"] += float(margin.nan_to_num().sum())
    entry["norm"] += float(relative.sum())
    entry["violation"] = max(
        entry["violation"], float(relative_violation(problem, delta, rows).max())
    )


def recover(problem: Problem, spec: RecoverySpec, seed: int) -> Recovery:
    """Search all rows of the problem. Raises nothing for a failed search: outcomes are values."""
    feasible = spec.constraint.feasible(problem)
    n = len(problem)
    device = problem.goal.device
    rows = torch.arange(n, device=device)
    dimension = feasible.dimension
    possible = dimension > 0
    margin = torch.full((n,), torch.nan, device=device)
    delta = torch.zeros(problem.shape, device=device)
    smallest = torch.full((n,), torch.nan, device=device)
    steps = torch.zeros(n, dtype=torch.long, device=device)
    outcomes: list[Outcome] = ["infeasible"] * n
    raw_trace: list[dict[str, float]] = []

    todo = rows[possible]
    lr = torch.full((n,), spec.lr, device=device)
    if len(todo):
        first = ascend(
            problem, feasible, todo, delta[todo], problem.goal[todo], problem.radius[todo], lr[todo],
            spec.steps, spec.constraint.stepper, trace=raw_trace,
        )  # fmt: skip
        delta[todo], margin[todo], reached = first.delta, first.margin, first.reached
        steps[todo] = torch.where(reached, first.reached_at, spec.steps)
        # The behavior is back where the margin is positive, even if the goal is out of reach.
        back = first.margin > 0
        for row, ok, bad in zip(todo.tolist(), reached | back, first.diverged, strict=True):
            outcomes[row] = "diverged" if bad else "recovered" if ok else "undecided"
        open_rows = todo[~reached & ~back & ~first.diverged]
        if len(open_rows):
            _try_harder(
                problem, feasible, spec, seed, open_rows, delta, margin, steps, outcomes
            )
            back = open_rows[margin[open_rows] > 0]
            if len(back):  # from the behavior to the goal
                more = ascend(
                    problem, feasible, back, delta[back], problem.goal[back], problem.radius[back],
                    lr[back], spec.steps, spec.constraint.stepper,
                )  # fmt: skip
                delta[back], margin[back] = more.delta, more.margin
        done = torch.as_tensor(
            [o == "recovered" for o in outcomes], dtype=torch.bool, device=device
        )
        reached_rows = rows[done & (margin >= problem.goal)]
        if len(reached_rows):
            delta, margin, smallest = _shrink(
                problem, feasible, spec, reached_rows, delta, margin, smallest
            )
    return Recovery(delta, margin, smallest, tuple(outcomes), steps, dimension, _mean(raw_trace))


def _mean(trace: list[dict[str, float]]) -> tuple[dict[str, float], ...]:
    """Sums of margin and norm turned into means over the lanes still searching at that step."""
    return tuple(
        {
            "step": step,
            "n_searching": entry["n"],
            "n_reached": sum(e["n_reached"] for e in trace[: step + 1]),
            "margin_mean": entry["margin"] / entry["n"],
            "norm_relative_mean": entry["norm"] / entry["n"],
            "violation_max": entry["violation"],
        }
        for step, entry in enumerate(trace)
        if entry["n"]
    )


def _try_harder(
    problem: Problem,
    feasible: FeasibleSet,
    spec: RecoverySpec,
    seed: int,
    rows: Tensor,
    delta: Tensor,
    margin: Tensor,
    steps: Tensor,
    outcomes: list[Outcome],
) -> None:
    """Search the rows that failed from 3 learning rates × 3 random starts and a warm start.

    All lanes run for twice the steps; if the second half brought the behavior back on no row that
    the first had not, the rest is `not_recovered`. Otherwise the steps double again, and after the
    last doubling the rest is `undecided`. Updates delta, margin, steps and outcomes in place.
    """
    attempt = spec.steps
    for doubling in range(spec.doublings):
        lanes, start, lr = _starts(problem, feasible, spec, seed + doubling, rows)
        # Here the question is whether the behavior comes back at all: a lane is done when the margin
        # is positive by more than rounding.
        goal = BACK * problem.goal[lanes]
        result = ascend(
            problem, feasible, lanes, start, goal, problem.radius[lanes], lr, 2 * attempt,
            spec.constraint.stepper,
        )  # fmt: skip
        early = set(lanes[(result.reached_at >= 0) & (result.reached_at <= attempt)].tolist())
        late = set(lanes[result.reached].tolist())
        for row in rows.tolist():
            own = (lanes == row).nonzero().flatten()
            # The lane that got there first, else the one with the highest margin; first and not
            # shortest, so that the choice does not depend on which lanes share a batch.
            hit = own[result.reached[own]]
            if len(hit):
                pick = hit[result.reached_at[hit].argmin()]
                outcomes[row] = "recovered"
            else:
                pick = own[result.margin[own].argmax()]
                outcomes[row] = "not_recovered" if late == early else "undecided"
            steps[row] = int(result.reached_at[pick]) if len(hit) else 2 * attempt
            if len(hit) or result.margin[pick] > margin[row]:
                delta[row], margin[row] = result.delta[pick], result.margin[pick]
        rows = torch.as_tensor(
            [row for row in rows.tolist() if row not in late], dtype=torch.long, device=rows.device
        )
        if late == early or not len(rows):
            return
        attempt *= 2


def _starts(
    problem: Problem,
    feasible: FeasibleSet,
    spec: RecoverySpec,
    seed: int,
    rows: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lanes, starting points [n p d] and learning rates [n] of a harder spec.

    Random starts are drawn by the example's id, so that they do not depend on the batch.
    """
    _, p, d = problem.shape
    device = rows.device
    lanes, starts, rates = [], [], []
    goal = BACK * problem.goal[rows]
    for index in range(3):
        noise = torch.stack(
            [
                _noise(f"{seed}/{index}/{problem.batch.ids[row]}", p, d).to(device)
                for row in rows.tolist()
            ]
        )
        noise = noise * problem.perturbed[rows][..., None]
        point = feasible.rows(rows).retract(noise)
        point = point / norms(point).clamp_min(1e-30) * (0.5 * problem.radius[rows])[:, None, None]
        for factor in (1 / 3, 1.0, 3.0):
            lanes.append(rows)
            starts.append(point)
            rates.append(torch.full((len(rows),), factor * spec.lr, device=device))
    looser = spec.constraint.looser
    if looser is not None:
        free = looser.feasible(problem)
        zero = torch.zeros(len(rows), p, d, device=device)
        lr = torch.full((len(rows),), spec.lr, device=device)
        loose = ascend(
            problem, free, rows, zero, goal, problem.radius[rows], lr, spec.steps, looser.stepper
        )
        lanes.append(rows)
        starts.append(into_ball(feasible.rows(rows).retract(loose.delta), problem.radius[rows]))
        rates.append(lr)
    return torch.cat(lanes), torch.cat(starts), torch.cat(rates)


def _noise(key: str, p: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(digest(key)[:15], 16))
    return torch.randn(p, d, generator=generator)


def _shrink(
    problem: Problem,
    feasible: FeasibleSet,
    spec: RecoverySpec,
    rows: Tensor,
    delta: Tensor,
    margin: Tensor,
    smallest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bisect the norm of each successful row, searching anew inside every smaller ball.

    Each round starts from the smallest success so far, scaled into the ball of the round; a
    direction that only had to be good enough for a large ball is so turned into a better one.
    """
    delta, margin, smallest = delta.clone(), margin.clone(), smallest.clone()
    high = norms(delta).flatten()
    low = torch.zeros_like(high)
    lr = torch.full_like(high, spec.refine_lr)
    n_rounds = int(np.ceil(np.log2(1 / spec.tolerance))) + 1
    for _ in range(n_rounds):
        wide = (high - low)[rows] > spec.tolerance * high[rows]
        todo = rows[wide]
        if not len(todo):
            break
        radius = (high + low)[todo] / 2
        start = into_ball(delta[todo], radius)
        result = ascend(
            problem, feasible, todo, start, problem.goal[todo], radius, lr[todo],
            spec.refine_steps, spec.constraint.stepper, decay=0.1,
        )
        hit, miss = todo[result.reached], todo[~result.reached]
        delta[hit], margin[hit] = result.delta[result.reached], result.margin[result.reached]
        high[hit] = norms(result.delta[result.reached]).flatten()
        low[miss] = radius[~result.reached]
    smallest[rows] = high[rows]
    return delta, margin, smallest


def summary_of(outcomes: tuple[Outcome, ...]) -> dict[str, Any]:
    """Counts of each outcome with its sentence, and the outcome of the whole trial.

    The whole is what was found for most rows that could be searched, except that a trial with any
    recovered row is `recovered`, and a trial with undecided rows and no recovered one `undecided`.
    """
    counts = {name: outcomes.count(name) for name in SENTENCES}
    order: tuple[Outcome, ...] = (
        "recovered", "undecided", "diverged", "not_recovered", "infeasible",
    )  # fmt: skip
    whole = next(name for name in order if counts[name])
    return {"outcome": whole, "sentence": SENTENCES[whole], "counts": counts}
