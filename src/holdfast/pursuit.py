"""Sparse non-negative codes: what a few rows of a dictionary, none subtracted, make of a vector.

Non-negative orthogonal matching pursuit (Bruckstein, Elad and Zibulevsky 2008): take the row that
points most along what is left, fit all rows taken by non-negative least squares, and so on. The fit
is Lawson and Hanson's active set, so that what is left is orthogonal to what was fitted, and a fit
is never longer than the vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES = 2**24
"""Correlations held at a time: 64 MB in float32."""

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
    """Codes of at most k rows for targets [m d] over rows [n_rows d]; fewer where no row is left
    that points along what remains."""
    x, device = targets.double(), targets.device
    m, d = x.shape
    length = rows.norm(dim=1)
    k = min(k, len(rows))
    atoms = torch.full((m, k), -1, dtype=torch.long, device=device)
    units = torch.zeros(m, k, d, dtype=torch.float64, device=device)
    weights = torch.zeros(m, k, dtype=torch.float64, device=device)
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
        weights = _refit(units[:, : step + 1], x, weights, step)
        left = x - torch.einsum("mk,mkd->md", weights, units)
    taken = weights > 0
    scale = length[atoms.clamp(min=0)].double().clamp_min(1e-30)
    return Code(torch.where(taken, atoms, -1), weights / scale * taken, x - left)


def _most_along(left: Tensor, rows: Tensor, length: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """[m] largest inner product of a row's direction with what is left, and which row."""
    best = torch.full((len(left),), -torch.inf, dtype=torch.float64, device=left.device)
    index = torch.zeros(len(left), dtype=torch.long, device=left.device)
    at = torch.arange(len(left), device=left.device)
    small = left.float()
    for chunk in torch.arange(len(rows), device=left.device).split(max(1, _ENTRIES // len(left))):
        scores = small @ rows[chunk].T / length[chunk].clamp_min(1e-30)
        scores = scores.masked_fill(length[chunk] == 0, -torch.inf)
        for column in taken.T:  # a row that is in use has nothing more to give
            inside = (column >= chunk[0]) & (column <= chunk[-1])
            scores[at[inside], column[inside] - chunk[0]] = -torch.inf
        top = scores.max(1)
        better = top.values.double() > best
        best = torch.where(better, top.values.double(), best)
        index = torch.where(better, chunk[top.indices], index)
    return best, index


def _refit(units: Tensor, x: Tensor, weights: Tensor, new: int) -> Tensor:
    """Non-negative least squares of x [m d] on units [m j d], from weights [m k] that were fitted
    without column `new`, which points along what they leave. A column that turns out to be in the
    way gets no weight."""
    j = units.shape[1]
    gram, to = units @ units.mT, torch.einsum("mjd,md->mj", units, x)
    now = weights[:, :j].clone()
    used = now > 0
    used[:, new] = units[:, new].square().sum(-1) > 0
    eye = torch.eye(j, dtype=x.dtype, device=x.device)
    for _ in range(j):
        both = used[:, :, None] & used[:, None, :]
        # Rows in use that depend on each other have no one solution: a trace of ridge gives one.
        system = torch.where(both, gram, 0.0) + torch.diag_embed((~used).double()) + 1e-12 * eye
        free = torch.linalg.solve(system, torch.where(used, to, 0.0)[..., None])[..., 0]
        below = used & (free <= 0)
        if not bool(below.any()):
            now = torch.where(used, free, 0.0)
            break
        step = torch.where(below, now / (now - free).clamp_min(1e-300), 1.0).amin(1, keepdim=True)
        moved = now + step * (free - now)
        # At least the column that stopped the step goes, whatever rounding leaves of it.
        stopped = below & (now <= step * (now - free) * (1 + 1e-12))
        now = torch.where(used & ~stopped, moved.clamp_min(0), 0.0)
        used = used & ~stopped
    made = weights.clone()
    made[:, :j] = now
    return made
