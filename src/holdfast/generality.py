"""Whether a vector found for one order of a question's choices brings back another order too.

A vector that carries the answer should do so whatever letter the answer has; one that only pushes a
letter works for prompts of that letter, of this question or of any (METHODS J.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.canonical import digest
from holdfast.measure import share
from holdfast.variants import Recovered, Variant, perform

MEANINGS: Mapping[str, str] = {
    "same_letter": "found for another order of this question with the same right letter",
    "other_letter": "found for another order of this question with another right letter",
    "shared": "the mean of the vectors found for this question's other orders",
    "other_question": "found for another question with the same right letter",
}


def between_orders(found: Recovered, scales: Sequence[float]) -> list[dict[str, Any]]:
    """A row for every kind of lent vector and scale. Every vector is brought to the norm of the one
    it stands for, times the scale, and measured as a recovery is.

    `back`: share of the prompts that have such a vector on which the behavior is there. Vectors
    found where a linear constraint holds the same features stay inside it; what others move is in
    `preactivation_drift_max`.
    """
    if not len(found):
        return []
    variants, named = [], []
    for name, (delta, there) in lent(found).items():
        for scale in scales:
            scaled, has = found.scaled(delta * found.slots, scale)
            why = "no recovered prompt to take it from"
            variants.append(Variant(f"{name} x{scale:g}", (scaled,), there & has, why))
            named.append((name, scale))
    rows = []
    for (name, scale), made in zip(named, perform(found, variants), strict=True):
        back = share("back", made.back, found.case.batch.clusters, made.reason)
        drift = made.preactivation_drift[~made.preactivation_drift.isnan()]
        rows.append(
            {
                "name": name,
                "scale": scale,
                "back": back.model_dump(mode="json"),
                "preactivation_drift_max": float(drift.max()) if len(drift) else float("nan"),
            }
        )
    return rows


def lent(found: Recovered) -> dict[str, tuple[Tensor, Tensor]]:
    """Kind → vectors [n q d_model] of other recovered prompts for each prompt, and for which [n]
    there is one; `shared` is a mean without the prompt's own."""
    batch = found.case.batch
    clusters, letters = batch.clusters, batch.targets.tolist()
    n = len(found)
    made = {
        name: (torch.zeros_like(found.delta), torch.zeros(n, dtype=torch.bool)) for name in MEANINGS
    }

    def give(name: str, row: int, donors: Sequence[int]) -> None:
        if donors:
            made[name][0][row] = found.delta[list(donors)].mean(0)
            made[name][1][row] = True

    for row in range(n):
        # Which of several is taken does not hang on the order of the prompts.
        others = sorted(
            (other for other in range(n) if other != row),
            key=lambda other: digest(["lent", batch.ids[row], batch.ids[other]]),
        )
        siblings = [other for other in others if clusters[other] == clusters[row]]
        strangers = [other for other in others if clusters[other] != clusters[row]]
        give("same_letter", row, [o for o in siblings if letters[o] == letters[row]][:1])
        give("other_letter", row, [o for o in siblings if letters[o] != letters[row]][:1])
        give("shared", row, siblings)
        give("other_question", row, [o for o in strangers if letters[o] == letters[row]][:1])
    device = found.delta.device
    return {name: (delta, there.to(device)) for name, (delta, there) in made.items()}
