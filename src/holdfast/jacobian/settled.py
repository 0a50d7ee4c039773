"""Iterates whose perturbed slots the forward pass puts back itself: later tokens are left to hold.

At a perturbed slot a residual can be put where its features do not move, whatever the rest of the
vector does (`constraints/in_place.py`). With that done in the pass, H: vectors → vectors, features
of perturbed slots are no constraints any more, and those of later tokens are Ψ = Φ∘H. So J has rows
for later tokens alone: with vectors at every prompt token of three layers, 160 of 472.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.constraints.feature_hold import FeatureHold
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.frame import Frame
from holdfast.jacobian.offsets import Offsets
from holdfast.prefix import by_formula
from holdfast.problem import TINY, Problem

STEPS = 2
"""Steps of conjugate gradients for a tangent: so near is it to the orthogonal projection."""


@dataclass(frozen=True)
class Settled:
    """Offsets that move no feature of perturbed slots: a linear space, whatever clamps do there.

    features: Ψ, with H in the pass; offsets: of Φ at later tokens, without.
    """

    features: FeatureMap
    offsets: Offsets

    @classmethod
    def of(cls, problem: Problem, features: FeatureMap) -> Settled:
        """features: Φ of the problem. Raises ConstraintError where vectors do not stand at every
        clamped site, or clamps act after them."""
        hold = FeatureHold().acting(problem).replay.hold
        later = replace(features, weight=torch.where(features.elsewhere, features.weight, 0.0))
        held = replace(later, replay=replace(features.replay, hold=hold))
        return cls(held, Offsets(later, problem.reference_norm))

    def rows(self, rows: Tensor) -> Settled:
        return Settled(self.features.rows(rows), self.offsets.rows(rows))

    def written(self, delta: Tensor) -> Tensor:
        return self._put(self.offsets.written(delta))

    def vectors(self, x: Tensor) -> Tensor:
        return self.offsets.vectors(x)

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.offsets.moved(x)

    def change(self, at: Tensor, x: Tensor, step: Tensor) -> Tensor:
        return self._put(self.offsets.change(at, x, step))

    def _put(self, x: Tensor) -> Tensor:
        """Offsets without what would move a feature of their slot."""
        replay = self.features.replay
        parts = replay.parts(x).items()
        return torch.cat(
            [
                replay.hold[site](replay.reference[site] + own) - replay.reference[site]
                for site, own in parts
            ],
            1,
        )

    def tangent(self, frame: Frame, delta: Tensor, u: Tensor) -> Tensor:
        """`Bw` nearest to u, B = H′P with the frame's P = I − Jᵀ(JJᵀ)⁻¹J, by conjugate gradients.

        B is a projection onto what moves no feature, and not the orthogonal one: `BBᵀu` is uphill
        too, but turned to where H′ stretches. After any number of steps the answer is tangent.
        """
        leaf = delta.detach().clone().requires_grad_(True)
        with torch.enable_grad(), by_formula():
            made = self.features.replay.realized(leaf)
            y = torch.zeros_like(made, requires_grad=True)
            (pulled,) = torch.autograd.grad(made, leaf, y, create_graph=True)

        def across(v: Tensor) -> Tensor:
            (own,) = torch.autograd.grad(made, leaf, v, retain_graph=True)
            return frame.tangent(own)

        out, left = torch.zeros_like(u), u
        slope = across(left)
        p, size = slope, _dot(slope, slope)
        for step in range(STEPS):
            (along,) = torch.autograd.grad(pulled, y, p, retain_graph=True)
            length = size / _dot(along, along).clamp_min(TINY)
            out, left = out + length * along, left - length * along
            if step + 1 == STEPS:
                break
            slope = across(left)
            following = _dot(slope, slope)
            p, size = slope + following / size.clamp_min(TINY) * p, following
        return out

    def inward(self, frame: Frame, delta: Tensor) -> Tensor | None:
        """The tangent along which a vector's norm falls.

        Shortest on the set is a vector from which no tangent leads to a shorter one. Scaling takes
        a vector out of the set, and being put back turns it: so that a search would end where steps
        uphill and this turn are level, and not where the objective is highest.
        """
        return self.tangent(frame, delta, delta)


def _dot(x: Tensor, z: Tensor) -> Tensor:
    return (x * z).sum((1, 2), keepdim=True)
