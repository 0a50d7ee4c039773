"""The work of a trial, stage by stage, in the order in which it is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from holdfast.forecast.comparing import comparing
from holdfast.forecast.scene import Scene
from holdfast.forecast.work import Stage, Work, total
from holdfast.harder import GO_ON

LIVE = 0.5
"""Share of the lanes that are still searching in an average step where everything is recovered;
the batch's last lane decides how many steps there are. On the organism it is 0.3 to 0.55."""

OUTSIDE = 3
"""What a step does outside of blocks (margin, projections, bookkeeping of lanes), in calls of a
block; it counts only where operations are too small to fill a device."""

STARTS = 9
"""Lanes of a row in a harder search: three learning rates from three random points."""

LIKELIHOODS = 6
"""Teacher-forced passes over answers: the clean one in three conditions, each condition's own."""


def stages_of(scene: Scene) -> list[Stage]:
    """All but what is prepared for several trials."""
    if not scene.trial.searches:
        return [attempting(scene)]
    stages = [recording(scene), searching(scene), verifying(scene)]
    if scene.trial.control.clamps_others:
        stages = [elsewhere(scene), *stages]
    if scene.trial.paths is not None:
        clamp = clamped(scene, scene.rows, scene.tokens)
        replayed = forwards(scene, scene.rows)
        stages.append(comparing(scene, clamp, step(scene, scene.rows), replayed))
    return stages


def preparing(scene: Scene) -> Stage:
    """Features and strength on their own splits, then what the clamp does to the test prompts."""
    passes, prompts, behavior = scene.passes, scene.prompts, scene.trial.behavior
    width = prompts.width
    n, beside = prompts.n, prompts.neighbors
    work = passes.full(n["fit"], width)  # what the features do where nothing is clamped
    if scene.trial.discovery.reads_whole:
        for site in scene.saes:
            work += _attribution(scene, site.depth, scene.saes[site].n_features)
    work += passes.full(n["fit"], width) * scene.trial.discovery.passes(tuple(scene.saes))
    work += _corpora(scene)
    n_candidates = len(scene.trial.intervention.candidates())
    if n_candidates > 1:
        tuned = n["tune"] + beside["tune"]
        work += _observed(scene, tuned, False) + _observed(scene, tuned, True) * n_candidates
    tested = n["test"] + beside["test"]
    work += _observed(scene, tested, False) + _observed(scene, tested, True)
    again = math.ceil(behavior.asked_again * tested)
    work += _observed(scene, again, False) * 2 + _observed(scene, again, True)
    if scene.trial.intervention.runs_whole:  # with every feature as it is, and what SAEs explain
        work += _observed(scene, n["test"], True) + passes.full(n["test"], width)
        work += clamped(scene, n["test"], width)
    work += passes.full(n["test"], scene.tokens, behavior.n_read) * 2
    return Stage("prepare", work, work)


def elsewhere(scene: Scene) -> Stage:
    """The same clamp on other features: drawn by what all of them do on the fit split, measured
    there, and applied to the test prompts."""
    n, width, d = scene.prompts.n, scene.prompts.width, scene.model.d_model
    codes = sum(2 * d * scene.saes[s].n_features for s in scene.features) * n["fit"] * width
    work = scene.passes.full(n["fit"], width) * 2 + Work(flops32=codes)
    work += _observed(scene, n["test"] + scene.prompts.neighbors["test"], True)
    work += scene.passes.full(n["test"], scene.tokens, scene.trial.behavior.n_read)
    work = work * scene.trial.control.n_clamps
    return Stage("other features", work, work)


def recording(scene: Scene) -> Stage:
    """The prefix and the suffix, once."""
    work = scene.passes.full(scene.rows, scene.tokens) + clamped(scene, scene.rows, scene.tokens)
    return Stage("record", work, work)


def searching(scene: Scene) -> Stage:
    """The first attempt and the bisection, or the first attempt and the harder search."""
    spec = scene.search
    if spec.schedule is not None:
        fixed = _steps(scene, spec.schedule.steps + 1, scene.rows)
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
    return Stage("search", least, most)


def verifying(scene: Scene) -> Stage:
    """Full passes with and without the saved perturbation, with the clamp in the other order and
    without it; replies where there are any, and how likely they are where the audited behavior
    itself was searched for."""
    behavior, rows, passes = scene.trial.behavior, scene.rows, scene.passes

    def checked(tokens: int) -> Work:
        return (passes.full(rows, tokens, behavior.n_read) + clamped(scene, rows, tokens)) * 2

    work = checked(scene.tokens) + passes.full(rows, scene.tokens, behavior.n_read)
    work += clamped(scene, rows, scene.tokens)
    if scene.trial.is_audit or scene.trial.control.clamps_others:
        work += passes.full(rows, scene.tokens, behavior.n_read)
    if behavior.answer_tokens:
        long = scene.prompts.width + behavior.answer_tokens
        work += _observed(scene, rows, True) + checked(long)
        if scene.trial.is_audit or scene.trial.control.clamps_others:
            work += passes.full(rows, long, behavior.answer_tokens) * LIKELIHOODS
            # Clean answers and two conditions' replies, each alone.
            work += passes.full(scene.prompts.n["test"] + 2 * rows, behavior.answer_tokens)
    return Stage("verify", work, work)


def attempting(scene: Scene) -> Stage:
    """Every script said to every prompt with the clamp and without, and to the opposed prompts that
    turn the model anyway; each turn generates its answer. Or answers to the prompts as they are, or
    a search of the attack's own."""
    rows, opposed, new = scene.rows, scene.prompts.opposed, scene.trial.behavior.answer_tokens
    made = _observed(scene, opposed, False) if opposed else Work()
    for turns in scene.trial.attack.turns:
        for turn in range(1, turns + 1):
            tokens = turn * (scene.prompts.width + new) - new
            made += scene.passes.generate(2 * rows + opposed, tokens, new)
            made += clamped(scene, rows, tokens + new)
    judged, without, beside = scene.trial.attack.answers
    if judged and new:
        made += _observed(scene, judged * rows, True)
        made += _observed(scene, without * rows + beside * opposed, False)
        if scene.trial.attack.reads_likelihood:
            every = (judged + without) * rows + beside * opposed
            made += scene.passes.full(every, scene.prompts.width + new, new)
    elif judged:  # drawn from the logits of one pass each
        made += _observed(scene, rows, True) + _observed(scene, rows, False)
    steps, added = scene.trial.attack.climbs
    if steps:
        tokens, n_read = scene.prompts.width + added, scene.trial.behavior.n_read
        climbed = scene.passes.full(rows, tokens + n_read - 1, n_read, back_to=0)
        # The monitor reads the same pass; then it is observed clean, as it began, and as it ended.
        made += (climbed + clamped(scene, rows, tokens)) * steps + _observed(scene, 3 * rows, True)
    return Stage("attempt", made, made)


def step(scene: Scene, lanes: float, at_least: bool = False) -> Work:
    """One step of the search with so many lanes, without launches: forward to what is read, back to
    the perturbation, and onto the constraint."""
    first, columns, tokens = scene.sites[0].depth, scene.columns, scene.tokens
    run = forwards(scene, lanes)
    again = scene.passes.replay(lanes, first, columns, tokens, last=scene.last_held.depth)
    return run * 2 + again * _repeats(scene, at_least) + _slices(scene, lanes)


def forwards(scene: Scene, lanes: float) -> Work:
    """The pass of one step, without launches."""
    first, columns, tokens = scene.sites[0].depth, scene.columns, scene.tokens
    return scene.passes.replay(lanes, first, columns, tokens, scene.n_logits, _read_depth(scene))


def _steps(scene: Scene, steps: int, lanes: float, at_least: bool = False) -> Work:
    n_batches = -(-int(lanes / (LIVE if at_least else 1)) // max(1, scene.sizes.steps))
    first, last = scene.sites[0].depth, scene.last_held.depth
    again = scene.passes.launches(first, last, back=False) + Work(calls=OUTSIDE)
    launches = scene.passes.launches(first, _read_depth(scene)) + Work(calls=OUTSIDE)
    launches += again * _repeats(scene, at_least)
    return (step(scene, lanes, at_least) + launches * n_batches) * steps


def _read_depth(scene: Scene) -> int | None:
    """Where a step's pass ends, None at the last block."""
    return None if scene.read_at is None else scene.read_at.depth


def _repeats(scene: Scene, at_least: bool) -> int:
    least, most = scene.search.constraint.repeats(len(scene.sites))
    return least if at_least else most


def _slices(scene: Scene, lanes: float) -> Work:
    """Projecting a step and an iterate (two products each), and clamps at later sites."""
    d, works = scene.model.d_model, []
    for site, k in scene.features.items():
        if site in scene.sites:
            works.append(Work(flops32=8 * d * k * scene.positions))
        if site > scene.sites[0]:
            used = k + scene.whole[site]
            works.append(Work(flops32=8 * d * used * scene.columns))
    return total(works) * lanes


def _observed(scene: Scene, rows: int, under_clamp: bool) -> Work:
    """What the behavior sees of some prompts: a pass, or answers where these are judged."""
    width, new = scene.prompts.width, scene.trial.behavior.answer_tokens
    seen = scene.passes.generate(rows, width, new) if new else scene.passes.full(rows, width)
    return seen + clamped(scene, rows, width + new) * under_clamp


def clamped(scene: Scene, rows: int, tokens: int) -> Work:
    """Encoding and decoding a slice at every token, or the whole where a clamp needs it."""
    d = scene.model.d_model
    used: Sequence[int] = [k + scene.whole[site] for site, k in scene.features.items()]
    return Work(flops32=4 * d * sum(used) * rows * tokens)


def _corpora(scene: Scene) -> Work:
    """Texts of other data run up to each site, and every feature encoded at every token. Counted
    for every point of a grid, though points that differ in a threshold alone share it."""
    rows, tokens = scene.trial.discovery.corpora
    works = []
    for site, sae in scene.saes.items() if rows else ():
        run = scene.passes.replay(rows, 0, tokens, tokens, last=site.depth)
        codes = Work(flops32=2 * scene.model.d_model * sae.n_features * rows * tokens)
        n_batches = -(-rows // scene.sizes.passes)
        works.append(run + codes + scene.passes.launches(0, site.depth, back=False) * n_batches)
    return total(works)


def _attribution(scene: Scene, depth: int, n_features: int) -> Work:
    """A backward pass, then encoder and decoder of every feature at every token; which features
    fire for the neighbors."""
    rows, beside = scene.prompts.n["fit"], scene.prompts.neighbors["fit"]
    width, d = scene.prompts.width, scene.model.d_model
    own = replace(scene.passes, batch_size=max(1, scene.sizes.discovery))
    through = own.full(rows, width, back_to=depth) + scene.passes.full(beside, width)
    matrix = 2 * d * n_features * width
    return through + Work(flops32=matrix * (2 * rows + beside))
