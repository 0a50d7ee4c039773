"""What the checks look at: one audit's prompts on one subject, and its residuals, read once.

Of the residuals those tokens are kept that an SAE is tried on, so that what is held does not grow
with prompts or their lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from holdfast.batch import Batch, Example, Frame
from holdfast.behaviors import BehaviorKind
from holdfast.edits import EveryToken
from holdfast.readouts import Readout
from holdfast.readouts.logits import LOGITS
from holdfast.running import by_row, joined
from holdfast.saes.sae import SAE
from holdfast.saes.stored import StoredSAE
from holdfast.setting import Data, readout_of
from holdfast.sites import Site
from holdfast.subject import Subject

N_PROMPTS = 24
"""Fit prompts the checks run on: enough tokens for a share of explained variance."""

N_TOKENS = 512
"""Most tokens an SAE is read on in one way; fewer of wide ones, at least `MIN_TOKENS`."""

MIN_TOKENS = 32

EFFORT = 1 << 31
"""Multiplications that one reading of an SAE may take, per matrix."""


@dataclass(frozen=True)
class Sample:
    """Residuals of one site. where [b s]: which tokens' x [tokens d_model] are kept, in the model's
    precision; norm [b s] float32: how long the residual is at every token, 0 at padding."""

    where: Tensor
    x: Tensor
    norm: Tensor

    def of(self, tokens: Tensor) -> Tensor:
        """[n d_model] float32 at tokens [b s], all of them kept."""
        return self.x[tokens[self.where].to(self.x.device)].float()


@dataclass(frozen=True)
class Scene:
    """The prompts of a behavior on one subject.

    examples: by split, as the audit will use them. ignorant: whether the subject is the twin that
    is not meant to show the behavior.
    """

    subject: Subject
    behavior: BehaviorKind
    examples: Mapping[str, Sequence[Example]]
    ignorant: bool = False
    fitted: Callable[[], Readout] = lambda: LOGITS
    _fired: dict[Site, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def splits(self) -> dict[str, Batch]:
        """Tokenized. Raises SubjectError for prompts that cannot be used."""
        names = self.behavior.readout(self.subject)
        return {name: self.subject.batch(drawn, names) for name, drawn in self.examples.items()}

    @cached_property
    def batch(self) -> Batch:
        """The fit prompts the checks run on: the shortest, the longest and others between."""
        fit = self.splits["fit"]
        order = fit.prompt_length.argsort(stable=True)
        return fit.rows(order[spread_rows(len(fit), N_PROMPTS).to(order.device)])

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site with an SAE and its neighbors."""
        depths = {
            depth
            for site in self.subject.saes
            for depth in (site.depth - 1, site.depth, site.depth + 1)
            if 0 <= depth <= self.subject.n_blocks
        }
        return tuple(Site(depth) for depth in sorted(depths))

    @cached_property
    def _read(self) -> tuple[Tensor, dict[Site, Sample]]:
        logits, samples = self._sampled(self.sites)
        return logits[:, -1], samples

    @property
    def logits(self) -> Tensor:
        """[b vocab] of `batch` at the last prompt token, in padded batches, without edits."""
        return self._read[0]

    @property
    def residuals(self) -> dict[Site, Sample]:
        """Residuals of `batch` at every site of `sites`, from the same pass."""
        return self._read[1]

    @cached_property
    def rounded(self) -> dict[Site, Sample]:
        """The residuals again, with every block's output rounded in another way.

        Noise of half a unit in the last place at every site adds up over the blocks as the model's
        own rounding does. On the organism in bfloat16 it changed .9 to 1.9 times as many firings
        as differ from float32 in truth; noise at the SAE's own site alone, .1 to .6 times.
        """
        sites = tuple(self.subject.saes)
        above = max((site.depth for site in sites), default=0)
        return self._sampled(sites, [Rounding(Site(depth)) for depth in range(above + 1)])[1]

    def _sampled(
        self, sites: Sequence[Site], noise: Sequence[Rounding] = ()
    ) -> tuple[Tensor, dict[Site, Sample]]:
        """Logits of `batch`, and its residuals at sites."""
        batch, there = self.batch, self.batch.positions >= 0
        kept = {site: self._tried_at(site) for site in sites}
        row_of = {example: row for row, example in enumerate(batch.ids)}

        def read(site: Site, frame: Frame, x: Tensor) -> Tensor:
            rows = [row_of[example] for example in frame.ids]
            return x[kept[site][rows][:, -x.shape[1] :].to(x.device)]

        tokens = {site: by_row(site, partial(read, site)) for site in sites}
        norms = {site: by_row(site, _norms) for site in sites}
        logits = self.subject.outputs(batch, (*noise, *tokens.values(), *norms.values()))
        samples = {}
        for site in sites:
            norm = torch.zeros(there.shape, device=batch.positions.device)
            norm[there] = joined(norms[site], norm.device)
            samples[site] = Sample(kept[site], torch.cat(tokens[site].state), norm)
        return logits, samples

    def _tried_at(self, site: Site) -> Tensor:
        """[b s] bool: tokens of a site that its SAE is tried on, or those of the sites beside."""
        kept = torch.zeros_like(self.batch.positions, dtype=torch.bool)
        for own, sae in self.subject.saes.items():
            if abs(own.depth - site.depth) <= 1:
                kept |= self._tried(sae)
            if own == site:
                kept |= self._tried(sae, special=True)
        return kept

    def _tried(self, sae: SAE | StoredSAE, special: bool = False) -> Tensor:
        """[b s] bool: tokens an SAE is tried on, as many as it can be, spread evenly. None is BOS;
        only those of the chat template and special tokens wherever they stand, if `special`."""
        batch = self.batch
        keep = (batch.positions >= 0) & ~((batch.positions == 0) & batch.bos[:, None])
        if special:
            ids = torch.as_tensor(sorted(self.subject.tokenizer.all_special_ids), dtype=torch.long)
            known = torch.isin(batch.tokens, ids.to(batch.tokens.device))
            keep &= (batch.positions >= batch.template[:, None]) | known
        tried = torch.zeros_like(keep)
        tried.view(-1)[spread(keep.flatten().nonzero().flatten(), sae)] = True
        return tried

    def some(self, sample: Sample, sae: SAE, special: bool = False) -> Tensor:
        """[tokens d_model] float32 of the tokens that an SAE is tried on, on its device."""
        return sample.of(self._tried(sae, special)).to(sae.W_enc.device)

    def fired(self, site: Site) -> Tensor:
        """[n_features] share of tokens on which each feature of the site's SAE fires.

        Worked out once, so that the SAE need not be read whole again.
        """
        if site not in self._fired:
            sae = self.subject.sae(site).full()
            x = self.some(self.residuals[site], sae)
            counts = torch.cat([(z > 0).sum(0) for _, z in sae.codes(x)])
            self._fired[site] = counts / len(x)
        return self._fired[site]


def _norms(frame: Frame, x: Tensor) -> Tensor:
    """[tokens] how long residuals are."""
    return x[frame.positions >= 0].float().norm(dim=-1)


@dataclass(frozen=True)
class Rounding(EveryToken):
    """Rounds a residual once more, in another direction: noise of half a unit in the last place."""

    site: Site

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        generator = torch.Generator().manual_seed(site.depth)
        noise = torch.rand(x.shape, generator=generator).to(x.device) - 0.5
        mask = self.selects(site, frame)[..., None]
        return torch.where(mask, x + (x * torch.finfo(x.dtype).eps * noise).to(x.dtype), x)


def set_scene(
    subject: Subject, behavior: BehaviorKind, data: Data, seed: int, ignorant: bool = False
) -> Scene:
    """Draw the audit's prompts. Raises HoldfastError where there are none."""
    drawn = {
        name: behavior.examples(subject.tokenizer, name, getattr(data, name), seed)
        for name in ("fit", "tune", "test")
    }
    fitted = partial(readout_of, subject, behavior, data, seed)
    return Scene(subject, behavior, drawn, ignorant, fitted)


def spread(x: Tensor, sae: SAE | StoredSAE) -> Tensor:
    """At most as many rows of x [tokens ...] as `EFFORT` allows, spread evenly."""
    n = min(N_TOKENS, max(MIN_TOKENS, EFFORT // (sae.n_features * sae.d_model)))
    return x if len(x) <= n else x[spread_rows(len(x), n).to(x.device)]


def spread_rows(n: int, most: int) -> Tensor:
    """At most `most` of n rows, evenly spread, the first and the last among them."""
    return torch.linspace(0, n - 1, min(most, n)).round().long().unique()


def share(value: float) -> str:
    return f"{value:.3f}"


def listed(items: Sequence[Any]) -> str:
    """The first few of a list, and how many more."""
    first = ", ".join(map(str, items[:3]))
    return first if len(items) <= 3 else f"{first} and {len(items) - 3} more"
