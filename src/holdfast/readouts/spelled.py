"""Logits where an answer may be written in two ways, and has the larger of their two logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.readouts.logits import Logits

if TYPE_CHECKING:
    from holdfast.batch import Batch
    from holdfast.edits import Edit
    from holdfast.readouts import Run
    from holdfast.replay import Replay


@dataclass(frozen=True)
class Spelled(Logits):
    """As SAEBench reads letters: `A` right after the cue counts as ` A` does (METHODS J.2).

    pairs: token that names an answer, token of its other spelling. The scores of all other tokens
    are their logits. A maximum is no linear function of the final residual, so that heads cannot be
    told apart by it.
    """

    pairs: tuple[tuple[int, int], ...]
    unembeds = False

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"spellings": [list(pair) for pair in self.pairs]}

    def read(self, run: Run, batch: Batch, edits: Sequence[Edit]) -> Tensor:
        return self._larger(super().read(run, batch, edits))

    def replayed(self, replay: Replay, delta: Tensor, answers: Tensor | None = None) -> Tensor:
        if answers is None:
            return self._larger(super().replayed(replay, delta))
        others = answers
        for name, other in self.pairs:
            others = torch.where(answers == name, other, others)
        either = super().replayed(replay, delta, torch.cat([answers, others], 1))
        return torch.maximum(*either.chunk(2, 1))

    def _larger(self, logits: Tensor) -> Tensor:
        scores = logits.clone()
        for name, other in self.pairs:
            scores[..., name] = torch.maximum(logits[..., name], logits[..., other])
        return scores
