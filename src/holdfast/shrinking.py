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

AHEAD = (0.5, 0.75)
"""Where between the largest failure and the smallest success a round searches. The second is where
bisection goes on if the first fails, from the same start: so two rounds are made as lanes of one
(docs/log.md has the measurement)."""


def shrink(stack: Stack, rows: Tensor, best: Best) -> Tensor:
    """Bisect the norm of each successful row, searching anew inside every smaller ball: [n].

    Each round starts from the smallest success so far, scaled into the balls of the round; a
    direction that only had to be good enough for a large ball is so turned into a better one.
    """
    problem, spec = stack.problem, stack.spec
    at = torch.as_tensor(AHEAD, device=rows.device)
    high = norms(best.delta[rows]).flatten()
    low = torch.zeros_like(high)
    for _ in range(MAX_ROUNDS):
        todo = ((high - low) > spec.tolerance * high).nonzero().flatten()
        if not len(todo):
            break
        balls = low[todo, None] + (high - low)[todo, None] * at  # [todo balls], the smallest first
        own, radius = rows[todo].repeat_interleave(len(at)), balls.flatten()
        start, lr = into_ball(best.delta[own], radius), torch.full_like(radius, spec.refine_lr)
        climb = Climb(own, start, problem.goal[own], radius, lr)
        result = ascend(problem, stack.feasible, climb, spec.refine_steps, stack.stepper, decay=0.1)
        best.count(own, result.passes)
        # How many balls, from the smallest on, were too small: those before the first success.
        n_failed = (~result.reached.view_as(balls)).int().cumprod(1).sum(1)
        each = torch.arange(len(todo), device=rows.device)
        hit, failed = n_failed < len(at), n_failed > 0
        lane = (each * len(at) + n_failed)[hit]
        best.delta[rows[todo[hit]]] = result.delta[lane]
        best.margin[rows[todo[hit]]] = result.margin[lane]
        high[todo[hit]] = norms(result.delta[lane]).flatten()
        low[todo[failed]] = balls[each, n_failed - 1][failed]
    return high
