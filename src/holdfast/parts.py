"""Split a recovery's vector by what the SAE says of it (METHODS F).

At every slot, with h the residual that δ is added to and E, W_dec the site's SAE:

    Δz = E(h + δ) − E(h),   δ = Δz_S·W_dec + Δz_rest·W_dec + residual

for the clamped features S, all others, and what the SAE does not see. Exact by construction, but
the parts are no shares of an energy: the last two can be long and nearly opposite (METHODS F.3-1),
which is why inner products are recorded and why there is a second split, by least squares, whose
parts are orthogonal and no longer than δ.

Two deviations from METHODS F.1: at later sites h already has the earlier vectors on, so that Δz is
what this vector does and not what reaches it from below; and where the clamp has the last word h is
the residual before it, for that is what the vector is added to. The same vector can be split quite
differently on either side of a clamp, though it does the same: the split is of what the SAE says at
one state, and a share of it is no property of the vector alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from holdfast.bounded import Bounded, Components, fitted, noise_for
from holdfast.saes.sae import SAE
from holdfast.said import Said
from holdfast.sites import Site
from holdfast.variants import Recovered

EXACT = ("clamped", "other", "residual")
"""The parts that sum to δ."""

REENCODED = (*EXACT, "seen", "unseen")

TINY = 1e-30


@dataclass(frozen=True)
class Split:
    """Parts of the vectors of n prompts, [n q d_model] in float64.

    clamped, other, residual: sum to δ; top: of `other`, the features that change most; seen: the
    projection of δ onto the decoder rows of features active with or without it, unseen: the rest,
    orthogonal. rank [n q]: dimension of that span. switched: part → [n] features that turn on or
    off when the part alone is added, mean over slots; visible: part → [n] norm of what the SAE
    decodes of that change, relative to the part's; explained: [n] share of the residual's squared
    norm (without the decoder's bias) that the SAE reconstructs where δ is added.
    """

    clamped: Tensor
    other: Tensor
    residual: Tensor
    top: Tensor
    seen: Tensor
    unseen: Tensor
    rank: Tensor
    switched: dict[str, Tensor]
    visible: dict[str, Tensor]
    explained: Tensor

    @property
    def gram(self) -> Tensor:
        """[n 3 3] inner products of the exact parts, as shares of ‖δ‖²; sums to 1."""
        parts = torch.stack([getattr(self, name).flatten(1) for name in EXACT], 1)
        whole = parts.sum(1).square().sum(1).clamp_min(TINY)
        return parts @ parts.mT / whole[:, None, None]

    @property
    def shares(self) -> dict[str, Tensor]:
        """Part → [n] ⟨part, δ⟩ / ‖δ‖², of the parts that sum to δ; they sum to 1."""
        return dict(zip(EXACT, self.gram.sum(2).unbind(1), strict=True))


@dataclass(frozen=True)
class _Slots:
    """The split of m slots of one site; tensors [m d], figures [m], by part [m parts]."""

    clamped: Tensor
    other: Tensor
    top: Tensor
    switched: Tensor
    decoded: Tensor
    error: Tensor
    size: Tensor


def take_apart(
    found: Recovered, components: Components | None, n_top: int, atoms: int, seed: int
) -> tuple[Split, dict[str, Bounded]]:
    """Both splits of the vectors found: by what the SAE says of them, and into subspaces, by name.

    components: where there are any, the subspace `principal`; n_top: how many of the features that
    change most are a part of their own; atoms: most decoder rows of a sparse code. One site's whole
    SAE is held at a time. Raises SAEError where a perturbed site has no SAE.
    """
    n, p = found.positions.shape
    device, drawn = found.delta.device, noise_for(found, seed)
    slots, fits = [], []
    for index, (site, h) in enumerate(found.entered().items()):
        noise = drawn[:, index * p : (index + 1) * p].flatten(0, 1)
        basis = None if components is None else components.basis[site]
        own, subspaces = _at(found, site, h, noise, basis, n_top, atoms)
        slots.append(own)
        fits.append(subspaces)

    def laid(columns: Sequence[Tensor]) -> Tensor:
        return torch.cat([own.to(device).unflatten(0, (n, p)) for own in columns], 1)

    bounded = {
        name: Bounded(*(
            laid([getattr(own[name], field.name) for own in fits]) for field in fields(Bounded)
        ))
        for name in fits[0]
    }  # fmt: skip
    exact = _Slots(*(laid([getattr(own, f.name) for own in slots]) for f in fields(_Slots)))
    return _split(found, exact, bounded["seen"]), bounded


def _at(
    found: Recovered, site: Site, h: Tensor, noise: Tensor, components: Tensor | None, n_top: int,
    atoms: int,
) -> tuple[_Slots, dict[str, Bounded]]:  # fmt: skip
    """What is found at one site. Its SAE is let go of before the next one is read."""
    said = Said.of(found, site, h)
    at = said.h.device
    subspaces = fitted(said, noise.to(at), components, atoms)
    rows = torch.arange(len(h), device=at).repeat_interleave(h.shape[1])
    clamped = _clamped(found, site, said.sae).to(at)  # [n F]
    own = clamped[rows[:, None], said.ids.clamp(min=0)] & (said.ids >= 0)
    return _slots(said, own, subspaces["seen"].part, n_top), subspaces


def _split(found: Recovered, exact: _Slots, seen: Bounded) -> Split:
    """Figures of prompts from those of their slots, [n q ...] each."""
    delta, there = found.delta.double(), found.problem.perturbed
    parts = {
        "clamped": exact.clamped, "other": exact.other,
        "residual": delta - exact.clamped - exact.other, "top": exact.top,
        "seen": seen.part, "unseen": delta - seen.part,
    }  # fmt: skip
    n_slots = there.sum(1).clamp_min(1)
    decoded = exact.decoded.sum(1).sqrt()  # [n parts]
    switched = (exact.switched * there[..., None]).sum(1) / n_slots[:, None]
    visible = {}
    for column, name in enumerate(REENCODED):
        length = parts[name].norm(dim=(1, 2))
        visible[name] = torch.where(length > 0, decoded[:, column] / length.clamp_min(TINY), 0.0)
    error, whole = exact.error * there, exact.size * there
    return Split(
        **parts,
        rank=seen.rank,
        switched=dict(zip(REENCODED, switched.unbind(1), strict=True)),
        visible=visible,
        explained=1 - error.sum(1) / whole.sum(1).clamp_min(TINY),
    )


def _clamped(found: Recovered, site: Site, sae: SAE) -> Tensor:
    """[n n_features] bool: the features of the site that each prompt's clamp sets."""
    bank = found.problem.held.get(site)
    mask = torch.zeros(len(found), sae.n_features, dtype=torch.bool, device=found.delta.device)
    if bank is not None:
        for row, group in enumerate(bank.slices(found.case.batch.frame()).tolist()):
            mask[row, list(bank.ids[group])] = True
    return mask


def _slots(said: Said, own: Tensor, seen: Tensor, n_top: int) -> _Slots:
    """own [m r]: which of the active features the clamp sets; seen [m d] float64: the projection
    onto their decoder rows."""
    change, delta = said.change, said.delta.double()
    rest = change.masked_fill(own, 0.0)
    most = rest.abs().topk(min(n_top, rest.shape[1]), -1).indices
    clamped, other = said.written(change - rest).double(), said.written(rest).double()
    top = said.written(rest.gather(1, most), said.ids.gather(1, most)).double()
    parts = torch.stack([clamped, other, delta - clamped - other, seen, delta - seen])
    switched, decoded = _encoded_again(said, parts)
    inputs, b_dec = said.sae.inputs, said.sae.b_dec
    made = inputs.leave(said.written(said.before) + b_dec, said.h)
    nothing = inputs.leave(b_dec.expand_as(said.h), said.h)
    return _Slots(
        clamped, other, top, switched, decoded,
        error=(said.h - made).double().square().sum(-1),
        size=(said.h - nothing).double().square().sum(-1),
    )  # fmt: skip


def _encoded_again(said: Said, parts: Tensor) -> tuple[Tensor, Tensor]:
    """With each of k parts [k m d] added alone, [m k]: how many features it switches, and the
    squared norm of what the SAE decodes of the change."""
    k, m, _ = parts.shape
    x = said.moved(parts)
    worth, was = said.sae.inputs.magnify(x), said.sae.inputs.magnify(said.h)
    switched = torch.zeros(k, m, dtype=torch.long, device=x.device)
    written = torch.zeros_like(x)
    for features, codes in said.sae.codes(x):
        before = said.begins(features)
        switched += ((codes > 0) != (before > 0)).sum(-1)
        written += said.sae.written(worth * codes - was * before, features)
    return switched.T.double(), written.double().square().sum(-1).T
