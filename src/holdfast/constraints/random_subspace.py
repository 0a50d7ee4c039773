"""A control: as many directions forbidden as features are held, but random ones."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.canonical import digest
from holdfast.constraints import ConstraintKind, Promise
from holdfast.problem import Problem
from holdfast.subspace import FeasibleSet, NullSpace, PerSlot


class RandomSubspace(ConstraintKind):
    """A random subspace of the dimension that `encoder_null` leaves (METHODS C.5).

    What it costs more than no constraint is what any loss of so many directions costs. It promises
    nothing about features.
    """

    kind: Literal["random_subspace"] = "random_subspace"

    @property
    def promise(self) -> Promise:
        return "nothing"

    def feasible(self, problem: Problem) -> FeasibleSet:
        parts = []
        for site in problem.sites:
            held = problem.held.get(site) or next(iter(problem.held.values()))
            generator = torch.Generator().manual_seed(int(digest(f"{self.kind}/{site}")[:12], 16))
            columns = torch.randn(held.W_enc.shape, generator=generator).to(held.W_enc.device)
            parts.append(NullSpace.of(columns, held.valid, held.slices(problem.replay.frame)))
        return parts[0] if len(parts) == 1 else PerSlot(tuple(parts))
