"""Whether clamps find other features on, in one pass over the same rows than in another.

A clamp reads its features as they are when it acts. Where one comes on, or goes off, what the clamp
adds can jump, and of a jump no gradient knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.edits import Edit, FeatureEdit, never_fired
from holdfast.sites import Site


@dataclass
class Switches:
    """An edit that changes nothing and notes what clamps are about to find.

    In front of `edits` it reads at each of their sites what the first of them reads. Passes are
    told apart by `a_pass`; moved [n] bool: in some pass a clamp found another feature on than in
    the first, at any token it acts on, or another gate open. None before there was a pass in which
    something was read.
    """

    edits: Sequence[Edit]
    moved: Tensor | None = None
    _first: Tensor | None = field(default=None, repr=False)
    _found: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted({site for edit in self.edits for site in edit.sites}))

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return frame.positions >= 0

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        for edit in self.edits:
            if isinstance(edit, FeatureEdit) and site in edit.sites:
                self._found.append(edit.finds(x.detach(), frame).flatten(1))
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        if n_fired == 0:
            raise never_fired(self, site)

    @contextmanager
    def a_pass(self) -> Iterator[None]:
        """Around one pass."""
        self._found.clear()
        yield
        if not self._found:
            return
        found = torch.cat([f.to(self._found[0].device) for f in self._found], 1)
        if self._first is None or self.moved is None:
            self._first, self.moved = found, torch.zeros_like(found[:, 0])
        self.moved = self.moved | (found != self._first).any(1)
