"""Activation × gradient through the SAE: which features push the answer the most."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.discovery import DiscoveryKind
from holdfast.edits import EveryToken
from holdfast.errors import FeatureError
from holdfast.features import EVERY_GROUP, FeatureSet, SiteFeatures
from holdfast.positions import Where, selected
from holdfast.running import Running
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject


@dataclass
class Leaf(EveryToken):
    """Cuts the graph at a site: what comes after is differentiable in `x` [b s d_model]."""

    site: Site
    seen: list[Tensor] = field(default_factory=list)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.seen.append(x.detach().requires_grad_(True))
        return self.seen[-1]


class Attribution(DiscoveryKind):
    """The n features with the largest mean attribution z_i · ∂margin/∂z_i (METHODS K.2).

    With the SAE in the graph as `D(E(x)) + stop_gradient(error)`, ∂margin/∂z_i is
    ∂margin/∂x · W_dec[i], so one backward pass to the site gives every feature's attribution
    exactly. Only positive attributions count.

    positions, include_bos: which tokens are summed over. group: `name` fits features per group of
    prompts, None one set for all. retain_threshold: leave out features that fire on more than this
    share of any neighbor's fit prompts (the sparsity rule of Farrell et al. 2410.19278, METHODS
    J.1, counted in prompts); without it, features of a shared format are clamped along.
    """

    kind: Literal["attribution"] = "attribution"
    n_features: int = Field(16, ge=1)
    positions: Where = "all"
    include_bos: bool = False
    group: Literal["name"] | None = None
    retain_threshold: float | None = Field(None, ge=0, le=1)

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        if self.retain_threshold is not None and not neighbors:
            raise FeatureError("retain_threshold needs a behavior with neighbors, this has none")
        entries = []
        for site in sorted(subject.saes):
            sae = subject.sae(site).full()
            scores = self.scores(subject, fit, sae)
            shared = torch.zeros_like(scores[0], dtype=torch.bool)
            if self.retain_threshold is not None:
                for batch in neighbors.values():
                    shared |= self.firing_rate(subject, batch, sae) > self.retain_threshold
            for group, rows in self._groups(fit).items():
                mean = scores[rows].mean(0).masked_fill(shared, -torch.inf)
                best = mean.topk(min(self.n_features, len(mean)))
                positive = best.values > 0
                if not positive.any():
                    raise FeatureError(
                        f"no feature at {site} has a positive attribution for group {group!r} "
                        f"({len(rows)} fit prompts, {int(shared.sum())} features left out for the "
                        "neighbors); the behavior is not read from this SAE here"
                    )
                entries.append(
                    SiteFeatures(
                        site=str(site),
                        group=group,
                        ids=tuple(best.indices[positive].tolist()),
                        scores=tuple(best.values[positive].tolist()),
                    )
                )
        return FeatureSet(entries=tuple(entries), source=self.kind)

    def _groups(self, fit: Batch) -> dict[str, Tensor]:
        if self.group is None:
            return {EVERY_GROUP: torch.arange(len(fit))}
        rows = defaultdict(list)
        for row, group in enumerate(fit.groups):
            rows[group].append(row)
        return {group: torch.as_tensor(index) for group, index in sorted(rows.items())}

    def firing_rate(self, subject: Subject, batch: Batch, sae: SAE) -> Tensor:
        """[n_features] share of prompts on which a feature fires at any of the positions."""

        def counted(before: Tensor, frame: Frame, x: Tensor) -> Tensor:
            mask = selected(self.positions, self.include_bos, frame)
            n_tokens, fired = mask.sum(1).tolist(), before.clone()
            for block, z in sae.codes(x[mask]):
                any_token = torch.stack([own.any(0) for own in (z > 0).split(n_tokens)])
                fired[block] += any_token.sum(0)
            return fired

        read = Running(sae.site, torch.zeros(sae.n_features, device=sae.b_dec.device), counted)
        subject.outputs(batch, (read,), work="discovery")
        return read.state / len(batch)

    def scores(self, subject: Subject, batch: Batch, sae: SAE) -> Tensor:
        """[b n_features] attribution of every feature on every prompt, in logits."""

        def of(rows: Tensor) -> Tensor:
            own = batch.rows(rows)
            leaf = Leaf(sae.site)
            margin = own.margin(subject.forward_with_gradients(own, (leaf,)))
            x = leaf.seen[0]
            gradient = torch.autograd.grad(margin.sum(), x)[0].float()
            gradient = gradient * sae.inputs.magnify(x.detach().float())
            mask = selected(self.positions, self.include_bos, own.frame())[..., None].to(x.device)
            x, found = x.detach(), x.new_empty(len(own), sae.n_features, dtype=torch.float32)
            for block, z in sae.codes(x):
                found[:, block] = (z * (gradient @ sae.rows(block).T) * mask).sum(1)
            return found

        return torch.cat(subject.batching.over("discovery", torch.arange(len(batch)), of))
