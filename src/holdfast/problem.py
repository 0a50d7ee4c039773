"""What the search sees: rows to recover, the margin each must reach, and how far it may go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.margins import lead
from holdfast.objectives import ObjectiveKind
from holdfast.objectives.margin import Margin
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Problem:
    """n rows of one recovery search at m sites and p positions: q = m·p slots.

    replay: the recorded pass with the intervention on; batch: prompts with the answers the
    margin is read for; goal [n]: margin that counts as success, in logits; held: site → the
    features that must not move there; reference_norm [n]: Frobenius norm of the suppressed residual
    over all slots; radius [n]: the norm budget in the same units; objective: what the search goes
    up on its way to the goal.
    """

    replay: Replay
    batch: Batch
    goal: Tensor
    held: Mapping[Site, FeatureBank]
    reference_norm: Tensor
    radius: Tensor
    objective: ObjectiveKind = field(default_factory=Margin)

    def __post_init__(self) -> None:
        # A search lies on one device, whatever devices the blocks of its sites are on.
        device = self.reference_norm.device
        held = {site: bank.to(device) for site, bank in self.held.items()}
        object.__setattr__(self, "held", held)

    def __len__(self) -> int:
        return len(self.goal)

    def rows(self, rows: Tensor) -> Problem:
        """The problem of some rows, in the order given."""
        return replace(
            self, replay=self.replay.rows(rows), batch=self.batch.rows(rows), goal=self.goal[rows],
            reference_norm=self.reference_norm[rows], radius=self.radius[rows],
        )  # fmt: skip

    @property
    def sites(self) -> tuple[Site, ...]:
        """The perturbed sites, in forward order."""
        return self.replay.sites

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, q, d_model): the shape of a perturbation."""
        n, p = self.replay.columns.shape
        return n, p * len(self.sites), self.replay.base.shape[-1]

    @property
    def perturbed(self) -> Tensor:
        """[n q] bool: slots that exist; fewer than q in some rows."""
        return (self.replay.columns >= 0).repeat(1, len(self.sites))

    @property
    def moved(self) -> tuple[Site, ...]:
        """Held sites whose features a perturbation can move: those not below the lowest site."""
        return tuple(site for site in sorted(self.held) if site >= self.sites[0])

    @property
    def linear(self) -> bool:
        """Whether what happens to held features is linear in the perturbation: no held site has
        perturbed blocks before it."""
        return set(self.moved) <= {self.sites[0]} or len(self.moved) == 0


@dataclass(frozen=True)
class Lanes:
    """Rows of a problem laid out for a batched search; one row may fill several lanes."""

    problem: Problem
    replay: Replay
    targets: Tensor
    rivals: Tensor
    forced: Tensor | None

    @classmethod
    def of(cls, problem: Problem, rows: Tensor) -> Lanes:
        return cls(
            problem, problem.replay.rows(rows), problem.batch.targets[rows],
            problem.batch.rivals[rows],
            None if problem.batch.forced is None else problem.batch.forced[rows],
        )  # fmt: skip

    def rows(self, rows: Tensor) -> Lanes:
        return replace(
            self, replay=self.replay.rows(rows), targets=self.targets[rows],
            rivals=self.rivals[rows], forced=None if self.forced is None else self.forced[rows],
        )  # fmt: skip

    def climbed(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """[n] each, what the search goes up and the margin, with `delta` [n q d_model] added;
        differentiable in it."""
        objective, readout = self.problem.objective, self.problem.batch.readout
        if self.forced is not None:
            scores = readout.replayed(self.replay, delta)
            margin = lead(scores, self.targets, self.rivals, self.forced)
            return objective.of_text(scores, self.forced), margin
        answers = torch.cat([self.targets[:, None], self.rivals], 1)
        if objective.reads_all:
            every = readout.replayed(self.replay, delta)
            among = every.gather(1, answers)
        else:
            among = readout.replayed(self.replay, delta, answers)
            every = among.new_zeros(len(among), 0)
        target, rivals = among[:, 0], among[:, 1:]
        same = self.rivals[:, :, None] == self.rivals[:, None, :]
        fresh = ~same.tril(-1).any(2)
        return objective.of_answers(target, rivals, fresh, every), target - rivals.amax(1)

    def margin(self, delta: Tensor) -> Tensor:
        """[n] the margin with `delta` [n q d_model] added, differentiable in it."""
        readout = self.problem.batch.readout
        if self.forced is not None:  # any token of the vocabulary may be in its way
            scores = readout.replayed(self.replay, delta)
            return lead(scores, self.targets, self.rivals, self.forced)
        answers = torch.cat([self.targets[:, None], self.rivals], 1)
        among = readout.replayed(self.replay, delta, answers)
        return among[:, 0] - among[:, 1:].amax(1)


def relative_violation(problem: Problem, delta: Tensor, rows: Tensor) -> Tensor:
    """[n] max over held sites, positions and features of |Δp_i| / (‖a_i‖·‖h‖), dimensionless.

    The leak of an iterate, from the replay; `verify` measures the same from real forward passes.
    """
    return violation_of(problem, problem.replay.rows(rows), delta)


def violation_of(problem: Problem, replay: Replay, delta: Tensor) -> Tensor:
    """The same for rows of the problem that are laid out already."""
    if not problem.moved:
        return torch.zeros(len(delta), device=delta.device)
    if problem.linear:
        (site,) = problem.moved
        parts = dict(zip(problem.sites, delta.split(replay.columns.shape[1], 1), strict=True))
        return _leak(problem, replay, site, parts[site])
    # Without what a constraint does in the forward pass: the vectors alone must not leak.
    with torch.no_grad():
        states = replace(replay, hold={}).states(delta, problem.moved)
    leaks = [
        _leak(problem, replay, site, states[site] - replay.reference[site])
        for site in problem.moved
    ]
    return torch.stack(leaks).amax(0)


def _leak(problem: Problem, replay: Replay, site: Site, change: Tensor) -> Tensor:
    """[n] the violation at one site, of a change [n p d_model] of its residual."""
    bank = problem.held[site]
    W = bank.W_enc[bank.slices(replay.frame)]
    moved = torch.bmm(change, W).abs()
    length = W.norm(dim=1).clamp_min(TINY)
    h = replay.reference[site].norm(dim=-1, keepdim=True)
    return (moved / (length[:, None] * h.clamp_min(TINY))).amax((1, 2))
