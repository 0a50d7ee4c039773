"""What a model did on some prompts, as a behavior reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from holdfast.reply import Reply


@dataclass(frozen=True)
class Observation:
    """n prompts under some edits.

    shows [n] bool: the behavior is there; opposite [n] bool: what the intervention is to bring
    about is there in its place. Both are false where the model does neither, breaks down say.
    Where replies are judged: labels, a judge's word for each; replies; tokens, those generated.
    """

    shows: Tensor
    opposite: Tensor
    labels: tuple[str, ...] = ()
    replies: tuple[Reply, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = ()
