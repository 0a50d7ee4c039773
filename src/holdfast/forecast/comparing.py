"""The work of setting recoveries beside variants of theirs (`paths`)."""

from __future__ import annotations

from holdfast.baselines import MEANINGS
from holdfast.bounded import SUBSPACES
from holdfast.datasets.questions import LETTERS
from holdfast.direct import CONDITIONS
from holdfast.forecast.reading import answered, clamped, whole_saes
from holdfast.forecast.scene import Scene
from holdfast.forecast.searching import bases, forwards, step
from holdfast.forecast.work import Stage, Work
from holdfast.generality import MEANINGS as LENT
from holdfast.openly import MEANINGS as OPENLY
from holdfast.parts import EXACT
from holdfast.predicted import MORE, NODES
from holdfast.replays import ALONG, PARTS, ROWS
from holdfast.routes import FROZEN

PRODUCTS = 12
"""Times a slot's vector meets the whole SAE: re-encoded with each part, and decoded again; encoded
for the bounded parts. An atom of a sparse code is one more."""

AGAIN = 0.07
"""Share of ways that are gone again at more nodes: 82 of 1,215 in six audits of the demo, none in
four of them and 0.22 at most."""


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


def comparing(scene: Scene) -> Stage:
    """Nothing where nothing is recovered."""
    rows, behavior, passes, spec = scene.rows, scene.trial.behavior, scene.passes, scene.trial.paths
    assert spec is not None
    one = passes.full(rows, scene.tokens, behavior.n_read) + clamped(scene, rows, scene.tokens)
    n = n_variants(scene)
    fit = scene.prompts.n["fit"] + scene.prompts.neighbors["fit"]
    # The clamp alone, and what is added to; then the passes that look inside.
    n_inside = 2 + (len(FROZEN) + 3 if spec.routes else 0) + (2 * len(CONDITIONS) + 1) * spec.heads
    work = one * (n + 1 + n_inside) + answered(scene, rows, n)
    work += _predicted(scene)
    if spec.openly:  # each choice's text in each condition, and what the vector moves
        work += one * (len(OPENLY) * len(LETTERS) + 2)
    if not behavior.answer_tokens:
        work += forwards(scene, rows) * _n_margins(scene)
    work += bases(scene) * 2  # of the constraint, for random vectors and for other baselines
    work += passes.full(fit, scene.prompts.width) * 2
    slots = rows * scene.positions
    work += whole_saes(scene, scene.sites, slots, PRODUCTS + spec.atoms)
    return Stage("compare", work, Work())


def _predicted(scene: Scene) -> Work:
    """One step inside, the beginning of every way, and its nodes, between two ends without
    gradient."""
    rows, n = scene.rows, n_pieces(scene)
    nodes = NODES + AGAIN * MORE
    ends = forwards(scene, rows) * (1 + 2 * (1 + AGAIN) * n)
    return step(scene, rows) * (2 + nodes * n) + ends
