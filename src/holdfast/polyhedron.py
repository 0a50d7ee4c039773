"""Nearest points under linear equalities and one-sided bounds on a few directions.

The dual, `min ½λᵀGλ − λᵀ(c − b)` with G = AᵀA and c = Aᵀv, has a variable a direction, λ ≥ 0 where
the bound is one-sided. A primal-dual active set method solves it, all rows at once, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.linalg import cholesky_solved
from holdfast.subspace import Iterate, into_ball
from holdfast.waiting import perhaps, waits

MAX_ITERATIONS = 8
"""Active sets tried: as many are where nobody asks whether they still change. Of 580,000 points of
searches on the organism none needed a fifth."""

ROUNDING = 1e-9
"""Excess over a bound, in units of ‖a_i‖·‖δ‖, that is rounding and no failure to converge."""

RIDGE = 1e-12
"""Added to the Gram matrix relative to its diagonal, so that repeated directions can be solved."""


@dataclass(frozen=True)
class Polyhedron:
    """Differences δ with `a_i·δ = 0` for some directions and `s_i·a_i·δ ≤ b_i` for others, by row
    and position; 0 is among them, so they are closed under scaling down.

    A [g d k]; slice_of [n]: the slice each row uses; equal, bounded [n p k] bool: which directions
    are held and which are one-sided; sign [n p k]: +1 for an upper bound, -1 for a lower one; bound
    [n p k] ≥ 0.
    """

    A: Tensor
    slice_of: Tensor
    equal: Tensor
    bounded: Tensor
    sign: Tensor
    bound: Tensor

    @property
    def dimension(self) -> Tensor:
        """Directions left free by the equalities, where they leave fewest."""
        return self.A.shape[1] - self.equal.sum(-1).amax(-1)

    def rows(self, rows: Tensor) -> Polyhedron:
        picked = {
            name: getattr(self, name)[rows]
            for name in ("slice_of", "equal", "bounded", "sign", "bound")
        }
        return replace(self, **picked)

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        # Which bounds bind is only known after the step.
        return gradient

    def retract(self, delta: Tensor) -> Tensor:
        """The nearest point of the set, differentiable where the set of binding bounds is."""
        A = (self.A[self.slice_of]).double()  # [n d k]
        v = delta.double()
        # Signs turn every bound into an upper one.
        c = torch.bmm(v, A) * self.sign
        G = (A.mT @ A)[:, None] * self.sign[..., None] * self.sign[..., None, :]
        ridge = RIDGE * torch.diagonal(G, dim1=-2, dim2=-1).clamp_min(1e-30)
        G = G + torch.diag_embed(ridge)
        want = c - self.bound.double()
        with torch.no_grad():
            binding = self._binding(G, want)
        multiplier = _solve(G, want, binding)
        point = v - torch.bmm(multiplier * self.sign, A.mT)
        with torch.no_grad():
            lost = self._exceeds(point, A)
        if perhaps(lost):
            # Active sets went in circles. With every bound held at 0 the point is in the set, and
            # nearly the nearest if bounds are tight.
            careful = v - torch.bmm(_solve(G, c, self.equal | self.bounded) * self.sign, A.mT)
            point = torch.where(lost[..., None], careful, point)
        return point.to(delta.dtype)

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        return into_ball(self.retract(delta), radius)

    def _binding(self, G: Tensor, want: Tensor) -> Tensor:
        """[n p k] bool: directions whose bound holds with equality at the nearest point."""
        binding = self.equal | (self.bounded & (want > 0))
        for _ in range(MAX_ITERATIONS):
            multiplier = _solve(G, want, binding)
            slack = want - (G @ multiplier[..., None]).squeeze(-1)
            # A bound binds while it pushes; it starts to where it would be exceeded.
            pushed = torch.where(binding, multiplier > 0, slack > 0)
            now = self.equal | (self.bounded & pushed)
            changed, binding = now != binding, now
            if not perhaps(changed):
                break
        return binding

    def _exceeds(self, point: Tensor, A: Tensor) -> Tensor:
        """[n p] bool: a bound is exceeded by more than rounding."""
        over = torch.bmm(point, A) * self.sign - self.bound.double()
        scale = A.norm(dim=1)[:, None] * point.norm(dim=-1, keepdim=True)
        return (self.bounded & (over > ROUNDING * scale)).any(-1)


def _solve(G: Tensor, want: Tensor, binding: Tensor) -> Tensor:
    """λ [n p k] with (Gλ)_i = want_i for binding i and λ_i = 0 for the others."""
    on = binding.to(G.dtype)
    masked = G * on[..., None] * on[..., None, :] + torch.diag_embed(1 - on)
    # Whether there is a factor is a question too. With the ridge there is, where G is finite.
    factor = torch.linalg.cholesky_ex(masked, check_errors=not waits(G.device)).L
    return cholesky_solved((want * on)[..., None], factor)[..., 0]
