"""What a site's SAE says where a recovery's vector is added: without the vector, and with it.

Both splits of a vector start from it (`parts.py`, `bounded.py`), so a site's whole SAE is read once
and encodes every residual once, a block of features at a time. Of the codes those of active
features are kept, a few of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.chunks import per_chunk
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.variants import Recovered


@dataclass(frozen=True)
class Said:
    """Of m slots of one site, row by row, on the device of the SAE, which is held whole as long as
    this is.

    h, delta [m d_model] float32: the residual, and what is added to it; there [m]: slots that
    exist; dtype: the model's, to which sums are rounded as they are there. ids [m r]: features that
    are active without the vector or with it, ascending, -1 for none; before, after [m r]: their
    codes.
    """

    site: Site
    sae: SAE
    h: Tensor
    delta: Tensor
    there: Tensor
    dtype: torch.dtype
    ids: Tensor
    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, found: Recovered, site: Site, h: Tensor) -> Said:
        """h [n p d_model]: what the vectors are added to. Raises SAEError without an SAE there."""
        sae = found.case.subject.sae(site).full()
        at = sae.b_dec.device  # the whole SAE stays where its site's block is; slots come to it
        delta = found.problem.replay.parts(found.delta)[site]
        x, v = (each.flatten(0, 1).to(at) for each in (h, delta))
        there = (found.positions >= 0).flatten().to(at)
        dtype = found.case.subject.model.dtype
        return cls(site, sae, x, v, there, dtype, *_active(sae, x, (x + v).to(dtype).float()))

    def __len__(self) -> int:
        return len(self.h)

    @property
    def change(self) -> Tensor:
        """[m r] what the vector changes of each code, times what a code is worth in the residual,
        into which a token's norm may enter."""
        after = self.sae.inputs.magnify(self.moved(self.delta)) * self.after
        return after - self.sae.inputs.magnify(self.h) * self.before

    @property
    def l0(self) -> float:
        """How many features are active without the vector, mean over slots."""
        return float((self.before[self.there] > 0).sum()) / int(self.there.sum())

    def active(self) -> Iterator[Tensor]:
        """Of each slot the features that are active without the vector or with it."""
        return (own[own >= 0] for own in self.ids)

    def moved(self, part: Tensor) -> Tensor:
        """[... m d_model] the residual with a part [... m d_model] of the vector added."""
        return (self.h + part.float()).to(self.dtype).float()

    def begins(self, own: slice) -> Tensor:
        """[m n] codes without the vector of a block of features."""
        row, column = ((self.ids >= own.start) & (self.ids < own.stop)).nonzero(as_tuple=True)
        codes = self.before.new_zeros(len(self), own.stop - own.start)
        codes[row, self.ids[row, column] - own.start] = self.before[row, column]
        return codes

    def written(self, weights: Tensor, ids: Tensor | None = None) -> Tensor:
        """[m d_model] weights [m r] times decoder rows, of `ids` [m r] where others are meant."""
        ids = self.ids if ids is None else ids
        size = per_chunk(ids.shape[1] * self.h.shape[1])
        return torch.cat([
            torch.einsum("mr,mrd->md", own, self.sae.rows(which.clamp(min=0)))
            for own, which in zip(weights.split(size), ids.split(size), strict=True)
        ])  # fmt: skip


def _active(sae: SAE, h: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids, before, after [m r] as `Said` has them, of residuals [m d_model]."""
    m, found = len(h), []
    for own, codes in sae.codes(torch.cat([h, moved])):
        before, after = codes.split(m)
        row, column = ((before > 0) | (after > 0)).nonzero(as_tuple=True)
        found.append((row, column + own.start, before[row, column], after[row, column]))
    row, *columns = (torch.cat(each) for each in zip(*found, strict=True))
    order = row.argsort(stable=True)
    row, n = row[order], row.bincount(minlength=m)
    place = torch.arange(len(row), device=row.device) - (n.cumsum(0) - n)[row]

    def laid(values: Tensor, nothing: float) -> Tensor:
        out = values.new_full((m, int(n.max())), nothing)
        out[row, place] = values[order]
        return out

    ids, before, after = columns
    return laid(ids, -1), laid(before, 0), laid(after, 0)
