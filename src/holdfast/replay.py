"""Replay: the part of the forward pass that a perturbation can change, and nothing else.

A perturbation at positions ≥ p₀ and sites ≥ ℓ leaves every earlier position and every lower layer
as it was. So the prefix runs once, its keys and values are kept (`prefix.py`), the arguments of
every block are recorded for the suffix (`recording.py`), and a step calls only the blocks above ℓ
on the suffix columns: `_run` is all of it. Equal to the full forward pass in logits and gradients;
tests hold it to 1e-5 in every family.

An edit that decides on the whole sequence what it does to each token can be moved by any token of
it. Then the suffix begins with the first token, and the record says so (`extent`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from holdfast import slots
from holdfast.batch import Batch
from holdfast.block_calls import picked, reading
from holdfast.edits import Edit
from holdfast.hooks import apply_edits
from holdfast.prefix import ConstantCache, attending
from holdfast.recording import Recorded, record
from holdfast.sites import Site
from holdfast.subject import Subject


class Hold(Protocol):
    """Puts residuals of a site back to where a constraint wants them."""

    def rows(self, rows: Tensor) -> Hold: ...

    def __call__(self, x: Tensor) -> Tensor:
        """[n p d_model] from the residual x [n p d_model] at the perturbed positions."""
        ...


class Passed(NamedTuple):
    """Residuals [n s d_model] at a site: as they came, before the perturbation, after everything.

    At the lowest perturbed site both of the first are after the edits before it.
    """

    entering: Tensor
    unperturbed: Tensor
    leaving: Tensor


@dataclass(frozen=True)
class Replay(Recorded):
    """What was recorded, and how it is run again; `rows` picks some rows, repeats allowed.

    hold: what is done to a site's residual after all edits, for constraints that act in the forward
    pass.
    """

    hold: Mapping[Site, Hold] = field(default_factory=dict)

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
        Beside what is kept (`recording.py`) the memory is that of passes over a piece of rows.
        """
        sites = (sites,) if isinstance(sites, Site) else tuple(sorted(set(sites)))
        return cls(**vars(record(subject, batch, sites, positions, before, after, watch)))

    def __len__(self) -> int:
        return self.base.shape[0]

    @property
    def extent(self) -> str:
        """What a step runs of the sequence, for the record."""
        return f"whole sequence: {self.whole}" if self.whole else "suffix"

    @property
    def prefix(self) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Layer → keys and values of the prefix, None below the lowest site; empty without one."""
        return self.cache.prefix

    def rows(self, rows: Tensor) -> Replay:
        """The recording of some rows, in the order given; a row may be repeated (lanes)."""
        cache = self.cache.rows(rows)
        return replace(
            self,
            frame=self.frame.rows(rows),
            base=self.base[rows.to(self.base.device)],
            columns=self.columns[rows],
            reference={site: x[rows] for site, x in self.reference.items()},
            unclamped={site: x[rows] for site, x in self.unclamped.items()},
            cache=cache,
            calls=reading(picked(self.calls, rows, len(self)), cache),
            hold={site: hold.rows(rows) for site, hold in self.hold.items()},
        )

    def isolated(self) -> Replay:
        """The same values with the derivatives of each token by itself, those through keys and
        values left out."""
        cache = ConstantCache.like(self.cache)
        return replace(self, cache=cache, calls=reading(self.calls, cache))

    def residual(self) -> Tensor:
        """[n q d_model] float32: the suppressed residual, every edit on, at the perturbed slots
        without perturbation."""
        return torch.cat([self.reference[site] for site in self.sites], 1)

    def parts(self, delta: Tensor) -> dict[Site, Tensor]:
        """A perturbation [n q d_model] by site: [n p d_model] each."""
        width = self.columns.shape[1]
        return dict(zip(self.sites, delta.split(width, 1), strict=True))

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

    def suffix(self, delta: Tensor, sites: Sequence[Site]) -> dict[Site, tuple[Tensor, Tensor]]:
        """Site → residuals [n s d_model] in float32 at every suffix column, before the site's edits
        and after them, on the device of `delta`: later tokens than the perturbed ones move too,
        through attention."""
        passed = self._run(delta, sites)
        return {site: (passed[site].entering.float().to(delta.device),
                       passed[site].leaving.float().to(delta.device))
                for site in sites}  # fmt: skip

    def realized(self, delta: Tensor) -> Tensor:
        """[n q d_model]: what is really added at each slot, what `hold` makes of it included.

        The same vectors, added without `hold`, give the same residuals: they are what is saved,
        counted against the budget, and verified.
        """
        passed = self._run(delta, self.sites)
        added = (
            slots.cut(passed[site].leaving, self.columns)
            - slots.cut(passed[site].unperturbed, self.columns)
            for site in self.sites
        )
        return torch.cat(list(added), 1)

    def _run(self, delta: Tensor, wanted: Sequence[Site]) -> dict[Site, Passed]:
        """The blocks from the lowest perturbed site to the last wanted one, with `delta` added."""
        passed: dict[Site, Passed] = {}
        parts, lowest = self.parts(delta), self.sites[0]
        blocks = self.subject.family.blocks_of(self.subject.model)
        x = self.base
        with attending(self.subject.model, self.cache):
            for depth in range(lowest.depth, max(wanted).depth + 1):
                site = Site(depth)
                if site != lowest:
                    args, kwargs = self.calls[site.layer]
                    out = blocks[site.layer](x, *args, **kwargs)
                    x = out[0] if isinstance(out, tuple) else out
                entering, frame = x, self.frame.to(x.device)
                if site != lowest:
                    x = apply_edits(self.before, site, x, frame)
                unperturbed = x
                if site in parts:
                    x = slots.place(x, parts[site], self.columns)
                x = apply_edits(self.after, site, x, frame)
                if site in self.hold:
                    here = slots.cut(x, self.columns)
                    x = slots.place(x, self.hold[site](here) - here, self.columns)
                if site in wanted:
                    passed[site] = Passed(entering, unperturbed, x)
        return passed
