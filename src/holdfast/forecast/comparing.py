"""The work of setting recoveries beside variants of theirs (`paths`)."""

from __future__ import annotations

from holdfast.baselines import MEANINGS
from holdfast.bounded import SUBSPACES
from holdfast.datasets.questions import LETTERS
from holdfast.direct import CONDITIONS
from holdfast.forecast.scene import Scene
from holdfast.forecast.work import Stage, Work
from holdfast.generality import MEANINGS as LENT
from holdfast.openly import MEANINGS as OPENLY
from holdfast.parts import EXACT
from holdfast.predicted import NODES
from holdfast.replays import ALONG, PARTS, ROWS
from holdfast.routes import FROZEN

PRODUCTS = 16
"""Times a slot's vector meets the whole SAE: re-encoded with each part, and decoded again."""


def n_variants(scene: Scene) -> int:
    """How many vectors are run in the place of one recovery's, draws counted."""
    spec, exact = scene.trial.paths, scene.search.constraint.exact
    assert spec is not None
    scaled = [name for name in MEANINGS if name != "nothing"]
    kept = [name for name in scaled if exact or not name.endswith("_inside")]
    draws = sum(spec.draws if name.startswith("random") else 1 for name in kept)
    baselines = 2 + draws * len(spec.scales)  # nothing, and the clamp taken back as it is
    split = 0
    if _is_split(scene):
        split = len(PARTS) * len(spec.part_scales)
        split += len(EXACT) + len(SUBSPACES) if spec.likes else 0
    lent = len(LENT) * len(spec.scales) if spec.orders else 0
    return lent + baselines + split + n_pieces(scene)


def n_pieces(scene: Scene) -> int:
    """How many of them are the recovery's vector, what is made of it, and what is left without."""
    spec = scene.trial.paths
    assert spec is not None
    # As it is; all but the projection and its rest are also left out.
    split = 2 * len(PARTS) - 2 if _is_split(scene) else 0
    undone = 2 * len((ROWS, ALONG))  # what of it takes the clamp back, alone and left out
    # Alone, left out, and up to it where that is something else.
    places = [len(scene.sites), min(spec.groups, scene.positions)]
    return 1 + split + undone + sum(3 * n - 2 for n in places if n > 1)


def _is_split(scene: Scene) -> bool:
    """Whether there is an SAE at every perturbed site."""
    return set(scene.sites) <= set(scene.saes)


def _n_margins(scene: Scene) -> int:
    """How many vectors are run for their margins alone: random ones, inside the constraint too."""
    spec = scene.trial.paths
    assert spec is not None
    linear = max(scene.features) <= scene.sites[0]
    return 2 + spec.margin_draws * (2 if scene.search.constraint.exact and linear else 1)


def comparing(scene: Scene, clamp: Work, gradient: Work, replayed: Work) -> Stage:
    """Nothing where nothing is recovered. clamp: of one pass over the rows; gradient: one step;
    replayed: a step's pass without a gradient."""
    rows, behavior, passes, spec = scene.rows, scene.trial.behavior, scene.passes, scene.trial.paths
    assert spec is not None
    one = passes.full(rows, scene.tokens, behavior.n_read) + clamp
    each = one
    if behavior.answer_tokens:
        each = one + passes.generate(rows, scene.prompts.width, behavior.answer_tokens) + clamp
    fit = scene.prompts.n["fit"] + scene.prompts.neighbors["fit"]
    # The clamp alone, and what is added to; then the passes that look inside.
    n_inside = 2 + (len(FROZEN) + 3 if spec.routes else 0) + (2 * len(CONDITIONS) + 1) * spec.heads
    work = each * n_variants(scene) + one * (1 + n_inside)
    # One step inside, the beginning of every way, and its nodes, between two ends without gradient.
    n = n_pieces(scene)
    work += gradient * (2 + NODES * n) + replayed * (1 + 2 * n)
    if spec.openly:  # each choice's text in each condition, and what the vector moves
        work += one * (len(OPENLY) * len(LETTERS) + 2)
    if not behavior.answer_tokens:
        work += replayed * _n_margins(scene)
    work += passes.full(fit, scene.prompts.width) * 2
    whole = sum(scene.saes[site].n_features for site in scene.sites if site in scene.saes)
    slots = rows * scene.positions
    work += Work(flops32=2 * PRODUCTS * scene.model.d_model * whole * slots)
    return Stage("compare", work, Work())
