"""The published loop over several layers, rebuilt from its description, for comparison.

METHODS D.2 to D.6 (arXiv 2606.18322, second stage): one prompt at a time with its answer forced; at
every circuit layer the clamp, then a vector at each of 48 positions, then a full-width encode that
captures the held features there. A step is a forward pass with the objective's gradient, nine
products with rows of the Jacobian (the present drift and eight random ones) off which it is
projected, the gradient of 200 times the squared relative drift, which nothing projects, a step of
Adam and a rescaling to the budget; then five plain steps down the drift, a forward and a backward
pass each.

The vectors are at the position that predicts each token of the answer, where the released code has
them at the token itself: as many, and comparable with holdfast's.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published import replaced_output
from holdfast.saes.sae import SAE

LEARNING_RATE = 0.05
N_PROBES = 8
DRIFT_WEIGHT = 200.0
CORRECTIONS = 5
CORRECTION_RATE = 0.05
OBJECTIVE_WEIGHT = 5.0


class PublishedRefusalSearch:
    """The search on one prompt with its answer, tokens [s], of which the last t are read.

    clamps: block → the SAE at its output and the features multiplied by `factor` there.
    """

    def __init__(
        self,
        model: Any,
        clamps: Mapping[nn.Module, tuple[SAE, Tensor]],
        factor: float,
        tokens: Tensor,
        answer: Tensor,
        budget: float,
    ):
        self.model, self.clamps, self.factor = model, clamps, factor
        self.tokens, self.answer, self.budget = tokens[None], answer, budget
        self.delta = torch.zeros(len(clamps), len(answer), model.config.hidden_size)
        with torch.no_grad():
            _, self.reference = self.run(self.delta)
        self.delta.requires_grad_(True)
        self.adam = torch.optim.Adam([self.delta], lr=LEARNING_RATE)

    def step(self) -> None:
        """One step of the published loop."""
        logits, codes = self.run(self.delta)
        own = logits.log_softmax(-1).gather(-1, self.answer[:, None])
        (uphill,) = torch.autograd.grad(
            OBJECTIVE_WEIGHT * own.mean(), self.delta, retain_graph=True
        )
        moved = torch.cat([(z - r).flatten() for z, r in zip(codes, self.reference, strict=True)])
        basis: list[Tensor] = []
        for probe in self._probes(moved.detach()):
            (row,) = torch.autograd.grad(moved, self.delta, probe, retain_graph=True)
            for other in basis:
                row = row - (row * other).sum() * other
            if row.norm() > 1e-7:
                basis.append(row / row.norm())
        for row in basis:
            uphill = uphill - (uphill * row).sum() * row
        (drift,) = torch.autograd.grad(self._drift(codes), self.delta)
        self.delta.grad = DRIFT_WEIGHT * drift - uphill  # Adam goes down
        self.adam.step()
        self._rescale()
        for _ in range(CORRECTIONS):
            _, codes = self.run(self.delta)
            (drift,) = torch.autograd.grad(self._drift(codes), self.delta)
            with torch.no_grad():
                self.delta -= CORRECTION_RATE * drift
            self._rescale()

    def run(self, delta: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [t vocab] where the answer is read, and the held codes [t k] of every layer."""
        n_read = len(self.answer)
        seen: list[Tensor] = []

        def edited(layer: int, sae: SAE, ids: Tensor, x: Tensor) -> Tensor:
            x = self.clamped(sae, ids, x)
            x = torch.cat([x[:, :-n_read], x[:, -n_read:] + delta[layer]], 1)
            seen.append(self.encoded(sae, ids, x[0, -n_read:]))
            return x

        with ExitStack() as stack:
            for layer, (block, (sae, ids)) in enumerate(self.clamps.items()):
                change = lambda x, own=(layer, sae, ids): edited(*own, x)  # noqa: E731
                stack.enter_context(replaced_output(block, change))
            logits = self.model(input_ids=self.tokens, use_cache=False).logits
        return logits[0, -n_read:], seen

    def clamped(self, sae: SAE, ids: Tensor, x: Tensor) -> Tensor:
        """The residual [1 s d_model] with the features multiplied, by the whole SAE."""
        z = sae.encode(x)
        clamped = z.clone()
        clamped[..., ids] = self.factor * z[..., ids]
        return sae.decode(clamped) + (x - sae.decode(z))

    def encoded(self, sae: SAE, ids: Tensor, x: Tensor) -> Tensor:
        """Held codes [t k] of residuals [t d_model], out of all codes."""
        return sae.encode(x)[..., ids]

    def _probes(self, moved: Tensor) -> list[Tensor]:
        probes = [moved / moved.norm()] if moved.norm() > 1e-8 else []
        noise = torch.randn(N_PROBES, len(moved))
        return [*probes, *(noise / noise.norm(dim=1, keepdim=True))]

    def _drift(self, codes: list[Tensor]) -> Tensor:
        """Mean over layers of `mean (z − r)² / (mean r² + 1e-6)` (METHODS D.5)."""
        each = [
            (z - r).square().mean() / (r.square().mean() + 1e-6)
            for z, r in zip(codes, self.reference, strict=True)
        ]
        return torch.stack(each).mean()

    @torch.no_grad()
    def _rescale(self) -> None:
        length = float(self.delta.norm())
        if length > self.budget:
            self.delta *= self.budget / length


class PartialRefusalSearch(PublishedRefusalSearch):
    """The same search with the columns of its own features only: no full-width encode, and nothing
    decoded but what the clamp adds (METHODS 0.2)."""

    def clamped(self, sae: SAE, ids: Tensor, x: Tensor) -> Tensor:
        z = self.encoded(sae, ids, x)
        return x + (self.factor - 1) * z @ sae.W_dec[ids]

    def encoded(self, sae: SAE, ids: Tensor, x: Tensor) -> Tensor:
        return sae.encode(x, ids.tolist())
