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

RELATIVE_UNIT = "share of the features' norm"
PREACTIVATION_UNIT = "share of encoder norm x residual norm"
NO_SCALE = "no held feature is active in the reference or on the fit split"
"""What a record calls the two drifts, and why the relative one may have no value."""

MedianActive = Mapping[str, float | None]
"""Group → median of the features' active values on the fit split, None where none fired."""


@dataclass(frozen=True)
class State:
    """What the held features of one site are at residuals, [n p k] each, in float64.

    held: bool, the features that there are, at the tokens that are looked at. preactivations, codes
    of all of them; scale: ‖a_i‖·‖h‖.
    """

    held: Tensor
    preactivations: Tensor
    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, bank: FeatureBank, frame: Frame, h: Tensor, there: Tensor) -> State:
        """Of residuals [n p d_model] in float64, at the tokens where `there` [n p]."""
        held = bank.valid[bank.slices(frame)][:, None] & there[..., None]
        return cls(
            held, bank.preactivations(h, frame), bank.activations(h, frame), _scale(bank, frame, h)
        )


@dataclass(frozen=True)
class Moved:
    """What the held features of one site did between two residuals, [n p k] each.

    held: as in `State`. preactivation: |Δp_i| in activation units, before, after: codes z_i; 0
    where not held. scale: of the first residual.
    """

    held: Tensor
    preactivation: Tensor
    scale: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def between(
        cls, bank: FeatureBank, frame: Frame, before: Tensor, after: Tensor, there: Tensor
    ) -> Moved:
        """Of residuals [n p d_model] in float64, at the tokens where `there` [n p]."""
        return cls.of(*(State.of(bank, frame, h, there) for h in (before, after)))

    @classmethod
    def of(cls, before: State, after: State) -> Moved:
        """Of two states of the same features at the same tokens."""
        held = before.held
        moved = (after.preactivations - before.preactivations).abs()
        return cls(held, torch.where(held, moved, 0.0), before.scale,
                   *(torch.where(held, state.codes, 0.0) for state in (before, after)))  # fmt: skip

    @property
    def flips(self) -> Tensor:
        """[n] float64: how many of the features came on or went off."""
        return ((self.before > 0) != (self.after > 0)).sum((1, 2)).double()

    def overtaken(self, bank: FeatureBank) -> Tensor:
        """[n] float64: how many did so though they need not have moved themselves, since others of
        a TopK came before them or fell behind; 0 elsewhere."""
        return self.flips if bank.guarantee == "margin" else torch.zeros_like(self.flips)

    def drift(self, floor: Tensor) -> Drift:
        """floor [n]: see `floor_of`."""
        return Drift(
            preactivation=(self.preactivation / self.scale).amax((1, 2)),
            change=(self.after - self.before).square().sum((1, 2)),
            size=self.before.square().sum((1, 2)),
            fall=(self.before - self.after).clamp_min(0).square().sum((1, 2)),
            floor=floor,
        )


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
    def between(
        cls,
        held: Mapping[Site, FeatureBank],
        frame: Frame,
        before: Mapping[Site, Tensor],
        after: Mapping[Site, Tensor],
        there: Tensor,
        median_active: Mapping[Site, MedianActive],
    ) -> Drift:
        """Of all held sites together: residuals [n p d_model] by site, in float64, at the tokens
        where `there` [n p]."""
        return cls.of_sites(
            [
                Moved.between(bank, frame, before[site], after[site], there).drift(
                    floor_of(bank, frame, median_active[site])
                )
                for site, bank in held.items()
            ]
        )

    @classmethod
    def of_sites(cls, sites: Sequence[Drift]) -> Drift:
        """Of several sites together."""
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


def preactivation_drift(bank: FeatureBank, frame: Frame, before: Tensor, after: Tensor) -> Tensor:
    """[n p] at each token, the largest |Δp_i| / (‖a_i‖·‖h‖) of a held feature between two residuals
    [n p d_model] in float64."""
    moved = (bank.preactivations(after, frame) - bank.preactivations(before, frame)).abs()
    drift = moved / _scale(bank, frame, before)
    return torch.where(bank.valid[bank.slices(frame)][:, None], drift, 0.0).amax(2)


def _scale(bank: FeatureBank, frame: Frame, h: Tensor) -> Tensor:
    """[n p k] ‖a_i‖·‖h‖ of residuals [n p d_model] in float64."""
    length = bank.W_enc.double().norm(dim=1)[bank.slices(frame)][:, None].clamp_min(TINY)
    return length * h.norm(dim=-1, keepdim=True).clamp_min(TINY)


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
