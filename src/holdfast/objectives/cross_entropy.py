"""The log-probability of the target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from holdfast.objectives import ObjectiveKind, over_tokens


class CrossEntropy(ObjectiveKind):
    """Log-probability of the target among itself and its rivals (`choice_ce` of arXiv 2606.18322).

    Of a text: the mean log-probability of its tokens among the whole vocabulary, teacher-forced, as
    the published search over several layers climbs it.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"

    def of_answers(self, target: Tensor, rivals: Tensor, fresh: Tensor, every: Tensor) -> Tensor:
        once = torch.where(fresh, rivals, -torch.inf)
        return target - torch.cat([target[:, None], once], 1).logsumexp(1)

    def of_text(self, scores: Tensor, forced: Tensor) -> Tensor:
        own = scores.gather(-1, forced.clamp(min=0)[..., None]).squeeze(-1)
        return over_tokens(own - scores.logsumexp(-1), forced)
