"""What a trial holds in the device's memory, in bytes, and the batches that fit.

Weights, caches and recorded residuals are counted; what a block keeps for the backward pass is
modeled (`kept`), and measured peaks of a step lie within a factor of 2 of it (`tests`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from holdfast.batching import MOST, WORK, Sizes, Work
from holdfast.capability import MOST_LOGITS
from holdfast.chunks import ENTRIES
from holdfast.forecast.architecture import Block
from holdfast.forecast.scene import Scene
from holdfast.saes import encoders
from holdfast.saes.sources import Shape
from holdfast.sites import Site

FREE = 0.9
"""Share of a device's memory that can be planned with; the rest is its runtime's, and waste."""

NORMS = 4
"""Residuals in float32 that a block's norms make."""

CODES = 4
"""Tensors [rows tokens features] that attribution holds at once, of a block of features."""

LIVE_COPIES = 3
"""Residuals of a site that are captured while a replay is recorded, or a recovery verified."""

PREDICTED = 8
"""Bytes of a text's logit beside the one that comes: in float32, and its logarithm."""

COMPARED = 3
"""Residuals in float64 that a verification makes of one site at a time."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they hold.

    weights; saes: slices, and the whole of one where it is needed all the time; whole: what is held
    of a whole SAE while features are found, drawn or compared, with its scores, and code: of one
    row beside that; replay: what is recorded of all rows of the batch that is searched, of this
    trial and of those beside it; row: one row of a full pass, with what is captured of it where it
    is recorded or verified; answer: one row of a generation, with its keys
    and values; lane: one lane of a search's step; texts: the logits of held-out texts that are
    predicted at a time. 0 is what a trial has none of.
    """

    weights: float
    saes: float
    whole: float
    code: float
    replay: float
    row: float
    answer: float
    lane: float
    texts: float = 0.0

    @property
    def per_row(self) -> dict[Work, float]:
        """Bytes of a row, by kind of work."""
        return {
            "passes": self.row, "generation": self.answer, "steps": self.lane,
            "discovery": self.code,
        }  # fmt: skip

    def discovery(self, sizes: Sizes) -> float:
        """What discovery holds beside the weights."""
        return self.whole + self.code * sizes.discovery

    def peak(self, rows: int, searched: int, lanes: int, sizes: Sizes) -> float:
        """The most that is held at once. rows: of passes over prompts; searched: rows of the batch
        that is searched, lanes: of its largest step, if it could hold them all."""
        held = self.weights + self.saes
        return held + max(
            self.discovery(sizes),
            self.texts,
            self.replay + self.row * min(max(rows, searched), sizes.passes),
            self.answer * min(rows, sizes.generation),
            self.replay + self.lane * min(lanes, sizes.steps),
        )

    def fit(self, memory: float, n_devices: int = 1) -> Sizes:
        """The largest sizes that fit in `memory` bytes of so many devices together; 0 of everything
        where not even one row can be recorded."""
        free = FREE * memory - self.weights - self.saes
        return Sizes.every(0) if free < self.replay + self.row else self.beside(free, n_devices)

    def beside(self, free: float, n_devices: int = 1) -> Sizes:
        """The largest sizes that fit into so many bytes beside weights and slices, none above what
        is worth it. A whole SAE is on one of the devices, beside its share of the model."""
        held: dict[Work, float] = {
            "passes": self.replay, "generation": 0.0, "steps": self.replay,
            "discovery": self.whole,
        }  # fmt: skip
        room = dict.fromkeys(WORK, free) | {"discovery": free / n_devices}
        sizes = {}
        for work, row in self.per_row.items():
            fits = (room[work] - held[work]) / row if row else MOST.of(work)
            sizes[work] = max(0, min(MOST.of(work), int(fits)))
        return Sizes(**sizes)


def memory_of(scene: Scene, device: float = math.inf) -> Memory:
    """device: bytes of the memory of one, by which it goes how much of a TopK is kept."""
    model, size = scene.model, scene.size
    d, longest = model.d_model, scene.longest
    widest = max(model.blocks, key=lambda block: block.outputs)
    everything = sum(2 * block.keys * longest * size for block in model.blocks)
    logits = scene.trial.behavior.n_read * model.vocabulary * _logit(scene)
    row = kept(scene, widest, longest, longest) + logits
    answer = row + everything if scene.trial.behavior.answer_tokens else 0.0
    replay, lane = _search(scene) if scene.trial.searches else (0.0, 0.0)
    if scene.trial.searches:
        row = max(row + _compared(scene), recorded_row(scene))
    sliced = sum(8 * d * k for k in scene.features.values())
    run = sum(_run(scene, site, device) for site, n in scene.whole.items() if n)
    weights = model.in_blocks * scene.weight_bytes + (model.parameters - model.in_blocks) * size
    whole, code = _discovery(scene)
    told = scene.prompts.texts * scene.prompts.text_tokens * model.vocabulary
    texts = float(min(told, MOST_LOGITS) * (scene.size + PREDICTED))
    return Memory(weights, sliced + run, whole, code, replay, row, answer, lane, texts)


def _run(scene: Scene, site: Site, device: float) -> float:
    """What is held of an SAE of which a clamp runs every feature: all of it, or of a TopK what is
    kept of its encoder, and a block of it in float32 where that is not all."""
    d, shape = scene.model.d_model, scene.saes[site]
    if scene.trial.intervention.runs_whole:
        return _whole(d, shape)
    numbers = d * shape.n_features
    size = encoders.kept(d, shape.n_features, shape.stored, device)
    return size * numbers + _block(numbers, size)


def _whole(d: int, shape: Shape) -> float:
    numbers = d * shape.n_features
    return 2.0 * shape.itemsize * numbers + _block(numbers, shape.itemsize)


def _block(numbers: int, itemsize: int) -> float:
    """What is cast at a time of a matrix that is not kept in float32."""
    return 0.0 if itemsize == 4 else 4.0 * min(numbers, ENTRIES)


def _logit(scene: Scene) -> int:
    """Bytes of one logit: as it comes, in float32, and its gradient."""
    return scene.size + 12


def _compared(scene: Scene) -> float:
    """What a verification holds of one row beside its pass: captures, what was read of both passes
    in float32, and their difference."""
    n_sites = len({*scene.sites, *scene.features})
    captured = n_sites * (LIVE_COPIES * scene.size + 2 * 4) + COMPARED * 8
    return float(scene.model.d_model * scene.longest * captured)


def recorded_row(scene: Scene) -> float:
    """One row of the passes that record a replay, with the keys and values of all blocks."""
    model, size, tokens = scene.model, scene.size, scene.tokens
    widest = max(model.blocks, key=lambda block: block.outputs)
    keys = sum(2 * block.keys * tokens * size for block in model.blocks)
    captured = LIVE_COPIES * len(scene.sites) * model.d_model * tokens * size
    return kept(scene, widest, tokens, tokens) + keys + captured


def _search(scene: Scene) -> tuple[float, float]:
    """What is recorded of all rows of the batch, and one lane of a step."""
    model, size = scene.model, scene.size
    d, tokens, columns = model.d_model, scene.tokens, scene.columns
    first = scene.sites[0].depth
    above = model.blocks[first:]
    through = above if scene.read_at is None else model.blocks[first : scene.read_at.depth]
    n_slots = scene.positions * len(scene.sites)
    prefix = sum(2 * b.keys * (b.seen(tokens, columns) - columns) * size for b in above)
    recorded = prefix + size * d * columns + 8 * d * n_slots
    graph = [kept(scene, b, columns, b.seen(tokens, columns)) for b in through]
    # Where no answer is forced, the rows of the unembedding that are in play are copied out.
    read = scene.n_logits * _logit(scene)
    if not scene.trial.behavior.answer_tokens:
        read += scene.n_logits * d * size
    # What was recorded, copied for the lane; the graph, and one block's gradients on the way.
    lane = recorded + sum(graph) + max(graph, default=0.0) + read
    # A constraint that reads the whole SAE has a basis of its own at every slot.
    own = 4 * d * scene.positions * sum(scene.held.values())
    bases = own if scene.search.constraint.sees_all else 0
    return scene.searched * recorded + scene.rows * bases, lane + bases


def kept(scene: Scene, block: Block, columns: int, keys: int) -> float:
    """What one block keeps of one row for the backward pass: every product's output, its norms in
    float32, keys and values, and the scores of attention that is not fused.

    Beside a prefix attention is computed from its formula, and the prefix is nobody's copy; in a
    whole pass keys and values are repeated for every query head.
    """
    size, d = scene.size, scene.model.d_model
    tokens = size * (block.outputs + 2 * d) + 4 * NORMS * d
    apart = columns < keys
    scores = block.heads * keys * (2 * size + 4) if scene.eager or apart else 0
    own = 2 * block.keys * columns if apart else 2 * block.queries * keys
    return columns * (tokens + scores) + own * size


def _discovery(scene: Scene) -> tuple[float, float]:
    """A whole SAE with a score of every feature and prompt, and a block of codes; and, of one row,
    the graph of its pass. What draws or compares features, or counts on corpora, holds the SAE
    alone."""
    width, d, blocks = scene.prompts.width, scene.model.d_model, scene.model.blocks
    whole = code = 0.0
    counts = bool(scene.trial.discovery.corpora[0])
    if scene.trial.control.clamps_others or scene.trial.paths is not None or counts:
        whole = max((_whole(d, shape) for shape in scene.saes.values()), default=0.0)
    if not scene.trial.discovery.reads_whole:
        return whole, code
    for site, shape in scene.saes.items():
        n = shape.n_features
        graph = sum(kept(scene, b, width, width) for b in blocks[site.depth :])
        codes = CODES * 4 * min(n * width * MOST.discovery, ENTRIES)
        whole = max(whole, _whole(d, shape) + 2 * 4 * n * scene.prompts.n["fit"] + codes)
        code = max(code, graph)
    return whole, code
