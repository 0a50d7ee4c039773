"""What of a recovery's vector lies in a subspace, and the orthogonal rest (METHODS F.4).

The exact split by Δz has parts that can be longer than the vector and cancel. These cannot: each is
a least-squares fit, at every slot, so that part and rest are orthogonal and neither is longer than
the vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.canonical import digest
from holdfast.positions import selected
from holdfast.pursuit import pursue
from holdfast.running import Moments, Running
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import orthonormal_basis
from holdfast.variants import Recovered

SUBSPACES = ("seen", "sparse", "encoder", "principal")
"""seen: decoder rows of features active with or without the vector; sparse: a non-negative code of
a few decoder rows, no more than are active there in the mean; encoder: encoder columns of active
features; principal: directions in which clean residuals of the fit split vary most."""

_ENTRIES = 2**24
"""Codes held at a time: 64 MB in float32."""


@dataclass(frozen=True)
class Bounded:
    """part [n q d_model] float64 of the vectors of n prompts; rank [n q]: dimension of the subspace
    at each slot, of a sparse code how many rows it has; noise [n q d_model]: random vectors of the
    same subspace, of the part's norm at each slot."""

    part: Tensor
    rank: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Components:
    """Site → the directions [d_model r] in which residuals vary most, and the share of their
    variance that these have."""

    basis: dict[Site, Tensor]
    share: dict[Site, float]

    @classmethod
    def of(cls, subject: Subject, batch: Batch, sites: tuple[Site, ...], n: int) -> Components:
        """Of clean residuals at every token of a batch but BOS, less their mean."""
        reads = [Running(site, Moments.none(whole=True), _with_tokens) for site in sites]
        subject.outputs(batch, reads)
        basis, share = {}, {}
        for read in reads:
            variance, directions = torch.linalg.eigh(read.state.spread)
            top = min(n, len(variance))
            basis[read.site] = directions[:, -top:].flip(1)
            share[read.site] = float(variance[-top:].sum() / variance.sum())
        return cls(basis, share)


def _with_tokens(before: Moments, frame: Frame, h: Tensor) -> Moments:
    return before.with_more(h[selected("all", False, frame)])


def bounded(
    found: Recovered, components: Components | None, atoms: int, seed: int
) -> dict[str, Bounded]:
    """Of `SUBSPACES` → its part; `principal` only where there are components. atoms: most decoder
    rows of a sparse code. Reads each site's whole SAE once. Raises SAEError where a perturbed site
    has no SAE."""
    n, p = found.positions.shape
    drawn = _noise(found, seed)
    laid: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for index, (site, h) in enumerate(found.entered().items()):
        sae = found.case.subject.sae(site).full()
        # The whole SAE stays where its site's block is; slots come to it.
        at = sae.b_dec.device
        delta = found.problem.replay.parts(found.delta)[site].flatten(0, 1).to(at)
        noise = drawn[:, index * p : (index + 1) * p].flatten(0, 1).to(at)
        basis = None if components is None else components.basis[site]
        x, there = h.flatten(0, 1).to(at), (found.positions >= 0).flatten().to(at)
        dtype = found.case.subject.model.dtype
        most = max(1, min(atoms, round(_l0(sae, x[there]))))
        pieces = [
            _of_slots(sae, x[i], delta[i], noise[i], basis, most, dtype)
            for i in torch.arange(n * p, device=x.device).split(_at_once(sae))
        ]
        for name in pieces[0]:
            joined = (
                torch.cat(c).to(found.delta.device)
                for c in zip(*(made[name] for made in pieces), strict=True)
            )
            part, rank, within = joined
            own = (part.view(n, p, -1), rank.view(n, p), within.view(n, p, -1))
            laid.setdefault(name, []).append(own)
    return {
        name: Bounded(*(torch.cat(column, 1) for column in zip(*sites, strict=True)))
        for name, sites in laid.items()
    }


def _of_slots(
    sae: SAE, h: Tensor, delta: Tensor, noise: Tensor, components: Tensor | None, atoms: int,
    dtype: torch.dtype,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """name → part [m d], rank [m], noise [m d] at m slots of a site."""
    moved = (h + delta).to(dtype).float()
    active = (sae.encode(h) > 0) | (sae.encode(moved) > 0)
    vectors = torch.stack([delta.double(), noise.double()], 1)  # [m 2 d]
    code = pursue(delta, sae.W_dec, atoms)
    bases: dict[str, Iterator[Tensor]] = {
        "seen": (_basis(sae.rows(on).T) for on in active),
        "sparse": (_basis(sae.rows(own[own >= 0]).T) for own in code.atoms),
        "encoder": (_basis(_columns(sae, on)) for on in active),
    }
    if components is not None:
        bases["principal"] = (components.to(delta.device) for _ in delta)
    made = {}
    for name, own in bases.items():
        onto, rank = [], []
        for vector, basis in zip(vectors, own, strict=True):
            onto.append((vector @ basis) @ basis.T)
            rank.append(basis.shape[1])
        part, random = torch.stack(onto).unbind(1)
        if name == "sparse":
            part = code.fit
        length = part.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True).clamp_min(1e-30)
        made[name] = part, torch.as_tensor(rank, device=delta.device), random * length
    return made


def _columns(sae: SAE, on: Tensor) -> Tensor:
    """[d_model r] encoder columns as they read the residual, of the features `on` [n_features]."""
    columns = sae.W_enc[:, on].float()
    return sae.inputs.fold(columns) if sae.inputs.affine else columns


def _at_once(sae: SAE) -> int:
    """Slots whose codes are held at a time."""
    return max(1, _ENTRIES // sae.n_features)


def _l0(sae: SAE, h: Tensor) -> float:
    """How many features are active at residuals h [m d], mean."""
    return sum(int((z > 0).sum()) for _, z in sae.codes(h)) / len(h)


def _basis(columns: Tensor) -> Tensor:
    return orthonormal_basis(columns).double().to(columns.device)


def _noise(found: Recovered, seed: int) -> Tensor:
    """[n q d] standard normal, drawn by the example's id."""
    _, q, d = found.delta.shape
    rows = []
    for example in found.case.batch.ids:
        key = int(digest(f"subspace/{seed}/{example}")[:15], 16)
        rows.append(torch.randn(q, d, generator=torch.Generator().manual_seed(key)))
    return torch.stack(rows).to(found.delta.device)
