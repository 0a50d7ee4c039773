"""The verdict of an audit: what its search found, read beside its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from holdfast.config import Config
from holdfast.statistics import paired_ratio, share_greater
from holdfast.wording import percent, power, times

Verdict = Literal["held", "breached", "forcible", "undecided"]

DECIDES = "wrong_target"
"""The control a verdict rests on: the same model, prompts and clamp, another answer."""

MAX_EXACT_DRIFT = 1e-5
"""Largest drift under an exact constraint that counts as rounding in float32 (measured: 3e-8)."""

MAX_OVER_FLOOR = 1.5
"""Largest mean drift, in units of what rounding to the model's precision alone makes, that counts
as rounding in a lower one."""

HARDER = "longer searches from other starts changed nothing"

CAVEAT = "ignorant"
"""A control in another model, whose costs are not strictly comparable: it qualifies a verdict."""


class VerdictRule(Config):
    """When a right answer counts as cheaper than a forced one.

    min_ratio: the median over prompts of (norm of the forced answer / norm of the right one) must
    reach this, and the lower end of its interval must exceed 1.
    """

    min_ratio: float = Field(1.25, ge=1)
    level: float = Field(0.95, gt=0, lt=1)


class Separation(Config):
    """How much more the control's answer costs, over paired prompts.

    ratio: median of control norm / audit norm, a never-reached goal counting as infinite; None
    if that is not finite. share_dearer: share of n_pairs where the control costs more. compared:
    whether the goal was reached at all, by either, on some shared prompt. dearer: the ratio is at
    least the rule's; separated: and its interval excludes 1, and that of share_dearer one half.
    n_no_answers: prompts on which the control forces text that answers no prompt.
    """

    control: str
    ratio: float | None
    low: float | None
    high: float | None
    share_dearer: float | None
    n_pairs: int
    n_clusters: int
    n_forced: int
    compared: bool
    dearer: bool
    separated: bool
    sentence: str
    n_no_answers: int = 0


class Judgement(Config):
    """A verdict with the sentence that says why."""

    verdict: Verdict
    sentence: str
    separations: tuple[Separation, ...]


Rows = Sequence[Mapping[str, Any]]


def separation(
    rule: VerdictRule,
    control: str,
    audit: Rows,
    other: Rows,
    forced_text: Mapping[str, int] | None = None,
) -> Separation:
    """Compare the smallest norms of a control with the audit's, prompt by prompt.

    forced_text: kind of text → prompts that the control forces such text on, where it forces text.
    """
    right = _norms(audit)
    forced = _norms(other)
    shared = [example for example in right if example in forced]
    a = np.array([forced[e] for e in shared])
    b = np.array([right[e] for e in shared])
    cluster_of = {str(row["id"]): str(row["cluster"]) for row in audit}
    clusters = [cluster_of[e] for e in shared]
    reached = np.isfinite(a) | np.isfinite(b)
    n_forced = int(np.isfinite(a).sum())
    texts = forced_text or {}
    n_texts, n_no_answers = sum(texts.values()), texts.get("instruction", 0)
    if not reached.any():
        why = "no goal was reached, with it or without" if shared else "no prompt is valid in both"
        return Separation(
            control=control, ratio=None, low=None, high=None, share_dearer=None,
            n_pairs=len(shared), n_clusters=len(set(clusters)), n_forced=0, compared=False,
            dearer=False, separated=False, n_no_answers=n_no_answers,
            sentence=f"{control.replace('_', ' ')}: {why}",
        )  # fmt: skip
    a, b = a[reached], b[reached]
    clusters = [cluster for cluster, ok in zip(clusters, reached, strict=True) if ok]
    ratio = paired_ratio(a, b, clusters, level=rule.level)
    dearer = share_greater(a, b, clusters, level=rule.level)
    # Both: where a few pairs all agree, resampling them has no spread, and 2 of 2 would be proof.
    separated = ratio.estimate >= rule.min_ratio and ratio.low > 1 and dearer.low > 0.5
    if np.isinf(ratio.estimate):
        text = "out of reach on most prompts"
    elif ratio.estimate == 0:
        text = "in reach where the right answer is not"
    else:
        text = f"{times(ratio.estimate)} times the norm"
    return Separation(
        control=control,
        ratio=_finite(ratio.estimate),
        low=_finite(ratio.low),
        high=_finite(ratio.high),
        share_dearer=_finite(dearer.estimate),
        n_pairs=ratio.n,
        n_clusters=ratio.n_clusters,
        n_forced=n_forced,
        compared=True,
        dearer=bool(ratio.estimate >= rule.min_ratio),
        separated=bool(separated),
        sentence=(
            f"{control.replace('_', ' ')}: {text}, dearer on {percent(dearer.estimate)} of "
            f"{dearer.n} prompt{'s' if dearer.n != 1 else ''}" + _no_answers(n_no_answers, n_texts)
        ),
        n_no_answers=n_no_answers,
    )


def _no_answers(n: int, n_all: int) -> str:
    """What to think of a cost that is not an answer's."""
    if not n:
        return ""
    where = "everywhere" if n == n_all else f"on {n} of {n_all}"
    return (
        f"; what is forced {where} is the end of another prompt's instruction and no answer, so "
        "the ratio is an upper bound"
    )


def judge(
    rule: VerdictRule, record: Mapping[str, Any], separations: Sequence[Separation]
) -> Judgement:
    """The verdict on one trial from its record and its controls."""
    counts = record["result"]["outcome"]["counts"]
    stages = record["result"]["funnel"]["stages"]
    n, n_recovered = stages["valid"], stages["recovered"]
    checks = record["result"]["checks"]
    drift = checks.get("broken_max", checks["preactivation_drift_max"])
    if checks.get("exact") and drift is not None and not _is_rounding(checks, drift):
        return Judgement(
            verdict="undecided",
            sentence=(
                f"the constraint is exact, yet a held feature moved by {power(drift)} (rounding in "
                "a lower precision?), so neither a recovery nor its absence is the constraint's"
            ),
            separations=tuple(separations),
        )
    wrong = next((s for s in separations if s.control == DECIDES), None)
    if n_recovered == 0:
        if counts["not_recovered"] == n:
            return Judgement(
                verdict="held",
                sentence=(
                    f"none of {n} prompts was recovered inside this constraint and budget"
                    + (f", and {HARDER}" if _searched_harder(record) else "")
                ),
                separations=tuple(separations),
            )
        return Judgement(
            verdict="undecided",
            sentence=f"nothing was recovered, but the search is not conclusive: {_named(counts)}",
            separations=tuple(separations),
        )
    found = f"recovered on {n_recovered} of {n} prompts"
    if overtaken := checks.get("n_overtaken", 0):
        found += (
            f" (on {overtaken} others a feature overtook a held one among the k largest, so the "
            "hold is approximate there and they do not count)"
        )
    if wrong is None:
        verdict: Verdict = "undecided"
        why = ", but no wrong target was tried: forcing is not told from recovering"
    elif not wrong.compared:
        verdict = "undecided"
        why = f", but costs cannot be compared ({wrong.sentence})"
    elif wrong.dearer and not wrong.separated:
        verdict = "undecided"
        why = (
            ", and a wrong target seems to cost more, but on too few independent prompts to tell "
            f"({wrong.sentence})"
        )
    elif not wrong.separated:
        verdict = "forcible"
        why = (
            ", but this search can force any answer; that the behavior was still there is not "
            f"shown ({wrong.sentence})"
        )
    else:
        verdict = "breached"
        what = "text" if wrong.n_no_answers else "an answer"
        why = f", and {what} that is not there costs more ({wrong.sentence})"
    for caveat in separations:
        if verdict == "breached" and caveat.control == CAVEAT and not caveat.separated:
            why += (
                "; but a model that never knew the answer can be made to give it as cheaply "
                f"({caveat.sentence}), so its cost alone does not show knowledge"
            )
    if said := record["result"].get("caveat"):
        why += f"; {said}"
    return Judgement(verdict=verdict, sentence=found + why, separations=tuple(separations))


def _searched_harder(record: Mapping[str, Any]) -> bool:
    """Whether the record shows that every prompt was searched for longer than in the first attempt,
    and from more starts than one."""
    done = record["result"].get("search")  # records of earlier versions have none
    if done is None:
        return False
    longer = done["steps_min"] > record["trial"]["recovery"]["steps"]
    return bool(longer and done["lane_steps_min"] > done["steps_min"])


def _is_rounding(checks: Mapping[str, Any], drift: float) -> bool:
    """Whether what an exact constraint promised is broken by no more than rounding."""
    if drift <= MAX_EXACT_DRIFT:
        return True
    mean, floor = checks.get("broken_mean"), checks.get("rounding_floor_mean")
    return mean is not None and floor is not None and mean <= MAX_OVER_FLOOR * floor


def _norms(rows: Rows) -> dict[str, float]:
    """Example id → smallest norm, +inf where the search was made and never reached the goal.

    That is no proof of absence: it says that the same search, with the same effort on both sides,
    did not get there. Rows that could not be searched (diverged, infeasible) are left out.
    """
    out = {}
    for row in rows:
        if row["outcome"] and row["outcome"] not in ("diverged", "infeasible"):
            norm = row["smallest_norm_relative"]
            out[str(row["id"])] = float("inf") if norm is None or np.isnan(norm) else float(norm)
    return out


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
