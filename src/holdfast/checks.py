"""What verification says of a recovery, prompt by prompt: the columns of a record's rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.constraints import Promise
from holdfast.reactivation import Reactivation


@dataclass(frozen=True)
class Checks:
    """Per prompt, over the held sites, the perturbed positions and the held features; NaN where not
    defined.

    margin: of the recovered pass, in logits. preactivation_drift: max |Δp_i| / (‖a_i‖·‖h‖), and
    _absolute in activation units; _elsewhere: the same at all other tokens, where no constraint
    promises anything; _anchor: at the last token of the prompt, _answer: at the tokens of a forced
    answer, perturbed or not. code_drift: max |Δz_i|, floor_violation: max (z_i of the reference
    − z_i)₊, in the same units. drift_relative: ‖Δz_S‖ / max(‖z_S‖, τ√|S|·median active value);
    code_norm: ‖z_S‖ of the reference, code_fall: ‖(−Δz_S)₊‖, in activation units.
    drift_assigned: ‖z_S − c_S‖ of the recovered state, clamp_mismatch the same of the suppressed
    one (decoder rows overlap, so a clamp does not re-encode to what it set). firings_kept: share of
    the features that fired before the clamp in the reference which still do. displacement: norm of
    what the clamp adds, relative to the reference. gate_flips: features that turned on or off;
    overtaken: of these, those of a TopK, whose own pre-activation did not have to move.
    gate_margin: smallest distance of a held pre-activation from what decides whether it fires (a
    threshold, the k-th value of a TopK), in the units of preactivation_drift.
    undo_cosine: cosine of the perturbation with the clamp's displacement taken back.
    decoder_share: share of the perturbation's squared norm in the span of the held decoder rows.
    slots, eligible, reactivated, reactivated_mass, activation_max: held features that came on
    again, see `Reactivation`. decode_drift: ‖Δz_S · W_dec‖ over sites and positions, in residual
    units.
    readout_norm, readout_drift, readout_rise, readout_fall: at the last token of the prompt, where
    the answer is read, ‖z_S‖ of the reference, ‖Δz_S‖, and of Δz_S what went up and what went down;
    readout_relative: readout_drift with the denominator of drift_relative (METHODS J.4, C.5).
    others_active, others_drift, others_floor, others_on, others_off: of the features that are not
    held, see `Others`; NaN where the whole SAE was not looked at.
    rounding_floor: the preactivation_drift of random vectors in the encoder's null space, of the
    same norm, that have only been rounded to the model's precision: no exact constraint can be
    expected to do better.
    """

    margin: Tensor
    norm: Tensor
    norm_relative: Tensor
    preactivation_drift: Tensor
    preactivation_drift_absolute: Tensor
    preactivation_drift_elsewhere: Tensor
    preactivation_drift_anchor: Tensor
    preactivation_drift_answer: Tensor
    code_drift: Tensor
    floor_violation: Tensor
    drift_absolute: Tensor
    drift_relative: Tensor
    code_norm: Tensor
    code_fall: Tensor
    drift_assigned: Tensor
    clamp_mismatch: Tensor
    firings_kept: Tensor
    displacement: Tensor
    gate_flips: Tensor
    gate_margin: Tensor
    overtaken: Tensor
    undo_cosine: Tensor
    decoder_share: Tensor
    slots: Tensor
    eligible: Tensor
    reactivated: Tensor
    reactivated_mass: Tensor
    activation_max: Tensor
    decode_drift: Tensor
    readout_norm: Tensor
    readout_drift: Tensor
    readout_rise: Tensor
    readout_fall: Tensor
    readout_relative: Tensor
    others_active: Tensor
    others_drift: Tensor
    others_floor: Tensor
    others_on: Tensor
    others_off: Tensor
    rounding_floor: Tensor

    @property
    def reactivation(self) -> Reactivation:
        """Which held features the recovery switched on again."""
        return Reactivation(
            self.slots, self.eligible, self.reactivated, self.reactivated_mass, self.activation_max
        )

    @property
    def recovered(self) -> Tensor:
        """[n] bool: the behavior is back, and no held feature was overtaken on the way."""
        return (self.margin > 0) & (self.overtaken == 0)

    def broken(self, promise: Promise) -> Tensor:
        """[n] how far what a constraint promised is from being kept, dimensionless."""
        kept = {
            "nothing": torch.zeros_like(self.margin),
            "preactivations": self.preactivation_drift,
            "codes": self.code_drift,
            "floor": self.floor_violation,
            "active": torch.maximum(self.preactivation_drift, self.others_drift),
        }
        return kept[promise]

    def floor(self, promise: Promise) -> Tensor:
        """[n] how much of that rounding alone makes."""
        if promise == "active":
            return torch.maximum(self.rounding_floor, self.others_floor)
        return self.rounding_floor
