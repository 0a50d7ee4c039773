"""Intervals and tests for what a study reports: rates, medians, paired differences, p-values.

Every n counts audited rows; clusters are the independent units behind them (questions, prompts).
Many rows of one question are not many observations (METHODS B and G.5: 91 flips of 6 questions),
so wherever `clusters` is given whole clusters are resampled, and `Interval.method` says which of
the two was done. NaN means "not scored": such rows are left out and counted in `n_dropped`.
"""

from __future__ import annotations

from holdfast.intervals import Interval, difference, wilson
from holdfast.rates import clustered_rate, share_greater
from holdfast.resampling import (
    Resampling,
    bootstrap,
    crossed_bootstrap,
    paired_bootstrap,
    paired_ratio,
    ratio_of_means,
)
from holdfast.significance import SIGNIFICANT, Corrected, corrected, holm, paired_test
from holdfast.units import Clusters

__all__ = [
    "SIGNIFICANT", "Clusters", "Corrected", "Interval", "Resampling", "bootstrap",
    "clustered_rate", "corrected", "crossed_bootstrap", "difference", "holm", "paired_bootstrap",
    "paired_ratio", "paired_test", "ratio_of_means", "share_greater", "wilson",
]  # fmt: skip
