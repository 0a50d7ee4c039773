"""Where a perturbation lives: the sites and the absolute positions that a study's words name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.errors import PositionError, StudyError
from holdfast.positions import check_possible, selected
from holdfast.recovery import Perturb
from holdfast.sites import Site


def sites_of(
    perturb: Perturb, clamped: Sequence[Site], model: str, n_blocks: int
) -> tuple[Site, ...]:
    """The perturbed sites, in forward order; the clamped ones if the study names none.

    Raises StudyError for one above the last block.
    """
    sites = tuple(sorted({Site.parse(site) for site in perturb.sites} or set(clamped)))
    if sites[-1].depth > n_blocks:
        raise StudyError(
            f"there is no site {sites[-1]} to perturb: {model} has {n_blocks} blocks, the last "
            f"site is {Site(n_blocks)}; name sites up to that one in recovery.perturb.sites"
        )
    return sites


def in_prompt(perturb: Perturb, frame: Frame) -> Tensor:
    """[b s] bool: the tokens of prompts that are perturbed.

    Raises PositionError where a prompt lacks a listed position, or has none that the policy names.
    """
    check_possible(perturb.positions, perturb.include_bos, frame)
    mask = selected(perturb.positions, perturb.include_bos, frame)
    bare = ~mask.any(1)
    if bare.any():
        raise PositionError(
            f"recovery.perturb.positions = {perturb.positions!r} names no token of prompt "
            f"{frame.ids[int(bare.int().argmax())]}, nor of {int(bare.sum()) - 1} others: a search "
            "needs one at least; name positions that every prompt has, such as last_prompt"
        )
    return mask


def positions_of(perturb: Perturb, batch: Batch) -> Tensor:
    """[n p] absolute positions, in prompts and, where the study says so, in their answers; -1 where
    a row has fewer.

    Raises PositionError as `in_prompt`, StudyError for positions of answers that nobody reads.
    """
    frame = batch.frame()
    mask = in_prompt(perturb, frame)
    if perturb.answer:
        if batch.forced is None:
            raise StudyError(
                "perturb.answer adds positions of the answer, and this behavior is read at the "
                "last prompt token; leave it out"
            )
        begin = frame.prompt_length[:, None]
        mask = mask | ((frame.positions >= begin) & (frame.positions < begin + perturb.answer))
    width = int(mask.sum(1).max())
    masked = torch.where(mask, frame.positions, -1)
    return masked.sort(1, descending=True).values[:, :width].flip(1)
