"""Iterates by where they put the perturbed slots, instead of by what they add there.

Where every held site is perturbed and clamps act before the perturbation, a vector can put a slot's
residual anywhere, so that offsets from the reference are coordinates of the same iterates: a vector
is the offset less what clamps and lower vectors made of the slot already. Written in offsets, the
features of a perturbed slot are linear, and those of later tokens follow from the offsets alone.
Written in vectors, both jump where a clamp at a perturbed slot switches on or off, and Gauss-Newton
jumps to and fro.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.jacobian.feature_map import FeatureMap, suffix_states
from holdfast.jacobian.frame import Frame
from holdfast.jacobian.linearized import Linearized
from holdfast.jacobian.null_space import exact_tangent
from holdfast.problem import TINY, Problem
from holdfast.replay import Replay
from holdfast.subspace import norms

SHORT = 1e-3
"""Norm of the difference that a derivative is taken from, as a share of the residual's."""


class Coordinates(Protocol):
    """How iterates are written while they are put back into the set."""

    @property
    def features(self) -> FeatureMap: ...

    def rows(self, rows: Tensor) -> Coordinates: ...

    def written(self, delta: Tensor) -> Tensor:
        """Coordinates [n q d_model] of vectors."""
        ...

    def vectors(self, x: Tensor) -> Tensor:
        """Vectors of coordinates."""
        ...

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Φ at coordinates, what is to be held there, as FeatureMap has them, and the vectors."""
        ...

    def change(self, at: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """How coordinates change with a step [n q d_model] from vectors `at`, which are at x, to
        first order."""
        ...

    def tangent(self, frame: Frame, delta: Tensor, u: Tensor) -> Tensor:
        """What of a direction [n q d_model] moves no feature, at vectors `delta` near a frame."""
        ...

    def inward(self, frame: Frame, delta: Tensor) -> Tensor | None:
        """Along what [n q d_model] vectors near `delta` are made shorter; None: as they are."""
        ...


@dataclass(frozen=True)
class Plain:
    """Vectors as they are."""

    features: FeatureMap

    def rows(self, rows: Tensor) -> Plain:
        return Plain(self.features.rows(rows))

    def written(self, delta: Tensor) -> Tensor:
        return delta

    def vectors(self, x: Tensor) -> Tensor:
        return x

    @torch.no_grad()
    def moved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.features(x), x

    def change(self, at: Tensor, x: Tensor, step: Tensor) -> Tensor:
        return step

    def tangent(self, frame: Frame, delta: Tensor, u: Tensor) -> Tensor:
        return exact_tangent(Linearized(self.features, delta), frame, u)

    def inward(self, frame: Frame, delta: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Offsets:
    """Offsets of the perturbed slots' residuals from the reference; size [n]: that one's norm."""

    features: FeatureMap
    size: Tensor

    @classmethod
    def fit(cls, problem: Problem) -> bool:
        """Whether vectors can put every held feature's slot anywhere, and numbers are fine enough
        for a derivative from a difference."""
        if problem.replay.base.dtype != torch.float32:
            return False
        late = [site for edit in problem.replay.after for site in edit.sites]
        return problem.moved == problem.sites and not set(late) & set(problem.sites)

    def rows(self, rows: Tensor) -> Offsets:
        return Offsets(self.features.rows(rows), self.size[rows])

    @torch.no_grad()
    def written(self, delta: Tensor) -> Tensor:
        replay = self.features.replay
        states = replay.states(delta, replay.sites)
        return torch.cat([states[s] - replay.reference[s] for s in replay.sites], 1) * self._there

    @torch.no_grad()
    def vectors(self, x: Tensor) -> Tensor:
        return self._pinned(x).realized(torch.zeros_like(x)) * self._there

    @torch.no_grad()
    def moved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pinned = self._pinned(x)
        passed = suffix_states(pinned, torch.zeros_like(x), self.features.sites)
        parts, held = self.features.of_states(passed)
        return torch.cat(parts, 2), held, pinned.added(passed) * self._there

    def change(self, at: Tensor, x: Tensor, step: Tensor) -> Tensor:
        # From a difference that is short, so that hardly any clamp switches within it.
        length = norms(step).clamp_min(TINY)
        short = SHORT * self.size[:, None, None]
        return (self.written(at + step / length * short) - x) / short * length

    def tangent(self, frame: Frame, delta: Tensor, u: Tensor) -> Tensor:
        return exact_tangent(Linearized(self.features, delta), frame, u)

    def inward(self, frame: Frame, delta: Tensor) -> Tensor | None:
        return None

    @property
    def _there(self) -> Tensor:
        """[n q 1] slots that exist."""
        replay = self.features.replay
        return (replay.columns >= 0).repeat(1, len(replay.sites))[..., None]

    def _pinned(self, x: Tensor) -> Replay:
        replay = self.features.replay
        pins = {site: Pin(replay.reference[site] + own) for site, own in replay.parts(x).items()}
        return replace(replay, hold=pins)


@dataclass(frozen=True)
class Pin:
    """Puts the perturbed positions of a site where they should be [n p d_model]."""

    residual: Tensor

    def rows(self, rows: Tensor) -> Pin:
        return Pin(self.residual[rows])

    def __call__(self, x: Tensor) -> Tensor:
        return self.residual
