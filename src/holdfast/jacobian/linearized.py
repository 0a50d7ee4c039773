"""Φ at one iterate, and products with its Jacobian J there, none of which needs J itself."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.jacobian.entries import Entries
from holdfast.jacobian.feature_map import FeatureMap

CHUNK = 4096
"""Tokens of one batched backward pass, over lanes and cotangents."""


class Linearized:
    """Φ and its derivatives at one iterate of n lanes; J = ∂Φ/∂δ is [s·K, q·d_model] by lane.

    delta [n q d]; value [n s K]; held [n]: the largest entry of what is to be held. Everything is
    made from one recorded forward pass; J·u is the derivative of Jᵀ·y, which is linear in y.
    """

    def __init__(self, features: FeatureMap, delta: Tensor):
        self.features, self.delta = features, delta.detach()
        self._leaf = delta.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            self._parts, held = features.by_site(self._leaf)
            self._output = torch.cat(self._parts, 2)
        self.value = self._output.detach()
        self.held = held.abs().amax((1, 2))
        self._pulled: tuple[Tensor, Tensor] | None = None

    def pull(self, y: Tensor) -> Tensor:
        """Jᵀ·y [n q d] of cotangents [n s K]."""
        return _gradient(self._output, self._leaf, y)

    def pull_many(self, ys: Tensor) -> Tensor:
        """[c n q d] from [c n s K]: many cotangents, in batched backward passes."""
        return self._pull_many(self._output, ys)

    def push(self, u: Tensor) -> Tensor:
        """J·u [n s K] of directions [n q d]."""
        if self._pulled is None:
            y = torch.zeros_like(self._output, requires_grad=True)
            (pulled,) = torch.autograd.grad(self._output, self._leaf, y, create_graph=True)
            self._pulled = y, pulled
        y, pulled = self._pulled
        return _gradient(pulled, y, u)

    def matrix(self, entries: Entries) -> Tensor:
        """J [n r q·d] itself, at the r entries of each row, by batched backward passes.

        For few entries: it costs as much as r products, those with features of lower sites less.
        """
        rows, first = [self.delta.new_zeros(0, *self.delta.shape)], 0
        for site, part in enumerate(self._parts):
            last = first + part.shape[2]
            if entries.sizes[site]:
                ys = entries.cotangents(site, self.value)[..., first:last]
                rows.append(self._pull_many(part, ys))
            first = last
        return torch.cat(rows).flatten(2).transpose(0, 1).contiguous()

    def _pull_many(self, output: Tensor, ys: Tensor) -> Tensor:
        size = max(1, CHUNK // (ys.shape[1] * ys.shape[2]))
        return torch.cat([_gradient(output, self._leaf, y, batched=True) for y in ys.split(size)])


def _gradient(output: Tensor, leaf: Tensor, weight: Tensor, batched: bool = False) -> Tensor:
    (gradient,) = torch.autograd.grad(
        output, leaf, weight, retain_graph=True, is_grads_batched=batched
    )
    return gradient
