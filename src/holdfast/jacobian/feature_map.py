"""Φ: how far a perturbation moves the held features, as a differentiable map.

Φ(δ) collects `(p_i(δ) − p_i(0)) / (‖a_i‖·‖h‖)` over the monitored slots and held features, so that
every entry is dimensionless (METHODS D.1). A slot is monitored if a perturbation can reach it: held
sites from the lowest perturbed one on, at every token from the first perturbed one on, because
later tokens read earlier ones through attention.

Where nothing is added at a slot and its clamps read held features only, Φ has the pre-activations
before the clamp. The clamp then does what it did in the reference, so that those after it are held
too, and a clamp that makes steps (where active) or takes almost everything away (set) makes no step
and no almost singular Jacobian here. What counts as held is always measured after the clamp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.edits import FeatureEdit
from holdfast.prefix import by_formula
from holdfast.problem import TINY, Problem
from holdfast.recorded import Passed
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site


@dataclass(frozen=True)
class FeatureMap:
    """Φ: perturbations [n q d_model] → [n s K], K features over all monitored sites, s columns.

    banks: the monitored sites in forward order; columns: their encoder columns [g d k] as unit
    vectors; slices: which of the g each row uses [n]; reference: residuals [n s d] before and after
    the edits; early [n s 1]: where the former are monitored; weight [n s K]: 1/‖h‖ after the edits,
    0 where a column is not monitored or a group has fewer features.
    """

    replay: Replay
    banks: tuple[FeatureBank, ...]
    columns: tuple[Tensor, ...]
    slices: tuple[Tensor, ...]
    reference: tuple[tuple[Tensor, Tensor], ...]
    early: tuple[Tensor, ...]
    weight: Tensor

    @classmethod
    def of(cls, problem: Problem) -> FeatureMap:
        """The map of everything a perturbation of this problem can move."""
        replay = replace(problem.replay, hold={})
        sites = problem.moved
        banks = tuple(problem.held[site] for site in sites)
        slices = tuple(bank.slices(replay.frame) for bank in banks)
        reference = _references(problem, replay)
        perturbed = perturbed_columns(replay)
        reached = perturbed.cumsum(1) > 0  # these columns and all later ones
        early, weights = [], []
        for bank, rows, (_, x) in zip(banks, slices, reference, strict=True):
            own = perturbed if bank.site in problem.sites else torch.zeros_like(perturbed)
            early.append((reached & ~own & _reads_held_only(replay, bank)[:, None])[..., None])
            here = perturbed if bank.site == problem.sites[0] else reached
            valid = here[..., None] & bank.valid[rows][:, None]
            length = x.norm(dim=-1, keepdim=True).clamp_min(TINY)
            weights.append(torch.where(valid, 1 / length, 0.0))
        columns = tuple(
            bank.W_enc / bank.W_enc.norm(dim=1, keepdim=True).clamp_min(TINY) for bank in banks
        )
        return cls(
            replay, banks, columns, slices, reference, tuple(early),
            torch.cat(weights, 2),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def sites(self) -> list[Site]:
        """The monitored sites, in forward order."""
        return [bank.site for bank in self.banks]

    @property
    def monitored(self) -> Tensor:
        """[n s K] bool: entries that are constraints."""
        return self.weight > 0

    @property
    def counts(self) -> list[int]:
        """How many of the K features belong to each monitored site."""
        return [W.shape[2] for W in self.columns]

    @property
    def elsewhere(self) -> Tensor:
        """[n s K] bool: constraints at tokens without a vector."""
        return self.monitored & ~perturbed_columns(self.replay)[..., None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, q, d_model): the shape of a perturbation."""
        n, p = self.replay.columns.shape
        return n, p * len(self.replay.sites), self.replay.base.shape[-1]

    @property
    def unknowns(self) -> Tensor:
        """[n] coordinates of a perturbation: slots that exist, times d_model."""
        slots = (self.replay.columns >= 0).sum(1) * len(self.replay.sites)
        return slots * self.shape[2]

    def rows(self, rows: Tensor) -> FeatureMap:
        return replace(
            self,
            replay=self.replay.rows(rows),
            slices=tuple(own[rows] for own in self.slices),
            reference=tuple((x[rows], y[rows]) for x, y in self.reference),
            early=tuple(own[rows] for own in self.early),
            weight=self.weight[rows],
        )

    def __call__(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Φ(δ) [n s K], differentiable twice, and what is to be held [n s K]: the same after the
        edits everywhere."""
        parts, held = self.by_site(delta)
        return torch.cat(parts, 2), held

    def by_site(self, delta: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same with the part [n s k] of each site by itself: a derivative of the features of
        one site has nothing to do with what lies above it."""
        return self.of_states(suffix_states(self.replay, delta, self.sites))

    def of_states(self, states: Mapping[Site, Passed]) -> tuple[list[Tensor], Tensor]:
        """`by_site` from what a pass left at the banks' sites."""
        parts, held = [], []
        weights = self.weight.split(self.counts, 2)
        for index, (site, (x_ref, y_ref)) in enumerate(
            zip(self.sites, self.reference, strict=True)
        ):
            late = states[site].leaving - y_ref
            change = torch.where(self.early[index], states[site].entering - x_ref, late)
            parts.append(self._along(index, change) * weights[index])
            held.append(self._along(index, late.detach()) * weights[index])
        return parts, torch.cat(held, 2)

    def _along(self, index: int, change: Tensor) -> Tensor:
        """[n s k] the components of a change [n s d] along the encoder columns of a site."""
        W = self.columns[index]
        return change @ W[0] if len(W) == 1 else torch.bmm(change, W[self.slices[index]])


def suffix_states(replay: Replay, delta: Tensor, sites: Sequence[Site]) -> dict[Site, Passed]:
    """Residuals [n s d_model] of some sites, differentiable twice: from the backward pass products
    with J are made."""
    with by_formula():
        return replay.suffix(delta, sites)


def _reads_held_only(replay: Replay, bank: FeatureBank) -> Tensor:
    """[n] whether what the edits at a site do depends on nothing but the row's own held
    pre-activations."""
    held = [set(bank.ids[own]) for own in bank.slices(replay.frame).tolist()]
    only = torch.full((len(held),), bank.guarantee == "exact", device=replay.columns.device)
    for edit in (*replay.before, *replay.after):
        if bank.site not in edit.sites:
            continue
        if not isinstance(edit, FeatureEdit) or edit.gate is not None or edit.error_scale != 1.0:
            return torch.zeros_like(only)
        read = [set(edit.bank.ids[own]) for own in edit.bank.slices(replay.frame).tolist()]
        contained = [own <= other for own, other in zip(read, held, strict=True)]
        only = only & torch.as_tensor(contained, device=only.device)
    return only


def perturbed_columns(replay: Replay) -> Tensor:
    """[n s] bool: suffix columns that are perturbed."""
    steps = torch.arange(replay.base.shape[1], device=replay.columns.device)
    return (replay.columns[:, :, None] == steps).any(1)


@torch.no_grad()
def _references(problem: Problem, replay: Replay) -> tuple[tuple[Tensor, Tensor], ...]:
    """`suffix_states` of the monitored sites without a perturbation, by which Φ(0) = 0 exactly."""
    n, q, d = problem.shape

    def states(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        zero = torch.zeros(len(rows), q, d, device=replay.columns.device)
        passed = suffix_states(replay.rows(rows), zero, problem.moved)
        return [(passed[site].entering, passed[site].leaving) for site in problem.moved]

    every = torch.arange(n, device=replay.columns.device)
    parts = replay.subject.batching.over("steps", every, states)
    return tuple(
        (torch.cat([x for x, _ in own]), torch.cat([y for _, y in own]))
        for own in zip(*parts, strict=True)
    )
