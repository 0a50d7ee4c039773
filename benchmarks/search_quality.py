"""The default search recovers at least 98 % of the prompts that it or a far larger search recovers.

The oracle knows nothing of the default's result: on the same problems, inside the same constraint
and budget, it climbs from 20 random feasible starts with 10 times the steps at three learning
rates, then bisects the smallest norm with 10 times the steps a round from 3 starts. Share =
default / (default or oracle), over prompts; for the behavior (margin > 0) and for the goal (half
of the prompt's clean margin). Norms are compared on prompts that both brought to the goal.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import ceil, log2, nan

import torch
from torch import Tensor

from benchmarks.harness import Bound, Cell, Options, Result, progress
from holdfast.ascent import Ascent, Climb, ascend
from holdfast.attacks.residual import pose
from holdfast.controls import Case
from holdfast.executor import Runtime, load_lab
from holdfast.planning import plan
from holdfast.problem import Problem, relative_violation
from holdfast.recovery import Recovery, RecoverySpec, recover
from holdfast.study import bundled, parse
from holdfast.subspace import FeasibleSet, into_ball, norms
from holdfast.trial import Lab, Trial

SHARE = 0.98
CONSTRAINTS = ("encoder_null", "unconstrained")
PROMPTS = 60
LANES = 256
"""Most lanes in one pass: `ascend` splits a larger search, which bounds its memory."""

COLUMNS = (
    "audit", "constraint", "sought", "prompts", "default", "oracle", "either", "share",
    "norm ratio, median", "norm ratio, 90 %",
)  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """How much more than the default the oracle does."""

    starts: int = 20
    starts_at_once: int = 5
    steps: int = 10
    refine_starts: int = 3
    refine_steps: int = 10
    rates: tuple[float, ...] = (1.0, 1 / 3, 3.0)


QUICK = Effort(starts=4, starts_at_once=2, steps=2, refine_steps=2)


@dataclass(frozen=True)
class Found:
    """What a search found on n prompts: smallest [n] is NaN where the goal was not reached."""

    margin: Tensor
    smallest: Tensor
    seconds: float

    @property
    def recovered(self) -> Tensor:
        return self.margin > 0

    @property
    def reached(self) -> Tensor:
        return ~self.smallest.isnan()


def run(options: Options) -> Result:
    effort = QUICK if options.quick else Effort()
    limit = options.limit or (8 if options.quick else PROMPTS)
    planned = plan(parse(bundled("demo")))
    trials = [
        trial
        for trial in planned.trials
        if trial.control.kind == "none" and trial.recovery.constraint.kind in CONSTRAINTS
    ]
    lab = load_lab(planned, trials, Runtime(batch_size=LANES))
    rows: list[tuple[Cell, ...]] = []
    shares: dict[str, float] = {}
    seconds = torch.zeros(2)
    for trial in trials:
        names = (trial.audit, trial.recovery.constraint.kind)
        progress.print(f"  {', '.join(names)}")
        problem = problem_of(trial, lab, limit)
        if problem is None:
            rows.append((*names, "behavior", 0, *[None] * (len(COLUMNS) - 4)))
            continue
        default = by_default(problem, trial.recovery, trial.seed)
        oracle = by_oracle(problem, trial.recovery, effort)
        behavior = counts(default.recovered, oracle.recovered)
        goal = counts(default.reached, oracle.reached)
        rows.append((*names, "behavior", len(problem), *behavior, None, None))
        rows.append((*names, "goal", len(problem), *goal, *norm_ratios(default, oracle)))
        seconds += torch.tensor([default.seconds, oracle.seconds])
        if behavior[-1] is not None:
            shares[", ".join(names)] = behavior[-1]
    worst = min(shares, key=lambda where: shares[where], default="no prompt recovered anywhere")
    return Result(
        columns=COLUMNS,
        rows=tuple(rows),
        bounds=(Bound(f"smallest share, behavior ({worst})", shares.get(worst, nan), SHARE, True),),
        settings={
            "prompts_at_most": limit,
            "oracle_starts": effort.starts,
            "oracle_steps": effort.steps * trials[0].recovery.steps,
            "oracle_refine_starts": effort.refine_starts,
            "oracle_refine_steps": effort.refine_steps * trials[0].recovery.refine_steps,
            "default_seconds": float(seconds[0]),
            "oracle_seconds": float(seconds[1]),
            "subjects": " ".join(sorted({t.subject.weights_sha256[:12] for t in trials})),
        },
    )


def problem_of(trial: Trial, lab: Lab, limit: int) -> Problem | None:
    """The trial's problem for at most `limit` prompts, or None if no prompt is valid."""
    setting = lab.setting(trial, trial.subject)
    case = some(trial.control.case(setting, lambda: lab.twin_setting(trial)), limit)
    return pose(trial.recovery, case) if len(case.rows) else None


def counts(default: Tensor, oracle: Tensor) -> tuple[int, int, int, float | None]:
    """Prompts by default, by the oracle and by either, and the default's share of the last."""
    found = int(default.sum()), int(oracle.sum()), int((default | oracle).sum())
    return *found, found[0] / found[2] if found[2] else None


def norm_ratios(default: Found, oracle: Found) -> tuple[float | None, float | None]:
    """Median and 90 % quantile of the default's smallest norm over the oracle's."""
    ratio = (default.smallest / oracle.smallest)[default.reached & oracle.reached].double()
    if not len(ratio):
        return None, None
    return float(ratio.quantile(0.5)), float(ratio.quantile(0.9))


def some(case: Case, limit: int) -> Case:
    """At most `limit` of the case's prompts, evenly spaced, so that every kind is among them."""
    n = len(case.rows)
    if n <= limit:
        return case
    index = torch.linspace(0, n - 1, limit).round().long()
    return replace(
        case,
        rows=case.rows[index],
        batch=case.batch.rows(index),
        clean_margin=case.clean_margin[index],
    )


def by_default(problem: Problem, spec: RecoverySpec, seed: int) -> Found:
    start = time.perf_counter()
    found: Recovery = recover(problem, spec, seed)
    return Found(found.margin, found.smallest_norm, time.perf_counter() - start)


def by_oracle(problem: Problem, spec: RecoverySpec, effort: Effort) -> Found:
    """Random restarts until the goal is reached, then the smallest norm that reaches it."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(20)  # `recover` draws its noise by example id
    feasible = spec.constraint.feasible(problem)
    n = len(problem)
    margin = torch.full((n,), -torch.inf)
    best = torch.zeros(problem.shape)
    reached = torch.zeros(n, dtype=torch.bool)
    for first in range(0, effort.starts, effort.starts_at_once):
        rows = (~reached).nonzero().flatten()
        if not len(rows):
            break
        lanes = rows.repeat_interleave(min(effort.starts_at_once, effort.starts - first))
        radius = problem.radius[lanes]
        length = radius * torch.rand(len(lanes), generator=generator)
        rates = torch.tensor(effort.rates).repeat(len(lanes))[: len(lanes)]
        climb = Climb(
            lanes,
            random_points(problem, feasible, lanes, length, generator),
            problem.goal[lanes],
            radius,
            spec.lr * rates,
        )
        result = ascend(
            problem, feasible, climb, effort.steps * spec.steps, spec.constraint.stepper, decay=0.1
        )
        check_inside(problem, spec, climb, result)
        for lane in range(len(lanes)):
            row = int(lanes[lane])
            if result.margin[lane] > margin[row]:
                margin[row], best[row] = result.margin[lane], result.delta[lane]
        reached[lanes[result.reached]] = True
    smallest = torch.full((n,), nan)
    rows = reached.nonzero().flatten()
    if len(rows):
        smallest[rows] = shortest(problem, feasible, spec, effort, rows, best[rows], generator)
    return Found(margin, smallest, time.perf_counter() - start)


def shortest(
    problem: Problem,
    feasible: FeasibleSet,
    spec: RecoverySpec,
    effort: Effort,
    rows: Tensor,
    delta: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """[len(rows)] the smallest norm that reaches the goal, by bisection.

    A round asks whether a ball holds a success, from the smallest success so far and from fresh
    random points on its surface.
    """
    high = norms(delta).flatten()
    low = torch.zeros_like(high)
    for _ in range(ceil(log2(1 / spec.tolerance)) + 1):
        todo = ((high - low) > spec.tolerance * high).nonzero().flatten()
        if not len(todo):
            break
        radius = (high + low)[todo] / 2
        starts = [into_ball(delta[todo], radius)]
        for _ in range(effort.refine_starts - 1):
            starts.append(random_points(problem, feasible, rows[todo], radius, generator))
        goal, lr = problem.goal[rows[todo]], torch.full_like(radius, spec.refine_lr)
        climb = Climb.join([Climb(rows[todo], start, goal, radius, lr) for start in starts])
        result = ascend(
            problem, feasible, climb, effort.refine_steps * spec.refine_steps,
            spec.constraint.stepper, decay=0.01,
        )  # fmt: skip
        check_inside(problem, spec, climb, result)
        lengths = norms(result.delta).flatten().where(result.reached, torch.inf)
        length, start = lengths.view(effort.refine_starts, -1).min(0)
        hit = length.isfinite()
        found = result.delta.view(effort.refine_starts, len(todo), *delta.shape[1:])
        delta[todo[hit]] = found[start, torch.arange(len(todo))][hit]
        high[todo[hit]] = length[hit]
        low[todo[~hit]] = radius[~hit]
    return high


def random_points(
    problem: Problem,
    feasible: FeasibleSet,
    lanes: Tensor,
    length: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """[n p d] feasible points of a given length in random directions."""
    _, p, d = problem.shape
    noise = torch.randn(len(lanes), p, d, generator=generator) * problem.perturbed[lanes][..., None]
    point = feasible.rows(lanes).retract(noise)
    return point * (length[:, None, None] / norms(point).clamp_min(1e-30))


def check_inside(problem: Problem, spec: RecoverySpec, climb: Climb, result: Ascent) -> None:
    """The oracle plays by the same rules: inside the ball, and the held features where they are."""
    assert bool((norms(result.delta).flatten() <= climb.radius * (1 + 1e-5)).all())
    if spec.constraint.kind == "encoder_null":
        assert float(relative_violation(problem, result.delta, climb.rows).max()) < 1e-6
