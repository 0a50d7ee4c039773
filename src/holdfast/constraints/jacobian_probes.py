"""The published way over several layers, kept as a baseline: a few random rows of the Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.canonical import digest
from holdfast.constraints import ConstraintKind, Promise
from holdfast.drift import squared_relative_drift
from holdfast.errors import ConstraintError
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.problem import Problem
from holdfast.steppers import Adam
from holdfast.subspace import Iterate, into_ball
from holdfast.waiting import carried

SMALLEST_DRIFT = 1e-8
"""Norm of the drift below which it is no probe, as published."""

SMALLEST_ROW = 1e-7
"""Norm below which Gram-Schmidt drops a row, as published."""


@dataclass(frozen=True)
class Probed:
    """Gradients without their part along a few random rows of the Jacobian of the codes.

    reference: codes [n s k] of each monitored site.
    """

    spec: JacobianProbes
    features: FeatureMap
    reference: tuple[Tensor, ...]
    free: Tensor

    @property
    def dimension(self) -> Tensor:
        return self.free

    def rows(self, rows: Tensor) -> Probed:
        return Probed(
            self.spec, self.features.rows(rows), tuple(z[rows] for z in self.reference),
            self.free[rows],
        )  # fmt: skip

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        """Projected off the probed rows; then the drift's gradient is added, unprojected."""
        leaf = at.delta.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            codes = self._codes(leaf)
            moved = torch.cat([z.flatten(1) for z in self._moved(codes)], 1)  # [n M]
            drift = self._drift(codes)
        searched = _searched(gradient)
        rows = [
            (searched * torch.autograd.grad(moved, leaf, probe, retain_graph=True)[0]).flatten(1)
            for probe in self._probes(moved.detach(), at.step)
        ]
        direction = gradient.flatten(1)
        for row in _orthonormal(rows):
            direction = direction - (direction * row).sum(1, keepdim=True) * row
        (uphill,) = torch.autograd.grad(drift.sum(), leaf)
        return direction.view_as(gradient) - self.spec.drift_weight * uphill

    def retract(self, delta: Tensor) -> Tensor:
        return delta

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        """Scaled into the ball; then a few plain steps down the drift, scaled after each."""
        delta = into_ball(delta, radius)
        own = 1.0 if last.gradient is None else _searched(last.gradient)
        for _ in range(self.spec.correction_steps):
            leaf = delta.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                drift = self._drift(self._codes(leaf))
            (uphill,) = torch.autograd.grad(drift.sum(), leaf)
            delta = into_ball(delta - self.spec.correction_lr * own * uphill, radius)
        return delta

    def _codes(self, delta: Tensor) -> list[Tensor]:
        """[n s k] of each monitored site."""
        features = self.features
        states = features.replay.suffix(delta, [bank.site for bank in features.banks])
        return [
            bank.activations(states[bank.site].leaving, features.replay.frame)
            for bank in features.banks
        ]

    def _moved(self, codes: list[Tensor]) -> list[Tensor]:
        """Differences to the reference, 0 where nothing is monitored."""
        sizes = [z.shape[2] for z in codes]
        monitored = self.features.monitored.split(sizes, 2)
        return [
            torch.where(own, z - z_ref, 0.0)
            for own, z, z_ref in zip(monitored, codes, self.reference, strict=True)
        ]

    def _drift(self, codes: list[Tensor]) -> Tensor:
        """[n] the squared relative drift at the monitored entries."""
        monitored = self.features.monitored.split([z.shape[2] for z in codes], 2)
        return squared_relative_drift(codes, self.reference, monitored)

    @cached_property
    def _entries(self) -> tuple[Tensor, ...]:
        """Of each row the monitored entries of M, for which random numbers are drawn, on the host.
        The device is waited for when rows have left, and not in each step."""
        sizes = [z.shape[2] for z in self.reference]
        parts = self.features.monitored.split(sizes, 2)
        monitored = torch.cat([part.flatten(1) for part in parts], 1).cpu()
        return tuple(own.nonzero().flatten() for own in monitored)

    def _probes(self, moved: Tensor, step: int) -> list[Tensor]:
        """Cotangents [n M] of unit norm: the present drift, and random ones, drawn by example and
        step."""
        length = moved.norm(dim=1, keepdim=True)
        probes = [torch.where(length > SMALLEST_DRIFT, moved / length.clamp_min(1e-30), 0.0)]
        noise, ids = torch.zeros(self.spec.n_probes, *moved.shape), self.features.replay.frame.ids
        for lane, (example, own) in enumerate(zip(ids, self._entries, strict=True)):
            key = f"{self.spec.kind}/{example}/{step}"
            generator = torch.Generator().manual_seed(int(digest(key)[:15], 16))
            drawn = torch.randn(self.spec.n_probes, len(own), generator=generator)
            noise[:, lane, own] = drawn
        noise = carried(noise, moved.device)
        return [*probes, *(noise / noise.norm(dim=2, keepdim=True).clamp_min(1e-30))]


def _searched(gradient: Tensor) -> Tensor:
    """[n q 1] bool: a slot without a gradient is not searched now, and no unknown of the
    Jacobian's."""
    return gradient.ne(0).any(2, keepdim=True)


def _orthonormal(rows: list[Tensor]) -> list[Tensor]:
    """Gram-Schmidt over [n N] rows, lane by lane; what is dropped in a lane is zero there."""
    basis: list[Tensor] = []
    for row in rows:
        for other in basis:
            row = row - (row * other).sum(1, keepdim=True) * other
        length = row.norm(dim=1, keepdim=True)
        basis.append(torch.where(length > SMALLEST_ROW, row / length.clamp_min(1e-30), 0.0))
    return basis


class JacobianProbes(ConstraintKind):
    """What the released code of arXiv 2606.18322 does over several layers (METHODS D.6): it leaks.

    A step's gradient is projected off `n_probes` random rows of the Jacobian of the held codes and
    the row along the present drift: 9 of some hundred or thousand. Then `drift_weight` times the
    gradient of the squared relative drift is added, which nothing projects; Adam steps; the norm is
    clipped; and `correction_steps` of plain gradient descent on the drift follow. The defaults are
    the published values.

    The search around it is the study's: by default one for the smallest norm, whose steps are a
    share of the budget, up the margin. The published one, two stages of Adam with a rule for which
    iterate is kept, is `recovery.schedule` (the study gemma-2-2b-it-refusal states it). Adapted
    even so: the last prompt token is monitored beside the answer's, and the objective lacks the
    small terms that hold discouraged openings down (`objectives/prefixes.py`).
    """

    kind: Literal["jacobian_probes"] = "jacobian_probes"
    n_probes: int = Field(8, ge=0)
    drift_weight: float = Field(200.0, ge=0)
    correction_steps: int = Field(5, ge=0)
    correction_lr: float = Field(0.05, gt=0)

    @property
    def promise(self) -> Promise:
        return "nothing"

    def repeats(self, n_sites: int) -> tuple[int, int]:
        # The codes, and back for each probe, the present drift and its gradient; then corrections.
        passes = 1 + self.n_probes + 2 + 2 * self.correction_steps
        return passes, passes

    def adapted(self, staged: bool) -> str:
        always = (
            "the last prompt token is monitored beside the answer's, and no term of the objective "
            "holds discouraged openings down"
        )
        if staged:
            return always
        return (
            "it looks for the smallest norm, up the study's objective; published are two stages of "
            f"fixed steps and a rule for which iterate is kept; {always}"
        )

    @property
    def stepper(self) -> Adam:
        return Adam()

    def feasible(self, problem: Problem) -> Probed:
        if not problem.moved:
            raise ConstraintError(
                f"{self.kind} has nothing to probe: the clamped sites lie below "
                f"{problem.sites[0]}, where no perturbation can reach their features"
            )
        features = FeatureMap.of(problem)
        codes = tuple(
            bank.activations(y, features.replay.frame)
            for bank, (_, y) in zip(features.banks, features.reference, strict=True)
        )
        free = (features.unknowns - self.n_probes - 1).clamp_min(0)
        return Probed(self, features, codes, free)
