"""The published vocabulary margin: the target's lead over the mean of everything else."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from holdfast.objectives import ObjectiveKind, over_tokens


class Vocabulary(ObjectiveKind):
    """The target's lead over the mean of all other answers (`vocab_margin` of arXiv 2606.18322).

    All other tokens of the vocabulary, or all other classes where probes are read. Of a text the
    mean over its tokens.
    """

    kind: Literal["vocabulary"] = "vocabulary"

    @property
    def reads_all(self) -> bool:
        return True

    def of_answers(self, target: Tensor, rivals: Tensor, fresh: Tensor, every: Tensor) -> Tensor:
        return target - (every.sum(1) - target) / (every.shape[1] - 1)

    def of_text(self, scores: Tensor, forced: Tensor) -> Tensor:
        own = scores.gather(-1, forced.clamp(min=0)[..., None]).squeeze(-1)
        return over_tokens(own - (scores.sum(-1) - own) / (scores.shape[-1] - 1), forced)
