"""The work of attacks that are made beside the audit's own search."""

from __future__ import annotations

from holdfast.forecast.reading import clamped, observed
from holdfast.forecast.scene import Scene
from holdfast.forecast.work import Stage, Work, total


def attempting(scene: Scene) -> Stage:
    """Scripts, answers to the prompts as they are, or a search of the attack's own."""
    opposed = scene.prompts.opposed
    made = observed(scene, opposed, False) if opposed else Work()
    made += total([_said(scene), _answered(scene), _searched(scene)])
    return Stage("attempt", made, made)


def _said(scene: Scene) -> Work:
    """Every script said to every prompt with the clamp and without, and to the opposed prompts that
    turn the model anyway; each turn generates its answer."""
    rows, new = scene.rows, scene.trial.behavior.answer_tokens
    made = Work()
    for turns in scene.trial.attack.turns:
        for turn in range(1, turns + 1):
            tokens = turn * (scene.prompts.width + new) - new
            made += scene.passes.generate(2 * rows + scene.prompts.opposed, tokens, new)
            made += clamped(scene, rows, tokens + new)
    return made


def _answered(scene: Scene) -> Work:
    """Answers to every prompt, generated and judged; of one token drawn from a pass each."""
    rows, opposed, new = scene.rows, scene.prompts.opposed, scene.trial.behavior.answer_tokens
    judged, without, beside = scene.trial.attack.answers
    if judged and not new:
        return observed(scene, rows, True) + observed(scene, rows, False)
    made = observed(scene, judged * rows, True)
    made += observed(scene, without * rows + beside * opposed, False)
    if scene.trial.attack.reads_likelihood:
        every = (judged + without) * rows + beside * opposed
        made += scene.passes.full(every, scene.prompts.width + new, new)
    return made


def _searched(scene: Scene) -> Work:
    """Steps through the whole model, on the columns from the tokens on that were put in; then read
    clean, as it began and as it ended, and held features at all that was read and generated."""
    search, rows, passes = scene.trial.attack.own_search, scene.rows, scene.passes
    if not search.steps:
        return Work()
    behavior, prompts = scene.trial.behavior, scene.prompts
    columns = search.added + prompts.template + behavior.n_read - 1
    tokens = prompts.width + search.added + behavior.n_read - 1
    forward = passes.replay(rows, 0, columns, tokens, scene.n_logits, scene.read_depth)
    forward += clamped(scene, rows, columns)
    if search.monitored:  # by a pass of its own
        last = max(scene.features).depth
        forward += passes.replay(rows, 0, columns, tokens, last=last)
        forward += clamped(scene, rows, columns)
    n_batches = -(-rows // max(1, scene.sizes.steps))
    step = forward * 2 + passes.launches(0) * n_batches
    read = passes.full(rows, tokens, behavior.n_read) + clamped(scene, rows, tokens)
    made = step * (search.steps + 1) + observed(scene, 3 * rows, True)
    made += read * 5  # recorded; the margin; and as found, as it began, and as it was
    if behavior.answer_tokens:
        long = prompts.width + search.added + behavior.answer_tokens
        made += (passes.full(rows, long, behavior.answer_tokens) + clamped(scene, rows, long)) * 3
    return made
