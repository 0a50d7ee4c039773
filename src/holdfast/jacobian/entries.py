"""Which entries of Φ are constraints: of each row its own, one monitored site after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.jacobian.feature_map import FeatureMap


@dataclass(frozen=True)
class Entries:
    """Of each row the entries of a flat [s·K] that are constraints.

    index [n r]: 0 where a row has fewer than r; there [n r] bool; sizes: how many of the r belong
    to each monitored site, in forward order, so that what lies above a site is left out of the
    derivatives of its own features.
    """

    index: Tensor
    there: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, features: FeatureMap) -> Entries:
        K, begin = features.weight.shape[2], 0
        index, there = [], []
        for own in features.monitored.split(features.counts, 2):
            k = own.shape[2]
            flat = own.flatten(1)
            n_own = flat.sum(1)
            at = flat.int().argsort(dim=1, descending=True, stable=True)[:, : int(n_own.max())]
            used = torch.arange(at.shape[1], device=at.device) < n_own[:, None]
            index.append(torch.where(used, at // k * K + begin + at % k, 0))
            there.append(used)
            begin += k
        sizes = tuple(part.shape[1] for part in index)
        return cls(torch.cat(index, 1), torch.cat(there, 1), sizes)

    def __len__(self) -> int:
        """Entries of the row that has most, at every site."""
        return self.index.shape[1]

    def rows(self, rows: Tensor) -> Entries:
        return Entries(self.index[rows], self.there[rows], self.sizes)

    def take(self, value: Tensor) -> Tensor:
        """[n r] of [n s K]; 0 where a row has fewer."""
        return torch.where(self.there, value.flatten(1).gather(1, self.index), 0.0)

    def put(self, y: Tensor, like: Tensor) -> Tensor:
        """[n s K] from [n r], 0 elsewhere; of the shape and type of `like`."""
        own = torch.where(self.there, y, 0.0).to(like.dtype)
        return torch.zeros_like(like).flatten(1).scatter_add(1, self.index, own).view_as(like)

    def cotangents(self, site: int, like: Tensor) -> Tensor:
        """[c n s K] a one at each of the c entries of the site of that number, zeros where a row
        has fewer; like [n s K]."""
        begin = sum(self.sizes[:site])
        own = slice(begin, begin + self.sizes[site])
        n, s, K = like.shape
        ones = like.new_zeros(n, self.sizes[site], s * K)
        ones.scatter_(2, self.index[:, own, None], self.there[:, own, None].to(like.dtype))
        return ones.view(n, -1, s, K).transpose(0, 1)
