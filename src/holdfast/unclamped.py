"""Does the vector that was found need the clamp? It is added to the model as it is (METHODS C.5).

A vector that only puts back what the clamp took has little to do there; one that pushes towards the
answer pushes there too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.controls import Case
from holdfast.edits import Perturbation
from holdfast.setting import Setting
from holdfast.verify import margin_in_order

NOT_AHEAD = "the answer does not lead with the clamp and the vector on"


@dataclass(frozen=True)
class Unclamped:
    """margin [n] in logits, of a full pass with the vector and no clamp; gain [n]: what the vector
    adds to the clean margin, as a share of what it adds to the suppressed one, NaN where that did
    not bring the lead back."""

    margin: Tensor
    gain: Tensor

    @classmethod
    def of(
        cls, setting: Setting, case: Case, perturbation: Perturbation, margin: Tensor
    ) -> Unclamped | None:
        """margin [n]: with the clamp on. None where another answer or another model is asked."""
        if not case.own or case.subject is not setting.subject:
            return None
        bare = margin_in_order(case.subject, case.batch, (), perturbation, clamp_first=True)
        clean, suppressed = (
            margins[case.rows].to(bare)
            for margins in (setting.clean_margin, setting.suppressed_margin)
        )
        led = (margin > 0) & (margin > suppressed)
        gain = (bare - clean) / (margin - suppressed)
        return cls(bare, torch.where(led, gain, torch.nan))
