"""Full passes from the embedding, and what they read where a perturbation is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.edits import Capture, CaptureAt, Edit
from holdfast.sites import Site
from holdfast.subject import Subject


@dataclass(frozen=True)
class Read:
    """The residual of one site before the clamp, after it, and at the end: [n p d] each at the
    perturbed positions; whole [n s d] at the end, at every token."""

    before: Tensor
    clamped: Tensor
    after: Tensor
    whole: Tensor


@dataclass(frozen=True)
class FullPass:
    """Logits of one pass where the answer is read, and what it read at every site."""

    logits: Tensor
    reads: Mapping[Site, Read]

    @classmethod
    def of(
        cls,
        subject: Subject,
        batch: Batch,
        edits: Sequence[Edit],
        added: Sequence[Edit],
        clamp_first: bool,
        sites: Sequence[Site],
        positions: Tensor,
    ) -> FullPass:
        """With the clamp's `edits` before or after what is added; read at positions [b p]."""
        before, clamped = ([CaptureAt(s, batch.ids, positions) for s in sites] for _ in range(2))
        after = [Capture(site) for site in sites]
        clamp = (*before, *edits, *clamped)
        passed = (*clamp, *added, *after) if clamp_first else (*added, *clamp, *after)
        logits = subject.read(batch, passed)
        everywhere = _positions(batch)
        reads = {
            site: Read(x.read, y.read, z.at(batch.ids, positions), z.at(batch.ids, everywhere))
            for site, x, y, z in zip(sites, before, clamped, after, strict=True)
        }
        return cls(logits, reads)

    def at(self, site: Site) -> Read:
        return self.reads[site]


def _positions(batch: Batch) -> Tensor:
    """[b s] every absolute position of a batch, ascending, -1 after the last."""
    steps = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).repeat(len(batch), 1)
    return torch.where(steps <= batch.positions[:, -1:], steps, -1)
