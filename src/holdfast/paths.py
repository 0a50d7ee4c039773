"""Through what a recovery went: baselines of its norm and its own parts, measured like itself.

One mechanism for both (METHODS E.4, F.4): each is a variant, run in its place on the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.baselines import baselines
from holdfast.bounded import Bounded, Components
from holdfast.divided import divided, interacting, worths
from holdfast.heads import heads_of
from holdfast.lens import seen_by_lens
from holdfast.many_draws import many_draws
from holdfast.measure import difference, mean, median, share
from holdfast.overlaps import overlaps
from holdfast.parts import REENCODED, Split, take_apart
from holdfast.predicted import predicted_of
from holdfast.replays import (
    EVERYBODY,
    gained,
    of_likes,
    of_norms,
    of_parts,
    of_places,
    of_undo,
    parts_of,
    whole,
)
from holdfast.routes import kept_routes
from holdfast.statistics import holm, paired_test
from holdfast.variants import PathSpec, Performed, Recovered, perform


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
    components = _components(found, spec)
    exact: Split | None = None
    subspaces: dict[str, Bounded] = {}
    if not missing:
        exact, subspaces = take_apart(found, components, spec.top, spec.atoms, seed)
    parts = {} if exact is None else parts_of(exact, subspaces)
    others = baselines(found, spec, seed)
    pieces = [whole(found), *of_parts(found, parts), *of_undo(found), *of_places(found, spec)]
    own = [*pieces, *of_norms(found, parts, spec)]
    if spec.likes and parts:
        own += of_likes(found, parts, subspaces)
    performed = perform(found, [*others, *own])
    compared, of_path = performed[: len(others)], performed[len(others) :]
    by_name = {made.name: made for made in performed}
    worth = {} if exact is None else worths(by_name)
    record: dict[str, Any] = {
        "n": len(found),
        "reason": f"no SAE at {', '.join(missing)}" if missing else "",
        "spec": spec.model_dump(mode="json"),
        "baselines": _rows(compared, by_name, clusters),
        "variants": _rows(of_path, by_name, clusters),
        "random": many_draws(found, spec, seed),
        "parts": [] if exact is None else _parts(exact, subspaces, found, clusters),
        "gram": None if exact is None else exact.gram.mean(0).tolist(),
        "shapley": divided(worth, clusters),
        "interactions": interacting(worth, clusters),
        "explained": None
        if exact is None
        else median("explained", "share", exact.explained, clusters).plain,
        "rank": None
        if exact is None
        else float(exact.rank[found.problem.perturbed].double().mean()),
        "principal_variance": None
        if components is None
        else {str(site): share for site, share in components.share.items()},
        "overlaps": overlaps(found, [*others, *own], clusters),
        "predicted": predicted_of(found, {v.name: v.draws[0] for v in pieces}, by_name, clusters),
        "routes": {
            "kept": kept_routes(found, by_name, clusters),
            **seen_by_lens(found, parts, clusters),
        }
        if spec.routes
        else None,
        "heads": heads_of(found) if spec.heads else None,
        "d_model": found.delta.shape[-1],
    }
    columns = {}
    for name, made in by_name.items():
        columns[f"variant.{name}.margin"] = made.margin
        columns[f"variant.{name}.back"] = made.back
        columns[f"variant.{name}.drift"] = made.drift_relative
    if exact is not None:
        columns |= {f"part.{name}.share": values for name, values in exact.shares.items()}
    return Paths(rows, record, columns)


def _components(found: Recovered, spec: PathSpec) -> Components | None:
    """Where residuals vary most; None without prompts to see it on."""
    fit = found.setting.fit
    if fit is None:
        return None
    return Components.of(found.setting.subject, fit, found.problem.sites, spec.principal)


def _rows(
    performed: Sequence[Performed], by_name: dict[str, Performed], clusters: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each variant. p: that it brings the behavior back as often as the recovery's own
    vector, whole clusters exchanged; p_holm: adjusted over these rows; both NaN over several
    draws."""
    everybody = by_name[EVERYBODY]
    pvalues = [
        paired_test(made.back.cpu(), everybody.back.cpu(), clusters)
        if made.n_draws == 1
        else float("nan")
        for made in performed
    ]
    adjusted = holm(np.asarray(pvalues))
    rows = []
    for made, p, p_holm in zip(performed, pvalues, adjusted, strict=True):
        brought, why = gained(made.margin, by_name), made.reason
        unit = "share of the margin that the recovery brought back"
        drift = made.drift_relative
        less = difference(
            "back, less the recovery's", "share of prompts", made.back, everybody.back, clusters,
            why,
        )  # fmt: skip
        figures = {
            "back": share("back", made.back, clusters, why),
            "less": less,
            "regained": median("regained", unit, brought, clusters, why),
            "norm": median("norm", "share of the recovery's norm", made.norm, clusters, why),
            "drift_relative": median(
                "drift_relative", "share of the features' norm", drift, clusters, why
            ),
        }
        rows.append(
            {
                "name": made.name,
                "draws": made.n_draws,
                **{name: figure.plain for name, figure in figures.items()},
                "preactivation_drift_max": _largest(made.preactivation_drift),
                "p": p,
                "p_holm": float(p_holm),
            }
        )
    return rows


def _parts(
    exact: Split, subspaces: Mapping[str, Bounded], found: Recovered, clusters: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each part: how long it is, what it has of the vector, what the SAE says of it, and
    of the bounded ones the dimension of their subspace, mean over slots."""
    length, there = found.length.double(), found.problem.perturbed
    rows = []
    for name, own in parts_of(exact, subspaces).items():
        dot = (own * found.delta.double()).sum((1, 2)) / length.square()
        share = exact.shares.get(name, dot)
        row: dict[str, Any] = {
            "name": name,
            "share": mean("signed share", "share of ‖δ‖²", share, clusters).plain,
            "norm": median("norm", "share of ‖δ‖", own.norm(dim=(1, 2)) / length, clusters).plain,
            "switched": None,
            "visible": None,
            "rank": None,
        }  # fmt: skip
        if name in REENCODED:
            row["switched"] = mean(
                "switched", "features per slot", exact.switched[name], clusters
            ).plain
            row["visible"] = median(
                "visible", "share of the part's norm", exact.visible[name], clusters
            ).plain
        if name in subspaces:
            row["rank"] = float(subspaces[name].rank[there].double().mean())
        rows.append(row)
    return rows


def _largest(values: Tensor) -> float:
    """NaN where none is scored."""
    scored = values[~values.isnan()]
    return float(scored.max()) if len(scored) else float("nan")
