"""What the search sees: rows to recover, the margin each must reach, and how far it may go."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.batch import Batch, margin_of
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank


@dataclass(frozen=True)
class Problem:
    """n rows of one recovery search at one site.

    replay: the recorded pass with the intervention on; batch: prompts with the answers the
    margin is read for; goal [n]: margin that counts as success, in logits; held: the features
    that must not move; reference_norm [n]: Frobenius norm of the suppressed residual at the
    perturbed positions; radius [n]: the norm budget in the same units.
    """

    replay: Replay
    batch: Batch
    goal: Tensor
    held: FeatureBank
    reference_norm: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.goal)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, p, d_model): the shape of a perturbation."""
        n, p = self.replay.columns.shape
        return n, p, self.replay.base.shape[-1]

    @property
    def perturbed(self) -> Tensor:
        """[n p] bool: positions that exist; fewer than p in some rows."""
        return self.replay.columns >= 0


@dataclass(frozen=True)
class Lanes:
    """Rows of a problem laid out for a batched search; one row may fill several lanes."""

    problem: Problem
    replay: Replay
    targets: Tensor
    rivals: Tensor

    @classmethod
    def of(cls, problem: Problem, rows: Tensor) -> Lanes:
        return cls(
            problem, problem.replay.rows(rows), problem.batch.targets[rows],
            problem.batch.rivals[rows],
        )  # fmt: skip

    def rows(self, rows: Tensor) -> Lanes:
        return replace(
            self, replay=self.replay.rows(rows), targets=self.targets[rows],
            rivals=self.rivals[rows],
        )  # fmt: skip

    def margin(self, delta: Tensor) -> Tensor:
        """[n] the margin with `delta` [n p d_model] added, differentiable in it."""
        return margin_of(self.replay.logits(delta), self.targets, self.rivals)


def relative_violation(problem: Problem, delta: Tensor, rows: Tensor) -> Tensor:
    """[n] max over positions and held features of |a_i·δ| / (‖a_i‖·‖h‖), dimensionless.

    The leak of an iterate, from δ alone; `verify` measures the same from real forward passes.
    """
    W = problem.held.W_enc[problem.held.slices(problem.replay.frame.rows(rows))]
    moved = torch.bmm(delta, W).abs()
    length = W.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    h = problem.replay.residual()[rows].norm(dim=-1, keepdim=True)
    leak = moved / (length[:, None] * h.clamp_min(torch.finfo(torch.float32).tiny))
    return leak.amax((1, 2))
