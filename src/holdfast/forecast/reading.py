"""What several stages do alike: ask the behavior, run the clamp, read a whole SAE."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.forecast.scene import Scene
from holdfast.forecast.work import Work


def observed(scene: Scene, rows: int, under_clamp: bool) -> Work:
    """What the behavior sees of some prompts: a pass, or answers where these are judged."""
    width, new = scene.prompts.width, scene.trial.behavior.answer_tokens
    seen = scene.passes.generate(rows, width, new) if new else scene.passes.full(rows, width)
    return seen + clamped(scene, rows, width + new) * under_clamp


def answered(scene: Scene, rows: int, times: int) -> Work:
    """Answers to the same prompts with so many vectors added in turn, where answers are judged:
    what stands before the first vector is run once for all of them (`begun.py`)."""
    width, new, start = scene.prompts.width, scene.trial.behavior.answer_tokens, scene.begun
    if not new:
        return Work()
    once = scene.passes.full(rows, start) + clamped(scene, rows, start) if start else Work()
    each = scene.passes.generate(rows, width, new, start)
    return once + (each + clamped(scene, rows, width - start + new)) * times


def clamped(scene: Scene, rows: int, tokens: int) -> Work:
    """Encoding and decoding a slice at every token, or the whole where a clamp needs it."""
    d = scene.model.d_model
    used: Sequence[int] = [k + scene.whole[site] for site, k in scene.features.items()]
    return Work(flops32=4 * d * sum(used) * rows * tokens)


def whole_saes(scene: Scene, sites: Sequence[object], slots: float, products: float) -> Work:
    """So many products of a vector at every slot of some sites with all of the site's SAE."""
    width = sum(shape.n_features for site, shape in scene.saes.items() if site in sites)
    return Work(flops32=2 * scene.model.d_model * width * slots * products)
