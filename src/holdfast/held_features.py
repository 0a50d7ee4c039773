"""What the held features of a site did between a pass without a perturbation and one with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.drift import MedianActive, Moved, floor_of, preactivation_drift, relative_of
from holdfast.edits import Edit, FeatureEdit
from holdfast.full_pass import FullPass, Read
from holdfast.reactivation import Reactivation
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site


@dataclass(frozen=True)
class HeldFeatures:
    """Per prompt, and norms as their squares, so that sites add up; the fields that `Checks` has
    are described there.

    preactivation, change, size, fall, floor: as of `Drift`; slots, eligible, reactivated, mass,
    highest: as of `Reactivation`. absolute, elsewhere, anchor, answer: of the pre-activations too.
    closeness: the gate margin, negated. fallen: floor violation. fired, still: features that fired
    before the clamp in the reference, and which of them still do; displaced, displaced_now: what
    the clamp adds in either pass. read_size, read_up, read_down: of the codes where the answer is
    read, their size in the reference and what went up and down of them.
    """

    preactivation: Tensor
    change: Tensor
    size: Tensor
    fall: Tensor
    floor: Tensor
    absolute: Tensor
    elsewhere: Tensor
    anchor: Tensor
    answer: Tensor
    closeness: Tensor
    code: Tensor
    fallen: Tensor
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

    @classmethod
    def between(
        cls,
        frame: Frame,
        edits: Sequence[Edit],
        held: Mapping[Site, FeatureBank],
        median_active: Mapping[Site, MedianActive],
        reference: FullPass,
        recovered: FullPass,
        positions: Tensor,
    ) -> HeldFeatures:
        """Of all held sites together. edits: the clamp's; positions [n p]: the perturbed ones."""
        return cls._sum(
            [
                cls._at_site(
                    frame, edits, held[site], median_active[site], reference.at(site),
                    recovered.at(site), positions,
                )
                for site in sorted(held)
            ]
        )  # fmt: skip

    @classmethod
    def _at_site(
        cls,
        frame: Frame,
        edits: Sequence[Edit],
        bank: FeatureBank,
        median_active: MedianActive,
        reference: Read,
        recovered: Read,
        positions: Tensor,
    ) -> HeldFeatures:
        h_ref, h_rec = reference.after.double(), recovered.after.double()
        moved = Moved.between(bank, frame, h_ref, h_rec, (positions >= 0).to(h_ref.device))
        valid, scale, z_ref, z_rec = moved.held, moved.scale, moved.before, moved.after
        to_gate = (bank.preactivations(h_rec, frame) - bank.limits(h_rec, frame)).abs() / scale
        floor = floor_of(bank, frame, median_active)
        z_before = bank.activations(reference.before.double(), frame)
        off, mismatch = torch.full_like(floor, torch.nan), torch.full_like(floor, torch.nan)
        # What was assigned is known where one clamp sets exactly the held features.
        assigned = [e for e in edits if isinstance(e, FeatureEdit) and bank.site in e.sites]
        if len(assigned) == 1 and assigned[0].bank.ids == bank.ids:
            target = torch.where(valid, assigned[0].assigned(z_before, frame), 0.0)
            off, mismatch = square(z_rec - target), square(z_ref - target)
        fired = (z_before > 0) & valid
        still = (bank.activations(recovered.before.double(), frame) > 0) & fired
        elsewhere, anchor, answer = _along(bank, frame, reference.whole, recovered.whole, positions)
        z_read, change_read = _at_readout(bank, frame, reference.whole, recovered.whole)
        return cls(
            **vars(moved.drift(floor)),
            absolute=moved.preactivation.amax((1, 2)),
            elsewhere=elsewhere,
            anchor=anchor,
            answer=answer,
            closeness=torch.where(valid, -to_gate, -torch.inf).amax((1, 2)),
            code=((z_rec - z_ref).abs() / scale).amax((1, 2)),
            fallen=((z_ref - z_rec).clamp_min(0) / scale).amax((1, 2)),
            off_assigned=off,
            mismatch=mismatch,
            fired=fired.sum((1, 2)).double(),
            still=still.sum((1, 2)).double(),
            displaced=square(h_ref - reference.before.double()),
            displaced_now=square(recovered.clamped.double() - recovered.before.double()),
            flips=moved.flips,
            overtaken=moved.overtaken(bank),
            **vars(Reactivation.between(z_ref, z_rec, valid)),
            decoded=square(bank.decode(z_rec, h_rec, frame) - bank.decode(z_ref, h_ref, frame)),
            read_size=square(z_read),
            read_up=square(change_read.clamp_min(0)),
            read_down=square(change_read.clamp_max(0)),
        )

    @classmethod
    def _sum(cls, sites: Sequence[HeldFeatures]) -> HeldFeatures:
        """Largest drifts, and sums of everything else."""
        stacked = {name: torch.stack([getattr(s, name) for s in sites]) for name in vars(sites[0])}
        return cls(**{n: v.amax(0) if n in _LARGEST else v.sum(0) for n, v in stacked.items()})

    @property
    def relative(self) -> Tensor:
        """Change of the held features relative to their norm; NaN where they have no scale."""
        return relative_of(self.change, self.size, self.floor)

    @property
    def relative_at_readout(self) -> Tensor:
        """The same at the last token of the prompt."""
        return relative_of(self.read_up + self.read_down, self.read_size, self.floor)


_LARGEST = (
    "preactivation", "absolute", "elsewhere", "anchor", "answer", "closeness", "code", "fallen",
    "highest",
)  # fmt: skip


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
    moved = preactivation_drift(bank, frame, before.double(), after.double())
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


def square(x: Tensor) -> Tensor:
    """[n] squared Frobenius norm over positions and the last axis, in float64."""
    return x.double().pow(2).sum((1, 2))
