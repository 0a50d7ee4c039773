"""Replay: the part of the forward pass that a perturbation can change, and nothing else.

    blocks   ┌────────────────┬──────────┐
       ↑     │ prefix         │ suffix   │  → unembed only the columns that are read
       above │ keys, values   │ RUN      │  every step: these blocks, on these columns
    site ────┼────────────────┼── δ ─────┤
       below │ never again    │ x = base │  recorded once: the residual that enters
             └────────────────┴──────────┘
               tokens before p₀  from p₀ on

A perturbation δ at positions ≥ p₀ and sites ≥ ℓ leaves every earlier position and every lower layer
as it was. So the pass runs once (`recording.py`), and of it is kept what the upper right needs: the
residual at ℓ, the keys and values of the prefix (`prefix.py`) and the arguments that each block was
called with (`block_calls.py`). A step is `_run`. It equals the full forward pass in logits and
gradients; tests hold it to 1e-5 in every family.

An edit that decides on the whole sequence what it does to each token can be moved by any token of
it. Then the suffix begins with the first token, and the record says so (`extent`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast import slots
from holdfast.batch import Batch
from holdfast.block_calls import called
from holdfast.edits import Edit
from holdfast.prefix import attending
from holdfast.recorded import Passed, Recorded
from holdfast.recording import record
from holdfast.sites import Site
from holdfast.subject import Subject


@dataclass(frozen=True)
class Replay(Recorded):
    """What was recorded, and how it is run again."""

    @classmethod
    def record(
        cls,
        subject: Subject,
        batch: Batch,
        sites: Site | Sequence[Site],
        positions: Tensor,
        before: Sequence[Edit] = (),
        after: Sequence[Edit] = (),
        watch: Sequence[Site] = (),
    ) -> Replay:
        """Run the prefix and the suffix once with the edits on.

        positions [b p] absolute, -1 for none. An edit stands either in `before` (it acts first,
        the perturbation has the last word) or in `after` (the edit has the last word); the
        distinction matters only at perturbed sites. watch: further sites whose residual is read.
        Beside what is kept the memory is that of passes over a piece of rows.
        """
        sites = (sites,) if isinstance(sites, Site) else tuple(sorted(set(sites)))
        return cls(**vars(record(subject, batch, sites, positions, before, after, watch)))

    def _run(self, delta: Tensor, wanted: Sequence[Site]) -> dict[Site, Passed]:
        """From the lowest perturbed site to the last wanted one, with `delta` [n q d_model] on."""
        passed: dict[Site, Passed] = {}
        parts, lowest, x = self.parts(delta), self.sites[0], self.base
        blocks = self.subject.family.blocks_of(self.subject.model)
        with attending(self.subject.model, self.cache):
            for site in map(Site, range(lowest.depth, max(wanted).depth + 1)):
                if site != lowest:
                    x = called(blocks[site.layer], x, self.calls[site.layer])
                step = self.at(site, x, parts.get(site))
                x = step.leaving
                if site in wanted:
                    passed[site] = step
        return passed

    def logits(self, delta: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits [n vocab], or [n t vocab] of a forced answer, at the columns that are read, with
        `delta` [n q d_model] added; float32. tokens [n m]: only theirs, [n m], where no answer is
        forced."""
        last = Site(self.subject.n_blocks)
        x = self._run(delta, [last])[last].leaving
        read = x[:, -1] if self.batch.forced is None else x[:, -self.batch.n_read :]
        logits = self.subject.family.unembed_of(self.subject.model, read, tokens)
        return logits.float().to(delta.device)

    def states(self, delta: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Site → [n p d_model] float32: the residual with `delta` and every edit on, at the
        perturbed positions, for sites not below the lowest perturbed one."""
        passed = self._run(delta, sites)
        return {site: slots.cut(passed[site].leaving, self.columns) for site in sites}

    def suffix(self, delta: Tensor, sites: Sequence[Site]) -> dict[Site, Passed]:
        """Site → residuals in float32 at every suffix column, on the device of `delta`: later
        tokens than the perturbed ones move too, through attention."""
        passed = self._run(delta, sites)
        return {site: Passed(*(x.float().to(delta.device) for x in passed[site])) for site in sites}

    def realized(self, delta: Tensor) -> Tensor:
        """[n q d_model]: what is really added at each slot, what `hold` makes of it included.

        The same vectors, added without `hold`, give the same residuals: they are what is saved,
        counted against the budget, and verified.
        """
        return self.added(self._run(delta, self.sites))

    def added(self, passed: Mapping[Site, Passed]) -> Tensor:
        """`realized` from what a pass left at the perturbed sites."""
        cut = [[slots.cut(x, self.columns) for x in passed[site][1:]] for site in self.sites]
        return torch.cat([leaving - unperturbed for unperturbed, leaving in cut], 1)
