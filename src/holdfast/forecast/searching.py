"""The work of a search: its steps, and what they begin with."""

from __future__ import annotations

from dataclasses import replace

from holdfast.forecast.reading import whole_saes
from holdfast.forecast.scene import Scene
from holdfast.forecast.work import Stage, Work, total
from holdfast.harder import GO_ON
from holdfast.schedule import Stage as Staged

LIVE = 0.5
"""Share of the lanes that are still searching in an average step where everything is recovered;
the batch's last lane decides how many steps there are. On the organism it is 0.3 to 0.55."""

OUTSIDE = 3
"""What a step does outside of blocks (margin, projections, bookkeeping of lanes), in calls of a
block; it counts only where operations are too small to fill a device."""

STARTS = 9
"""Lanes of a row in a harder search: three learning rates from three random points."""

PROJECTIONS = 8
"""Times a slot's vector meets the features held there: a step and an iterate are projected, each
twice for rounding, in two products."""

BASIS = 8
"""Operations of an orthonormal basis of k vectors in d dimensions, by d·k²: found twice, as rank
is told by pivots."""


def searching(scene: Scene) -> Stage:
    """The first attempt and the bisection, or the first attempt and the harder search."""
    spec = scene.search
    if spec.schedule is not None:
        fixed = total([_staged(scene, stage) for stage in spec.schedule.stages])
        fixed += bases(scene) + forwards(scene, scene.rows)
        return Stage("search", fixed, fixed)
    first = spec.steps + 1
    refine = scene.rounds * (spec.refine_steps + 1)
    least = _steps(scene, first + refine, scene.rows * LIVE, at_least=True)
    lanes = scene.rows * STARTS
    most = _steps(scene, first, scene.rows)
    if spec.constraint.looser is not None:
        most += _steps(scene, first, scene.rows)
        lanes += scene.rows
    # Nothing is found for good when the best lanes, going on for as many steps, find nothing.
    most += _steps(scene, first, lanes) + _steps(scene, first, scene.rows * GO_ON)
    return Stage("search", bases(scene) + least, bases(scene) + most)


def bases(scene: Scene) -> Work:
    """What a constraint reads of the whole SAE at every slot before the first step, and the basis
    that it makes of it there."""
    if not scene.search.constraint.sees_all:
        return Work()
    slots, d = scene.rows * scene.positions, scene.model.d_model
    made = sum(BASIS * d * k**2 for k in scene.held.values()) * slots
    return whole_saes(scene, tuple(scene.held), slots, 1) + Work(flops32=made)


def step(scene: Scene, lanes: float, at_least: bool = False) -> Work:
    """One step of the search with so many lanes, without launches: forward to what is read, back to
    the perturbation, and onto the constraint."""
    run, again = forwards(scene, lanes), _between(scene, lanes)
    return run * 2 + again * _repeats(scene, at_least) + _slices(scene, lanes)


def forwards(scene: Scene, lanes: float) -> Work:
    """The pass of one step, without launches."""
    first, columns, tokens = scene.sites[0].depth, scene.columns, scene.tokens
    return scene.passes.replay(lanes, first, columns, tokens, scene.n_logits, scene.read_depth)


def _between(scene: Scene, lanes: float) -> Work:
    """A pass from the lowest perturbed to the last held site."""
    first, columns, tokens = scene.sites[0].depth, scene.columns, scene.tokens
    return scene.passes.replay(lanes, first, columns, tokens, last=scene.last_held.depth)


def _steps(scene: Scene, steps: int, lanes: float, at_least: bool = False) -> Work:
    n_batches = -(-int(lanes / (LIVE if at_least else 1)) // max(1, scene.sizes.steps))
    first, last = scene.sites[0].depth, scene.last_held.depth
    again = scene.passes.launches(first, last, back=False) + Work(calls=OUTSIDE)
    launches = scene.passes.launches(first, scene.read_depth) + Work(calls=OUTSIDE)
    launches += again * _repeats(scene, at_least)
    return (step(scene, lanes, at_least) + launches * n_batches) * steps


def _staged(scene: Scene, stage: Staged) -> Work:
    """All steps of a stage, each with a look at how far held features have moved; and at every
    checkpoint the objective and the codes of what was reached."""
    schedule = scene.search.schedule
    assert schedule is not None
    if stage.objective is not None:
        spec = scene.search.model_copy(update={"objective": stage.objective})
        scene = replace(scene, trial=scene.trial.model_copy(update={"recovery": spec}))
    rows, rule = scene.rows, schedule.checkpoint
    seen = _between(scene, rows)
    offers = 0 if rule is None else stage.steps // rule.every + 2
    return (
        _steps(scene, stage.steps, rows)
        + seen * stage.steps
        + (forwards(scene, rows) + seen) * offers
    )


def _repeats(scene: Scene, at_least: bool) -> int:
    """None where what is held is where the vector is: that is linear algebra."""
    if scene.last_held == scene.sites[0]:
        return 0
    least, most = scene.search.constraint.repeats(len(scene.sites))
    return least if at_least else most


def _slices(scene: Scene, lanes: float) -> Work:
    """Projecting a step and an iterate, and clamps at later sites."""
    d, works = scene.model.d_model, [projected(scene, PROJECTIONS)]
    for site, k in scene.features.items():
        if site > scene.sites[0]:
            works.append(Work(flops32=8 * d * (k + scene.whole[site]) * scene.columns))
    return total(works) * lanes


def projected(scene: Scene, products: float) -> Work:
    """So many products of each slot's vector with the features that are held there, of a row."""
    held = sum(k for site, k in scene.held.items() if site in scene.sites)
    return Work(flops32=2 * products * scene.model.d_model * held * scene.positions)
