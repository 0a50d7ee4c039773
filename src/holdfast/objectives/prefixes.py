"""The published objective of text: log-probabilities of its first tokens, some more than others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from holdfast.config import Config
from holdfast.objectives import ObjectiveKind, over_tokens
from holdfast.objectives.cross_entropy import CrossEntropy


class Prefix(Config):
    """weight: of the mean log-probability of the first n_tokens tokens, or of as many as there are;
    all of them if n_tokens is left out."""

    weight: float = Field(1.0, gt=0)
    n_tokens: int | None = Field(None, ge=1)


class Prefixes(ObjectiveKind):
    """A weighted sum of mean log-probabilities of an answer's beginnings, teacher-forced.

    The first stage of arXiv 2606.18322's search over several layers climbs 4 × the first token + 2
    × the first eight, its second 5 × all that is read (METHODS D.4). Left out here are its small
    terms (weights .1 and .2) that hold discouraged openings down, a list that is not all known.
    Where one answer is read, it is the cross entropy times all weights.
    """

    kind: Literal["prefixes"] = "prefixes"
    terms: tuple[Prefix, ...] = Field((Prefix(),), min_length=1)

    def of_answers(self, target: Tensor, rivals: Tensor, fresh: Tensor, every: Tensor) -> Tensor:
        total = sum(term.weight for term in self.terms)
        return total * CrossEntropy().of_answers(target, rivals, fresh, every)

    def of_text(self, scores: Tensor, forced: Tensor) -> Tensor:
        own = scores.gather(-1, forced.clamp(min=0)[..., None]).squeeze(-1)
        likely = own - scores.logsumexp(-1)
        parts = [
            term.weight * over_tokens(likely[:, : term.n_tokens], forced[:, : term.n_tokens])
            for term in self.terms
        ]
        return sum(parts[1:], parts[0])
