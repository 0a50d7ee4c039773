"""What other vectors of the same norm do: how much of a recovery is mere forcing?

Nothing here is searched for. If a vector that knows nothing of the behavior does what the recovery
did, the recovery shows no more than that this model is easily pushed (METHODS C.4-9, C.4-10, E.4).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.canonical import digest
from holdfast.positions import selected
from holdfast.problem import Lanes
from holdfast.running import by_row, joined
from holdfast.subspace import FeasibleSet, Iterate
from holdfast.variants import PathSpec, Recovered, Variant

ROUNDS = 3
"""Times a vector is brought to its norm and back into a set that scaling may leave."""

LEFT = 1e-3
"""Share of a vector's norm that has to be left of it inside a constraint."""

MEANINGS: Mapping[str, str] = {
    "nothing": "the clamp alone",
    "random": "a random direction",
    "random_inside": "a random direction inside the constraint",
    "undo": "the clamp's displacement taken back",
    "undo_inside": "the clamp's displacement, brought inside the constraint",
    "transfer": "the vector of another recovered prompt",
    "transfer_inside": "another prompt's vector, brought inside the constraint",
    "answer_mean": "difference in means towards this answer",
    "answer_mean_inside": "difference in means, brought inside the constraint",
    "gradient_inside": "one gradient step inside the constraint",
}
"""Every baseline, in the order of the table."""


def baselines(found: Recovered, spec: PathSpec, seed: int) -> list[Variant]:
    """Every baseline at every scale; those `inside` only where the constraint promises something.

    The norm of a recovery is the smallest found, so that at the same norm a direction has to be
    nearly as good to do as much: the scales say how much longer another one would have to be.
    """
    constraint = found.spec.constraint
    problem = constraint.acting(found.problem)
    feasible = constraint.feasible(problem)
    undo = _displacement(found)
    means, known = _answer_means(found)
    drawn = tuple(noise(found, seed, draw) for draw in range(spec.draws))
    lent, lends = _transferred(found, seed)
    everyone = torch.ones(len(found), dtype=torch.bool, device=found.delta.device)
    still = "the clamp did not move the residual there"
    alone = "the fit split has no prompts with this answer, or none with another"
    outside = "nothing of it is inside the constraint"
    nobody = "no prompt of another cluster was recovered, or none at these positions"
    free = {
        "random": (drawn, everyone, ""),
        "undo": ((undo,), everyone, still),
        "transfer": ((lent,), lends, nobody),
        "answer_mean": ((means,), known, alone),
    }
    held = {
        "random_inside": (drawn, everyone, outside),
        "undo_inside": ((undo,), everyone, f"{still}, or {outside}"),
        "transfer_inside": ((lent,), lends, f"{nobody}, or {outside}"),
        "answer_mean_inside": ((means,), known, f"{alone}, or {outside}"),
        "gradient_inside": ((_gradient(found),), everyone, outside),
    }
    made = [Variant.whole("nothing", torch.zeros_like(found.delta)), Variant.whole("undo", undo)]
    for name, (draws, there, reason) in {**free, **(held if constraint.exact else {})}.items():
        for scale in spec.scales:
            ready, all_there = [], there
            for delta in draws:
                if name.endswith("_inside"):
                    delta, has = inside(found, feasible, delta, scale)
                else:
                    delta, has = found.scaled(delta, scale)
                ready.append(delta)
                all_there = all_there & has
            made.append(Variant(f"{name} x{scale:g}", tuple(ready), all_there, reason))
    return made


def noise(found: Recovered, seed: int, draw: int) -> Tensor:
    """[n q d] standard normal at the slots that exist, drawn by the example's id."""
    _, q, d = found.delta.shape
    rows = []
    for example in found.case.batch.ids:
        key = int(digest(f"baseline/{seed}/{draw}/{example}")[:15], 16)
        rows.append(torch.randn(q, d, generator=torch.Generator().manual_seed(key)))
    return torch.stack(rows).to(found.delta.device) * found.slots


def inside(
    found: Recovered, feasible: FeasibleSet, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Vectors in the constraint's set, of the norm asked for as far as the set reaches; and rows
    [n] of which anything is left there."""
    least = LEFT * scale * found.length

    def kept(own: Tensor) -> Tensor:
        return own.norm(dim=(1, 2)) > least

    start = Iterate.zero(delta)
    own = feasible.tangent(found.scaled(delta, scale)[0], start)
    # What is nearly orthogonal to the set would be scaled up to mere rounding.
    own = torch.where(kept(own)[:, None, None], own, 0.0)
    for _ in range(ROUNDS):
        own = feasible.inside(found.scaled(own, scale)[0], scale * found.length, start)
    there = kept(own)
    return torch.where(there[:, None, None], own, 0.0), there


def _transferred(found: Recovered, seed: int) -> tuple[Tensor, Tensor]:
    """[n q d], and the rows [n] there is one for: the vector found for a prompt of another cluster,
    drawn by id; slots as far from the last one as in the prompt it was found for."""
    batch = found.case.batch
    lengths = found.slots.sum((1, 2)).tolist()
    out = torch.zeros_like(found.delta)
    there = torch.zeros(len(found), dtype=torch.bool, device=found.delta.device)
    for row, (example, cluster) in enumerate(zip(batch.ids, batch.clusters, strict=True)):
        # One that covers fewer positions would be shorter for another reason than its direction.
        donors = [
            other
            for other in range(len(found))
            if batch.clusters[other] != cluster and lengths[other] >= lengths[row]
        ]
        if donors:
            keys = {d: digest(f"transfer/{seed}/{example}/{batch.ids[d]}") for d in donors}
            out[row], there[row] = found.delta[min(donors, key=keys.__getitem__)], True
    return out * found.slots, there


def _displacement(found: Recovered) -> Tensor:
    """[n q d]: what the clamp had added at the slots, negated."""
    replay = found.problem.replay
    return torch.cat([replay.unclamped[s] - replay.reference[s] for s in found.problem.sites], 1)


def _answer_means(found: Recovered) -> tuple[Tensor, Tensor]:
    """[n q d], [n]: mean clean residual of fit prompts with a prompt's answer minus that of fit
    prompts with others, and for which prompts there are both.

    Present minus absent and not clean minus suppressed: at the clamped site that difference is the
    mean of what the clamp adds, which `undo` takes back already, prompt by prompt. Where all fit
    prompts have one answer, as refused prompts do, the neighbors' stand against it.
    """
    setting = found.setting
    fit = [] if setting.fit is None else [setting.fit]
    fit += setting.fit_neighbors.values()
    there = torch.zeros(len(found), dtype=torch.bool, device=found.delta.device)
    out = torch.zeros_like(found.delta)
    if not fit:
        return out, there
    states = [_states(found, batch) for batch in fit]
    first = fit[0].targets.unique()
    pool = states[:1] if len(first) > 1 else states
    targets = torch.cat([batch.targets for batch in fit[: len(pool)]])
    stacked = torch.cat(pool)  # [b m d]
    directions = {}
    for target in found.case.batch.targets.unique().tolist():
        own = targets == target
        if own.any() and not own.all():
            directions[target] = stacked[own].mean(0) - stacked[~own].mean(0)
    p = found.positions.shape[1]
    for row, target in enumerate(found.case.batch.targets.tolist()):
        if target in directions:
            there[row] = True
            out[row] = directions[target].repeat_interleave(p, 0)
    return out * found.slots, there


def _states(found: Recovered, batch: Batch) -> Tensor:
    """[b m d]: clean residuals of fit prompts at the m perturbed sites, mean over the positions of
    the prompt that the trial perturbs."""
    where = found.spec.perturb

    def mean(frame: Frame, x: Tensor) -> Tensor:
        mask = selected(where.positions, where.include_bos, frame)[..., None]
        return (x.float() * mask).sum(1) / mask.sum(1).clamp_min(1)

    reads = [by_row(site, mean) for site in found.problem.sites]
    found.setting.subject.outputs(batch, reads)
    return torch.stack([joined(read, found.delta.device) for read in reads], 1)


def _gradient(found: Recovered) -> Tensor:
    """[n q d]: gradient of the margin at zero (one step of FGSM in the 2-norm)."""

    def gradient(rows: Tensor) -> Tensor:
        leaf = torch.zeros_like(found.delta[rows]).requires_grad_(True)
        margin = Lanes.of(found.problem, rows).margin(leaf)
        return torch.autograd.grad(margin.sum(), leaf)[0]

    every = torch.arange(len(found), device=found.delta.device)
    return torch.cat(found.case.subject.batching.over("steps", every, gradient))
