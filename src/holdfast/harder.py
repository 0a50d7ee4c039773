"""A harder search of the rows that failed, before nothing found is said to be nothing there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from holdfast.ascent import Ascent, Climb, ascend
from holdfast.canonical import digest
from holdfast.outcome import Best
from holdfast.stack import Stack
from holdfast.subspace import FeasibleSet, Iterate, norms

BACK = 0.01
"""Share of the goal from which a margin counts as positive beyond rounding."""

GO_ON = 3
"""Lanes of a row that go on for the second half of a harder search."""


def try_harder(stack: Stack, rows: Tensor, best: Best) -> None:
    """Search the rows that failed from 3 learning rates x 3 random starts and a warm start.

    Then the lanes that came furthest go on for as many steps again. If that brought the behavior
    back on no further row of a search, the rest of it is `not_recovered`. Otherwise all of it is
    done anew with twice the steps, and after the last doubling the rest is `undecided`.
    """
    problem, feasible, stepper = stack.problem, stack.feasible, stack.stepper
    attempt = stack.spec.steps
    for doubling in range(stack.spec.doublings):
        climb = _starts(stack, rows, doubling, best)
        half = ascend(problem, feasible, climb, attempt, stepper)
        _take(best, climb, half, 0)
        further = _furthest(climb, half)
        moving = torch.zeros(0, dtype=torch.long, device=rows.device)
        if len(further):
            whole = ascend(problem, feasible, further, attempt, stepper)
            _take(best, further, whole, attempt)
            moving = further.rows[whole.reached]
        left = rows[~torch.isin(rows, best.rows_with("recovered"))]
        again = []
        for _, own in stack.parts:
            mine = left[(left >= own.start) & (left < own.stop)]
            settled = not ((moving >= own.start) & (moving < own.stop)).any()
            for row in mine.tolist():
                if best.outcomes[row] != "diverged":
                    best.outcomes[row] = "not_recovered" if settled else "undecided"
                best.steps[row] = 2 * attempt
            again += [] if settled else [mine]
        rows = torch.cat(again) if again else rows[:0]
        if not len(rows):
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


def _take(best: Best, climb: Climb, result: Ascent, spent: int) -> None:
    """Take of every row the lane that got there first, else the one with the highest margin.

    First and not shortest, so that the choice does not depend on which lanes share a batch.
    spent: steps that these lanes had made before.
    """
    best.count(climb.rows, result.passes)
    for row in climb.rows.unique().tolist():
        own = (climb.rows == row).nonzero().flatten()
        hit = own[result.reached[own]]
        if len(hit):
            pick = hit[result.reached_at[hit].argmin()]
            best.outcomes[row] = "recovered"
            best.steps[row] = spent + result.reached_at[pick]
        else:
            pick = own[result.margin[own].argmax()]
            if result.diverged[own].all():
                best.outcomes[row] = "diverged"
        best.keep(climb.rows[pick, None], result.delta[pick, None], result.margin[pick, None])


def _starts(stack: Stack, rows: Tensor, doubling: int, best: Best) -> Climb:
    """The lanes of a harder search: is the behavior there at all, by more than rounding?

    Random starts are drawn by seed and example, so that they do not depend on the batch. The warm
    start comes from the problem without what the constraint does to it.
    """
    problem, spec = stack.problem, stack.spec
    _, q, d = problem.shape
    device = rows.device
    goal, radius = BACK * problem.goal[rows], problem.radius[rows]
    seeds, ids = stack.seeds, problem.batch.ids
    lanes = []
    for index in range(3):
        noise = torch.zeros(len(rows), q, d, device=device)
        for lane, row in enumerate(rows.tolist()):
            own = problem.perturbed[row]
            key = f"{seeds[row] + doubling}/{index}/{ids[row]}"
            noise[lane, own] = _noise(key, int(own.sum()), d).to(device)
        point = _put(stack, rows, noise, _feasible)
        point = point / norms(point).clamp_min(1e-30) * (0.5 * radius)[:, None, None]
        for factor in (1 / 3, 1.0, 3.0):
            rate = torch.full((len(rows),), factor * spec.lr, device=device)
            lanes.append(Climb(rows, point, goal, radius, rate))
    eased = stack.looser()
    own = rows[:0] if eased is None else eased[1][rows].nonzero().flatten()
    if eased is not None and len(own):
        looser, _ = eased
        zero = torch.zeros(len(own), q, d, device=device)
        rate = torch.full((len(own),), spec.lr, device=device)
        climb = Climb(rows[own], zero, goal[own], radius[own], rate)
        warm = ascend(looser.problem, looser.feasible, climb, spec.steps, looser.stepper)
        best.count(climb.rows, warm.passes)
        stack.charge(looser, climb.rows, warm.passes)

        def back(sets: FeasibleSet, delta: Tensor, at: Tensor) -> Tensor:
            origin = Iterate.zero(delta)
            return sets.inside(sets.tangent(delta, origin), climb.radius[at], origin)

        lanes.append(replace(climb, start=_put(stack, climb.rows, warm.delta, back)))
    return Climb.join(lanes)


def _feasible(sets: FeasibleSet, delta: Tensor, at: Tensor) -> Tensor:
    return sets.retract(sets.tangent(delta, Iterate.zero(delta)))


def _put(
    stack: Stack,
    rows: Tensor,
    delta: Tensor,
    act: Callable[[FeasibleSet, Tensor, Tensor], Tensor],
) -> Tensor:
    """Vectors [n q d] of rows [n] put into their sets by `act`, a piece of rows at a time: some
    sets have passes of their own. act: of some of the rows the sets, the vectors, and their places
    among the n."""
    batching, every = (
        stack.problem.replay.subject.batching, torch.arange(len(rows), device=rows.device),
    )  # fmt: skip
    return torch.cat(
        batching.over("steps", every, lambda at: act(stack.feasible.rows(rows[at]), delta[at], at))
    )


def _noise(key: str, p: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(digest(key)[:15], 16))
    return torch.randn(p, d, generator=generator)
