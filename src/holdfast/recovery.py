"""Search: bring the behavior back inside constraint ∩ ball, then find the smallest norm that does.

Every row is its own problem: steps are scaled by the row's own budget and gradients never mix, so a
batch changes nothing. A failed search proves nothing, so `not_recovered` is said only after the
checks of `_try_harder`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from holdfast.ascent import Ascent, Climb, Trace, ascend
from holdfast.canonical import digest
from holdfast.closed_form import ClosedForm
from holdfast.config import Config
from holdfast.constraints import Constraint
from holdfast.objectives import Objective
from holdfast.objectives.margin import Margin
from holdfast.positions import Where
from holdfast.problem import Problem
from holdfast.subspace import FeasibleSet, Iterate, into_ball, norms

Outcome = Literal["recovered", "not_recovered", "undecided", "infeasible", "diverged"]

MAX_ROUNDS = 40
"""Most bisection rounds; a norm of 1e-9 of the first success would still be found to tolerance."""

BACK = 0.01
"""Share of the goal from which a margin counts as positive beyond rounding."""

GO_ON = 3
"""Lanes of a row that go on for the second half of a harder search."""

SENTENCES: dict[Outcome, str] = {
    "recovered": "the behavior came back inside the constraint and the budget",
    "not_recovered": (
        "nothing found over 3 learning rates x 3 seeds, nor warm from the looser constraint where "
        "there is one, and twice the steps from where these came furthest changed nothing"
    ),
    "undecided": "nothing found, but longer searches were still finding more when they stopped",
    "infeasible": "the held features leave no direction to search in",
    "diverged": "the search met NaN or infinite values",
}


class Perturb(Config):
    """Where the perturbation lives. sites: empty for the intervention's own. answer: so many tokens
    of the answer in addition to the prompt positions, for behaviors that are read from text; fewer
    where an answer is shorter."""

    sites: tuple[str, ...] = ()
    positions: Where = "last_prompt"
    answer: int = Field(0, ge=0)


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
    """How to search. Everything here changes numbers, so it is part of a trial's identity.

    order: who has the last word at one site. objective: what is climbed; iterates are judged by
    the margin whatever it is. steps: steps of the first attempt. lr: the norm of a
    step as a share of the budget. refine_steps: steps of a bisection round, refine_lr: the norm of
    its first step as a share of the round's ball. tolerance: relative width at which the smallest
    norm is known. doublings: how often the steps are doubled before the answer is `undecided`.
    """

    order: Literal["clamp_then_perturbation", "perturbation_then_clamp"] = "clamp_then_perturbation"
    constraint: Constraint
    objective: Objective = Margin()
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

    delta [n q d_model]: the smallest success, else the iterate with the highest margin; margin
    [n] in logits; norm [n]; smallest_norm [n]: NaN where the goal was never reached; outcomes;
    steps [n]: steps of the attempt that decided; null_dimension [n]; closed_form: what the smallest
    norm is known to be, where it is; trace: the first attempt, one entry a step.
    """

    delta: Tensor
    margin: Tensor
    smallest_norm: Tensor
    outcomes: tuple[Outcome, ...]
    steps: Tensor
    null_dimension: Tensor
    closed_form: ClosedForm
    trace: tuple[dict[str, float], ...] = field(repr=False)

    @property
    def norm(self) -> Tensor:
        return self.delta.norm(dim=(1, 2))


@dataclass
class _Found:
    """The best of every row so far; the one thing the stages of a search write to."""

    delta: Tensor
    margin: Tensor
    steps: Tensor
    outcomes: list[Outcome]

    def keep(self, rows: Tensor, delta: Tensor, margin: Tensor) -> None:
        """Take new iterates of some rows where their margin is higher, or the first one."""
        better = ~(margin <= self.margin[rows])
        self.delta[rows[better]] = delta[better]
        self.margin[rows[better]] = margin[better]


def recover(problem: Problem, spec: RecoverySpec, seed: int) -> Recovery:
    """Search all rows of the problem. Raises nothing for a failed search: outcomes are values."""
    loose, problem = problem, spec.constraint.acting(problem)
    feasible = spec.constraint.feasible(problem)
    n, device = len(problem), problem.goal.device
    found = _Found(
        delta=torch.zeros(problem.shape, device=device),
        margin=torch.full((n,), torch.nan, device=device),
        steps=torch.zeros(n, dtype=torch.long, device=device),
        outcomes=["infeasible"] * n,
    )
    smallest = torch.full((n,), torch.nan, device=device)
    trace: Trace = []
    todo = torch.arange(n, device=device)[feasible.dimension > 0]
    if len(todo):
        _first_attempt(problem, feasible, spec, todo, found, trace)
        failed = _rows_with(found, "undecided")
        if len(failed):
            _try_harder(problem, loose, feasible, spec, seed, failed, found)
        back = _rows_with(found, "recovered")
        short = back[found.margin[back] < problem.goal[back]]
        if len(short):  # the behavior is there, the goal is not: go on, with ever finer steps
            climb = _climb(problem, spec, short, found.delta[short])
            more = ascend(
                problem, feasible, climb, 2 * spec.steps, spec.constraint.stepper, decay=0.1
            )
            found.keep(short, more.delta, more.margin)
        recovered = _rows_with(found, "recovered")
        reached = recovered[found.margin[recovered] >= problem.goal[recovered]]
        if len(reached):
            smallest[reached] = _shrink(problem, feasible, spec, reached, found)
    return Recovery(
        found.delta, found.margin, smallest, tuple(found.outcomes), found.steps,
        feasible.dimension, ClosedForm.of(problem, feasible), _means(trace),
    )  # fmt: skip


def _rows_with(found: _Found, outcome: Outcome) -> Tensor:
    rows = [row for row, name in enumerate(found.outcomes) if name == outcome]
    return torch.as_tensor(rows, dtype=torch.long, device=found.margin.device)


def _climb(problem: Problem, spec: RecoverySpec, rows: Tensor, start: Tensor) -> Climb:
    """One lane a row, to the goal, inside the whole budget."""
    lr = torch.full((len(rows),), spec.lr, device=rows.device)
    return Climb(rows, start, problem.goal[rows], problem.radius[rows], lr)


def _first_attempt(
    problem: Problem,
    feasible: FeasibleSet,
    spec: RecoverySpec,
    rows: Tensor,
    found: _Found,
    trace: Trace,
) -> None:
    """One ascent from zero. Rows without the behavior afterwards are left `undecided`."""
    first = ascend(
        problem, feasible, _climb(problem, spec, rows, found.delta[rows]), spec.steps,
        spec.constraint.stepper, trace=trace,
    )  # fmt: skip
    found.keep(rows, first.delta, first.margin)
    found.steps[rows] = torch.where(first.reached, first.reached_at, spec.steps)
    # The behavior is back where the margin is positive, even if the goal is out of reach.
    back = first.reached | (first.margin > 0)
    for row, ok, bad in zip(rows.tolist(), back, first.diverged, strict=True):
        found.outcomes[row] = "recovered" if ok else "diverged" if bad else "undecided"


def _try_harder(
    problem: Problem,
    loose: Problem,
    feasible: FeasibleSet,
    spec: RecoverySpec,
    seed: int,
    rows: Tensor,
    found: _Found,
) -> None:
    """Search the rows that failed from 3 learning rates x 3 random starts and a warm start.

    Then the lanes that came furthest go on for as many steps again. If that brought the behavior
    back on no further row, the rest is `not_recovered`. Otherwise all of it is done anew with twice
    the steps, and after the last doubling the rest is `undecided`.
    """
    attempt = spec.steps
    for doubling in range(spec.doublings):
        climb = _starts(problem, loose, feasible, spec, seed + doubling, rows)
        half = ascend(problem, feasible, climb, attempt, spec.constraint.stepper)
        _take(found, climb, half, 0)
        further = _furthest(climb, half)
        if not len(further):
            return
        whole = ascend(problem, feasible, further, attempt, spec.constraint.stepper)
        _take(found, further, whole, attempt)
        settled = not whole.reached.any()
        rows = rows[~torch.isin(rows, _rows_with(found, "recovered"))]
        for row in rows.tolist():
            if found.outcomes[row] != "diverged":
                found.outcomes[row] = "not_recovered" if settled else "undecided"
            found.steps[row] = 2 * attempt
        if settled or not len(rows):
            return
        attempt *= 2


def _furthest(climb: Climb, result: Ascent) -> Climb:
    """The lanes that go on, of every row that has not got there: from where they were best."""
    there = climb.rows[result.reached]
    lanes = []
    for row in climb.rows[~torch.isin(climb.rows, there)].unique().tolist():
        own = (climb.rows == row).nonzero().flatten()
        finite = own[~result.diverged[own]]
        own = finite if len(finite) else own
        lanes.append(own[result.margin[own].topk(min(GO_ON, len(own))).indices])
    index = torch.cat(lanes) if lanes else there.new_zeros(0)
    return replace(climb.part(index), start=result.delta[index])


def _take(found: _Found, climb: Climb, result: Ascent, spent: int) -> None:
    """Take of every row the lane that got there first, else the one with the highest margin.

    First and not shortest, so that the choice does not depend on which lanes share a batch.
    spent: steps that these lanes had made before.
    """
    for row in climb.rows.unique().tolist():
        own = (climb.rows == row).nonzero().flatten()
        hit = own[result.reached[own]]
        if len(hit):
            pick = hit[result.reached_at[hit].argmin()]
            found.outcomes[row] = "recovered"
            found.steps[row] = spent + result.reached_at[pick]
        else:
            pick = own[result.margin[own].argmax()]
            if result.diverged[own].all():
                found.outcomes[row] = "diverged"
        found.keep(climb.rows[pick, None], result.delta[pick, None], result.margin[pick, None])


def _starts(
    problem: Problem,
    loose: Problem,
    feasible: FeasibleSet,
    spec: RecoverySpec,
    seed: int,
    rows: Tensor,
) -> Climb:
    """The lanes of a harder search: is the behavior there at all, by more than rounding?

    loose: the problem without what the constraint does to it, for the warm start. Random starts are
    drawn by the example's id, so that they do not depend on the batch.
    """
    _, q, d = problem.shape
    device = rows.device
    sets, goal, radius = feasible.rows(rows), BACK * problem.goal[rows], problem.radius[rows]
    lanes = []

    def add(start: Tensor, lr: float) -> None:
        rate = torch.full((len(rows),), lr, device=device)
        lanes.append(Climb(rows, start, goal, radius, rate))

    for index in range(3):
        names = [f"{seed}/{index}/{problem.batch.ids[row]}" for row in rows.tolist()]
        noise = torch.zeros(len(rows), q, d, device=device)
        for lane, (name, own) in enumerate(zip(names, problem.perturbed[rows], strict=True)):
            noise[lane, own] = _noise(name, int(own.sum()), d).to(device)
        point = sets.retract(sets.tangent(noise, Iterate.zero(noise)))
        point = point / norms(point).clamp_min(1e-30) * (0.5 * radius)[:, None, None]
        for factor in (1 / 3, 1.0, 3.0):
            add(point, factor * spec.lr)
    looser = spec.constraint.looser
    if looser is not None:
        zero = torch.zeros(len(rows), q, d, device=device)
        rate = torch.full((len(rows),), spec.lr, device=device)
        eased = looser.acting(loose)
        warm = ascend(
            eased, looser.feasible(eased), Climb(rows, zero, goal, radius, rate), spec.steps,
            looser.stepper,
        )  # fmt: skip
        origin = Iterate.zero(warm.delta)
        add(sets.inside(sets.tangent(warm.delta, origin), radius, origin), spec.lr)
    return Climb.join(lanes)


def _noise(key: str, p: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(digest(key)[:15], 16))
    return torch.randn(p, d, generator=generator)


def _shrink(
    problem: Problem, feasible: FeasibleSet, spec: RecoverySpec, rows: Tensor, found: _Found
) -> Tensor:
    """Bisect the norm of each successful row, searching anew inside every smaller ball: [n].

    Each round starts from the smallest success so far, scaled into the ball of the round; a
    direction that only had to be good enough for a large ball is so turned into a better one.
    """
    high = norms(found.delta[rows]).flatten()
    low = torch.zeros_like(high)
    for _ in range(MAX_ROUNDS):
        todo = ((high - low) > spec.tolerance * high).nonzero().flatten()
        if not len(todo):
            break
        radius = (high + low)[todo] / 2
        start = into_ball(found.delta[rows[todo]], radius)
        lr = torch.full_like(radius, spec.refine_lr)
        climb = Climb(rows[todo], start, problem.goal[rows[todo]], radius, lr)
        result = ascend(
            problem, feasible, climb, spec.refine_steps, spec.constraint.stepper, decay=0.1
        )
        hit, miss = todo[result.reached], todo[~result.reached]
        shorter = result.delta[result.reached]
        found.delta[rows[hit]], found.margin[rows[hit]] = shorter, result.margin[result.reached]
        high[hit] = norms(shorter).flatten()
        low[miss] = radius[~result.reached]
    return high


def _means(trace: Trace) -> tuple[dict[str, float], ...]:
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
