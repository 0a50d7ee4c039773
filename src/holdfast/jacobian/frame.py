"""J itself near some iterates, factored: for rows with few constraints on few unknowns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.chunks import per_chunk
from holdfast.jacobian.entries import Entries
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.linearized import Linearized
from holdfast.linalg import cholesky_solved
from holdfast.problem import TINY
from holdfast.subspace import norms
from holdfast.waiting import sent

RIDGE = 1e-9
"""Added to the diagonal of the Gram matrix of J's unit rows: where features depend on each
other, what rounding leaves between them is not corrected for."""

FEW = 1024
"""Most constraints of a row for which J is kept."""

SMALL = 2**20
"""Most numbers of a row's J that are kept: 4 MB."""


def few(features: FeatureMap) -> Tensor:
    """[n] bool: rows whose J is small enough to be kept."""
    n_constraints = features.monitored.sum((1, 2))
    return (n_constraints <= FEW) & (n_constraints * features.unknowns <= SMALL)


@dataclass(frozen=True)
class Frame:
    """J at `center` [n q d_model], and a factor of JJᵀ.

    J [n r q·d_model]: its rows, scaled to unit length, at each row's own entries; scale [n r]: what
    they were multiplied with, 0 for entries that are no constraints; factor [n r r] lower, in
    float64. A later token's row is as long as the attention that the token pays, over three decades
    on the organism, and the singular values of unit rows fall over three more.
    """

    center: Tensor
    J: Tensor
    scale: Tensor
    factor: Tensor
    entries: Entries

    @classmethod
    def at(cls, features: FeatureMap, delta: Tensor, entries: Entries) -> Frame:
        n, q, d = delta.shape
        together = per_chunk(len(entries) * q * d)
        if n <= together:
            return cls(delta.clone(), *_factored(features, delta, entries), entries)
        pieces = [
            sent(range(begin, min(begin + together, n)), delta.device)
            for begin in range(0, n, together)
        ]
        parts = [_factored(features.rows(rows), delta[rows], entries.rows(rows)) for rows in pieces]
        J, scale, factor = (torch.cat(own) for own in zip(*parts, strict=True))
        return cls(delta.clone(), J, scale, factor, entries)

    @classmethod
    def origin(cls, features: FeatureMap) -> Frame:
        """Without a perturbation, as many rows at once as fit."""
        entries, zero = Entries.of(features), features.weight.new_zeros(features.shape)
        parts = features.replay.subject.batching.over(
            "steps", torch.arange(len(features), device=zero.device),
            lambda rows: cls.at(features.rows(rows), zero[rows], entries.rows(rows)),
        )  # fmt: skip
        names = ("center", "J", "scale", "factor")
        own = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**own, entries=entries)

    def rows(self, rows: Tensor) -> Frame:
        return Frame(
            self.center[rows], self.J[rows], self.scale[rows], self.factor[rows],
            self.entries.rows(rows),
        )  # fmt: skip

    def anew(self, features: FeatureMap, delta: Tensor, rows: Tensor) -> Frame:
        """The frame made once more at delta, for some lanes."""
        if not len(rows):
            return self
        made = Frame.at(features.rows(rows), delta[rows], self.entries.rows(rows))
        return replace(
            self,
            center=self.center.index_copy(0, rows, made.center),
            J=self.J.index_copy(0, rows, made.J),
            scale=self.scale.index_copy(0, rows, made.scale),
            factor=self.factor.index_copy(0, rows, made.factor),
        )

    def distance(self, delta: Tensor) -> Tensor:
        """[n] how far iterates are from where J was made."""
        return norms(delta - self.center).flatten()

    def solve(self, r: Tensor) -> Tensor:
        """(JJᵀ)⁻¹r [n s K]."""
        return self.entries.put(self._solved(r) * self.scale, r)

    def correction(self, value: Tensor) -> Tensor:
        """The shortest step [n q d_model] to be subtracted for Φ to fall by `value` [n s K]."""
        y = self._solved(value).to(self.J.dtype)
        return torch.bmm(y[:, None], self.J).view_as(self.center)

    def tangent(self, u: Tensor) -> Tensor:
        """What of a direction [n q d_model] moves no feature at the center: `(I − Jᵀ(JJᵀ)⁻¹J)u`."""
        # A vector times a matrix: the other way round is several times slower on a CPU.
        moved = torch.bmm(u.flatten(1)[:, None], self.J.mT).mT.double()
        y = cholesky_solved(moved, self.factor).to(self.J.dtype)
        return u - torch.bmm(y.mT, self.J).view_as(u)

    def _solved(self, r: Tensor) -> Tensor:
        own = (self.entries.take(r) * self.scale).double()
        return cholesky_solved(own[..., None], self.factor)[..., 0]


def _factored(
    features: FeatureMap, delta: Tensor, entries: Entries
) -> tuple[Tensor, Tensor, Tensor]:
    J = Linearized(features, delta).matrix(entries)
    length = J.norm(dim=2)
    counts = entries.there & (length > TINY)
    scale = torch.where(counts, 1 / length.clamp_min(TINY), 0.0)
    J = J * scale[..., None]
    gram = J.double() @ J.double().mT
    extra = torch.where(counts, RIDGE, 1.0).double()
    # Unchecked: that would be a wait. Where J is NaN so is its factor, and no way back ends well.
    return J, scale, torch.linalg.cholesky_ex(gram + torch.diag_embed(extra)).L
