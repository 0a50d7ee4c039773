"""The work of a setting: features, strength, and what the clamp does."""

from __future__ import annotations

import math
from dataclasses import replace

from holdfast.forecast.reading import clamped, observed
from holdfast.forecast.scene import Scene
from holdfast.forecast.work import Stage, Work, total


def preparing(scene: Scene) -> Stage:
    """Features and strength on their own splits, then what the clamp does to the test prompts."""
    passes, prompts, behavior = scene.passes, scene.prompts, scene.trial.behavior
    intervention, width = scene.trial.intervention, prompts.width
    n, beside = prompts.n, prompts.neighbors
    work = passes.full(n["fit"], width)  # what the features do where nothing is clamped
    if scene.trial.discovery.reads_whole:
        for site in scene.saes:
            work += _attribution(scene, site.depth, scene.saes[site].n_features)
    work += passes.full(n["fit"], width) * scene.trial.discovery.passes(tuple(scene.saes))
    work += _corpora(scene)
    work += passes.full(beside["fit"], width) * intervention.learns
    n_candidates = len(intervention.candidates())
    if n_candidates > 1:
        tuned = n["tune"] + beside["tune"]
        work += observed(scene, tuned, False) + observed(scene, tuned, True) * n_candidates
    tested = n["test"] + beside["test"]
    work += observed(scene, tested, False) + observed(scene, tested, True)
    again = math.ceil(behavior.asked_again * tested)
    work += observed(scene, again, False) * 2 + observed(scene, again, True)
    if intervention.runs_whole:  # with every feature as it is, and what SAEs explain
        work += observed(scene, n["test"], True) + passes.full(n["test"], width)
        work += clamped(scene, n["test"], width)
    if intervention.conditional:  # where it acts
        work += passes.full(tested, width) + clamped(scene, tested, width)
    work += _texts(scene)
    work += passes.full(n["test"], scene.tokens, behavior.n_read) * 2
    return Stage("prepare", work, work)


def elsewhere(scene: Scene) -> Stage:
    """The same clamp on other features: drawn by what all of them do on the fit split, measured
    there, and applied to the test prompts."""
    n, width, d = scene.prompts.n, scene.prompts.width, scene.model.d_model
    codes = sum(2 * d * scene.saes[s].n_features for s in scene.features) * n["fit"] * width
    work = scene.passes.full(n["fit"], width) * 2 + Work(flops32=codes)
    work += observed(scene, n["test"] + scene.prompts.neighbors["test"], True)
    work += scene.passes.full(n["test"], scene.tokens, scene.trial.behavior.n_read)
    work = work * scene.trial.control.n_clamps
    return Stage("other features", work, work)


def _texts(scene: Scene) -> Work:
    """Held-out texts, predicted at every token without the SAEs and, where these change anything by
    themselves, with them. Counted for every setting, though all of a subject share the former."""
    n, tokens = scene.prompts.texts, scene.prompts.text_tokens
    once = scene.passes.full(n, tokens, tokens)
    if scene.trial.intervention.runs_whole:
        return once * 2 + clamped(scene, n, tokens)
    return once


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
