"""Measure a recovery from the saved perturbation alone, with full forward passes.

Nothing here trusts the optimizer or the replay: the perturbation is attached as an edit, the model
runs from the embedding, and what the clamped features do is read from the residual in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.constraints import Promise
from holdfast.drift import TINY, floor_of, moved_preactivations, relative_of
from holdfast.edits import Capture, Edit, FeatureEdit, Perturbation
from holdfast.reactivation import Reactivation
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import NullSpace

N_DRAWS = 8
"""Random vectors per prompt that the rounding floor is averaged over."""


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
        }
        return kept[promise]


def verify(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    perturbation: Perturbation,
    held: Mapping[Site, FeatureBank],
    median_active: Mapping[Site, Mapping[str, float | None]],
    clamp_first: bool,
) -> Checks:
    """Compare the pass with the perturbation to the one without, prompt by prompt.

    held: site → the features that were to stay; median_active: site → group → their scale.
    """
    sites = tuple(sorted({*held, *perturbation.sites}))
    reference = _Pass.of(subject, batch, edits, None, sites, perturbation, clamp_first)
    recovered = _Pass.of(subject, batch, edits, perturbation, sites, perturbation, clamp_first)
    frame = batch.frame()
    by_site = [
        _at_site(
            frame, edits, held[site], median_active[site], reference.at(site), recovered.at(site),
            perturbation.positions,
        )
        for site in sorted(held)
    ]  # fmt: skip
    total = _Features.sum(by_site)
    nan = torch.full_like(total.size, torch.nan)
    kept, fired = total.still, total.fired
    displaced = total.displaced.sqrt()
    h_norm = torch.stack(
        [_square(reference.at(site).after) for site in perturbation.sites]
    ).sum(0).sqrt()  # fmt: skip
    norm = perturbation.norm
    undo, decoder = _undo(perturbation, reference, held, frame)
    return Checks(
        margin=batch.margin(recovered.logits).double(),
        norm=norm,
        norm_relative=norm / h_norm,
        preactivation_drift=total.drift,
        preactivation_drift_absolute=total.drift_absolute,
        preactivation_drift_elsewhere=total.elsewhere,
        preactivation_drift_anchor=total.anchor,
        preactivation_drift_answer=total.answer,
        code_drift=total.code,
        floor_violation=total.fallen,
        drift_absolute=total.change.sqrt(),
        drift_relative=total.relative,
        code_norm=total.size.sqrt(),
        code_fall=total.fall.sqrt(),
        drift_assigned=total.off_assigned.sqrt(),
        clamp_mismatch=total.mismatch.sqrt(),
        firings_kept=torch.where(fired > 0, kept / fired, nan),
        displacement=torch.where(displaced > 0, total.displaced_now.sqrt() / displaced, nan),
        gate_flips=total.flips,
        gate_margin=-total.closeness,
        overtaken=total.overtaken,
        undo_cosine=undo,
        decoder_share=decoder,
        slots=total.slots,
        eligible=total.eligible,
        reactivated=total.reactivated,
        reactivated_mass=total.mass,
        activation_max=total.highest,
        decode_drift=total.decoded.sqrt(),
        readout_norm=total.read_size.sqrt(),
        readout_drift=(total.read_up + total.read_down).sqrt(),
        readout_rise=total.read_up.sqrt(),
        readout_fall=total.read_down.sqrt(),
        readout_relative=total.relative_at_readout,
        rounding_floor=_rounding_floor(subject, held, frame, reference, perturbation),
    )


def margin_in_order(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    perturbation: Perturbation,
    clamp_first: bool,
) -> Tensor:
    """[n] margin in logits of a full pass with the clamp before the perturbation at every site, or
    after it: whose word is the last one (METHODS A.9, C.5)."""
    passed = (*edits, perturbation) if clamp_first else (perturbation, *edits)
    return batch.margin(subject.read(batch, passed)).double()


@dataclass(frozen=True)
class Effect:
    """What one perturbation did to n prompts: norm in residual units, the rest as in `Checks`."""

    margin: Tensor
    norm: Tensor
    preactivation_drift: Tensor
    drift_relative: Tensor
    overtaken: Tensor


def effects(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    perturbations: Iterable[Perturbation],
    held: Mapping[Site, FeatureBank],
    median_active: Mapping[Site, Mapping[str, float | None]],
    clamp_first: bool,
) -> Iterator[Effect]:
    """Several perturbations of the same sites and positions, each in full forward passes and
    compared to one pass without any: the part of `verify` that comparing them needs."""
    reference: _Pass | None = None
    frame = batch.frame()
    for perturbation in perturbations:
        sites = tuple(sorted({*held, *perturbation.sites}))
        if reference is None:
            reference = _Pass.of(subject, batch, edits, None, sites, perturbation, clamp_first)
        moved = _Pass.of(subject, batch, edits, perturbation, sites, perturbation, clamp_first)
        total = _Features.sum(
            [
                _at_site(
                    frame, edits, held[site], median_active[site], reference.at(site),
                    moved.at(site), perturbation.positions,
                )
                for site in sorted(held)
            ]
        )  # fmt: skip
        yield Effect(
            margin=batch.margin(moved.logits).double(),
            norm=perturbation.norm,
            preactivation_drift=total.drift,
            drift_relative=total.relative,
            overtaken=total.overtaken,
        )


@dataclass(frozen=True)
class _Read:
    """The residual of one site before the clamp, after it, and at the end: [n p d] each at the
    perturbed positions; whole [n s d] at the end, at every token."""

    before: Tensor
    clamped: Tensor
    after: Tensor
    whole: Tensor


@dataclass(frozen=True)
class _Pass:
    """Logits of one pass where the answer is read, and what it read at every site."""

    logits: Tensor
    reads: Mapping[Site, _Read]

    @classmethod
    def of(
        cls,
        subject: Subject,
        batch: Batch,
        edits: Sequence[Edit],
        added: Perturbation | None,
        sites: Sequence[Site],
        perturbation: Perturbation,
        clamp_first: bool,
    ) -> _Pass:
        before, clamped, after = kinds = [[Capture(site) for site in sites] for _ in range(3)]
        push = () if added is None else (added,)
        clamp = (*before, *edits, *clamped)
        passed = (*clamp, *push, *after) if clamp_first else (*push, *clamp, *after)
        logits = subject.read(batch, passed)
        everywhere = _positions(batch)
        reads = {}
        for index, site in enumerate(sites):
            x, y, z = (c[index].at(batch.ids, perturbation.positions) for c in kinds)
            reads[site] = _Read(x, y, z, after[index].at(batch.ids, everywhere))
        return cls(logits, reads)

    def at(self, site: Site) -> _Read:
        return self.reads[site]


def _positions(batch: Batch) -> Tensor:
    """[b s] every absolute position of a batch, ascending, -1 after the last."""
    steps = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).repeat(len(batch), 1)
    return torch.where(steps <= batch.positions[:, -1:], steps, -1)


@dataclass(frozen=True)
class _Features:
    """What the held features of one site did, per prompt; norms are kept as their squares, so that
    sites add up."""

    drift: Tensor
    drift_absolute: Tensor
    elsewhere: Tensor
    anchor: Tensor
    answer: Tensor
    closeness: Tensor
    code: Tensor
    fallen: Tensor
    change: Tensor
    fall: Tensor
    size: Tensor
    floor: Tensor
    off_assigned: Tensor
    mismatch: Tensor
    fired: Tensor
    still: Tensor
    displaced: Tensor
    displaced_now: Tensor
    flips: Tensor
    overtaken: Tensor
    slots: Tensor
    eligible: Tensor
    reactivated: Tensor
    mass: Tensor
    highest: Tensor
    decoded: Tensor
    read_size: Tensor
    read_up: Tensor
    read_down: Tensor

    @property
    def relative(self) -> Tensor:
        """Change of the held features relative to their norm; NaN where they have no scale."""
        return relative_of(self.change, self.size, self.floor)

    @property
    def relative_at_readout(self) -> Tensor:
        """The same at the last token of the prompt."""
        return relative_of(self.read_up + self.read_down, self.read_size, self.floor)

    @classmethod
    def sum(cls, sites: Sequence[_Features]) -> _Features:
        """Largest drifts, and sums of everything else."""
        largest = (
            "drift", "drift_absolute", "elsewhere", "anchor", "answer", "closeness", "code",
            "fallen", "highest",
        )  # fmt: skip
        stacked = {name: torch.stack([getattr(s, name) for s in sites]) for name in vars(sites[0])}
        return cls(**{n: v.amax(0) if n in largest else v.sum(0) for n, v in stacked.items()})


def _at_site(
    frame: Frame,
    edits: Sequence[Edit],
    bank: FeatureBank,
    median_active: Mapping[str, float | None],
    reference: _Read,
    recovered: _Read,
    positions: Tensor,
) -> _Features:
    h_ref, h_rec = reference.after.double(), recovered.after.double()
    here = (positions >= 0).to(h_ref.device)[..., None]  # [n p 1]
    rows = bank.slices(frame)
    valid = bank.valid[rows][:, None] & here
    moved, scale = moved_preactivations(bank, frame, h_ref, h_rec)
    moved = torch.where(valid, moved, 0.0)

    z_ref, z_rec = bank.activations(h_ref, frame), bank.activations(h_rec, frame)
    p_rec, limit = bank.preactivations(h_rec, frame), bank.limits(h_rec, frame)
    floor = floor_of(bank, frame, median_active)

    # What was assigned is known where one clamp sets exactly the held features.
    z_before = bank.activations(reference.before.double(), frame)
    assigned = [e for e in edits if isinstance(e, FeatureEdit) and bank.site in e.sites]
    off = mismatch = torch.full_like(floor, torch.nan)
    if len(assigned) == 1 and assigned[0].bank.ids == bank.ids:
        target = assigned[0].assigned(z_before, frame)
        off = _square(torch.where(valid, z_rec - target, 0.0))
        mismatch = _square(torch.where(valid, z_ref - target, 0.0))

    fired = (z_before > 0) & valid
    still = (bank.activations(recovered.before.double(), frame) > 0) & fired
    elsewhere, anchor, answer = _along(bank, frame, reference.whole, recovered.whole, positions)
    flips = (((z_ref > 0) != (z_rec > 0)) & valid).sum((1, 2)).double()
    z_read, change_read = _at_readout(bank, frame, reference.whole, recovered.whole)
    return _Features(
        drift=(moved / scale).amax((1, 2)),
        drift_absolute=moved.amax((1, 2)),
        elsewhere=elsewhere,
        anchor=anchor,
        answer=answer,
        closeness=torch.where(valid, -(p_rec - limit).abs() / scale, -torch.inf).amax((1, 2)),
        code=(torch.where(valid, (z_rec - z_ref).abs(), 0.0) / scale).amax((1, 2)),
        fallen=(torch.where(valid, (z_ref - z_rec).clamp_min(0), 0.0) / scale).amax((1, 2)),
        change=_square(torch.where(here, z_rec - z_ref, 0.0)),
        fall=_square(torch.where(here, (z_ref - z_rec).clamp_min(0), 0.0)),
        size=_square(torch.where(here, z_ref, 0.0)),
        floor=floor,
        off_assigned=off,
        mismatch=mismatch,
        fired=fired.sum((1, 2)).double(),
        still=still.sum((1, 2)).double(),
        displaced=_square(reference.after.double() - reference.before.double()),
        displaced_now=_square(recovered.clamped.double() - recovered.before.double()),
        flips=flips,
        overtaken=flips if bank.guarantee == "margin" else torch.zeros_like(flips),
        **vars(Reactivation.between(z_ref, z_rec, valid)),
        decoded=_square(
            bank.decode(torch.where(valid, z_rec, 0.0), h_rec, frame)
            - bank.decode(torch.where(valid, z_ref, 0.0), h_ref, frame)
        ),
        read_size=_square(z_read),
        read_up=_square(change_read.clamp_min(0)),
        read_down=_square(change_read.clamp_max(0)),
    )


def _at_readout(
    bank: FeatureBank, frame: Frame, before: Tensor, after: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes of the held features [n 1 k] at the last token of the prompt, and what changed of them,
    between two residuals [n s d] at every absolute position."""
    last = (frame.prompt_length - 1).to(before.device)
    rows = torch.arange(len(last), device=before.device)
    z_ref, z_rec = (
        bank.activations(x[rows, last][:, None].double(), frame) for x in (before, after)
    )
    valid = bank.valid[bank.slices(frame)][:, None]
    return torch.where(valid, z_ref, 0.0), torch.where(valid, z_rec - z_ref, 0.0)


def _along(
    bank: FeatureBank, frame: Frame, before: Tensor, after: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[n] each, the largest drift: at tokens that are not perturbed, 0 where every one is; at the
    last token of the prompt; at those after it, NaN where there is none."""
    moved, scale = moved_preactivations(bank, frame, before.double(), after.double())
    moved = torch.where(bank.valid[bank.slices(frame)][:, None], moved / scale, 0.0).amax(2)
    steps = torch.arange(before.shape[1], device=before.device)
    there = steps <= frame.positions[:, -1:].to(before.device)
    perturbed = (positions.to(before.device)[:, :, None] == steps).any(1)
    last = frame.prompt_length[:, None].to(before.device) - 1
    elsewhere, anchor, answer = (
        torch.where(mask, moved, 0.0).amax(1)
        for mask in (there & ~perturbed, steps == last, there & (steps > last))
    )
    answered = (there & (steps > last)).any(1)
    return elsewhere, anchor, torch.where(answered, answer, torch.nan)


def _undo(
    perturbation: Perturbation, reference: _Pass, held: Mapping[Site, FeatureBank], frame: Frame
) -> tuple[Tensor, Tensor]:
    """How far the perturbation just takes the clamp back (METHODS C.5), [n] each.

    The cosine with what the clamp had added, negated, over all perturbed slots; NaN where it added
    nothing. The share of the squared norm in the span of the held decoder rows.
    """
    dot = there = inside = torch.zeros(len(frame.ids), dtype=torch.float64)
    for site, delta in perturbation.deltas.items():
        delta = delta.double().cpu()
        read = reference.at(site)
        back = (read.before - read.clamped).double().cpu()
        dot = dot + (delta * back).sum((1, 2))
        there = there + _square(back)
        if site in held:
            bank = held[site]
            rows = NullSpace.of(bank.W_dec.mT, bank.valid, bank.slices(frame))
            outside = rows.retract(perturbation.deltas[site]).double().cpu()
            inside = inside + _square(delta - outside)
    norm = perturbation.norm.cpu()
    nan = torch.full_like(norm, torch.nan)
    cosine = torch.where((there > 0) & (norm > 0), dot / (there.sqrt() * norm).clamp_min(TINY), nan)
    share = torch.where(norm > 0, inside / norm.square().clamp_min(TINY), nan)
    device = perturbation.positions.device
    return cosine.to(device), share.to(device)


def _rounding_floor(
    subject: Subject,
    held: Mapping[Site, FeatureBank],
    frame: Frame,
    reference: _Pass,
    perturbation: Perturbation,
) -> Tensor:
    """[n] mean over draws of the largest drift that rounding alone makes of null-space vectors, at
    sites that are held and perturbed. NaN where there is none, or where the SAE normalizes tokens
    and so has no null space."""
    sites = [site for site in perturbation.sites if site in held]
    if not sites or any(held[site].guarantee == "none" for site in sites):
        device = perturbation.positions.device
        return torch.full((len(frame.ids),), torch.nan, dtype=torch.float64, device=device)
    floors = []
    for site in sites:
        bank, h = held[site], reference.at(site).after
        space = NullSpace.of(bank.W_enc, bank.valid, bank.slices(frame))
        length = perturbation.deltas[site].norm(dim=-1, keepdim=True).to(h.device)
        here = (perturbation.positions >= 0).to(h.device)[..., None]
        valid = bank.valid[bank.slices(frame)][:, None] & here
        generator = torch.Generator().manual_seed(0)
        drifts = []
        for _ in range(N_DRAWS):
            v = space.retract(torch.randn(h.shape, generator=generator).to(h.device))
            v = v * length / v.norm(dim=-1, keepdim=True).clamp_min(TINY)
            rounded = (h.float() + v).to(subject.model.dtype)
            moved, scale = moved_preactivations(bank, frame, h.double(), rounded.double())
            drifts.append((torch.where(valid, moved, 0.0) / scale).amax((1, 2)))
        floors.append(torch.stack(drifts))
    return torch.stack(floors).amax(0).mean(0).double()


def _square(x: Tensor) -> Tensor:
    """[n] squared Frobenius norm over positions and the last axis, in float64."""
    return x.double().pow(2).sum((1, 2))
