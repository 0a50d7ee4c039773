"""What a trial found, as plain numbers: the result of its record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.checks import Checks
from holdfast.constraints import Promise
from holdfast.controls import Case
from holdfast.drift import NO_SCALE, PREACTIVATION_UNIT, RELATIVE_UNIT
from holdfast.funnel import funnel_of
from holdfast.measure import Measurement, median, rate, rate_where, relative
from holdfast.paths import Paths
from holdfast.problem import Problem
from holdfast.recovery import SENTENCES, Recovery, summary_of
from holdfast.regain import Regained
from holdfast.saes.sae import Guarantee
from holdfast.second_opinions import opinions_of, rates_of
from holdfast.setting import Setting
from holdfast.strata import by_depth
from holdfast.unclamped import NOT_AHEAD, Unclamped
from holdfast.undone import Undone

_UNITS = {
    "clean_answer_nll": "nats a token",
    "reply_perplexity": "perplexity without any edit",
    "reply_foreign_letters": "share of letters",
    "fidelity_token_f1": "token F1 with the clean answer",
    "fidelity_rouge_l": "ROUGE-L with the clean answer",
    "fidelity_embedding": "cosine with the clean answer, unrelated ones about 0",
    "fidelity_z": "standard deviations from unrelated answers",
}

_REASONS = {
    "reply_foreign_letters": "there is no letter to compare",
    "fidelity_embedding": "there is no text to compare",
}
"""Why such a measure has no value; of the others the test of fidelity says it."""


@dataclass(frozen=True)
class Found:
    """Everything a trial made on the way. turned [n]: margin in the other order of clamp and
    perturbation; undone: what of it takes the clamp back, alone and left out; bare: what the
    perturbation does without the clamp."""

    setting: Setting
    case: Case
    problem: Problem
    recovery: Recovery
    checks: Checks
    turned: Tensor
    promise: Promise
    regained: Regained
    undone: Undone
    paths: Paths | None = None
    bare: Unclamped | None = None


def result_of(found: Found) -> dict[str, Any]:
    """The `result` of a record: plain numbers and words, the same for every run of one trial."""
    setting, case, problem, recovery = found.setting, found.case, found.problem, found.recovery
    checks, promise, regained = found.checks, found.promise, found.regained
    clusters = case.batch.clusters
    recovered = regained.recovered
    smallest = recovery.smallest_norm.double() / problem.reference_norm.double()
    reached = ~smallest.isnan()
    measurements: list[Measurement] = [
        rate("recovery_rate", recovered, clusters),
        rate("goal_rate", reached, clusters),
        median(
            # Never reached counts as infinitely far: a median over the prompts that did reach the
            # goal would flatter whoever reaches it seldom.
            "smallest_norm_relative", "share of the residual's norm",
            smallest.nan_to_num(nan=torch.inf), clusters,
            "half of the prompts or more never reached the goal inside the budget",
        ),
        median(
            "drift_relative", RELATIVE_UNIT, checks.drift_relative, clusters, NO_SCALE,
        ),
        median(
            "preactivation_drift", PREACTIVATION_UNIT, checks.preactivation_drift, clusters,
        ),
        median("decode_drift", "residual units", checks.decode_drift, clusters),
    ]  # fmt: skip
    measurements += checks.reactivation.measurements(recovered, clusters)
    led = checks.recovered  # by the margin, which is what the other order is read by too
    measurements.append(
        rate_where(
            "other_order_rate",
            found.turned > 0,
            led,
            clusters,
            "no positive margin in its own order",
        )
    )
    measurements.append(
        median("lane_steps", "passes of a lane", recovery.lane_steps.double(), clusters)
    )
    if found.bare is not None:
        measurements.append(
            median(
                "gain_unclamped", "share of the margin gained with the clamp on", found.bare.gain,
                clusters, NOT_AHEAD,
            )
        )  # fmt: skip
    measurements += found.undone.measurements
    measurements += _neighbors(setting)
    tried = setting.test.clusters
    measurements.append(rate("clean_rate", setting.clean, tried))
    if setting.spliced is not None:
        measurements.append(rate("spliced_rate", setting.spliced, tried))
    measurements += setting.capability
    for name, values in regained.measured.items():
        kind = name.partition(".")[0]
        reason = _REASONS.get(kind, regained.unscored)
        measurements.append(median(name, _UNITS[kind], values, clusters, reason))
    measurements += [rate(f"{name}_rate", hits, clusters) for name, hits in regained.alike.items()]
    measurements += rates_of(setting, case, regained)
    measurements += [*setting.scores, *setting.triggers]
    measurements += by_depth(setting.suppressed_margin[case.rows], recovered, smallest, clusters)
    drift = checks.drift_relative
    closed = recovery.closed_form
    return {
        "funnel": funnel_of(setting, case, recovered),
        "outcome": summary_of(recovery.outcomes),
        "search": {
            "steps_min": int(recovery.steps.min()),
            "steps_max": int(recovery.steps.max()),
            "lane_steps_min": int(recovery.lane_steps.min()),
            "lane_steps_max": int(recovery.lane_steps.max()),
        },
        "measurements": [m.model_dump(mode="json") for m in measurements],
        "checks": {
            "preactivation_drift_max": float(checks.preactivation_drift.max()),
            "preactivation_drift_max_absolute": float(checks.preactivation_drift_absolute.max()),
            "drift_relative_mean": float(drift.nanmean()),
            "drift_relative_max": float(drift.nan_to_num(-1.0).max())
            if drift.isfinite().any()
            else float("nan"),
            "drift_absolute_max": float(checks.drift_absolute.max()),
            "n_drift_undefined": int(drift.isnan().sum()),
            "drift_assigned_mean": float(checks.drift_assigned.nanmean()),
            "clamp_mismatch_mean": float(checks.clamp_mismatch.nanmean()),
            "firings_kept_mean": float(checks.firings_kept.nanmean()),
            "displacement_mean": float(checks.displacement.nanmean()),
            "decode_drift_mean": float(checks.decode_drift.mean()),
            "decode_drift_max": float(checks.decode_drift.max()),
            **checks.reactivation.pooled(),
            "gate_flips": int(checks.gate_flips.sum()),
            "gate_margin_min": float(checks.gate_margin.min()),
            "n_overtaken": int((checks.overtaken > 0).sum()),
            "others_active_mean": float(checks.others_active.mean()),
            "others_drift_max": float(checks.others_drift.max()),
            "others_on_mean": float(checks.others_on.mean()),
            "others_off_mean": float(checks.others_off.mean()),
            "rounding_floor_mean": float(checks.floor(promise).mean()),
            "rounding_floor_max": float(checks.floor(promise).max()),
            "preactivation_drift_mean": float(checks.preactivation_drift.mean()),
            "preactivation_drift_elsewhere_max": float(checks.preactivation_drift_elsewhere.max()),
            "preactivation_drift_anchor_max": float(checks.preactivation_drift_anchor.max()),
            "preactivation_drift_answer_max": _largest(checks.preactivation_drift_answer),
            "undo_cosine_mean": float(checks.undo_cosine.nanmean()),
            "decoder_share_mean": float(checks.decoder_share.nanmean()),
            "guarantee": weakest(problem),
            "sites": [str(site) for site in problem.sites],
            "norm_relative_max": float(checks.norm_relative.max()),
            "budget_relative": float((problem.radius / problem.reference_norm).max()),
            "promise": promise,
            "exact": promise != "nothing",
            "broken_max": float(checks.broken(promise).max()),
            "broken_mean": float(checks.broken(promise).mean()),
            "drift_generated_max": float(regained.drift.max()),
            "null_dimension": int(recovery.null_dimension.min()),
            "null_dimension_max": int(recovery.null_dimension.max()),
            "closed_form_error_max": _largest(recovery.smallest_norm / closed.norm - 1),
            "closed_form_error_min": -_largest(1 - recovery.smallest_norm / closed.norm),
            "free_share_mean": float(closed.share.nanmean()),
            "replay": problem.replay.extent,
            "other_order_margin_max": _largest((found.turned - checks.margin).abs()),
            "replay_error": _largest((checks.margin - recovery.margin.double()).abs()),
        },
        "undo": found.undone.record,
        "labels": _labels(found),
        "opinions": opinions_of(setting, regained),
        "readout": case.batch.readout.facts,
        "caveat": "" if setting.behavior is None else setting.behavior.caveat,
        "paths": None if found.paths is None else found.paths.record,
        "explained": setting.explained,
        "features": case.features.model_dump(mode="json"),
        "intervention": setting.intervention.model_dump(mode="json"),
        "trace": list(recovery.trace),
        **case.measured,
    }


def _neighbors(setting: Setting) -> list[Measurement]:
    """What the intervention leaves of behaviors it was not meant for."""
    made = []
    for name, (batch, clean, suppressed) in setting.neighbors.items():
        for condition, shown in (("clean", clean), ("suppressed", suppressed)):
            made.append(rate(f"neighbor.{name}.{condition}", shown, batch.clusters))
        left = f"neighbor.{name}.relative"
        made.append(relative(left, suppressed, clean, batch.clusters, "there are no prompts"))
    return made


def _labels(found: Found) -> dict[str, dict[str, int]]:
    """Condition → label → replies, where a behavior is read from text; of the prompts tried for
    clean and suppressed, of those audited for recovered."""
    setting = found.setting
    if setting.observed is None or setting.changed is None:
        return {}
    seen = {
        "clean": setting.observed.labels,
        "suppressed": setting.changed.labels,
        "recovered": found.regained.labels,
    }
    return {name: dict(sorted(Counter(labels).items())) for name, labels in seen.items()}


def unsearched(setting: Setting, case: Case) -> dict[str, Any]:
    """The `result` of a control whose finding is that no prompt is left to search."""
    nothing = torch.zeros(0, dtype=torch.bool)
    measured = [rate(name, nothing, ()) for name in ("recovery_rate", "goal_rate")]
    measured += [
        median(name, unit, nothing.double(), (), case.if_empty)
        for name, unit in (
            ("smallest_norm_relative", "share of the residual's norm"),
            ("drift_relative", RELATIVE_UNIT),
            ("preactivation_drift", PREACTIVATION_UNIT),
        )
    ]
    counts = dict.fromkeys(SENTENCES, 0)
    return {
        "funnel": funnel_of(setting, case, nothing),
        "outcome": {"outcome": "not_searched", "sentence": case.if_empty, "counts": counts},
        "measurements": [m.model_dump(mode="json") for m in (*measured, *_neighbors(setting))],
        "checks": dict.fromkeys(_READ) | {"n_drift_undefined": 0},
        "labels": {},
        "features": case.features.model_dump(mode="json"),
        "intervention": setting.intervention.model_dump(mode="json"),
        "trace": [],
        **case.measured,
    }


_READ = (
    "preactivation_drift_max", "preactivation_drift_max_absolute", "drift_relative_mean",
    "drift_relative_max", "budget_relative", "promise", "exact",
)  # fmt: skip
"""Checks that summaries read of every trial; None where nothing was searched."""


def _largest(values: Tensor) -> float:
    """The largest finite value; NaN if there is none."""
    known = values[values.isfinite()]
    return float(known.max()) if len(known) else float("nan")


def weakest(problem: Problem) -> Guarantee:
    """What unchanged pre-activations guarantee, at the held site where that is least."""
    order: tuple[Guarantee, ...] = ("none", "margin", "exact")
    return min((bank.guarantee for bank in problem.held.values()), key=order.index)
