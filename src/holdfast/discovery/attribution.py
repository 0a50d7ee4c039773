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
from holdfast.edits import never_fired
from holdfast.errors import FeatureError
from holdfast.features import EVERY_GROUP, FeatureSet, SiteFeatures
from holdfast.positions import Where, selected
from holdfast.sites import Site
from holdfast.subject import Subject

_CHUNK = 16  # rows per backward pass: the codes of all features are held for them


@dataclass
class Leaf:
    """Cuts the graph at a site: what comes after is differentiable in `x` [b s d_model]."""

    site: Site
    seen: list[Tensor] = field(default_factory=list)

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return frame.positions >= 0

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.seen.append(x.detach().requires_grad_(True))
        return self.seen[-1]

    def check_fired(self, site: Site, n_fired: int) -> None:
        if n_fired == 0:
            raise never_fired(self, site)


class Attribution(DiscoveryKind):
    """The n features with the largest mean attribution z_i · ∂margin/∂z_i (METHODS K.2).

    With the SAE in the graph as `D(E(x)) + stop_gradient(error)`, ∂margin/∂z_i is
    ∂margin/∂x · W_dec[i], so one backward pass to the site gives every feature's attribution
    exactly. Only positive attributions count.

    positions, include_bos: which tokens are summed over. group: `name` fits features per group of
    prompts, None one set for all. contrast: subtract the mean attribution on the neighbors' fit
    prompts, which keeps features that carry the behavior and not the format it shares.
    """

    kind: Literal["attribution"] = "attribution"
    n_features: int = Field(16, ge=1)
    positions: Where = "all"
    include_bos: bool = False
    group: Literal["name"] | None = None
    contrast: bool = False

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        if self.contrast and not neighbors:
            raise FeatureError("contrast = true needs a behavior with neighbors, this has none")
        entries = []
        for site in sorted(subject.saes):
            scores = self.scores(subject, fit, site)
            common = torch.zeros_like(scores[0])
            if self.contrast:
                rest = [self.scores(subject, batch, site) for batch in neighbors.values()]
                common = torch.cat(rest).mean(0)
            for group, rows in self._groups(fit).items():
                mean = scores[rows].mean(0) - common
                best = mean.topk(min(self.n_features, len(mean)))
                positive = best.values > 0
                if not positive.any():
                    raise FeatureError(
                        f"no feature at {site} has a positive attribution for group {group!r} "
                        f"({len(rows)} fit prompts); the behavior is not read from this SAE here"
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

    def scores(self, subject: Subject, batch: Batch, site: Site) -> Tensor:
        """[b n_features] attribution of every feature on every prompt, in logits."""
        sae = subject.sae(site)
        out = []
        for chunk in batch.chunks(_CHUNK):
            leaf = Leaf(site)
            margin = chunk.margin(subject.forward_with_gradients(chunk, (leaf,)))
            x = leaf.seen[0]
            gradient = torch.autograd.grad(margin.sum(), x)[0].float()
            attribution = sae.encode(x.detach()) * (gradient @ sae.W_dec.T)
            mask = selected(self.positions, self.include_bos, chunk.frame())
            out.append((attribution * mask[..., None]).sum(1))
        return torch.cat(out)
