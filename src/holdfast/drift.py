"""How far held features moved: one definition for what is measured, one for what is descended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.features import EVERY_GROUP
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site

FLOOR = 1e-6
"""Added to the mean square of the reference's codes, as published."""

TAU = 0.01
"""Floor of the relative drift's denominator, as a share of √|S| · median active value."""

TINY = 1e-30

MedianActive = Mapping[str, float | None]
"""Group → median of the features' active values on the fit split, None where none fired."""


@dataclass(frozen=True)
class Drift:
    """What held features did between two passes, of n prompts (METHODS C.5, Numerics).

    preactivation: max |Δp_i| / (‖a_i‖·‖h‖), dimensionless. change, size: ‖Δz_S‖² and ‖z_S‖² of the
    reference, fall: ‖(−Δz_S)₊‖², floor: (τ√|S|·median active value)², in squared activation
    units, so that sites add.
    """

    preactivation: Tensor
    change: Tensor
    size: Tensor
    fall: Tensor
    floor: Tensor

    @classmethod
    def at(
        cls,
        bank: FeatureBank,
        frame: Frame,
        before: Tensor,
        after: Tensor,
        there: Tensor,
        median_active: MedianActive,
    ) -> Drift:
        """Of one site: residuals [n p d_model] at the tokens where `there` [n p], float64."""
        own = bank.valid[bank.slices(frame)][:, None] & there[..., None]
        moved, scale = moved_preactivations(bank, frame, before, after)
        reference = bank.activations(before, frame)
        change = bank.activations(after, frame) - reference
        return cls(
            torch.where(own, moved / scale, 0.0).amax((1, 2)),
            torch.where(own, change, 0.0).square().sum((1, 2)),
            torch.where(own, reference, 0.0).square().sum((1, 2)),
            torch.where(own, (-change).clamp_min(0), 0.0).square().sum((1, 2)),
            floor_of(bank, frame, median_active),
        )

    @classmethod
    def between(
        cls,
        held: Mapping[Site, FeatureBank],
        frame: Frame,
        before: Mapping[Site, Tensor],
        after: Mapping[Site, Tensor],
        there: Tensor,
        median_active: Mapping[Site, MedianActive],
    ) -> Drift:
        """Of all held sites together."""
        sites = [
            cls.at(bank, frame, before[site], after[site], there, median_active[site])
            for site, bank in held.items()
        ]
        return cls(
            torch.stack([s.preactivation for s in sites]).amax(0),
            *(
                torch.stack([getattr(site, name) for site in sites]).sum(0)
                for name in ("change", "size", "fall", "floor")
            ),
        )

    @property
    def relative(self) -> Tensor:
        """[n] ‖Δz_S‖ / max(‖z_S‖, τ√|S|·median active value); NaN where neither has a scale."""
        return relative_of(self.change, self.size, self.floor)


def relative_of(change: Tensor, size: Tensor, floor: Tensor) -> Tensor:
    """[n] the relative drift of squares [n]; NaN where there is no scale."""
    scale = torch.maximum(size, floor).sqrt()
    return torch.where(scale > 0, change.sqrt() / scale, torch.nan)


def floor_of(bank: FeatureBank, frame: Frame, median_active: MedianActive) -> Tensor:
    """[n] float64: the square of τ√|S|·median active value, each prompt's own group's."""
    n_held = bank.valid.sum(1)[bank.slices(frame)].double()
    medians = [
        median_active.get(group, median_active.get(EVERY_GROUP)) or 0.0 for group in frame.groups
    ]
    return TAU**2 * n_held * n_held.new_tensor(medians).square()


def moved_preactivations(
    bank: FeatureBank, frame: Frame, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor]:
    """|Δp| [n p k] between two residuals [n p d] in float64, and its scale ‖a_i‖·‖h‖."""
    change = bank.preactivations(after, frame) - bank.preactivations(before, frame)
    length = bank.W_enc.double().norm(dim=1)[bank.slices(frame)][:, None].clamp_min(TINY)
    return change.abs(), length * before.norm(dim=-1, keepdim=True).clamp_min(TINY)


def squared_relative_drift(
    codes: Sequence[Tensor], reference: Sequence[Tensor], monitored: Sequence[Tensor]
) -> Tensor:
    """[n] `mean (z − r)² / (mean r² + 1e-6)` over monitored entries, averaged over sites
    (METHODS D.5, `relative_mse`); dimensionless, and 0 where nothing is monitored.

    codes, reference: z and r [n s k] of each site; monitored: bool, of the same shapes.
    """
    sites = []
    for z, r, own in zip(codes, reference, monitored, strict=True):
        count = own.sum((1, 2)).clamp_min(1)
        moved = torch.where(own, z - r, 0.0).square().sum((1, 2)) / count
        size = torch.where(own, r, 0.0).square().sum((1, 2)) / count
        sites.append(moved / (size + FLOOR))
    return torch.stack(sites).mean(0)
