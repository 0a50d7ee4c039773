"""Which positions an edit acts on: a policy, decided on absolute positions only.

Under a KV cache a hook sees one new token; a policy that counted columns would fail there
(METHODS D.9-1), so every rule reads the frame's absolute positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.batch import Frame
from holdfast.errors import ContextError, PositionError

Where = (
    Literal["all", "prompt", "generated", "last_prompt", "template"]
    | tuple[Annotated[int, Field(ge=0)], ...]
)


def check_possible(where: Where, include_bos: bool, frame: Frame, n_generated: int = 0) -> None:
    """Raise PositionError if some prompt has not what the policy names.

    A listed position outside the prompt and `n_generated` tokens, one that is BOS where BOS is left
    out, or a chat template where there is none: all would be skipped there without a word.
    """
    if not len(frame.ids):
        return
    if where == "template" and bool((frame.template >= frame.prompt_length).any()):
        row = int((frame.template >= frame.prompt_length).int().argmax())
        raise PositionError(
            f"positions are 'template', but prompt {frame.ids[row]} has no chat template after its "
            "instruction; use chat prompts, or another policy"
        )
    if isinstance(where, str):
        return
    shortest = int(frame.positions[:, -1].min()) + 1 + n_generated
    outside = [position for position in where if position >= shortest]
    if outside:
        raise PositionError(
            f"positions {outside} are listed, but the shortest sequence has positions 0 to "
            f"{shortest - 1}; list only what every prompt has, or use a policy such as last_prompt"
        )
    check_not_bos(where, include_bos, frame)


def check_not_bos(where: Where, include_bos: bool, frame: Frame) -> None:
    """Raise PositionError if a listed position is BOS, and BOS is left out."""
    if not isinstance(where, str) and 0 in where and not include_bos and bool(frame.bos.any()):
        row = int(frame.bos.int().argmax())
        raise PositionError(
            f"position 0 is listed, but in prompt {frame.ids[row]} that is BOS, which is left out; "
            "set include_bos = true beside the positions, or list them without 0"
        )


def check_fits(
    name: str, context: int | None, ids: Sequence[str], lengths: Sequence[int], n_new: int = 0
) -> None:
    """Raise ContextError for prompts of these lengths that have no room for so many new tokens.

    All in tokens; context: what the model called `name` reads. Nothing is ever cut to fit.
    """
    long = [i for i, n in enumerate(lengths) if context is not None and n + n_new > context]
    if long:
        worst = max(long, key=lambda i: lengths[i])
        new = f" and {n_new} are to be generated" if n_new else ""
        less = "fewer new tokens (max_new_tokens), " if n_new else ""
        raise ContextError(
            f"{len(long)} of {len(ids)} prompts do not fit into the {context} tokens that {name} "
            f"reads: {ids[worst]} has {lengths[worst]}{new}; use {less}shorter prompts, or leave "
            "such rows out of the dataset: prompts are never cut"
        )


def selected(where: Where, include_bos: bool, frame: Frame) -> Tensor:
    """[b s] bool: the tokens of `frame` that the policy names. Padding is never selected.

    `include_bos` decides about the BOS token for every policy, also for an explicit list.
    """
    positions = frame.positions
    length = frame.prompt_length[:, None]
    if where == "all":
        mask = positions >= 0
    elif where == "prompt":
        mask = (positions >= 0) & (positions < length)
    elif where == "generated":
        mask = positions >= length
    elif where == "last_prompt":
        mask = positions == length - 1
    elif where == "template":
        mask = (positions >= frame.template[:, None]) & (positions < length)
    else:
        mask = torch.zeros_like(positions, dtype=torch.bool)
        for position in where:
            mask |= positions == position
    if not include_bos:
        mask = mask & ~((positions == 0) & frame.bos[:, None])
    return mask
