"""What is near (JJᵀ)⁻¹ at every iterate and cheap to apply, made once, at the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.jacobian.entries import Entries
from holdfast.jacobian.feature_map import FeatureMap, perturbed_columns
from holdfast.jacobian.linearized import Linearized
from holdfast.linalg import cholesky_solved

FEW = 512
"""Most constraints of a row for which J itself is computed, once."""

RIDGE = 1e-2
"""Added to the diagonal of position blocks, as a share of it."""

RANK_TOLERANCE = 1e-6
"""Singular values of J below this share of the largest are rounding, and no constraints."""

SHARPEST = 1e-4
"""Singular values of J at the reference below this share of the largest say little about J
elsewhere, so they count as this large."""

LARGEST = 2**26
"""Most numbers of J that are held at once."""


class Preconditioner(Protocol):
    """Something near (JJᵀ)⁻¹, symmetric and positive definite where there are constraints."""

    def rows(self, rows: Tensor) -> Preconditioner: ...

    def solve(self, r: Tensor) -> Tensor:
        """[n s K] from [n s K]."""
        ...


@dataclass(frozen=True)
class Factored:
    """JJᵀ of the reference: factor [n r r] lower, over each row's own entries."""

    factor: Tensor
    entries: Entries

    @classmethod
    def of(cls, gram: Tensor, entries: Entries) -> Factored:
        """From JJᵀ [n r r] in float64, with zeros where a row has fewer constraints."""
        size = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        extra = torch.where(entries.there, (SHARPEST**2 * size).clamp_min(1e-30), 1.0)
        return cls(torch.linalg.cholesky(gram + torch.diag_embed(extra)).float(), entries)

    def rows(self, rows: Tensor) -> Factored:
        return Factored(self.factor[rows], self.entries.rows(rows))

    def solve(self, r: Tensor) -> Tensor:
        own = self.entries.take(r)[..., None]
        return self.entries.put(cholesky_solved(own, self.factor)[..., 0], r)


@dataclass(frozen=True)
class Positions:
    """Blocks for the features at one position, over all sites: factor [n s K K] lower.

    At a perturbed token a block is what its own slots do to its features. With the derivatives
    through keys and values left out, cotangents of one feature at all tokens at once do not mix, so
    K backward passes are enough. At other tokens it is the Gram matrix of the encoder columns, as
    if the blocks of the model did nothing to what the residual stream carries.
    """

    factor: Tensor

    @classmethod
    def of(cls, features: FeatureMap) -> Positions:
        n_before = torch.cat([
            torch.full((W.shape[2],), sum(site <= bank.site for site in features.replay.sites))
            for W, bank in zip(features.columns, features.banks, strict=True)
        ]).to(features.weight.device)  # fmt: skip
        W = torch.cat([W[own] for W, own in zip(features.columns, features.slices, strict=True)], 2)
        shared = torch.minimum(n_before[:, None], n_before) * (W.mT @ W)  # [n K K]
        weight = features.weight
        gram = weight[..., None] * shared[:, None] * weight[..., None, :]
        perturbed = perturbed_columns(features.replay)[..., None, None]
        gram = torch.where(perturbed, _own(features), gram)
        size = gram.diagonal(dim1=-2, dim2=-1)
        extra = torch.where(features.monitored, (RIDGE * size).clamp_min(1e-30), 1.0)
        return cls(torch.linalg.cholesky(gram + torch.diag_embed(extra)))

    def rows(self, rows: Tensor) -> Positions:
        return replace(self, factor=self.factor[rows])

    def solve(self, r: Tensor) -> Tensor:
        return cholesky_solved(r[..., None], self.factor).squeeze(-1)


def _own(features: FeatureMap) -> Tensor:
    """[n s K K] blocks of JJᵀ at perturbed columns, from slots of the same token; 0 elsewhere."""
    alone = replace(features, replay=features.replay.isolated())
    columns = features.replay.columns
    (n, s, K), (m, p), d = (
        features.weight.shape, (len(features.replay.sites), columns.shape[1]), features.shape[2],
    )  # fmt: skip
    here = Linearized(alone, torch.zeros(features.shape, device=columns.device))
    y = torch.eye(K, device=columns.device)[:, None, None].expand(-1, n, s, -1)
    J = here.pull_many(y * features.monitored).view(K, n, m, p, d)
    J = J.permute(1, 3, 0, 2, 4).reshape(n, p, K, m * d)
    blocks = torch.zeros(n, s + 1, K, K, device=columns.device)
    # Unused positions (-1) land in an extra column that is cut off again.
    at = torch.where(columns >= 0, columns, s)
    blocks[torch.arange(n, device=at.device)[:, None], at] = J @ J.mT
    return blocks[:, :s]


def factorable(features: FeatureMap) -> Tensor:
    """[n] bool: rows with so few constraints that J of the reference is computed."""
    return features.monitored.sum((1, 2)) <= FEW


def prepared(features: FeatureMap) -> tuple[Preconditioner, Tensor]:
    """The preconditioner for the constraints of this map, and the dimensions [n] they leave free.

    All rows are `factorable`, or none is. free: unknowns less the rank of J at the reference, which
    is computed where it is factorable or could leave no free direction; elsewhere it is taken for
    the number of constraints, so that there are at least as many as is said.
    """
    constraints, unknowns = features.monitored.sum((1, 2)), features.unknowns
    free, few = (unknowns - constraints).clamp_min(0), factorable(features)
    assert few.all() or not few.any(), "rows of both kinds"
    unsure = ((constraints >= unknowns) | few).nonzero().flatten()
    entries = Entries.of(features)
    size = max(1, LARGEST // max(1, len(entries) * features.shape[1] * features.shape[2]))

    def rank_and_gram(rows: Tensor) -> tuple[Tensor, Tensor]:
        part = features.rows(rows)
        here = Linearized(part, torch.zeros(part.shape, device=rows.device))
        J = here.matrix(entries.rows(rows)).double()
        return rank(J), J @ J.mT if few.any() else J.new_zeros(len(J), 0, 0)

    batching = features.replay.subject.batching
    parts = batching.over("steps", unsure, rank_and_gram, most=size)
    if parts:
        free[unsure] = unknowns[unsure] - torch.cat([own for own, _ in parts])
    if not few.any():
        return _positions(features), free
    return Factored.of(torch.cat([gram for _, gram in parts]), entries), free


def rank(J: Tensor) -> Tensor:
    """[n] the rank of J [n r c], float64, up to rounding."""
    squares = torch.linalg.eigvalsh(J @ J.mT if J.shape[1] <= J.shape[2] else J.mT @ J)
    return (squares > RANK_TOLERANCE**2 * squares[:, -1:]).sum(1)


def _positions(features: FeatureMap) -> Positions:
    """As many rows at once as fit."""
    rows = torch.arange(len(features), device=features.weight.device)
    parts = features.replay.subject.batching.over(
        "steps", rows, lambda own: Positions.of(features.rows(own)).factor
    )
    return Positions(torch.cat(parts))
