"""Splits share no prompt: features and strengths that saw an audited one make optimistic counts."""

from __future__ import annotations

from holdfast.batch import Batch
from holdfast.errors import SplitError


def check_disjoint(splits: dict[str, Batch]) -> None:
    """Raise SplitError if two splits share a prompt text or a cluster (a question, a prompt)."""
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = splits[first], splits[second]
            shared = set(a.texts) & set(b.texts)
            clusters = set(a.clusters) & set(b.clusters)
            if shared or clusters:
                raise SplitError(
                    f"the splits {first!r} and {second!r} must be disjoint, but share "
                    f"{len(shared)} prompts and {len(clusters)} clusters "
                    f"(for example {sorted(clusters)[:3]}); draw them from other prompts"
                )
