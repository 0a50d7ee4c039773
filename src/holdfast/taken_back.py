"""Does a perturbation just take the clamp back? (METHODS C.5)"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.drift import TINY
from holdfast.edits import Perturbation
from holdfast.full_pass import FullPass
from holdfast.held_features import square
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subspace import decoder_null


def taken_back(
    perturbation: Perturbation, reference: FullPass, held: Mapping[Site, FeatureBank], frame: Frame
) -> tuple[Tensor, Tensor]:
    """How far it does, [n] each.

    The cosine with what the clamp had added, negated, over all perturbed slots; NaN where it added
    nothing. The share of the squared norm in the span of the held decoder rows.
    """
    dot = there = inside = torch.zeros(len(frame.ids), dtype=torch.float64)
    for site, delta in perturbation.deltas.items():
        delta = delta.double().cpu()
        read = reference.at(site)
        back = (read.before - read.clamped).double().cpu()
        dot = dot + (delta * back).sum((1, 2))
        there = there + square(back)
        if site in held:
            bank = held[site]
            rows = decoder_null(bank, frame)
            outside = rows.retract(perturbation.deltas[site]).double().cpu()
            inside = inside + square(delta - outside)
    norm = perturbation.norm.cpu()
    nan = torch.full_like(norm, torch.nan)
    cosine = torch.where((there > 0) & (norm > 0), dot / (there.sqrt() * norm).clamp_min(TINY), nan)
    share = torch.where(norm > 0, inside / norm.square().clamp_min(TINY), nan)
    device = perturbation.positions.device
    return cosine.to(device), share.to(device)
