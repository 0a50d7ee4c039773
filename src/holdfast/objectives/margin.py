"""The margin: the target's lead over the largest rival."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from holdfast.margins import lead
from holdfast.objectives import ObjectiveKind


class Margin(ObjectiveKind):
    """The target's lead over its largest rival; of a text the smallest lead of its tokens.

    What a search is judged by, so nothing is climbed beside it.
    """

    kind: Literal["margin"] = "margin"

    def of_answers(self, target: Tensor, rivals: Tensor, fresh: Tensor, every: Tensor) -> Tensor:
        return target - rivals.amax(1)

    def of_text(self, scores: Tensor, forced: Tensor) -> Tensor:
        return lead(scores, forced[:, 0], forced, forced)
