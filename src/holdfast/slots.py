"""Where perturbed vectors stand among the columns of a replay: read there, and put there.

columns [n p]: the column of each perturbed position, -1 where a row has fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor


def find(positions: Tensor, among: Tensor) -> Tensor:
    """[n p] the column of each of positions [n p] in the columns' positions [n s]; -1 stays."""
    match = (positions[:, :, None] == among[:, None, :]) & (positions >= 0)[:, :, None]
    return torch.where(match.any(-1), match.int().argmax(-1), -1)


def cut(x: Tensor, columns: Tensor) -> Tensor:
    """[n p d] float32: residuals x [n s d] at the columns, on their device; zeros for -1."""
    at = columns.to(x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    there = torch.where((at >= 0)[..., None], x[rows, at.clamp(min=0)].float(), 0.0)
    return there.to(columns.device)


def place(x: Tensor, delta: Tensor, columns: Tensor) -> Tensor:
    """Residuals x [n s d] with vectors delta [n p d] added at the columns, summed in float32."""
    n, s, d = x.shape
    at, delta = columns.to(x.device), delta.to(x.device)
    placed = torch.zeros(n, s + 1, d, dtype=torch.float32, device=x.device)
    # Unused positions (-1) land in an extra column that is cut off again.
    index = torch.where(at >= 0, at, s)[..., None].expand(-1, -1, d)
    placed = placed.scatter_add(1, index, delta)[:, :s]
    return (x.float() + placed).to(x.dtype)
