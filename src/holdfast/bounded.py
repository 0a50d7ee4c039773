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
from holdfast.said import Said
from holdfast.sites import Site
from holdfast.spans import orthonormal_basis
from holdfast.subject import Subject
from holdfast.variants import Recovered

SUBSPACES = ("seen", "sparse", "encoder", "principal")
"""seen: decoder rows of features active with or without the vector; sparse: a non-negative code of
a few decoder rows, no more than are active there in the mean; encoder: encoder columns of active
features; principal: directions in which clean residuals of the fit split vary most."""


@dataclass(frozen=True)
class Bounded:
    """part [n q d_model] float64 of the vectors of n prompts; rank [n q]: dimension of the subspace
    at each slot, of a sparse code how many rows it has; noise [n q d_model]: random vectors of the
    same subspace, of the part's norm at each slot. Of m slots of one site: [m d_model], [m]."""

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


def fitted(said: Said, noise: Tensor, components: Tensor | None, atoms: int) -> dict[str, Bounded]:
    """Of `SUBSPACES` → its part of the vectors of m slots; `principal` only where there are
    components [d_model r] of the site. noise [m d_model]: what random vectors are projected from;
    atoms: most decoder rows of a sparse code."""
    sae, delta = said.sae, said.delta
    vectors = torch.stack([delta.double(), noise.double()], 1)  # [m 2 d]
    code = pursue(delta, sae.W_dec, max(1, min(atoms, round(said.l0))))
    bases: dict[str, Iterator[Tensor]] = {
        "seen": (_basis(sae.rows(on).T) for on in said.active()),
        "sparse": (_basis(sae.rows(own[own >= 0]).T) for own in code.atoms),
        "encoder": (_basis(_columns(sae, on)) for on in said.active()),
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
        made[name] = Bounded(part, torch.as_tensor(rank, device=delta.device), random * length)
    return made


def _columns(sae: SAE, on: Tensor) -> Tensor:
    """[d_model r] encoder columns as they read the residual, of the features `on` [r]."""
    columns = sae.W_enc[:, on].float()
    return sae.inputs.fold(columns) if sae.inputs.affine else columns


def _basis(columns: Tensor) -> Tensor:
    return orthonormal_basis(columns).double().to(columns.device)


def noise_for(found: Recovered, seed: int) -> Tensor:
    """[n q d_model] standard normal, drawn by the example's id."""
    _, q, d = found.delta.shape
    rows = []
    for example in found.case.batch.ids:
        key = int(digest(f"subspace/{seed}/{example}")[:15], 16)
        rows.append(torch.randn(q, d, generator=torch.Generator().manual_seed(key)))
    return torch.stack(rows).to(found.delta.device)
