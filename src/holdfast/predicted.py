"""What the margin's gradient predicts of an effect, to be set beside the effect when performed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from holdfast.problem import Lanes
from holdfast.variants import Recovered

STEPS = 8
"""Points on the way from nothing to the vector, at which `integrated` reads the gradient."""


def gradients(found: Recovered) -> dict[str, Tensor]:
    """Two gradients of the margin [n q d_model], in logits per unit of residual.

    linear: where nothing is added (activation patching's first order). integrated: the mean over
    the way to the vector found, by midpoints (Sundararajan, Taly and Yan 2017); with it the whole
    vector is predicted exactly, but for the number of steps.
    """

    def both(rows: Tensor) -> tuple[Tensor, Tensor]:
        lanes, delta = Lanes.of(found.problem, rows), found.delta[rows]

        def at(share: float) -> Tensor:
            leaf = (share * delta).requires_grad_(True)
            return torch.autograd.grad(lanes.margin(leaf).sum(), leaf)[0].double()

        return at(0.0), sum((at((i + 0.5) / STEPS) for i in range(1, STEPS)), at(0.5 / STEPS))

    everyone = torch.arange(len(found), device=found.delta.device)
    linear, along = zip(*found.case.subject.batching.over("steps", everyone, both), strict=True)
    return {"linear": torch.cat(linear), "integrated": torch.cat(along) / STEPS}


def predictions(gradient: Tensor, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name → [n] predicted change of the margin, in logits, of vectors [n q d_model]."""
    return {name: (gradient * v.double()).sum((1, 2)) for name, v in vectors.items()}


def agreement(predicted: Tensor, performed: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """[n] correlation, and [n] mean absolute difference as a share of the whole vector's effect.

    predicted, performed [v n]: changes of the margin by v vectors, in logits; whole [n].
    """
    a, b = (x - x.mean(0) for x in (predicted, performed))
    size = (a.square().sum(0) * b.square().sum(0)).sqrt()
    correlation = torch.where(size > 0, (a * b).sum(0) / size.clamp_min(1e-30), torch.nan)
    return correlation, (predicted - performed).abs().mean(0) / whole.abs()
