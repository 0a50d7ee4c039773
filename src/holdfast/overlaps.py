"""How far a recovery's vector points along directions that nobody searched for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from holdfast.measure import median
from holdfast.variants import Recovered, Variant

DIRECTIONS = ("undo", "answer_mean", "gradient_inside")
"""Baselines whose direction the vector is set beside: the clamp's displacement, the difference in
means towards the answer (of refused prompts the refusal direction), and the margin's gradient."""


def overlaps(
    found: Recovered, variants: Sequence[Variant], clusters: Sequence[str]
) -> list[dict[str, Any]]:
    """Of `DIRECTIONS`, those among the variants: the cosine with the vector, over all its slots."""
    delta, made = found.delta.double(), []
    named = {variant.name.partition(" ")[0]: variant for variant in variants}
    for name in DIRECTIONS:
        if (variant := named.get(name)) is None:
            continue
        own = variant.draws[0].double()
        length = own.norm(dim=(1, 2))
        cosine = (own * delta).sum((1, 2)) / (length * found.length.double()).clamp_min(1e-30)
        cosine = torch.where(variant.there & (length > 0), cosine, torch.nan)
        reason = variant.reason or "there is no such direction here"
        row = median("cosine", "cosine", cosine, clusters, reason)
        made.append({"name": name, "cosine": row.plain})
    return made
