"""What the features of an SAE do that nobody clamped, where a vector is added (METHODS C.5 d)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.drift import TINY
from holdfast.saes.bank import FeatureBank
from holdfast.saes.pieces import encoded
from holdfast.saes.sae import SAE
from holdfast.saes.stored import StoredSAE


@dataclass(frozen=True)
class Others:
    """Per prompt, over the perturbed tokens and the features of an SAE that are not held.

    active: features that fire in the reference; drift: largest |Δp_i| / (‖a_i‖·‖h‖) of these;
    floor: as much of it as rounding the residual makes; on: features that fire now and did not;
    off: how many of the active no longer fire. Counts are of features × tokens.
    """

    active: Tensor
    drift: Tensor
    floor: Tensor
    on: Tensor
    off: Tensor

    @classmethod
    def unknown(cls, like: Tensor) -> Others:
        """NaN, where nobody looked."""
        return cls(*(torch.full_like(like, torch.nan) for _ in fields(cls)))

    @classmethod
    def between(
        cls,
        sae: SAE | StoredSAE,
        bank: FeatureBank,
        frame: Frame,
        before: Tensor,
        after: Tensor,
        rounding: Tensor,
        there: Tensor,
    ) -> Others:
        """Of one site: residuals [n p d_model] in float64, at the tokens where `there` [n p].
        rounding [n p d_model]: what was lost when the vector was added."""
        n, p, d = before.shape
        x, moved, lost = (each.reshape(n * p, d) for each in (before, after, rounding))
        length = x.norm(dim=-1, keepdim=True).clamp_min(TINY)
        groups = bank.slices(frame).repeat_interleave(p)
        held = torch.zeros(len(bank.ids), sae.n_features, dtype=torch.bool, device=x.device)
        for group, ids in enumerate(bank.ids):
            held[group, list(ids)] = True
        made = torch.zeros(len(fields(cls)), n * p, dtype=torch.float64, device=x.device)
        for piece in encoded(sae, torch.cat([x, moved])):  # what it reads is read once for both
            own, W = list(piece.own.ids), piece.own.W_enc.double()
            free = ~held[:, own][groups] & there.reshape(-1, 1)
            was, now = (z > 0 for z in piece.z.chunk(2))
            was, now = was & free, now & free
            before_it, after_it = piece.p.chunk(2)
            scale = W.norm(dim=0).clamp_min(TINY) * length
            for row, change in ((1, after_it - before_it), (2, lost @ W)):
                largest = torch.where(was, change.abs() / scale, 0.0).amax(1)
                made[row] = torch.maximum(made[row], largest)
            made[0] += was.sum(1)
            made[3] += (now & ~was).sum(1)
            made[4] += (was & ~now).sum(1)
        active, drift, floor, on, off = made.view(-1, n, p)
        return cls(active.sum(1), drift.amax(1), floor.amax(1), on.sum(1), off.sum(1))

    @classmethod
    def sum(cls, sites: Sequence[Others]) -> Others:
        """The largest drift and floor, and sums of everything else."""
        stacked = {f.name: torch.stack([getattr(s, f.name) for s in sites]) for f in fields(cls)}
        largest = ("drift", "floor")
        return cls(**{n: v.amax(0) if n in largest else v.sum(0) for n, v in stacked.items()})
