"""The smallest norm that still reaches the goal: bisection of each row's own."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.ascent import Climb, ascend
from holdfast.outcome import Best
from holdfast.stack import Stack
from holdfast.subspace import into_ball, norms

MAX_ROUNDS = 40
"""Most bisection rounds; a norm of 1e-9 of the first success would still be found to tolerance."""


def shrink(stack: Stack, rows: Tensor, best: Best) -> Tensor:
    """Bisect the norm of each successful row, searching anew inside every smaller ball: [n].

    Each round starts from the smallest success so far, scaled into the ball of the round; a
    direction that only had to be good enough for a large ball is so turned into a better one.
    """
    problem, spec = stack.problem, stack.spec
    high = norms(best.delta[rows]).flatten()
    low = torch.zeros_like(high)
    for _ in range(MAX_ROUNDS):
        todo = ((high - low) > spec.tolerance * high).nonzero().flatten()
        if not len(todo):
            break
        radius = (high + low)[todo] / 2
        start = into_ball(best.delta[rows[todo]], radius)
        lr = torch.full_like(radius, spec.refine_lr)
        climb = Climb(rows[todo], start, problem.goal[rows[todo]], radius, lr)
        result = ascend(problem, stack.feasible, climb, spec.refine_steps, stack.stepper, decay=0.1)
        best.count(climb.rows, result.passes)
        hit, miss = todo[result.reached], todo[~result.reached]
        shorter = result.delta[result.reached]
        best.delta[rows[hit]], best.margin[rows[hit]] = shorter, result.margin[result.reached]
        high[hit] = norms(shorter).flatten()
        low[miss] = radius[~result.reached]
    return high
