"""The work of a trial, stage by stage, in the order in which it is done.

Every stage is a function of the scene in a file of its own or here. What kinds do differently they
say themselves (`repeats` of a constraint, `answers` of an attack); tests hold each stage to the
operations that torch counts.
"""

from __future__ import annotations

from holdfast.forecast.attempting import attempting
from holdfast.forecast.comparing import comparing
from holdfast.forecast.preparing import elsewhere
from holdfast.forecast.reading import answered, clamped, whole_saes
from holdfast.forecast.scene import Scene
from holdfast.forecast.searching import forwards, projected, searching
from holdfast.forecast.work import Stage, Work
from holdfast.undone import ARMS

LIKELIHOODS = 6
"""Teacher-forced passes over answers: the clean one in three conditions, each condition's own."""

SEEN = 3
"""Times a slot meets the whole SAE where all of its features are looked at: before and after the
vector, and what was rounded away."""

TAKEN = 4
"""Times a slot's vector meets the features held there, to be split by the span of their rows: twice
for rounding, in two products."""


def stages_of(scene: Scene) -> list[Stage]:
    """All but what is prepared for several trials."""
    if not scene.trial.searches:
        return [attempting(scene)]
    stages = [recording(scene), searching(scene), verifying(scene), undoing(scene)]
    if scene.trial.control.clamps_others:
        stages = [elsewhere(scene), *stages]
    if scene.trial.paths is not None:
        stages.append(comparing(scene))
    return stages


def recording(scene: Scene) -> Stage:
    """The prefix and the suffix, once."""
    work = scene.passes.full(scene.rows, scene.tokens) + clamped(scene, scene.rows, scene.tokens)
    return Stage("record", work, work)


def verifying(scene: Scene) -> Stage:
    """Full passes with and without the saved perturbation, with the clamp in the other order and
    without it; replies where there are any, and how likely they are where the audited behavior
    itself was searched for."""
    behavior, rows, passes = scene.trial.behavior, scene.rows, scene.passes

    def checked(tokens: int) -> Work:
        return (passes.full(rows, tokens, behavior.n_read) + clamped(scene, rows, tokens)) * 2

    work = checked(scene.tokens) + passes.full(rows, scene.tokens, behavior.n_read)
    work += clamped(scene, rows, scene.tokens)
    if scene.search.constraint.sees_all or scene.trial.paths is not None:
        work += whole_saes(scene, tuple(scene.features), rows * scene.positions, SEEN)
    own = scene.trial.is_audit or scene.trial.control.clamps_others
    if own:
        work += passes.full(rows, scene.tokens, behavior.n_read)
    if behavior.answer_tokens:
        long = scene.prompts.width + behavior.answer_tokens
        work += answered(scene, rows, 1) + checked(long)
        if own:
            work += passes.full(rows, long, behavior.answer_tokens) * LIKELIHOODS
            # Clean answers and two conditions' replies, each alone.
            work += passes.full(scene.prompts.n["test"] + 2 * rows, behavior.answer_tokens)
    return Stage("verify", work, work)


def undoing(scene: Scene) -> Stage:
    """What of a recovery takes the clamp back, and what is left of it, replayed for their margins
    alone. Nothing where nothing is recovered."""
    lanes = scene.rows * len(ARMS)
    n_batches = -(-lanes // max(1, scene.sizes.steps))
    launches = scene.passes.launches(scene.sites[0].depth, scene.read_depth, back=False)
    parts = projected(scene, TAKEN) * scene.rows
    return Stage("undo", parts + forwards(scene, lanes) + launches * n_batches, Work())
