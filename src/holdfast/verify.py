"""Measure a recovery from the saved perturbation alone, with full forward passes.

Nothing here trusts the optimizer or the replay: the perturbation is attached as an edit, the model
runs from the embedding, and what the clamped features do is read from the residual in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.edits import Capture, Edit, FeatureEdit, Perturbation
from holdfast.features import EVERY_GROUP
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import NullSpace

N_DRAWS = 8
"""Random vectors per prompt that the rounding floor is averaged over."""

TAU = 0.01
"""Floor of the relative drift's denominator, as a share of √|S| · median active value."""


@dataclass(frozen=True)
class Checks:
    """Per prompt, over the perturbed positions and the held features; NaN where not defined.

    margin: of the recovered pass, in logits. preactivation_drift: max |Δp_i| / (‖a_i‖·‖h‖), and
    _absolute in activation units. drift_relative: ‖Δz_S‖ / max(‖z_S‖, τ√|S|·median active value).
    drift_assigned: ‖z_S − c_S‖ of the recovered state, clamp_mismatch the same of the suppressed
    one (decoder rows overlap, so a clamp does not re-encode to what it set). firings_kept: share of
    the features that fired before the clamp in the reference which still do. displacement: norm of
    what the clamp adds, relative to the reference. gate_flips: features that turned on or off.
    overtaken: of these, those of a TopK, whose own pre-activation did not have to move.
    rounding_floor: the preactivation_drift of random vectors in the encoder's null space, of the
    same norm, that have only been rounded to the model's precision: no exact constraint can be
    expected to do better.
    """

    margin: Tensor
    norm: Tensor
    norm_relative: Tensor
    preactivation_drift: Tensor
    preactivation_drift_absolute: Tensor
    drift_absolute: Tensor
    drift_relative: Tensor
    drift_assigned: Tensor
    clamp_mismatch: Tensor
    firings_kept: Tensor
    displacement: Tensor
    gate_flips: Tensor
    overtaken: Tensor
    rounding_floor: Tensor

    @property
    def recovered(self) -> Tensor:
        """[n] bool: the behavior is back, and no held feature was overtaken on the way."""
        return (self.margin > 0) & (self.overtaken == 0)


def verify(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    perturbation: Perturbation,
    bank: FeatureBank,
    median_active: Mapping[str, float | None],
    clamp_first: bool,
) -> Checks:
    """Compare the pass with the perturbation to the one without, prompt by prompt."""
    site = bank.site
    frame = batch.frame()
    reference = _states(subject, batch, edits, None, site, perturbation.positions, clamp_first)
    recovered = _states(
        subject, batch, edits, perturbation, site, perturbation.positions, clamp_first
    )
    h_ref, h_rec = reference.after.double(), recovered.after.double()
    here = (perturbation.positions >= 0)[..., None]  # [n p 1]

    p_ref, p_rec = bank.preactivations(h_ref, frame), bank.preactivations(h_rec, frame)
    rows = bank.slices(frame)
    valid = bank.valid[rows][:, None] & here
    length = bank.W_enc.double().norm(dim=1)[rows][:, None].clamp_min(1e-30)
    moved = torch.where(valid, (p_rec - p_ref).abs(), 0.0)
    scale = length * h_ref.norm(dim=-1, keepdim=True).clamp_min(1e-30)

    z_ref, z_rec = bank.activations(h_ref, frame), bank.activations(h_rec, frame)
    change = _norm(torch.where(here, z_rec - z_ref, 0.0))
    size = _norm(torch.where(here, z_ref, 0.0))
    n_held = bank.valid.sum(1)[rows].double()
    median = torch.as_tensor(
        [median_active.get(group, median_active.get(EVERY_GROUP)) or 0.0 for group in frame.groups],
        dtype=torch.float64, device=h_ref.device,
    )  # fmt: skip
    floor = torch.maximum(size, TAU * n_held.sqrt() * median)

    # What was assigned is known where one clamp sets exactly the held features.
    assigned = [edit for edit in edits if isinstance(edit, FeatureEdit) and site in edit.sites]
    nan = torch.full_like(change, torch.nan)
    drift_assigned = clamp_mismatch = nan
    if len(assigned) == 1 and assigned[0].bank.ids == bank.ids:
        target = assigned[0].assigned(bank.activations(reference.before.double(), frame), frame)
        drift_assigned = _norm(torch.where(valid, z_rec - target, 0.0))
        clamp_mismatch = _norm(torch.where(valid, z_ref - target, 0.0))

    fired = (bank.activations(reference.before.double(), frame) > 0) & valid
    still = (bank.activations(recovered.before.double(), frame) > 0) & fired
    n_fired = fired.sum((1, 2)).double()
    displaced = _norm((reference.after - reference.before).double())
    displaced_now = _norm((recovered.clamped - recovered.before).double())
    h_norm = _norm(torch.where(here, h_ref, 0.0))
    norm = perturbation.norm
    flips = (((z_ref > 0) != (z_rec > 0)) & valid).sum((1, 2)).double()
    return Checks(
        margin=batch.margin(recovered.logits).double(),
        norm=norm,
        norm_relative=norm / h_norm,
        preactivation_drift=(moved / scale).amax((1, 2)),
        preactivation_drift_absolute=moved.amax((1, 2)),
        drift_absolute=change,
        drift_relative=torch.where(floor > 0, change / floor, nan),
        drift_assigned=drift_assigned,
        clamp_mismatch=clamp_mismatch,
        firings_kept=torch.where(n_fired > 0, still.sum((1, 2)) / n_fired, nan),
        displacement=torch.where(displaced > 0, displaced_now / displaced, nan),
        gate_flips=flips,
        overtaken=flips if bank.guarantee == "margin" else torch.zeros_like(flips),
        rounding_floor=_rounding_floor(subject, bank, frame, reference.after, perturbation),
    )


def _rounding_floor(
    subject: Subject, bank: FeatureBank, frame: Frame, h: Tensor, perturbation: Perturbation
) -> Tensor:
    """[n] mean over draws of the drift that rounding alone makes of null-space vectors.

    h [n p d]: the reference residual. NaN where the SAE normalizes tokens: it has no null space.
    """
    if bank.guarantee == "none":
        return torch.full((len(h),), torch.nan, dtype=torch.float64, device=h.device)
    space = NullSpace.of(bank.W_enc, bank.valid, bank.slices(frame))
    delta = torch.stack(list(perturbation.deltas.values())).sum(0).to(h.device)
    length = delta.norm(dim=-1, keepdim=True)
    scale = bank.W_enc.norm(dim=1)[bank.slices(frame)][:, None].clamp_min(1e-30)
    scale = scale * h.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    valid = bank.valid[bank.slices(frame)][:, None]
    generator = torch.Generator().manual_seed(0)
    drifts = []
    for _ in range(N_DRAWS):
        v = space.retract(torch.randn(h.shape, generator=generator).to(h.device))
        v = v * length / v.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        rounded = (h.float() + v).to(subject.model.dtype)
        moved = bank.preactivations(rounded.double(), frame) - bank.preactivations(
            h.double(), frame
        )
        here = valid & (perturbation.positions >= 0).to(h.device)[..., None]
        drifts.append((torch.where(here, moved.abs(), 0.0) / scale).amax((1, 2)))
    return torch.stack(drifts).mean(0).double()


@dataclass(frozen=True)
class _States:
    """Logits [n vocab] and the residual [n p d] before the clamp, after it, and at the end."""

    logits: Tensor
    before: Tensor
    clamped: Tensor
    after: Tensor


def _states(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    perturbation: Perturbation | None,
    site: Site,
    positions: Tensor,
    clamp_first: bool,
) -> _States:
    before, clamped, after = (Capture(site) for _ in range(3))
    added = () if perturbation is None else (perturbation,)
    clamp = (before, *edits, clamped)
    passed = (*clamp, *added, after) if clamp_first else (*added, *clamp, after)
    logits = subject.outputs(batch, passed)[:, -1]
    read = [capture.at(batch.ids, positions) for capture in (before, clamped, after)]
    return _States(logits, *read)


def _norm(x: Tensor) -> Tensor:
    """[n] Frobenius norm over positions and the last axis, in float64."""
    return x.double().pow(2).sum((1, 2)).sqrt()
