"""What the checks look at: one audit's prompts on one subject, and its residuals, read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from holdfast.batch import Batch, Example, Frame
from holdfast.behaviors import BehaviorKind
from holdfast.edits import Capture, EveryToken
from holdfast.readouts import Readout
from holdfast.readouts.logits import LOGITS
from holdfast.saes.sae import SAE
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
    def _read(self) -> tuple[Tensor, dict[Site, Capture]]:
        captures = {site: Capture(site) for site in self.sites}
        logits = self.subject.outputs(self.batch, tuple(captures.values()))
        return logits[:, -1], captures

    @property
    def logits(self) -> Tensor:
        """[b vocab] of `batch` at the last prompt token, in padded batches, without edits."""
        return self._read[0]

    @property
    def captures(self) -> dict[Site, Capture]:
        """Residuals of `batch` at every site of `sites`, from the same pass."""
        return self._read[1]

    @cached_property
    def rounded(self) -> dict[Site, Capture]:
        """The residuals again, with every block's output rounded in another way.

        Noise of half a unit in the last place at every site adds up over the blocks as the model's
        own rounding does. On the organism in bfloat16 it changed .9 to 1.9 times as many firings
        as differ from float32 in truth; noise at the SAE's own site alone, .1 to .6 times.
        """
        captures = {site: Capture(site) for site in self.subject.saes}
        above = max((site.depth for site in captures), default=0)
        noise = [Rounding(Site(depth)) for depth in range(above + 1)]
        self.subject.outputs(self.batch, (*noise, *captures.values()))
        return captures

    def tokens(self, capture: Capture, special: bool = False) -> Tensor:
        """[tokens d_model] float32: residuals without BOS; only those of the chat template and of
        special tokens wherever they stand, if `special`."""
        tokenizer = self.subject.tokenizer
        ids = torch.as_tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
        row_of = {example: row for row, example in enumerate(self.batch.ids)}
        out = []
        for frame, x in capture.seen:
            keep = (frame.positions >= 0) & ~((frame.positions == 0) & frame.bos[:, None])
            if special:
                rows = [row_of[example] for example in frame.ids]
                tokens = self.batch.tokens[rows][:, -x.shape[1] :]
                template = frame.positions >= frame.template[:, None]
                known = torch.isin(tokens, ids.to(tokens.device))
                keep &= template | known.to(template.device)
            out.append(x[keep.to(x.device)])
        return torch.cat(out).float()

    def some(self, capture: Capture, sae: SAE, special: bool = False) -> Tensor:
        """`tokens` on the SAE's device, as many as it can be tried on, spread evenly."""
        return spread(self.tokens(capture, special), sae).to(sae.W_enc.device)

    def fired(self, site: Site) -> Tensor:
        """[n_features] share of tokens on which each feature of the site's SAE fires.

        Worked out once, so that the SAE need not be read whole again.
        """
        if site not in self._fired:
            sae = self.subject.sae(site).full()
            x = self.some(self.captures[site], sae)
            counts = torch.cat([(z > 0).sum(0) for _, z in sae.codes(x)])
            self._fired[site] = counts / len(x)
        return self._fired[site]


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


def spread(x: Tensor, sae: SAE) -> Tensor:
    """At most as many rows of x [tokens d_model] as `EFFORT` allows, spread evenly."""
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
