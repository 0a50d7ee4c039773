"""The published single-layer loop, rebuilt from its description, for comparison.

METHODS C.2 (arXiv 2606.18322, `optimize_delta`): one prompt at a time; a reference pass with the
clamp caches the residual of every position; each step is a full forward pass whose residual is
pasted over with `cached + δ`, a full-width encode and decode for two drift terms (their weights are
0 by default), a backward pass, the gradient's projection, a step of Adam and a rescaling to the
budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.margins import margin_of
from holdfast.saes.sae import SAE

LEARNING_RATE = 0.1
RIDGE = 1e-4


@dataclass(frozen=True)
class LongClamp:
    """Set features where they fire, the long way: `D(clamp(E(x))) + (x − D(E(x)))`."""

    sae: SAE
    ids: Tensor
    value: float

    def __call__(self, x: Tensor) -> Tensor:
        z = self.sae.encode(x)
        clamped = z.clone()
        own = z[..., self.ids]
        clamped[..., self.ids] = torch.where(own > 0, self.value, own)
        return self.sae.decode(clamped) + (x - self.sae.decode(z))


class PublishedSearch:
    """The search on one prompt [s]. with_drift: compute the two drift terms of the loss."""

    def __init__(
        self,
        model: Any,
        block: nn.Module,
        clamp: LongClamp,
        tokens: Tensor,
        target: Tensor,
        rivals: Tensor,
        budget: float,
        with_drift: bool = True,
    ):
        self.model, self.block, self.clamp = model, block, clamp
        self.tokens, self.target, self.rivals = tokens[None], target[None], rivals[None]
        self.budget, self.with_drift = budget, with_drift
        self.residual = self._reference()
        with torch.no_grad():
            self.z = clamp.sae.encode(self.residual)[..., clamp.ids]
            self.decoded = self._contribution(self.z)
        A = clamp.sae.W_enc[:, clamp.ids]
        self.projector = torch.linalg.solve(A.T @ A + RIDGE * torch.eye(len(clamp.ids)), A.T)
        self.columns = A
        self.delta = torch.zeros(1, self.residual.shape[-1], requires_grad=True)
        self.adam = torch.optim.Adam([self.delta], lr=LEARNING_RATE)

    def step(self) -> None:
        """One step of the published loop."""
        self.adam.zero_grad()
        pasted = self.pasted(self.delta)
        loss = -self.margin(pasted)
        if self.with_drift:
            z = self.clamp.sae.encode(pasted)[..., self.clamp.ids]
            loss = loss + 0.0 * (z - self.z).norm()
            loss = loss + 0.0 * (self._contribution(z) - self.decoded).norm()
        (loss + 0.0 * self.delta.norm()).sum().backward()
        gradient = self.delta.grad
        assert gradient is not None
        gradient -= (gradient @ self.columns) @ self.projector
        self.adam.step()
        with torch.no_grad():
            length = float(self.delta.norm())
            if length > self.budget:
                self.delta *= self.budget / length

    def pasted(self, delta: Tensor) -> Tensor:
        """The cached residual [1 s d] with delta [1 d] added at the last position."""
        last = self.residual[:, -1:] + delta
        return torch.cat([self.residual[:, :-1], last], 1)

    def margin(self, pasted: Tensor) -> Tensor:
        """[1] the margin of a full forward pass with the residual pasted over."""
        with replaced_output(self.block, lambda x: pasted):
            logits = self.model(input_ids=self.tokens, use_cache=False).logits
        return margin_of(logits[:, -1], self.target, self.rivals)

    def _contribution(self, z: Tensor) -> Tensor:
        """Decode codes of the clamped features [1 s k] at full width."""
        codes = z.new_zeros(*z.shape[:-1], self.clamp.sae.n_features)
        return codes.index_copy(-1, self.clamp.ids, z) @ self.clamp.sae.W_dec

    @torch.no_grad()
    def _reference(self) -> Tensor:
        seen: list[Tensor] = []

        def clamped(x: Tensor) -> Tensor:
            seen.append(self.clamp(x))
            return seen[-1]

        with replaced_output(self.block, clamped):
            self.model(input_ids=self.tokens, use_cache=False)
        return seen[-1]


@contextmanager
def replaced_output(block: nn.Module, change: Any) -> Iterator[None]:
    """Replace what a decoder block returns, for the length of a `with` block."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
