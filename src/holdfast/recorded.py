"""What a replay is made of: all that one pass over the prompts left, for each of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from holdfast import slots
from holdfast.batch import Batch, Frame
from holdfast.block_calls import Call, picked, reading
from holdfast.edits import Edit
from holdfast.hooks import apply_edits
from holdfast.prefix import ConstantCache, PrefixCache
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
class Recorded:
    """What was recorded for n rows.

    sites: the m perturbed ones, in forward order; a perturbation is [n q d_model] with q = m·p
    slots, all positions of the first site, then all of the next. base [n s d_model]: the residual
    of the lowest site in the suffix columns, before the perturbation and with `before` on; columns
    [n p]: suffix column of each perturbed position, -1 for none. `before` and `after` act at a
    perturbed site before and after the perturbation, at other sites in this order. reference: site
    → [n p d_model], the suppressed residual with every edit on, at perturbed sites and at watched
    ones; unclamped: the same before the site's own edits, at perturbed sites. cache, calls: the
    prefix, and what each block is called with. whole: why every token is replayed; empty where it
    is the suffix. hold: what is done to a site's residual after all edits, for constraints that act
    in the forward pass; nothing when recorded.
    """

    subject: Subject
    sites: tuple[Site, ...]
    batch: Batch
    frame: Frame
    base: Tensor
    columns: Tensor
    before: tuple[Edit, ...]
    after: tuple[Edit, ...]
    reference: Mapping[Site, Tensor]
    unclamped: Mapping[Site, Tensor]
    cache: PrefixCache
    calls: tuple[Call, ...]
    whole: str
    hold: Mapping[Site, Hold] = field(default_factory=dict)

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

    def residual(self) -> Tensor:
        """[n q d_model] float32: the suppressed residual, every edit on, at the perturbed slots
        without perturbation."""
        return torch.cat([self.reference[site] for site in self.sites], 1)

    def parts(self, delta: Tensor) -> dict[Site, Tensor]:
        """A perturbation [n q d_model] by site: [n p d_model] each."""
        width = self.columns.shape[1]
        return dict(zip(self.sites, delta.split(width, 1), strict=True))

    def at(self, site: Site, x: Tensor, delta: Tensor | None) -> Passed:
        """What a site does to the residual: edits, the perturbation, edits, what is held."""
        entering, frame = x, self.frame.to(x.device)
        if site != self.sites[0]:  # there `base` has them
            x = apply_edits(self.before, site, x, frame)
        unperturbed = x
        if delta is not None:
            x = slots.place(x, delta, self.columns)
        x = apply_edits(self.after, site, x, frame)
        if site in self.hold:
            here = slots.cut(x, self.columns)
            x = slots.place(x, self.hold[site](here) - here, self.columns)
        return Passed(entering, unperturbed, x)

    def rows(self, rows: Tensor) -> Self:
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

    def isolated(self) -> Self:
        """The same values with the derivatives of each token by itself, those through keys and
        values left out."""
        cache = ConstantCache.like(self.cache)
        return replace(self, cache=cache, calls=reading(self.calls, cache))
