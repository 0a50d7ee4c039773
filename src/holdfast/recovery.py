"""Search: bring the behavior back inside constraint ∩ ball, then find the smallest norm that does.

Every row is its own problem: steps are scaled by the row's own budget and gradients never mix, so a
batch changes nothing, and several searches can be rows of one (`stack.py`). A failed search proves
nothing, so `not_recovered` is said only after the checks of `harder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from holdfast.ascent import Climb, Noted, Trace, ascend
from holdfast.closed_form import ClosedForm
from holdfast.config import LATER, Config
from holdfast.constraints import Constraint
from holdfast.harder import try_harder
from holdfast.objectives import Objective
from holdfast.objectives.margin import Margin
from holdfast.outcome import SENTENCES, Best, Outcome, summary_of
from holdfast.positions import Where
from holdfast.problem import Problem
from holdfast.schedule import Schedule
from holdfast.scheduled import follow
from holdfast.shrinking import shrink
from holdfast.stack import Search, Stack
from holdfast.timed import shares

__all__ = [
    "SENTENCES", "Budget", "Outcome", "Perturb", "Recovery", "RecoverySpec", "Search", "Stop",
    "recover", "recover_together", "summary_of",
]  # fmt: skip


class Perturb(Config):
    """Where the perturbation lives.

    sites: empty for the intervention's own. include_bos: the BOS token too, where the positions
    name it. answer: so many tokens of the answer in addition to the prompt positions, for behaviors
    that are read from text; fewer where an answer is shorter.
    """

    sites: tuple[str, ...] = ()
    positions: Where = "last_prompt"
    include_bos: Annotated[bool, LATER] = False
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
    schedule: search by these stages in place of all that, as a published search did; the norm that
    is reported as the smallest is then the one they ended at. seed: of starts and draws of the
    search alone, with prompts, splits and features as they are; None for the study's.
    """

    order: Literal["clamp_then_perturbation", "perturbation_then_clamp"] = "clamp_then_perturbation"
    constraint: Constraint
    objective: Annotated[Objective, LATER] = Margin()
    perturb: Perturb = Perturb()
    budget: Budget = Budget(relative=0.25)
    stop: Stop = Stop()
    steps: int = Field(100, ge=1)
    lr: float = Field(0.1, gt=0)
    refine_steps: int = Field(30, ge=1)
    refine_lr: float = Field(0.5, gt=0)
    tolerance: float = Field(0.005, gt=0, lt=1)
    doublings: int = Field(2, ge=1)
    # Left out of an identity where it changes nothing.
    schedule: Annotated[Schedule | None, LATER] = None
    seed: Annotated[int | None, LATER] = None

    @model_validator(mode="after")
    def _can_be_staged(self) -> RecoverySpec:
        stages = self.schedule.stages if self.schedule is not None else ()
        if any(stage.at == "answer" for stage in stages) and not self.perturb.answer:
            raise ValueError(
                'a stage at = "answer" needs positions of the answer: set perturb.answer'
            )
        if any(stage.at != "all" for stage in stages) and self.constraint.exact:
            raise ValueError(
                f"stages of some positions leave the others where they are, and "
                f"{self.constraint.kind} keeps its promise for all of them together: use at = "
                '"all", or a constraint that promises nothing (unconstrained, '
                "gradient_projection, jacobian_probes)"
            )
        return self

    @property
    def adapted(self) -> str:
        """In what this is not the published search its constraint is kept for, "" for nothing."""
        return self.constraint.adapted(self.schedule is not None)

    @property
    def pace(self) -> tuple[float | str, ...]:
        """How long a search is: what searches that share their steps have in common."""
        return (
            self.steps, self.lr, self.refine_steps, self.refine_lr, self.tolerance, self.doublings,
            "" if self.schedule is None else self.schedule.model_dump_json(),
        )  # fmt: skip


@dataclass(frozen=True)
class Recovery:
    """What the search found for n rows.

    delta [n q d_model]: the smallest success, else the iterate with the highest margin; margin
    [n] in logits; norm [n]; smallest_norm [n]: NaN where the goal was never reached; outcomes;
    steps [n]: steps of the attempt that decided; null_dimension [n]; closed_form: what the smallest
    norm is known to be, where it is; trace: the first attempt, one entry a step; lane_steps [n]:
    how often a lane of the row was run; own_seconds: what the constraint took by itself, beside the
    passes that it shares with other searches.
    """

    delta: Tensor
    margin: Tensor
    smallest_norm: Tensor
    outcomes: tuple[Outcome, ...]
    steps: Tensor
    null_dimension: Tensor
    closed_form: ClosedForm
    trace: tuple[dict[str, float], ...] = field(repr=False)
    lane_steps: Tensor = field(repr=False)
    own_seconds: float = field(default=0.0, repr=False)

    @property
    def norm(self) -> Tensor:
        return self.delta.norm(dim=(1, 2))


def recover(problem: Problem, spec: RecoverySpec, seed: int) -> Recovery:
    """Search all rows of the problem. Raises nothing for a failed search: outcomes are values."""
    (found,) = recover_together(problem, [Search(len(problem), spec, seed)])
    return found


def recover_together(problem: Problem, searches: Sequence[Search]) -> list[Recovery]:
    """What each of several searches finds on its own rows of the problem, all of them at once.

    searches: in the order of their rows; alike in all but constraint, budget, goal and seed, the
    second and third of which are the problem's. Raises ConstraintError.
    """
    stack = Stack.of(problem, searches)
    problem, feasible = stack.problem, stack.feasible
    device = problem.goal.device
    best = Best.none(problem.shape, device)
    smallest = torch.full((len(problem),), torch.nan, device=device)
    trace: Trace = []
    dimension = feasible.dimension
    todo = torch.arange(len(problem), device=device)[dimension > 0]
    if len(todo) and stack.spec.schedule is not None:
        follow(stack, stack.spec.schedule, todo, best, trace)
        back = best.rows_with("recovered")
        reached = back[best.margin[back] >= problem.goal[back]]
        smallest[reached] = best.delta[reached].norm(dim=(1, 2))
    elif len(todo):
        _first_attempt(stack, todo, best, trace)
        failed = best.rows_with("undecided")
        if len(failed):
            try_harder(stack, failed, best)
        back = best.rows_with("recovered")
        short = back[best.margin[back] < problem.goal[back]]
        if len(short):  # the behavior is there, the goal is not: go on, with ever finer steps
            _go_on(stack, short, best)
        recovered = best.rows_with("recovered")
        reached = recovered[best.margin[recovered] >= problem.goal[recovered]]
        if len(reached):
            smallest[reached] = shrink(stack, reached, best)
    closed = _closed_form(stack)
    lanes = [int(best.lane_steps[rows].sum()) for _, rows in stack.parts]
    return [
        Recovery(
            best.delta[rows], best.margin[rows], smallest[rows], tuple(best.outcomes[rows]),
            best.steps[rows], dimension[rows], ClosedForm(closed.norm[rows], closed.share[rows]),
            _means(trace, rows), best.lane_steps[rows], own,
        )
        for (_, rows), own in zip(stack.parts, shares(stack.clocks, lanes), strict=True)
    ]  # fmt: skip


def _climb(stack: Stack, rows: Tensor, start: Tensor) -> Climb:
    """One lane a row, to the goal, inside the whole budget."""
    problem = stack.problem
    lr = torch.full((len(rows),), stack.spec.lr, device=rows.device)
    return Climb(rows, start, problem.goal[rows], problem.radius[rows], lr)


def _first_attempt(stack: Stack, rows: Tensor, best: Best, trace: Trace) -> None:
    """One ascent from zero. Rows without the behavior afterwards are left `undecided`."""
    climb, steps = _climb(stack, rows, best.delta[rows]), stack.spec.steps
    first = ascend(stack.problem, stack.feasible, climb, steps, stack.stepper, trace=trace)
    best.count(rows, first.passes)
    best.keep(rows, first.delta, first.margin)
    best.steps[rows] = torch.where(first.reached, first.reached_at, steps)
    # The behavior is back where the margin is positive, even if the goal is out of reach.
    back = first.reached | (first.margin > 0)
    for row, ok, bad in zip(rows.tolist(), back, first.diverged, strict=True):
        best.outcomes[row] = "recovered" if ok else "diverged" if bad else "undecided"


def _go_on(stack: Stack, rows: Tensor, best: Best) -> None:
    """Another ascent of rows that have come some of the way, from where they are."""
    climb = _climb(stack, rows, best.delta[rows])
    more = ascend(
        stack.problem, stack.feasible, climb, 2 * stack.spec.steps, stack.stepper, decay=0.1
    )
    best.count(rows, more.passes)
    best.keep(rows, more.delta, more.margin)


def _closed_form(stack: Stack) -> ClosedForm:
    """Of every row, as its own constraint has it."""
    norm = torch.full_like(stack.problem.goal, torch.nan)
    share = norm.clone()
    for part in stack.posed:
        known = ClosedForm.of(part.problem, part.feasible)
        norm[part.rows], share[part.rows] = known.norm, known.share
    return ClosedForm(norm, share)


def _means(trace: Trace, rows: slice) -> tuple[dict[str, float], ...]:
    """Of a search's rows: the mean margin and norm over its lanes still searching at each step, the
    largest violation, and how many have reached their goal so far."""
    entries, n_reached = [], 0
    steps: dict[int, list[tuple[Noted, Tensor]]] = {}
    for noted in trace:
        own = noted.searching & (noted.rows >= rows.start) & (noted.rows < rows.stop)
        steps.setdefault(noted.step, []).append((noted, own))
    for step, parts in sorted(steps.items()):
        n = sum(int(own.sum()) for _, own in parts)
        if not n:
            continue
        n_reached += sum(int(noted.reached[own].sum()) for noted, own in parts)
        entries.append(
            {
                "step": step,
                "n_searching": n,
                "n_reached": n_reached,
                "margin_mean": sum(float(x.margin[own].nan_to_num().sum()) for x, own in parts) / n,
                "norm_relative_mean": sum(float(x.norm[own].sum()) for x, own in parts) / n,
                "violation_max": max(
                    float(x.violation[own].max()) for x, own in parts if own.any()
                ),
            }
        )
    return tuple(entries)
