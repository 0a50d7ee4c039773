"""Sparse non-negative codes: what a few rows of a dictionary, none subtracted, make of a vector.

Non-negative orthogonal matching pursuit (Bruckstein, Elad and Zibulevsky 2008): take the row that
points most along what is left, fit all rows taken by non-negative least squares, and so on. The fit
is Lawson and Hanson's active set, so that what is left is orthogonal to what was fitted, and a fit
is never longer than the vector.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from holdfast.chunks import per_chunk

ROUNDS = 1e-9
"""Of a vector's norm: a correlation below it is rounding."""


@dataclass(frozen=True)
class Code:
    """m codes of at most k rows. atoms [m k]: their rows, -1 for none; weights [m k] ≥ 0, float64,
    on rows as they are; fit [m d]: what they make, float64."""

    atoms: Tensor
    weights: Tensor
    fit: Tensor


def pursue(targets: Tensor, rows: Tensor, k: int) -> Code:
    """Codes of at most k rows for targets [m d] over rows [n_rows d], which may be kept in half
    precision; fewer where no row is left that points along what remains."""
    (m, d), k = targets.shape, min(k, len(rows))
    if m > (size := per_chunk(k * d)):
        codes = [pursue(some, rows, k) for some in targets.split(size)]
        return Code(*(torch.cat([getattr(c, f.name) for c in codes]) for f in fields(Code)))
    x, device = targets.double(), targets.device
    length = torch.cat([some.float().norm(dim=1) for some in rows.split(per_chunk(d))])
    atoms = torch.full((m, k), -1, dtype=torch.long, device=device)
    units = torch.zeros(m, k, d, dtype=torch.float64, device=device)
    weights = torch.zeros(m, k, dtype=torch.float64, device=device)
    gram, to = torch.zeros(m, k, k, dtype=torch.float64, device=device), torch.zeros_like(weights)
    left = x.clone()
    least = ROUNDS * x.norm(dim=1)
    for step in range(k):
        score, best = _most_along(left, rows, length, torch.where(weights > 0, atoms, -1))
        going = score > least
        if not bool(going.any()):
            break
        atoms[:, step] = torch.where(going, best, -1)
        unit = rows[best].double() / length[best, None].double().clamp_min(1e-30)
        units[:, step] = unit * going[:, None]
        taken = slice(step + 1)
        inner = torch.einsum("mjd,md->mj", units[:, taken], units[:, step])
        gram[:, taken, step] = gram[:, step, taken] = inner
        to[:, step] = (units[:, step] * x).sum(1)
        weights[:, taken] = _refit(gram[:, taken, taken], to[:, taken], weights[:, taken])
        left = x - torch.einsum("mk,mkd->md", weights[:, taken], units[:, taken])
    used = weights > 0
    scale = length[atoms.clamp(min=0)].double().clamp_min(1e-30)
    return Code(torch.where(used, atoms, -1), weights / scale * used, x - left)


def _most_along(left: Tensor, rows: Tensor, length: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """[m] largest inner product of a row's direction with what is left, and which row."""
    best = torch.full((len(left),), -torch.inf, dtype=torch.float64, device=left.device)
    index = torch.zeros(len(left), dtype=torch.long, device=left.device)
    at = torch.arange(len(left), device=left.device)
    small = left.float()
    size = per_chunk(max(left.shape))
    for first in range(0, len(rows), size):
        own = length[first : first + size]
        scores = small @ rows[first : first + size].T.to(small.dtype)
        # In place: scores are as large as all that is held at a time.
        scores.div_(own.clamp_min(1e-30)).masked_fill_(own == 0, -torch.inf)
        for column in taken.T:  # a row that is in use has nothing more to give
            inside = (column >= first) & (column < first + size)
            scores[at[inside], column[inside] - first] = -torch.inf
        top = scores.max(1)
        better = top.values.double() > best
        best = torch.where(better, top.values.double(), best)
        index = torch.where(better, first + top.indices, index)
    return best, index


def _refit(gram: Tensor, to: Tensor, weights: Tensor) -> Tensor:
    """[m j] non-negative least squares on j units, from weights [m j] that were fitted without the
    last unit, which points along what they leave; a unit that turns out to be in the way gets none.

    gram [m j j]: inner products of the units, to [m j]: with the vectors that are fitted.
    """
    j = gram.shape[1]
    now = weights.clone()
    used = now > 0
    used[:, -1] = gram[:, -1, -1] > 0
    eye = torch.eye(j, dtype=gram.dtype, device=gram.device)
    rows = torch.arange(len(gram), device=gram.device)
    for _ in range(j):  # a round takes at least one unit away from every row that needs another
        own, have = used[rows], now[rows]
        both = own[:, :, None] & own[:, None, :]
        # Units in use that depend on each other have no one solution: a trace of ridge gives one.
        system = torch.where(both, gram[rows], 0.0) + torch.diag_embed((~own).double())
        free = torch.linalg.solve(system + 1e-12 * eye, torch.where(own, to[rows], 0.0))
        below = own & (free <= 0)
        step = torch.where(below, have / (have - free).clamp_min(1e-300), 1.0).amin(1, keepdim=True)
        # At least the unit that stopped the step goes, whatever rounding leaves of it.
        stopped = below & (have <= step * (have - free) * (1 + 1e-12))
        moved = (have + step * (free - have)).clamp_min(0)
        now[rows] = torch.where(own & ~stopped, moved, 0.0)
        used[rows] = own & ~stopped
        rows = rows[below.any(1)]
        if not len(rows):
            break
    return now
