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
from holdfast.bounded import Bounded, Components, bounded
from holdfast.direct import unreadable
from holdfast.heads import heads_of
from holdfast.many_draws import many_draws
from holdfast.measure import difference, mean, median, share
from holdfast.parts import EXACT, REENCODED, Split, split
from holdfast.predicted import agreement, gradients, predictions
from holdfast.replays import (
    EVERYBODY,
    NOBODY,
    of_likes,
    of_parts,
    of_places,
    of_undo,
    parts_of,
    whole,
    without,
)
from holdfast.routes import Lens, routes
from holdfast.shapley import Coalition, coalitions, interactions, shapley
from holdfast.statistics import holm, paired_test
from holdfast.variants import PathSpec, Performed, Recovered, Variant, perform

DIRECTIONS = ("undo", "answer_mean", "gradient_inside")
"""Baselines whose direction the vector is set beside: the clamp's displacement, the difference in
means towards the answer (of refused prompts the refusal direction), and the margin's gradient."""


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
    exact = None if missing else split(found, spec.top)
    subspaces = {} if missing else bounded(found, components, spec.atoms, seed)
    parts = {} if exact is None else parts_of(exact, subspaces)
    others = baselines(found, spec, seed)
    own = [whole(found), *of_parts(found, parts, spec)]
    if spec.likes and parts:
        own += of_likes(found, parts, subspaces)
    own += [*of_undo(found), *of_places(found, spec)]
    performed = perform(found, [*others, *own])
    compared, of_path = performed[: len(others)], performed[len(others) :]
    by_name = {made.name: made for made in performed}
    worths = {} if exact is None else _worths(by_name)
    record: dict[str, Any] = {
        "n": len(found),
        "reason": f"no SAE at {', '.join(missing)}" if missing else "",
        "spec": spec.model_dump(mode="json"),
        "baselines": _rows(compared, by_name, clusters),
        "variants": _rows(of_path, by_name, clusters),
        "random": many_draws(found, spec, seed),
        "parts": [] if exact is None else _parts(exact, subspaces, found, clusters),
        "gram": None if exact is None else exact.gram.mean(0).tolist(),
        "shapley": _divided(worths, clusters),
        "interactions": _interacting(worths, clusters),
        "explained": None
        if exact is None
        else _plain(median("explained", "share", exact.explained, clusters)),
        "rank": None
        if exact is None
        else float(exact.rank[found.problem.perturbed].double().mean()),
        "principal_variance": None
        if components is None
        else {str(site): share for site, share in components.share.items()},
        "overlaps": _overlaps(found, [*others, *own], clusters),
        "predicted": _predicted(found, own, by_name, clusters),
        "routes": _routes(found, by_name, parts, clusters) if spec.routes else None,
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
            "share": _plain(mean("signed share", "share of ‖δ‖²", share, clusters)),
            "norm": _plain(
                median("norm", "share of ‖δ‖", own.norm(dim=(1, 2)) / length, clusters)
            ),
            "switched": None,
            "visible": None,
            "rank": None,
        }  # fmt: skip
        if name in REENCODED:
            row["switched"] = _plain(
                mean("switched", "features per slot", exact.switched[name], clusters)
            )
            row["visible"] = _plain(
                median("visible", "share of the part's norm", exact.visible[name], clusters)
            )
        if name in subspaces:
            row["rank"] = float(subspaces[name].rank[there].double().mean())
        rows.append(row)
    return rows


def _worths(by_name: dict[str, Performed]) -> dict[tuple[str, str], dict[Coalition, Tensor]]:
    """(what, unit) → set of the exact parts → [n] what it brings back: of the margin as a share of
    what the whole vector does, and of the behavior."""
    names = {coalition: _named(coalition) for coalition in coalitions(EXACT)}
    return {
        ("margin", "share of the margin brought back"): {
            c: _gained(by_name[name].margin, by_name) for c, name in names.items()
        },
        ("back", "share of prompts"): {c: by_name[name].back for c, name in names.items()},
    }


def _gained(margin: Tensor, by_name: Mapping[str, Performed]) -> Tensor:
    """[n] a margin as a share of what the recovery's vector brought back."""
    nobody, everybody = by_name[NOBODY], by_name[EVERYBODY]
    return (margin - nobody.margin) / (everybody.margin - nobody.margin)


def _divided(
    worths: dict[tuple[str, str], dict[Coalition, Tensor]], clusters: Sequence[str]
) -> dict[str, Any]:
    """Shapley values of the parts that sum to the vector; of the margin they sum to 1."""
    return {
        what: {
            name: _plain(mean(name, unit, values, clusters))
            for name, values in shapley(worth).items()
        }
        for (what, unit), worth in worths.items()
    }


def _interacting(
    worths: dict[tuple[str, str], dict[Coalition, Tensor]], clusters: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """What two of these parts do together beyond what each does alone."""
    return {
        what: [
            {"parts": list(pair), "beyond": _plain(mean("interaction", unit, values, clusters))}
            for pair, values in interactions(worth).items()
        ]
        for (what, unit), worth in worths.items()
    }


def _overlaps(
    found: Recovered, variants: Sequence[Variant], clusters: Sequence[str]
) -> list[dict[str, Any]]:
    """Cosine between the vector and directions nobody searched for, over all its slots."""
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
        made.append(
            {"name": name, "cosine": _plain(median("cosine", "cosine", cosine, clusters, reason))}
        )
    return made


def _predicted(
    found: Recovered, variants: Sequence[Variant], by_name: Mapping[str, Performed],
    clusters: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What gradients say of every variant that is made of the vector and exists for all prompts,
    beside what it did. correlation, error: over the variants, prompt by prompt."""
    own = {v.name: v.draws[0] for v in variants if bool(v.there.all()) and " x" not in v.name}
    own = {name: v for name, v in own.items() if not name.startswith("random in")}
    nobody = by_name[NOBODY].margin
    brought = by_name[EVERYBODY].margin - nobody
    performed = torch.stack([by_name[name].margin - nobody for name in own])
    record: dict[str, Any] = {"variants": list(own)}
    for kind, gradient in gradients(found).items():
        made = predictions(gradient, own)
        correlation, error = agreement(torch.stack(list(made.values())), performed, brought)
        reason = "the variants do not differ in what they are predicted to do, or in what they do"
        record[kind] = {
            "correlation": _plain(
                median("correlation", "Pearson's r", correlation, clusters, reason)
            ),
            "error": _plain(
                median("error", "share of the margin brought back", error, clusters)
            ),
            "regained": {
                name: _plain(
                    median("predicted", "share of the margin brought back", v / brought, clusters)
                )
                for name, v in made.items()
            },
        }  # fmt: skip
    return record


def _routes(
    found: Recovered, by_name: Mapping[str, Performed], parts: Mapping[str, Tensor],
    clusters: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """What of the margin comes back with later blocks kept as they were; and by the logit lens what
    each part does at the token that is read, in logits, for the rival strongest under the clamp."""
    why = unreadable(found.case.subject, found.case.batch)
    lens = None if why else Lens.of(found)
    seen = {} if lens is None else {name: lens(v) for name, v in parts.items()}
    if lens is not None:
        seen = {EVERYBODY: lens(found.delta), **seen}
    return {
        "kept": [
            {
                "name": name,
                "regained": _plain(
                    median(
                        "regained", "share of the margin that the recovery brought back",
                        _gained(margin, by_name), clusters,
                    )
                ),
                "ahead": _plain(share("ahead", (margin > 0).double(), clusters)),
            }
            for name, margin in routes(found).items()
        ],
        "lens_reason": why,
        "lens": [
            {"name": name, "lead": _plain(mean("lead", "logits", values, clusters))}
            for name, values in seen.items()
        ],
    }  # fmt: skip


def _named(coalition: frozenset[str]) -> str:
    """The variant in which just these parts are added."""
    if not coalition:
        return NOBODY
    if len(coalition) == len(EXACT):
        return EVERYBODY
    if len(coalition) == 1:
        return next(iter(coalition))
    (left_out,) = set(EXACT) - coalition
    return without(left_out)


def _plain(measurement: Any) -> dict[str, Any]:
    made: dict[str, Any] = measurement.model_dump(mode="json")
    return made


def _largest(values: Tensor) -> float:
    """NaN where none is scored."""
    scored = values[~values.isnan()]
    return float(scored.max()) if len(scored) else float("nan")
