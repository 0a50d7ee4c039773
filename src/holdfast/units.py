"""Rows and the independent units behind them, for what is counted over either.

NaN means "not scored": such rows are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Clusters = Sequence[Hashable] | NDArray[np.generic]
"""The unit of each row: a question, a prompt."""
Floats = NDArray[np.float64]


def pairs(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    """Two values a row, [n] each. Raises ValueError where they are not as many."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected pairs of one length, got shapes {a.shape} and {b.shape}")
    return a, b


def scored(values: ArrayLike, clusters: Clusters | None) -> tuple[Floats, NDArray[np.int64], int]:
    """The values that are not NaN, their cluster's number in 0, 1, …, and how many were dropped."""
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"expected one value per row, got shape {x.shape}")
    if clusters is not None and len(clusters) != x.size:
        raise ValueError(f"expected one cluster per value, got {len(clusters)} for {x.size}")
    there = ~np.isnan(x)
    kept = x[there]
    if clusters is None:
        units = np.arange(kept.size)
    else:
        # Numbered by first appearance: works for any hashable, and mixes of them.
        numbers: dict[Hashable, int] = {}
        names = [c for c, keep in zip(clusters, there, strict=True) if keep]
        units = np.array([numbers.setdefault(c, len(numbers)) for c in names], dtype=np.int64)
    return kept, units, int(x.size - kept.size)


def count(units: NDArray[np.int64]) -> int:
    """How many units there are, numbered 0, 1, …"""
    return int(units.max()) + 1 if units.size else 0
