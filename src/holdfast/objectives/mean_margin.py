"""The published choice margin: the target's lead over the mean of its rivals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from holdfast.objectives import ObjectiveKind, over_tokens, own_and_others


class MeanMargin(ObjectiveKind):
    """The target's lead over the mean of its rivals (`choice_margin` of arXiv 2606.18322).

    It can grow while one rival still wins (METHODS C.4-6). Of a text: each token's lead over the
    largest other, and the mean of those over the tokens, which can grow while one lags.
    """

    kind: Literal["mean_margin"] = "mean_margin"

    def of_answers(self, target: Tensor, rivals: Tensor, fresh: Tensor, every: Tensor) -> Tensor:
        return target - torch.where(fresh, rivals, 0.0).sum(1) / fresh.sum(1)

    def of_text(self, scores: Tensor, forced: Tensor) -> Tensor:
        own, others = own_and_others(scores, forced)
        return over_tokens(own - others.amax(-1), forced)
