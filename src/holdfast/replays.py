"""The variants that are made of a recovery's own vector: its parts, alone, rescaled and left out.

Beside them stand what would tell a part from its like: the part that another prompt was found to
need, and random vectors of the same subspace (METHODS F.4).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from holdfast.bounded import Bounded
from holdfast.parts import EXACT, Split
from holdfast.subspace import decoder_null
from holdfast.variants import PathSpec, Performed, Recovered, Variant

NOBODY, EVERYBODY = "nothing", "all"
"""The variants in which no part, and every part, is added."""

ROWS, ALONG = "in clamped rows", "along the clamp"
"""What of the vector takes the clamp back, in two readings."""

PARTS = (*EXACT, "top", "seen", "unseen", "sparse", "encoder", "principal")
"""Every part, in the order of the table. All but `seen` and `unseen`, which are each other's rest,
are also left out."""


def whole(found: Recovered) -> Variant:
    """The vector itself, added again."""
    return Variant.whole(EVERYBODY, found.delta)


def parts_of(split: Split, subspaces: Mapping[str, Bounded]) -> dict[str, Tensor]:
    """Of `PARTS`, those that there are → [n q d_model]."""
    found = {name: getattr(split, name) for name in (*EXACT, "top", "seen", "unseen")}
    found |= {name: own.part for name, own in subspaces.items()}
    return {name: found[name] for name in PARTS if name in found}


def of_parts(found: Recovered, parts: Mapping[str, Tensor]) -> list[Variant]:
    """Each part as it is, and left out."""
    made = []
    for name, part in parts.items():
        made.append(Variant.whole(name, part))
        if name not in ("seen", "unseen"):
            made.append(Variant.whole(without(name), found.delta.double() - part))
    return made


def of_norms(found: Recovered, parts: Mapping[str, Tensor], spec: PathSpec) -> list[Variant]:
    """Each part brought to norms in units of the vector's."""
    made = []
    for name, part in parts.items():
        for scale in spec.part_scales:
            scaled, there = found.scaled(part, scale)
            made.append(Variant(f"{name} x{scale:g}", (scaled,), there, "the part is nothing here"))
    return made


def of_likes(
    found: Recovered, parts: Mapping[str, Tensor], subspaces: Mapping[str, Bounded]
) -> list[Variant]:
    """What a part is to be told from, all of the vector's norm: the parts found for another prompt,
    slot by slot, and random vectors of a part's subspace."""
    other, has = _others(found)
    made = []
    for name in EXACT:
        scaled, there = found.scaled(parts[name][other] * found.slots)
        reason = "every recovered prompt is of one cluster, or the other's part is nothing"
        made.append(Variant(f"{name} of another", (scaled,), there & has, reason))
    for name, own in subspaces.items():
        scaled, there = found.scaled(own.noise)
        reason = "the part is nothing here"
        made.append(Variant(f"random in {name}", (scaled,), there, reason))
    return made


def _others(found: Recovered) -> tuple[Tensor, Tensor]:
    """[n] for each prompt the next one of another cluster, and whether there is one."""
    clusters, n = found.case.batch.clusters, len(found)
    rows, there = [], []
    for row in range(n):
        later = [(row + i) % n for i in range(1, n)]
        own = [other for other in later if clusters[other] != clusters[row]]
        rows.append(own[0] if own else row)
        there.append(bool(own))
    device = found.delta.device
    return torch.as_tensor(rows, device=device), torch.as_tensor(there, device=device)


def gained(margin: Tensor, by_name: Mapping[str, Performed]) -> Tensor:
    """[n] a margin as a share of what the recovery's vector brought back."""
    nobody, everybody = by_name[NOBODY], by_name[EVERYBODY]
    return (margin - nobody.margin) / (everybody.margin - nobody.margin)


def without(name: str) -> str:
    """What the vector is called with a part left out."""
    return f"{EVERYBODY} but {name}"


def of_undo(found: Recovered) -> list[Variant]:
    """What of the vector takes the clamp back (METHODS C.5), alone and left out: its part in the
    span of the clamped decoder rows, and along the clamp's displacement at each slot."""
    problem = found.problem
    frame = found.case.batch.frame()
    spanned, along = [], []
    for site, delta in problem.replay.parts(found.delta).items():
        bank = problem.held.get(site)
        if bank is None:
            spanned.append(torch.zeros_like(delta))
        else:
            rows = decoder_null(bank, frame)
            spanned.append(delta - rows.retract(delta))
        back = problem.replay.unclamped[site] - problem.replay.reference[site]
        size = back.square().sum(-1, keepdim=True)
        share = (delta * back).sum(-1, keepdim=True) / size.clamp_min(1e-30)
        along.append(torch.where(size > 0, share * back, 0.0))
    made = []
    for name, pieces in ((ROWS, spanned), (ALONG, along)):
        part = torch.cat(pieces, 1)
        made += [Variant.whole(name, part), Variant.whole(without(name), found.delta - part)]
    return made


def of_places(found: Recovered, spec: PathSpec) -> list[Variant]:
    """The vectors of one site or group of neighboring positions alone, all but them, and all up to
    them where that is neither the first alone nor everything."""
    sites, p = found.problem.sites, found.positions.shape[1]
    n, q, _ = found.delta.shape
    slot = torch.arange(q, device=found.delta.device)
    by_site = {str(site): (slot // p == i).expand(n, q) for i, site in enumerate(sites)}
    # A row's own positions, counted from the first it has: shorter rows have fewer.
    own = found.positions >= 0
    width = own.sum(1, keepdim=True)
    n_groups = min(spec.groups, int(width.max()))
    group = torch.where(own, (own.cumsum(1) - 1) * n_groups // width.clamp_min(1), -1)
    by_group = {
        f"positions {i + 1} of {n_groups}": (group == i).repeat(1, len(sites))
        for i in range(n_groups)
    }
    made = []
    for places in (by_site, by_group):
        if len(places) < 2:
            continue
        reached = torch.zeros_like(found.delta)
        for index, (place, mask) in enumerate(places.items()):
            name, only = f"at {place}", found.delta * mask[..., None]
            reached = reached + only
            made.append(Variant.whole(name, only))
            made.append(Variant.whole(without(name), found.delta - only))
            if 0 < index < len(places) - 1:
                made.append(Variant.whole(f"up to {place}", reached))
    return made
