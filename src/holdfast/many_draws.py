"""Many random vectors of a recovery's norm: how seldom does mere length bring a behavior back?

A few draws in full passes (`baselines.py`) tell one in ten from one in two. One in a hundred needs
a hundred (METHODS C.5, "n >= 100"): they are run in the replay, many at a time, for their margins
alone. So it is only done where the margin is the behavior, and not where text is judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from holdfast.baselines import inside, noise
from holdfast.measure import median, rate, share
from holdfast.problem import Lanes
from holdfast.variants import PathSpec, Recovered

JUDGED = "the behavior is read from generated text, which margins do not tell"
OUTSIDE = "nothing of a random direction is inside the constraint"
FIRST = 1_000_000
"""Number of the first draw: none of them is one of the baselines'."""


def many_draws(found: Recovered, spec: PathSpec, seed: int) -> dict[str, Any]:
    """What `spec.margin_draws` random directions of the recovery's norm do to each prompt's margin.

    free and inside: anywhere, and inside the constraint; the latter None where it promises nothing,
    and where a vector is only brought inside by solves through the model, which for so many draws
    would cost more than the search. Of each, by prompt: back, the share of draws that bring the
    behavior back; any, whether one does; best, the margin that the best of them regains, as a share
    of what the vector found regains; as_good, the share of draws at least as good as that vector. A
    draw under which a held feature was overtaken among the k largest of a TopK counts as any other.
    """
    if found.setting.observed is not None and found.case.own:
        return {"n": 0, "reason": JUDGED}
    constraint = found.spec.constraint
    sets = {"free": _free(found, spec, seed)}
    if constraint.exact and found.problem.linear:
        sets["inside"] = _inside(found, spec, seed)
    lanes: dict[tuple[int, int], Lanes] = {}
    nothing = _margins(found, lanes, torch.zeros_like(found.delta))
    reached = _margins(found, lanes, found.delta)
    made: dict[str, Any] = {"n": spec.margin_draws, "reason": ""}
    for name, draws in sets.items():
        margins, there = [], torch.ones_like(nothing, dtype=torch.bool)
        for delta, has in draws:
            margins.append(_margins(found, lanes, delta))
            there &= has
        made[name] = _told(found, torch.stack(margins), there, nothing, reached)
    return made | {"inside": made.get("inside")}


def _free(found: Recovered, spec: PathSpec, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for draw in range(spec.margin_draws):
        yield found.scaled(noise(found, seed, FIRST + draw))


def _inside(found: Recovered, spec: PathSpec, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    constraint = found.spec.constraint
    feasible = constraint.feasible(constraint.acting(found.problem))
    for draw in range(spec.margin_draws):
        yield inside(found, feasible, noise(found, seed, FIRST + draw), 1.0)


def _margins(found: Recovered, lanes: dict[tuple[int, int], Lanes], delta: Tensor) -> Tensor:
    """[n] float64, of vectors [n q d_model] as they are; lanes: first row and number of rows → what
    is run of them, laid out once for all draws."""

    def margin(rows: Tensor) -> Tensor:
        key = int(rows[0]), len(rows)
        if key not in lanes:
            lanes[key] = Lanes.of(found.problem, rows)
        return lanes[key].margin(delta[rows])

    everyone = torch.arange(len(found), device=delta.device)
    with torch.no_grad():
        return torch.cat(found.case.subject.batching.over("steps", everyone, margin)).double()


def _told(
    found: Recovered, margins: Tensor, there: Tensor, nothing: Tensor, reached: Tensor
) -> dict[str, Any]:
    """margins [draws n]; nothing, reached [n]: of the clamp alone and of the vector found."""
    clusters = found.case.batch.clusters
    nan = torch.full_like(nothing, torch.nan)
    back = (margins > 0).double().mean(0)
    best = (margins.amax(0) - nothing) / (reached - nothing)
    as_good = (margins >= reached).double().mean(0)
    kept = there.nonzero().flatten().tolist()
    own = [clusters[row] for row in kept]
    measured = {
        "back": share("back", torch.where(there, back, nan), clusters, OUTSIDE, "share of draws"),
        "any": rate("any", (back > 0)[kept], own),
        "best": median(
            "best", "share of the margin that the recovery brought back",
            torch.where(there, best, nan), clusters, OUTSIDE,
        ),
        "as_good": share(
            "as_good", torch.where(there, as_good, nan), clusters, OUTSIDE, "share of draws"
        ),
    }  # fmt: skip
    return {name: m.model_dump(mode="json") for name, m in measured.items()}
