"""Through what a recovery went: baselines of its norm and its own parts, measured like itself.

One mechanism for both (METHODS E.4, F.4): each is a variant, run in its place on the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.baselines import baselines
from holdfast.many_draws import many_draws
from holdfast.measure import difference, mean, median, share
from holdfast.parts import EXACT, REENCODED, Split, split
from holdfast.shapley import coalitions, shapley
from holdfast.statistics import holm, paired_test
from holdfast.subspace import NullSpace
from holdfast.variants import PathSpec, Performed, Recovered, Variant, perform

NOBODY, EVERYBODY = "nothing", "all"
"""The variants in which no part, and every part, is added."""


ROWS, ALONG = "in clamped rows", "along the clamp"
"""What of the vector takes the clamp back, in two readings."""


@dataclass(frozen=True)
class Paths:
    """What was found for the prompts `rows` [n] of a trial: `record`, plain numbers; columns: name
    → [n], a value for each of them."""

    rows: Tensor
    record: dict[str, Any]
    columns: dict[str, Tensor]

    def laid(self, n: int) -> dict[str, Tensor]:
        """The columns over all n audited prompts; NaN where nothing was recovered."""
        laid = {}
        for name, values in self.columns.items():
            laid[name] = torch.full((n,), torch.nan, dtype=torch.float64, device=values.device)
            laid[name][self.rows] = values.double()
        return laid


def follow(found: Recovered, spec: PathSpec, seed: int, rows: Tensor | None = None) -> Paths:
    """Compare a recovery with its variants. rows: where its prompts stand in the trial's case."""
    rows = torch.arange(len(found)) if rows is None else rows
    if not len(found):
        return Paths(rows, {"n": 0, "reason": "no prompt was recovered"}, {})
    clusters = found.case.batch.clusters
    missing = [str(s) for s in found.problem.sites if s not in found.case.subject.saes]
    parts = None if missing else split(found, spec.top)
    others = baselines(found, spec, seed)
    own = [*_of_parts(found, parts), *_of_undo(found), *_of_places(found, spec)]
    performed = perform(found, [*others, *own])
    compared, of_path = performed[: len(others)], performed[len(others) :]
    by_name = {made.name: made for made in performed}
    record: dict[str, Any] = {
        "n": len(found),
        "reason": f"no SAE at {', '.join(missing)}" if missing else "",
        "spec": spec.model_dump(mode="json"),
        "baselines": _rows(compared, by_name, clusters),
        "variants": _rows(of_path, by_name, clusters),
        "random": many_draws(found, spec, seed),
        "parts": [] if parts is None else _parts(parts, found.length, clusters),
        "gram": None if parts is None else parts.gram.mean(0).tolist(),
        "shapley": {} if parts is None else _shapley(by_name, clusters),
        "explained": None
        if parts is None
        else _plain(median("explained", "share", parts.explained, clusters)),
        "rank": None if parts is None else float(parts.rank.double().mean()),
        "d_model": found.delta.shape[-1],
    }
    columns = {}
    for name, made in by_name.items():
        columns[f"variant.{name}.margin"] = made.margin
        columns[f"variant.{name}.back"] = made.back
        columns[f"variant.{name}.drift"] = made.drift_relative
    if parts is not None:
        columns |= {f"part.{name}.share": values for name, values in parts.shares.items()}
    return Paths(rows, record, columns)


def _of_parts(found: Recovered, parts: Split | None) -> list[Variant]:
    """The vector itself; each part as it is, brought to the vector's norm, and left out."""
    made = [Variant.whole(EVERYBODY, found.delta)]
    if parts is None:
        return made
    for name in (*EXACT, "top", "seen", "unseen"):
        part = getattr(parts, name)
        made.append(Variant.whole(name, part))
        scaled, there = found.scaled(part)
        made.append(Variant(f"{name} x1", (scaled,), there, "the part is nothing here"))
        if name in (*EXACT, "top"):
            made.append(Variant.whole(_without(name), found.delta.double() - part))
    return made


def _without(name: str) -> str:
    return f"{EVERYBODY} but {name}"


def _of_undo(found: Recovered) -> list[Variant]:
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
            rows = NullSpace.of(bank.W_dec.mT, bank.valid, bank.slices(frame))
            spanned.append(delta - rows.retract(delta))
        back = problem.replay.unclamped[site] - problem.replay.reference[site]
        size = back.square().sum(-1, keepdim=True)
        share = (delta * back).sum(-1, keepdim=True) / size.clamp_min(1e-30)
        along.append(torch.where(size > 0, share * back, 0.0))
    made = []
    for name, pieces in ((ROWS, spanned), (ALONG, along)):
        part = torch.cat(pieces, 1)
        made += [Variant.whole(name, part), Variant.whole(_without(name), found.delta - part)]
    return made


def _of_places(found: Recovered, spec: PathSpec) -> list[Variant]:
    """The vectors of one site or group of neighboring positions alone, and all but them."""
    sites, p = found.problem.sites, found.positions.shape[1]
    n, q, _ = found.delta.shape
    slot = torch.arange(q, device=found.delta.device)
    places = {}
    if len(sites) > 1:
        places = {f"at {site}": (slot // p == i).expand(n, q) for i, site in enumerate(sites)}
    # A row's own positions, counted from the first it has: shorter rows have fewer.
    own = found.positions >= 0
    width = own.sum(1, keepdim=True)
    n_groups = min(spec.groups, int(width.max()))
    group = torch.where(own, (own.cumsum(1) - 1) * n_groups // width.clamp_min(1), -1)
    if n_groups > 1:
        for i in range(n_groups):
            name = f"at positions {i + 1} of {n_groups}"
            places[name] = (group == i).repeat(1, len(sites))
    made = []
    for name, mask in places.items():
        only = found.delta * mask[..., None]
        made += [Variant.whole(name, only), Variant.whole(_without(name), found.delta - only)]
    return made


def _rows(
    performed: Sequence[Performed], by_name: dict[str, Performed], clusters: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each variant. p: that it brings the behavior back as often as the recovery's own
    vector, whole clusters exchanged; p_holm: adjusted over these rows; both NaN over several
    draws."""
    nobody, everybody = by_name[NOBODY], by_name[EVERYBODY]
    pvalues = [
        paired_test(made.back.cpu(), everybody.back.cpu(), clusters)
        if made.n_draws == 1
        else float("nan")
        for made in performed
    ]
    adjusted = holm(np.asarray(pvalues))
    rows = []
    for made, p, p_holm in zip(performed, pvalues, adjusted, strict=True):
        gained = (made.margin - nobody.margin) / (everybody.margin - nobody.margin)
        why = made.reason
        rows.append(
            {
                "name": made.name,
                "draws": made.n_draws,
                "back": _plain(share("back", made.back, clusters, why)),
                "less": _plain(
                    difference(
                        "back, less the recovery's", "share of prompts", made.back, everybody.back,
                        clusters, why,
                    )
                ),
                "regained": _plain(
                    median(
                        "regained", "share of the margin that the recovery brought back", gained,
                        clusters, why,
                    )
                ),
                "norm": _plain(
                    median("norm", "share of the recovery's norm", made.norm, clusters, why)
                ),
                "drift_relative": _plain(
                    median(
                        "drift_relative", "share of the features' norm", made.drift_relative,
                        clusters, why,
                    )
                ),
                "preactivation_drift_max": _largest(made.preactivation_drift),
                "p": p,
                "p_holm": float(p_holm),
            }
        )  # fmt: skip
    return rows


def _parts(parts: Split, length: Tensor, clusters: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each part: how long it is, what it has of the vector, what the SAE says of it."""
    shares = parts.shares
    rows = []
    for name in (*EXACT, "top", "seen", "unseen"):
        own: Tensor = getattr(parts, name)
        whole = length.double()
        dot = (own * _whole(parts)).sum((1, 2)) / whole.square()
        row: dict[str, Any] = {
            "name": name,
            "share": _plain(
                mean("signed share", "share of ‖δ‖²", shares.get(name, dot), clusters)
            ),
            "norm": _plain(
                median("norm", "share of ‖δ‖", own.norm(dim=(1, 2)) / whole, clusters)
            ),
            "switched": None,
            "visible": None,
        }  # fmt: skip
        if name in REENCODED:
            row["switched"] = _plain(
                mean("switched", "features per slot", parts.switched[name], clusters)
            )
            row["visible"] = _plain(
                median("visible", "share of the part's norm", parts.visible[name], clusters)
            )
        rows.append(row)
    return rows


def _whole(parts: Split) -> Tensor:
    return parts.clamped + parts.other + parts.residual


def _shapley(by_name: dict[str, Performed], clusters: Sequence[str]) -> dict[str, Any]:
    """Shapley values of the parts that sum to the vector, for the margin and for the behavior.

    Of the margin as a share of what the vector brought back, so that they sum to 1.
    """
    names = {coalition: _named(coalition) for coalition in coalitions(EXACT)}
    nobody, everybody = by_name[NOBODY], by_name[EVERYBODY]
    margins = {
        c: (by_name[name].margin - nobody.margin) / (everybody.margin - nobody.margin)
        for c, name in names.items()
    }
    back = {c: by_name[name].back for c, name in names.items()}
    return {
        what: {
            name: _plain(mean(name, unit, values, clusters))
            for name, values in shapley(worth).items()
        }
        for what, unit, worth in (
            ("margin", "share of the margin brought back", margins),
            ("back", "share of prompts", back),
        )
    }


def _named(coalition: frozenset[str]) -> str:
    """The variant in which just these parts are added."""
    if not coalition:
        return NOBODY
    if len(coalition) == len(EXACT):
        return EVERYBODY
    if len(coalition) == 1:
        return next(iter(coalition))
    (left_out,) = set(EXACT) - coalition
    return _without(left_out)


def _plain(measurement: Any) -> dict[str, Any]:
    made: dict[str, Any] = measurement.model_dump(mode="json")
    return made


def _largest(values: Tensor) -> float:
    """NaN where none is scored."""
    scored = values[~values.isnan()]
    return float(scored.max()) if len(scored) else float("nan")
