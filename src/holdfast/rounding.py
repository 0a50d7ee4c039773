"""How far rounding alone moves held features: no exact constraint can be expected to do better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.drift import TINY, preactivation_drift
from holdfast.edits import Perturbation
from holdfast.full_pass import FullPass
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subspace import encoder_null

N_DRAWS = 8
"""Random vectors per prompt that the rounding floor is averaged over."""


class Drawn(NamedTuple):
    """Rows [m] of n: noise is drawn for all n, so that a prompt's is the same in any piece."""

    rows: Tensor
    n: int


def rounding_floor(
    dtype: torch.dtype,
    held: Mapping[Site, FeatureBank],
    frame: Frame,
    reference: FullPass,
    perturbation: Perturbation,
    drawn: Drawn,
) -> Tensor:
    """[m] mean over draws of the largest drift that rounding alone makes of null-space vectors, at
    sites that are held and perturbed. dtype: the model's. NaN where there is none, or where the SAE
    normalizes tokens and so has no null space."""
    sites = [site for site in perturbation.sites if site in held]
    if not sites or any(held[site].guarantee == "none" for site in sites):
        device = perturbation.positions.device
        return torch.full((len(frame.ids),), torch.nan, dtype=torch.float64, device=device)
    floors = []
    for site in sites:
        bank, h = held[site], reference.at(site).after
        space = encoder_null(bank, frame)
        length = perturbation.deltas[site].norm(dim=-1, keepdim=True).to(h.device)
        here = (perturbation.positions >= 0).to(h.device)
        generator = torch.Generator().manual_seed(0)
        drifts = []
        for _ in range(N_DRAWS):
            noise = torch.randn(drawn.n, *h.shape[1:], generator=generator)[drawn.rows.cpu()]
            v = space.retract(noise.to(h.device))
            v = v * length / v.norm(dim=-1, keepdim=True).clamp_min(TINY)
            rounded = (h.float() + v).to(dtype)
            moved = preactivation_drift(bank, frame, h.double(), rounded.double())
            drifts.append(torch.where(here, moved, 0.0).amax(1))
        floors.append(torch.stack(drifts))
    return torch.stack(floors).amax(0).mean(0).double()
