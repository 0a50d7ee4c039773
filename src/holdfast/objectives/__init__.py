"""Objectives: what a search goes up. One file a kind. What it is judged by is the margin, always.

An iterate counts by its margin over the largest rival whatever was climbed, so that objectives can
be compared by the smallest norm each of them leads to.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from holdfast.config import Kind
from holdfast.registry import Registry

OBJECTIVES = Registry(
    "objectives",
    {
        "margin": "holdfast.objectives.margin:Margin",
        "mean_margin": "holdfast.objectives.mean_margin:MeanMargin",
        "cross_entropy": "holdfast.objectives.cross_entropy:CrossEntropy",
        "vocabulary": "holdfast.objectives.vocabulary:Vocabulary",
        "prefixes": "holdfast.objectives.prefixes:Prefixes",
    },
)


class ObjectiveKind(Kind):
    """An objective. All scores are in logits."""

    @property
    def reads_all(self) -> bool:
        """Whether it needs every answer's score, not only the target's and its rivals'."""
        return False

    def of_answers(self, target: Tensor, rivals: Tensor, fresh: Tensor, every: Tensor) -> Tensor:
        """[n] what is climbed where one answer is read, differentiable.

        target [n] and rivals [n m]: scores; fresh [n m] bool: rivals that are not there before
        (rows with fewer repeat one); every [n answers]: all scores, empty unless `reads_all`.
        """
        raise NotImplementedError

    def of_text(self, scores: Tensor, forced: Tensor) -> Tensor:
        """[n] what is climbed where an answer of several tokens is forced, differentiable.

        scores [n t vocab] at each of them; forced [n t] their ids, -1 where a row has fewer.
        """
        raise NotImplementedError


def own_and_others(scores: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [n t] of the forced tokens, and [n t vocab] of all with those at minus infinity."""
    token = forced.clamp(min=0)[..., None]
    return scores.gather(-1, token).squeeze(-1), scores.scatter(-1, token, -torch.inf)


def over_tokens(values: Tensor, forced: Tensor) -> Tensor:
    """[n] mean of values [n t] over the forced tokens that a row has."""
    there = forced >= 0
    return torch.where(there, values, 0.0).sum(-1) / there.sum(-1)


Objective = Annotated[SerializeAsAny[ObjectiveKind], BeforeValidator(OBJECTIVES.parse)]
