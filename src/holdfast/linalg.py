"""Solves that no device is waited for."""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky_solved(b: Tensor, factor: Tensor) -> Tensor:
    """x [n r c] with `LLᵀx = b`, for factors L [n r r], lower.

    By two triangular solves: torch's own may go through a library that waits (MAGMA), and takes two
    to four times as long on a CPU.
    """
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
