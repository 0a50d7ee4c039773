"""A factorization machine: which features, alone and in pairs, tell the behavior (METHODS L.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from holdfast.batch import Batch, Frame
from holdfast.canonical import digest
from holdfast.discovery import Discovery, DiscoveryKind
from holdfast.discovery.minimal import chosen, slots_of
from holdfast.errors import FeatureError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.positions import selected
from holdfast.running import Running, by_row, joined
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject

HELD = 0.25
"""Share of the fit prompts that fitting stops by."""

LR, MAX_STEPS, PATIENCE = 0.05, 500, 50
"""Of AdamW, over all prompts at once: steps at most, and steps without a better held-out loss."""

MIN_PROMPTS = 8
"""Fewer of either kind leave nothing to hold out."""


@dataclass(frozen=True)
class Machine:
    """y(x) = bias + w·x + Σ_{i<j} ⟨v_i, v_j⟩ x_i x_j (Rendle 2010).

    linear w [m], factors v [m rank].
    """

    bias: Tensor
    linear: Tensor
    factors: Tensor

    def score(self, x: Tensor) -> Tensor:
        """[n] of x [n m], pairs by ½ Σ_f ((Σ_i v_if x_i)² − Σ_i v_if² x_i²): linear in m."""
        pairs = (x @ self.factors).square() - x.square() @ self.factors.square()
        return self.bias + x @ self.linear + 0.5 * pairs.sum(-1)

    def strengths(self) -> Tensor:
        """[m] |w_i| + ½ Σ_j |⟨v_i, v_j⟩|: what a feature weighs, half of every pair it is in."""
        pairs = (self.factors @ self.factors.T).fill_diagonal_(0.0)
        return self.linear.abs() + 0.5 * pairs.abs().sum(1)


def fit_machine(
    x: Tensor, y: Tensor, held: Tensor, rank: int, decay: float, seed: int
) -> tuple[Machine, float]:
    """A machine fitted to labels y [n] in {0, 1} of x [n m], and its held-out log loss.

    held [n] bool: rows that only say when to stop. AdamW with weight decay; the parameters with the
    lowest held-out loss are kept, those it began with among them.
    """
    generator = torch.Generator().manual_seed(seed)
    m = x.shape[1]
    start = (torch.zeros(()), torch.zeros(m), 0.1 * torch.randn(m, rank, generator=generator))
    parameters = [part.to(x.device).requires_grad_(True) for part in start]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=decay)
    best, lowest, since = [part.detach().clone() for part in parameters], torch.inf, 0
    with torch.enable_grad():
        for _ in range(MAX_STEPS):
            scores = Machine(*parameters).score(x)
            loss = float(binary_cross_entropy_with_logits(scores[held], y[held]).detach())
            if loss < lowest - 1e-5:
                best, lowest, since = [part.detach().clone() for part in parameters], loss, 0
            since += 1
            if since > PATIENCE:
                break
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(scores[~held], y[~held]).backward()
            optimizer.step()
    return Machine(*best), lowest


class Factorization(DiscoveryKind):
    """Of another discovery's features the n that weigh most in factorization machines.

    A machine tells the behavior's fit prompts from its neighbors' by each feature's largest
    activation over a prompt's tokens, BOS left out, in units of its spread over the prompts. What
    weighs is |w_i| and half of every pair's |⟨v_i, v_j⟩|, the mean over `seeds` machines: a feature
    that says something only beside another is found too.

    of: the discovery whose features these are, one set for all prompts: name more than n.
    """

    kind: Literal["factorization"] = "factorization"
    of: Discovery
    n_features: int = Field(16, ge=1)
    rank: int = Field(8, ge=1)
    decay: float = Field(0.05, ge=0)
    seeds: int = Field(3, ge=1)

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        found = self.of.find(subject, fit, neighbors)
        slots = slots_of(found, self.kind)
        batches = [fit, *neighbors.values()]
        n_other = sum(map(len, batches[1:]))
        if min(len(fit), n_other) < MIN_PROMPTS:
            raise FeatureError(
                "factorization tells the behavior's fit prompts from its neighbors', "
                f"{MIN_PROMPTS} of each at least; got {len(fit)} and {n_other}: it needs "
                "a behavior with neighbors, and data.fit large enough"
            )
        x = torch.cat([largest(subject, batch, found) for batch in batches])
        y = (torch.arange(len(x), device=x.device) < len(fit)).float()
        x = x / x.std(0).clamp_min(1e-6)
        ids = [example for batch in batches for example in batch.ids]
        drawn = torch.tensor([int(digest(["held", i])[:8], 16) / 16**8 < HELD for i in ids])
        held = drawn.to(x.device)
        if not all(y[rows].unique().numel() == 2 for rows in (held, ~held)):
            raise FeatureError(
                "factorization: the held-out fit prompts are all of one kind; give it more "
                "prompts (data.fit)"
            )
        machines = [
            fit_machine(x, y, held, self.rank, self.decay, seed)[0] for seed in range(self.seeds)
        ]
        strengths = torch.stack([machine.strengths() for machine in machines]).mean(0)
        best = strengths.topk(min(self.n_features, len(slots)))
        picked = [slots[place][:2] for place in best.indices.tolist()]
        return chosen(found, picked, self.kind, best.values.tolist())

    @property
    def reads_whole(self) -> bool:
        return self.of.reads_whole

    def passes(self, sites: Sequence[Site]) -> int:
        return self.of.passes(sites) + 2  # the fit prompts once, and about as many neighbors


def largest(subject: Subject, batch: Batch, found: FeatureSet) -> Tensor:
    """[b m] each candidate's largest activation over a prompt's tokens, BOS left out, in the order
    of the set's entries and their ids."""

    def read(entry: SiteFeatures) -> Running[tuple[Tensor, ...]]:
        site = Site.parse(entry.site)
        only = FeatureSet(entries=(entry,), source=found.source)
        bank = FeatureBank.of(subject.sae(site), only)

        def top(frame: Frame, x: Tensor) -> Tensor:
            mask = selected("all", False, frame)[..., None]
            return torch.where(mask, bank.activations(x, frame), 0.0).amax(1)

        return by_row(site, top)

    reads = [read(entry) for entry in found.entries]
    subject.outputs(batch, reads)
    # A site's block may be on another device.
    return torch.cat([joined(own, batch.tokens.device) for own in reads], 1)
