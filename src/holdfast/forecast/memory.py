"""What a trial holds in the device's memory, in bytes, and the batch that fits.

Weights, caches and recorded residuals are counted; what a block keeps for the backward pass is
modeled (`kept`), and measured peaks of a step lie within a factor of 2 of it (`tests`).
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.forecast.architecture import Block
from holdfast.forecast.scene import Scene
from holdfast.forecast.stages import ATTRIBUTION_ROWS

FREE = 0.9
"""Share of a device's memory that can be planned with; the rest is its runtime's, and waste."""

NORMS = 4
"""Residuals in float32 that a block's norms make."""

CODES = 4
"""Tensors [rows tokens features] that attribution holds at once."""

LIVE_COPIES = 3
"""Residuals that are captured while a replay is recorded."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they hold.

    weights; saes: slices, and the whole of one where it is needed all the time; whole: what is held
    of a whole SAE while features are found, drawn or compared, with its scores, and code: of one of
    its rows beside that; replay: what is recorded of all rows; recording: the peak while it is
    recorded; row: one row of a full pass; lane: one lane of a search's step. The last four but row
    are 0 where nothing is searched.
    """

    weights: float
    saes: float
    whole: float
    code: float
    replay: float
    recording: float
    row: float
    lane: float

    def discovery(self, batch_size: int) -> float:
        """What discovery holds beside the weights."""
        return self.whole + self.code * min(ATTRIBUTION_ROWS, batch_size)

    def peak(self, rows: int, lanes: int, batch_size: int) -> float:
        """The most that is held at once."""
        held = self.weights + self.saes
        return held + max(
            self.discovery(batch_size),
            self.row * min(rows, batch_size),
            self.recording,
            self.replay + self.lane * min(lanes, batch_size),
        )

    def batch_size(self, memory: float, n_devices: int) -> int:
        """The largest batch that fits in `memory` bytes of so many devices together; 0 where not
        even one row does. A whole SAE is on one of them, beside its share of the model."""
        held = self.weights + self.saes
        free = FREE * memory - held
        if free < self.recording:
            return 0
        most = free / self.row
        if self.lane:
            most = min(most, (free - self.replay) / self.lane)
        beside = (FREE * memory - held) / n_devices - self.whole
        if beside < self.code * ATTRIBUTION_ROWS:
            most = min(most, beside / self.code)
        elif beside < 0:
            return 0
        return max(0, int(most))


def memory_of(scene: Scene) -> Memory:
    model, size = scene.model, scene.size
    d, longest = model.d_model, scene.longest
    widest = max(model.blocks, key=lambda block: block.outputs)
    everything = sum(2 * block.keys * longest * size for block in model.blocks)
    logits = scene.trial.behavior.n_read * model.vocabulary * _logit(scene)
    row = kept(scene, widest, longest, longest) + everything + logits
    searched = _search(scene, widest) if scene.trial.searches else (0.0, 0.0, 0.0)
    sliced = sum(8 * d * k for k in scene.features.values())
    run = sum(8 * d * n for n in scene.whole.values())
    weights = model.in_blocks * scene.weight_bytes + (model.parameters - model.in_blocks) * size
    whole, code = _discovery(scene)
    replay, recording, lane = searched
    return Memory(weights, sliced + run, whole, code, replay, recording, row, lane)


def _logit(scene: Scene) -> int:
    """Bytes of one logit: as it comes, in float32, and its gradient."""
    return scene.size + 12


def _search(scene: Scene, widest: Block) -> tuple[float, float, float]:
    """What is recorded of all rows, the peak while it is recorded, and one lane of a step."""
    model, size, rows = scene.model, scene.size, scene.rows
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
    recording = rows * (
        recorded
        + kept(scene, widest, tokens, tokens)
        + sum(2 * block.keys * tokens * size for block in model.blocks)
        + LIVE_COPIES * len(scene.sites) * d * tokens * size
    )
    return rows * recorded, recording, lane


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
    """A whole SAE with a score of every feature and prompt; and, of one row, the codes of its
    tokens or the graph of its pass. What draws or compares features, or counts on corpora, holds
    the SAE alone."""
    width, d, blocks = scene.prompts.width, scene.model.d_model, scene.model.blocks
    whole = code = 0.0
    counts = bool(scene.trial.discovery.corpora[0])
    if scene.trial.control.clamps_others or scene.trial.paths is not None or counts:
        whole = max((8.0 * d * shape.n_features for shape in scene.saes.values()), default=0.0)
    if not scene.trial.discovery.reads_whole:
        return whole, code
    for site, shape in scene.saes.items():
        n = shape.n_features
        graph = sum(kept(scene, b, width, width) for b in blocks[site.depth :])
        whole = max(whole, 8 * d * n + 2 * 4 * n * scene.prompts.n["fit"])
        code = max(code, CODES * 4 * n * width, graph)
    return whole, code
