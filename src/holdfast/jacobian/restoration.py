"""Gauss-Newton: put an iterate back where no held feature has moved (METHODS D.10)."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.linearized import Linearized
from holdfast.jacobian.null_space import correction
from holdfast.jacobian.preconditioners import Preconditioner
from holdfast.subspace import into_ball, norms
from holdfast.waiting import Behind, waits

ROUNDS = 10
"""Most corrections of one restoration."""

STALLS = 3
"""How often a violation may fail to halve before its lane is given up."""

SLACK = 1e-4
"""Relative amount by which a norm may exceed its budget."""

SHRINK = 5e-4
"""How far inside its ball an iterate is scaled, so that the next correction keeps it there."""


def restore(
    features: FeatureMap, near: Preconditioner, delta: Tensor, radius: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Iterates [n q d] put back where Φ = 0, inside balls of radius [n]; which ones got there [n].

    δ ← δ − Jᵀ(JJᵀ)⁻¹Φ(δ), and the iterate is scaled into its ball in between, so that what is
    accepted fulfils both. Near Φ = 0 the violation falls quadratically.
    """
    n, device = len(delta), delta.device
    out, kept = delta.clone(), torch.zeros(n, dtype=torch.bool, device=device)
    lanes = torch.arange(n, device=device)
    smallest = torch.full((n,), torch.inf, device=device)
    excesses, stalls = torch.zeros(2, n, dtype=torch.long, device=device)
    behind = Behind()
    for _ in range(ROUNDS + 1):
        over = norms(delta).flatten() > radius * (1 + SLACK)
        excesses = excesses + over
        # Scaling moves features again, so each time a little more room is made for the correction.
        inner = torch.where(over, radius * (1 - SHRINK * excesses), torch.inf)
        delta = into_ball(delta, inner)
        here = Linearized(features, delta)
        good = here.held <= tolerance
        out[lanes], kept[lanes] = delta, good
        stalls = stalls + ~(here.held <= 0.5 * smallest)
        going = ~good & torch.isfinite(here.held) & (stalls <= STALLS)
        if behind.none(going):
            break
        # The next violation is about the square of this one, however well the linear map is solved.
        largest = here.value.abs().amax((1, 2))
        goal = torch.minimum(largest.square().clamp_min(tolerance / 3), 0.1 * largest)
        step = correction(here, near, torch.where(going, goal, torch.inf))
        delta = torch.where(going[:, None, None], delta - step, delta)
        smallest = torch.minimum(smallest, here.held)
        if not waits(device) and not going.all():
            rows = going.nonzero().flatten()
            features, near, lanes = features.rows(rows), near.rows(rows), lanes[rows]
            delta, radius, smallest = delta[rows], radius[rows], smallest[rows]
            excesses, stalls = excesses[rows], stalls[rows]
    return out, kept
