"""Solves with JJᵀ by conjugate gradients, which need products with J and Jᵀ only (METHODS D.10)."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.jacobian.linearized import Linearized
from holdfast.jacobian.preconditioners import Preconditioner
from holdfast.problem import TINY
from holdfast.waiting import Behind

LEFT = 0.1
"""Share of what moves features that may be left in a direction; the restoration takes it away."""

OFF = 0.02
"""Share of a direction's length by which `exact_tangent` may differ from what is tangent."""

MAX_ITERATIONS = 60
"""Most steps of conjugate gradients. What is left then is left, and seen in the next violation."""


def tangent(here: Linearized, near: Preconditioner, direction: Tensor) -> Tensor:
    """What of a direction [n q d] moves no feature, to first order: `(I − Jᵀ(JJᵀ)⁻¹J)u`."""
    moved = here.push(direction)
    y = conjugate_gradients(here, near, moved, LEFT * moved.abs().amax((1, 2)))
    return direction - here.pull(y)


def exact_tangent(here: Linearized, near: Preconditioner, direction: Tensor) -> Tensor:
    """The same up to `OFF` of the direction's length, where features hardly depend on some of it.

    There a direction that moves no feature by much can still be far from tangent: the way back from
    a step along it is longer than the step. The length of what is left is `r·(JJᵀ)⁻¹r`, squared.
    """
    most = OFF * direction.norm(dim=(1, 2))
    nothing = torch.zeros_like(most)
    y = conjugate_gradients(here, near, here.push(direction), nothing, most)
    return direction - here.pull(y)


def correction(here: Linearized, near: Preconditioner, goal: Tensor) -> Tensor:
    """The smallest step [n q d] that takes Φ to 0, to first order and up to `goal` [n] in every
    entry: `Jᵀ(JJᵀ)⁻¹Φ`, to be subtracted."""
    return here.pull(conjugate_gradients(here, near, here.value, goal))


def conjugate_gradients(
    here: Linearized,
    near: Preconditioner,
    b: Tensor,
    goal: Tensor,
    most: Tensor | None = None,
) -> Tensor:
    """y [n s K] with `JJᵀy ≈ b`, until every entry of the residual is below goal [n], or what it
    stands for in a direction is shorter than `most` [n].

    Each lane stops by itself and is then left as it is, so a batch changes nothing. Where held
    features depend on each other JJᵀ is singular and b in its range, which is enough.
    """
    y, r = torch.zeros_like(b), b
    z = near.solve(r)
    p, rz = z, _dot(r, z)
    behind = Behind()
    for _ in range(MAX_ITERATIONS):
        going = (r.abs().amax((1, 2)) > goal)[:, None, None]
        if most is not None:
            going = going & (rz > most.square()[:, None, None])
        if behind.none(going):
            break
        q = here.push(here.pull(p))
        curvature = _dot(p, q)
        going = going & (curvature > 0)
        length = torch.where(going, rz / curvature.clamp_min(TINY), 0.0)
        y, r = y + length * p, r - length * q
        z = near.solve(r)
        following = _dot(r, z)
        p = torch.where(going, z + following / rz.clamp_min(TINY) * p, p)
        rz = torch.where(going, following, rz)
    return y


def _dot(x: Tensor, z: Tensor) -> Tensor:
    return (x * z).sum((1, 2), keepdim=True)
