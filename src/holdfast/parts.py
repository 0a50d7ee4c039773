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

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subspace import orthonormal_basis
from holdfast.variants import Recovered

EXACT = ("clamped", "other", "residual")
"""The parts that sum to δ."""

REENCODED = (*EXACT, "seen", "unseen")

_ENTRIES = 2**24
"""Codes held at a time: 64 MB in float32."""

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
    seen: Tensor
    rank: Tensor
    switched: Tensor
    decoded: Tensor
    error: Tensor
    size: Tensor

    @classmethod
    def join(cls, pieces: list[_Slots], device: torch.device) -> _Slots:
        names = [f.name for f in fields(cls)]
        return cls(
            **{name: torch.cat([getattr(p, name) for p in pieces]).to(device) for name in names}
        )


def split(found: Recovered, n_top: int) -> Split:
    """Split the vectors found. Reads each site's whole SAE once, a chunk of slots at a time.

    Raises SAEError where a perturbed site has no SAE.
    """
    problem, case = found.problem, found.case
    n, p = found.positions.shape
    dtype = case.subject.model.dtype
    by_site = []
    for site, h in found.entered().items():
        sae = case.subject.sae(site).full()
        delta = problem.replay.parts(found.delta)[site]
        at = sae.b_dec.device  # the whole SAE stays where its site's block is; slots come to it
        own = _clamped(found, site, sae).to(at)  # [n F]
        rows = torch.arange(n, device=at).repeat_interleave(p)
        size = max(1, _ENTRIES // sae.n_features)
        x, v = (each.flatten(0, 1).to(at) for each in (h, delta))
        pieces = [
            _slots(sae, x[i], v[i], own[rows[i]], n_top, dtype)
            for i in torch.arange(n * p, device=at).split(size)
        ]
        by_site.append(_Slots.join(pieces, delta.device))

    def laid(name: str) -> Tensor:
        return torch.cat([getattr(s, name).unflatten(0, (n, p)) for s in by_site], 1)

    delta, there = found.delta.double(), problem.perturbed
    clamped, other, seen = laid("clamped"), laid("other"), laid("seen")
    parts = {
        "clamped": clamped, "other": other, "residual": delta - clamped - other,
        "top": laid("top"), "seen": seen, "unseen": delta - seen,
    }  # fmt: skip
    n_slots = there.sum(1).clamp_min(1)
    decoded = laid("decoded").sum(1).sqrt()  # [n parts]
    switched = (laid("switched") * there[..., None]).sum(1) / n_slots[:, None]
    visible = {}
    for column, name in enumerate(REENCODED):
        length = parts[name].norm(dim=(1, 2))
        visible[name] = torch.where(length > 0, decoded[:, column] / length.clamp_min(TINY), 0.0)
    error, whole = (laid(name) * there for name in ("error", "size"))
    return Split(
        **parts,
        rank=laid("rank"),
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


def _slots(
    sae: SAE, h: Tensor, delta: Tensor, own: Tensor, n_top: int, dtype: torch.dtype
) -> _Slots:
    """h, delta [m d], own [m F]. The sum is rounded to the model's precision, as it is there."""
    before = sae.encode(h)
    scale = _scale(sae, h)
    moved = (h + delta).to(dtype).float()
    after = sae.encode(moved)
    change = _scale(sae, moved) * after - scale * before
    rest = change.masked_fill(own, 0.0)
    most = rest.abs().topk(min(n_top, sae.n_features), -1).indices
    clamped, other = _decoded(change - rest, sae), _decoded(rest, sae)
    top = torch.einsum("mk,mkd->md", rest.gather(1, most), sae.rows(most)).double()
    seen, rank = _projected(sae, delta.double(), (before > 0) | (after > 0))
    delta = delta.double()
    parts = (clamped, other, delta - clamped - other, seen, delta - seen)
    switched, decoded = [], []
    for part in parts:
        x = (h + part.float()).to(dtype).float()
        codes = sae.encode(x)
        switched.append(((codes > 0) != (before > 0)).sum(-1))
        decoded.append(_decoded(_scale(sae, x) * codes - scale * before, sae).square().sum(-1))
    return _Slots(
        clamped, other, top, seen, rank,
        switched=torch.stack(switched, -1).double(),
        decoded=torch.stack(decoded, -1),
        error=(h - sae.decode(before, h)).double().square().sum(-1),
        size=(h - sae.decode(torch.zeros_like(before), h)).double().square().sum(-1),
    )  # fmt: skip


def _scale(sae: SAE, x: Tensor) -> Tensor | float:
    """What a code is multiplied by in the residual; [m 1] where a token's norm enters."""
    return sae.inputs.magnify(x)


def _decoded(codes: Tensor, sae: SAE) -> Tensor:
    return sae.written(codes).double()


def _projected(sae: SAE, delta: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """[m d], [m]: each vector's projection onto the decoder rows of its active features, and the
    dimension of their span."""
    seen, rank = [], []
    for vector, on in zip(delta, active, strict=True):
        basis = orthonormal_basis(sae.rows(on).T).double().to(delta.device)
        seen.append((vector @ basis) @ basis.T)
        rank.append(basis.shape[1])
    return torch.stack(seen), torch.as_tensor(rank, device=delta.device)
