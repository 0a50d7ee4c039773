"""The work of the passes that a trial is made of, in closed form.

A multiply-add is two operations. A token costs twice the weights it is multiplied with, and an
attention of s queries over t keys `4·s·t·heads·size`; norms, activations and rotations are left
out. Going back to the perturbation costs the same again: the weights need no gradient. Counted by
torch's own FlopCounterMode these are the same to a fraction of a percent (`tests`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from holdfast.forecast.architecture import Architecture, Block
from holdfast.forecast.work import Work, total


@dataclass(frozen=True)
class Passes:
    """Passes of one model. weight_bytes: of one weight of a block; cache_bytes: of one key;
    batch_size: rows of a pass, answered: of a generation, as many as of a pass if left out."""

    model: Architecture
    weight_bytes: float
    cache_bytes: int
    batch_size: int
    answered: int | None = None

    def full(self, rows: int, tokens: int, n_read: int = 1, back_to: int | None = None) -> Work:
        """Forward over whole prompts; back_to: the depth that gradients go back to."""
        if not rows:
            return Work()
        blocks = self.model.blocks
        forward = total([self._block(block, tokens, tokens) for block in blocks])
        read = Work(flops=2 * n_read * self.model.unembedding)
        if back_to is not None:
            forward += total([self._block(block, tokens, tokens) for block in blocks[back_to:]])
            read = read * 2
        per_batch = self._launched(self.model.n_blocks)
        if back_to is not None:
            per_batch += self._launched(self.model.n_blocks - back_to, back=True)
        return (forward + read) * rows + per_batch * math.ceil(rows / self.batch_size)

    def generate(self, rows: int, tokens: int, new: int, start: int = 0) -> Work:
        """A prompt pass, then one token at a time over what is cached. start: tokens of the prompt
        whose keys and values are there already."""
        if not rows or not new:
            return Work()
        n_batches = math.ceil(rows / (self.answered or self.batch_size))
        begun = self.replay(rows, 0, tokens - start, tokens, self.model.vocabulary)
        later = Work()
        for block in self.model.blocks:
            keys = [min(tokens + n, block.window or tokens + n) for n in range(1, new)]
            seen = sum(keys)
            later += Work(
                flops=2 * block.active * (new - 1) + 4 * block.queries * seen,
                bytes=2 * block.keys * seen * self.cache_bytes,
            )
        later += Work(flops=2 * (new - 1) * self.model.unembedding)
        return begun + later * rows + self.launches(0, back=False) * (new * n_batches)

    def replay(
        self,
        lanes: float,
        first: int,
        columns: int,
        keys: int,
        n_logits: int = 0,
        last: int | None = None,
    ) -> Work:
        """Forward over the suffix of some lanes from depth `first` on, without launches.

        n_logits: how many of a lane are computed; last: the depth to stop at.
        """
        blocks = self.model.blocks[first:last]
        run = total([self._block(b, columns, b.seen(keys, columns)) for b in blocks])
        return (run + Work(flops=2 * n_logits * self.model.d_model)) * lanes

    def launches(self, first: int, last: int | None = None, back: bool = True) -> Work:
        """What one batched step over the blocks from `first` on costs whatever its size."""
        n = len(self.model.blocks[first:last])
        return self._launched(n) + (self._launched(n, back=True) if back else Work())

    def _launched(self, n_blocks: int, back: bool = False) -> Work:
        weights = sum(block.parameters for block in self.model.blocks[-n_blocks:] if n_blocks)
        calls = 2 * n_blocks if back else n_blocks
        return Work(bytes=weights * self.weight_bytes, calls=calls)

    @staticmethod
    def _block(block: Block, columns: int, keys: int) -> Work:
        return Work(flops=2 * columns * block.active + 4 * columns * keys * block.queries)
