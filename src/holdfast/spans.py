"""What some columns span: orthonormal bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """The spans of g sets of columns: basis [g d r] float32, orthonormal, with zero columns where a
    set has a lower rank; rank [g]."""

    basis: Tensor
    rank: Tensor

    @classmethod
    def among(cls, columns: Tensor, valid: Tensor) -> Spans:
        """Of those of columns [g d k] that are `valid` [g k], set by set."""
        return cls.of([own[:, there] for own, there in zip(columns, valid, strict=True)])

    @classmethod
    def of(cls, columns: Sequence[Tensor]) -> Spans:
        """Of sets of columns [d k], each of a size of its own."""
        device, bases = columns[0].device, [orthonormal_basis(own) for own in columns]
        rank = torch.as_tensor([basis.shape[1] for basis in bases], device=device)
        padded = torch.zeros(len(bases), columns[0].shape[0], max(int(rank.max()), 1))
        for g, basis in enumerate(bases):
            padded[g, :, : basis.shape[1]] = basis
        return cls(padded.to(device), rank)


def orthonormal_basis(columns: Tensor) -> Tensor:
    """An orthonormal basis [d r] of the span of columns [d k], float32, by rank-revealing QR.

    Column-pivoted Householder QR in float64; r counts the diagonal entries of R above
    max(d, k)·eps·|R₀₀|, so repeated and dependent encoder columns are counted once.
    """
    from scipy.linalg import qr

    d, k = columns.shape
    if k == 0:
        return torch.zeros(d, 0)
    q, r, _ = qr(columns.double().cpu().numpy(), mode="economic", pivoting=True)
    diagonal = np.abs(np.diag(r))
    tolerance = max(d, k) * np.finfo(np.float64).eps * diagonal[0]
    rank = int((diagonal > tolerance).sum())
    return torch.from_numpy(np.ascontiguousarray(q[:, :rank])).float()
