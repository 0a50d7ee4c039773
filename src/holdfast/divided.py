"""A recovery's effect divided among the three parts that sum to its vector (METHODS F.4).

Every set of them is added by itself, so that Shapley values and pairwise interactions are of
performed patches and of nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from holdfast.measure import mean
from holdfast.parts import EXACT
from holdfast.replays import EVERYBODY, NOBODY, gained, without
from holdfast.shapley import Coalition, coalitions, interactions, shapley
from holdfast.variants import Performed

UNITS: Mapping[str, str] = {
    "margin": "share of the margin brought back",
    "back": "share of prompts",
}
"""What is divided: of the margin as a share of what the whole vector does, and of the behavior."""

Worths = Mapping[str, Mapping[Coalition, Tensor]]
"""What is divided → set of the exact parts → [n] what it brings back."""


def worths(by_name: Mapping[str, Performed]) -> Worths:
    """Of `UNITS`."""
    made = {coalition: by_name[_named(coalition)] for coalition in coalitions(EXACT)}
    return {
        "margin": {each: gained(own.margin, by_name) for each, own in made.items()},
        "back": {each: own.back for each, own in made.items()},
    }


def divided(of: Worths, clusters: Sequence[str]) -> dict[str, Any]:
    """Shapley values of the parts; those of the margin sum to 1."""
    return {
        what: {
            name: mean(name, UNITS[what], values, clusters).plain
            for name, values in shapley(worth).items()
        }
        for what, worth in of.items()
    }


def interacting(of: Worths, clusters: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What two of these parts do together beyond what each does alone."""
    return {
        what: [
            {
                "parts": list(pair),
                "beyond": mean("interaction", UNITS[what], values, clusters).plain,
            }
            for pair, values in interactions(worth).items()
        ]
        for what, worth in of.items()
    }


def _named(coalition: Coalition) -> str:
    """The variant in which just these parts are added."""
    if not coalition:
        return NOBODY
    if len(coalition) == len(EXACT):
        return EVERYBODY
    if len(coalition) == 1:
        return next(iter(coalition))
    (left_out,) = set(EXACT) - coalition
    return without(left_out)
