"""Reactivation: did the recovery switch clamped features on again? (METHODS C.3, I.5)

A slot is one held feature at one perturbed position of one prompt. It is eligible where the feature
is off with the clamp on, and reactivated where it is on after the recovery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.measure import Measurement, mean, rate

ETA = 0.0
"""Highest activation at which a feature counts as off, in activation units; 0 as published."""

NO_SLOT = "every held feature is on with the clamp on, so none can be switched on again"


@dataclass(frozen=True)
class Reactivation:
    """Per prompt [n], over the held slots of one site or of several.

    slots, eligible, reactivated: how many; mass: sum of the activations of eligible slots after the
    recovery, highest: the largest activation of any held slot after it, both in activation units.
    """

    slots: Tensor
    eligible: Tensor
    reactivated: Tensor
    mass: Tensor
    highest: Tensor

    @classmethod
    def between(cls, reference: Tensor, recovered: Tensor, held: Tensor) -> Reactivation:
        """Of activations [n p k] with the clamp on, before and after a recovery; held [n p k] bool:
        the slots that there are."""
        eligible = held & (reference <= ETA)
        return cls(
            slots=held.sum((1, 2)).double(),
            eligible=eligible.sum((1, 2)).double(),
            reactivated=(eligible & (recovered > ETA)).sum((1, 2)).double(),
            mass=torch.where(eligible, recovered.clamp_min(0), 0.0).double().sum((1, 2)),
            highest=torch.where(held, recovered, 0.0).double().amax((1, 2)),
        )

    @property
    def within_eligible(self) -> Tensor:
        """[n] share of the eligible slots that were reactivated; NaN where none is eligible."""
        return torch.where(self.eligible > 0, self.reactivated / self.eligible, torch.nan)

    @property
    def of_all(self) -> Tensor:
        """[n] share of all held slots that were reactivated."""
        return self.reactivated / self.slots

    @property
    def silent(self) -> Tensor:
        """[n] bool: no held feature is on after the recovery, at any perturbed position."""
        return self.highest <= ETA

    def measurements(self, recovered: Tensor, clusters: Sequence[str]) -> list[Measurement]:
        """Means over prompts, and the shares of all audited prompts that came back with no held
        feature on, and with none switched on. recovered [n] bool."""
        share = "share of held features x positions"
        return [
            mean("reactivated_within_eligible", share, self.within_eligible, clusters, NO_SLOT),
            mean("reactivated_of_all", share, self.of_all, clusters),
            rate("zero_reactivation_rate", recovered & self.silent, clusters),
            rate("none_reactivated_rate", recovered & (self.reactivated == 0), clusters),
        ]

    def pooled(self) -> dict[str, Any]:
        """The same over the slots of all prompts together, where every slot counts once."""
        slots, eligible, reactivated, mass = (
            float(values.sum())
            for values in (self.slots, self.eligible, self.reactivated, self.mass)
        )
        nan = float("nan")
        return {
            "n_slots": int(slots),
            "n_eligible": int(eligible),
            "n_reactivated": int(reactivated),
            "reactivated_of_all": reactivated / slots if slots else nan,
            "reactivated_within_eligible": reactivated / eligible if eligible else nan,
            "reactivated_mass_mean": mass / eligible if eligible else nan,
        }
