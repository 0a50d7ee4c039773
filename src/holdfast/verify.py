"""Measure a recovery from the saved perturbation alone, with full forward passes.

Nothing here trusts the optimizer or the replay: the perturbation is attached as an edit, the model
runs from the embedding, and what the clamped features do is read from the residual in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.checks import Checks
from holdfast.drift import Drift, MedianActive, Moved, State, floor_of
from holdfast.edits import CaptureAt, Edit, Perturbation, in_order
from holdfast.firing import Counted, counted
from holdfast.full_pass import FullPass
from holdfast.held_features import HeldFeatures, square
from holdfast.others import Others
from holdfast.rounding import Drawn, rounding_floor
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.taken_back import taken_back

T = TypeVar("T")


def verify(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    perturbation: Perturbation,
    held: Mapping[Site, FeatureBank],
    median_active: Mapping[Site, MedianActive],
    clamp_first: bool,
    whole: Collection[Site] = (),
) -> Checks:
    """Compare the pass with the perturbation to the one without, prompt by prompt.

    held: site → the features that were to stay; median_active: site → group → their scale; whole:
    held sites at which every other feature of the SAE is looked at too. What is read at every token
    is there of a piece of rows at a time.
    """
    run, push = counted(edits), Counted(perturbation)
    held = _together(held, perturbation)

    def compare(rows: Tensor) -> Checks:
        some, own = batch.rows(rows), perturbation.rows(rows)
        return _compared(
            subject, some, edits, run, push, own, held, median_active, clamp_first, whole,
            Drawn(rows, len(batch)),
        )  # fmt: skip

    pieces = subject.batching.over("passes", _every(batch), compare)
    for each in (*run, push):
        each.check()
    return _joined(Checks, pieces)


def _joined(kind: type[T], parts: Sequence[T]) -> T:
    """Of all rows, what was found of some rows after the other: a record of tensors [n]."""
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _together(
    held: Mapping[Site, FeatureBank], perturbation: Perturbation
) -> Mapping[Site, FeatureBank]:
    """Banks of several sites where what is read of them is compared."""
    return {site: bank.to(perturbation.positions.device) for site, bank in held.items()}


def _every(batch: Batch) -> Tensor:
    """[n] all rows of a batch."""
    return torch.arange(len(batch), device=batch.tokens.device)


def _compared(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    run: Sequence[Edit],
    push: Edit,
    perturbation: Perturbation,
    held: Mapping[Site, FeatureBank],
    median_active: Mapping[Site, MedianActive],
    clamp_first: bool,
    whole: Collection[Site],
    drawn: Drawn,
) -> Checks:
    """`verify` of some rows. run, push: edits and perturbation, as they count what they touch."""
    reference, recovered = (
        _passed(subject, batch, run, added, perturbation, held, clamp_first)
        for added in ((), (push,))
    )
    frame = batch.frame()
    rounding = rounding_floor(subject.model.dtype, held, frame, reference, perturbation, drawn)
    others = [
        _others(subject, held[site], frame, site, perturbation, reference, recovered)
        for site in whole
    ]
    return _checks(
        batch, edits, held, median_active, reference, recovered, perturbation, rounding,
        Others.sum(others) if others else Others.unknown(rounding),
    )  # fmt: skip


def _checks(
    batch: Batch,
    edits: Sequence[Edit],
    held: Mapping[Site, FeatureBank],
    median_active: Mapping[Site, MedianActive],
    reference: FullPass,
    recovered: FullPass,
    perturbation: Perturbation,
    rounding: Tensor,
    other: Others,
) -> Checks:
    """What two passes over the same prompts say."""
    frame = batch.frame()
    total = HeldFeatures.between(
        frame, edits, held, median_active, reference, recovered, perturbation.positions
    )
    nan = torch.full_like(total.size, torch.nan)
    displaced = total.displaced.sqrt()
    length = [square(reference.at(site).after) for site in perturbation.sites]
    norm = perturbation.norm
    undo, decoder = taken_back(perturbation, reference, held, frame)
    return Checks(
        margin=batch.margin(recovered.logits).double(),
        norm=norm,
        norm_relative=norm / torch.stack(length).sum(0).sqrt(),
        preactivation_drift=total.preactivation,
        preactivation_drift_absolute=total.absolute,
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
        firings_kept=torch.where(total.fired > 0, total.still / total.fired, nan),
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
        others_active=other.active,
        others_drift=other.drift,
        others_floor=other.floor,
        others_on=other.on,
        others_off=other.off,
        rounding_floor=rounding,
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
    return batch.margin(subject.read(batch, in_order(edits, perturbation, clamp_first))).double()


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
    median_active: Mapping[Site, MedianActive],
    clamp_first: bool,
) -> list[Effect]:
    """Several perturbations of the same sites and positions, each in a full forward pass and
    compared to one pass without any: the part of `verify` that comparing them needs, and no more of
    it is read."""
    added = tuple(perturbations)
    if not added:
        return []
    run, pushes = counted(edits), counted(added)
    held = _together(held, added[0])

    def compare(rows: Tensor) -> list[Effect]:
        some, positions = batch.rows(rows), added[0].positions[rows]
        frame = some.frame()

        def states(edits: Sequence[Edit]) -> tuple[Tensor, dict[Site, State]]:
            reads = [CaptureAt(site, some.ids, positions) for site in sorted(held)]
            scores = subject.read(some, (*edits, *reads))
            return scores, {
                each.site: State.of(held[each.site], frame, each.read.double(), positions >= 0)
                for each in reads
            }

        _, reference = states(run)
        floor = {site: floor_of(bank, frame, median_active[site]) for site, bank in held.items()}
        found = []
        for own, push in zip(added, pushes, strict=True):
            scores, after = states(in_order(run, push, clamp_first))
            moved = {site: Moved.of(reference[site], after[site]) for site in reference}
            drift = Drift.of_sites([each.drift(floor[site]) for site, each in moved.items()])
            overtaken = [each.overtaken(held[site]) for site, each in moved.items()]
            found.append(
                Effect(
                    margin=some.margin(scores).double(),
                    norm=own.rows(rows).norm,
                    preactivation_drift=drift.preactivation,
                    drift_relative=drift.relative,
                    overtaken=torch.stack(overtaken).sum(0),
                )
            )
        return found

    pieces = subject.batching.over("passes", _every(batch), compare)
    for each in (*run, *pushes):
        each.check()
    return [_joined(Effect, parts) for parts in zip(*pieces, strict=True)]


def _passed(
    subject: Subject,
    batch: Batch,
    edits: Sequence[Edit],
    added: Sequence[Edit],
    perturbation: Perturbation,
    held: Mapping[Site, FeatureBank],
    clamp_first: bool,
) -> FullPass:
    """A pass with what is added, read where features are held or the perturbation acts."""
    sites = tuple(sorted({*held, *perturbation.sites}))
    return FullPass.of(subject, batch, edits, added, clamp_first, sites, perturbation.positions)


def _others(
    subject: Subject,
    bank: FeatureBank,
    frame: Frame,
    site: Site,
    perturbation: Perturbation,
    reference: FullPass,
    recovered: FullPass,
) -> Others:
    """What the features of a site that are not held did at the perturbed tokens."""
    before, after = (passed.at(site).after.double() for passed in (reference, recovered))
    added = perturbation.deltas.get(site)
    exact = before if added is None else before + added.to(before.device, torch.float64)
    rounding = exact.to(subject.model.dtype).double() - exact
    there = (perturbation.positions >= 0).to(before.device)
    return Others.between(subject.sae(site), bank, frame, before, after, rounding, there)
