"""How the next token is chosen: the likeliest, or one drawn at a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from holdfast.canonical import digest


class Choice(Protocol):
    """Which token follows."""

    def __call__(self, ids: Sequence[str], logits: Tensor) -> Tensor:
        """[b] tokens for the prompts `ids`, from their logits [b vocab]."""
        ...


def greedy(ids: Sequence[str], logits: Tensor) -> Tensor:
    """The likeliest token."""
    return logits.argmax(-1)


@dataclass
class Sampled:
    """Tokens drawn with probabilities `softmax(logits / temperature)`.

    Every prompt has random numbers of its own, one a token in order, that depend on seed, draw and
    its id alone: which prompts share a batch, and how large it is, changes nothing. Of one use: a
    second pass goes on where the first left the numbers.
    """

    temperature: float
    seed: int
    draw: int
    _streams: dict[str, torch.Generator] = field(default_factory=dict, repr=False)

    def __call__(self, ids: Sequence[str], logits: Tensor) -> Tensor:
        chances = torch.softmax(logits.double() / self.temperature, -1).cumsum(-1)
        at = chances[:, -1:] * self._uniform(ids).to(chances, non_blocking=True)[:, None]
        # To the right of ties: a token without any chance is never drawn.
        drawn = torch.searchsorted(chances, at, right=True).squeeze(1)
        return drawn.clamp(max=logits.shape[-1] - 1)

    def _uniform(self, ids: Sequence[str]) -> Tensor:
        """[b] float64 in [0, 1)."""
        return torch.stack(
            [torch.rand((), generator=self._stream(i), dtype=torch.float64) for i in ids]
        )

    def _stream(self, example: str) -> torch.Generator:
        if example not in self._streams:
            key = int(digest(f"sample/{self.seed}/{self.draw}/{example}")[:15], 16)
            self._streams[example] = torch.Generator().manual_seed(key)
        return self._streams[example]
