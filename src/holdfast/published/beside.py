"""A run beside published figures. They are of other things, and every row says of which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import numpy as np

from holdfast.compare import Contrast, Finished, Side, Value, value_at
from holdfast.config import Config
from holdfast.errors import CompareError
from holdfast.grid import describe, label
from holdfast.published import Published, PublishedPoint, published_names, read_published
from holdfast.statistics import Interval, difference
from holdfast.study import headline_constraint

ANOTHER = "attack"
"""The coordinate of figures made by other means than a residual perturbation: no run has them."""


class Beside(Config):
    """A published figure, and the run's at the same point where it has one.

    trial: which of the run's, empty for none; unlike: coordinates in which the two differ; note:
    the published figure's own.
    """

    label: str
    measure: str
    published: Value
    trial: str = ""
    ours: Value | None = None
    difference: Contrast | None = None
    unlike: tuple[str, ...] = ()
    note: str = ""


class PublishedComparison(Config):
    """A run and a set of published figures: what each is of, and the figures."""

    run: str
    of: str
    name: str
    source: str
    published_of: str
    rows: tuple[Beside, ...]


def beside(run: Side, published: Published) -> PublishedComparison:
    """Put the figures side by side. Raises CompareError if they are about another behavior."""
    mains = [
        each
        for each in run.trials
        if each.trial.control.kind == "none" and each.trial.behavior.kind == published.behavior
    ]
    if not mains:
        kinds = sorted({each.trial.behavior.kind for each in run.trials})
        raise CompareError(
            f"{published.name} has figures about {published.behavior}, and {run.name} audits "
            f"{', '.join(kinds)}; published figures about that: {', '.join(about(run)) or 'none'}"
        )
    subjects = dict.fromkeys(
        f"{each.trial.subject.name}, {' + '.join(s.site for s in each.trial.subject.saes)}"
        for each in mains
    )
    rows = [row for point in published.points for row in _rows(run, mains, point)]
    return PublishedComparison(
        run=run.name, of="; ".join(subjects), name=published.name, source=published.source,
        published_of=published.subject, rows=tuple(rows),
    )  # fmt: skip


def beside_named(run: Side, name: str | None) -> list[PublishedComparison]:
    """The run beside a set of figures, or beside every set about its behaviors.

    Raises UnknownNameError or CompareError, with the names there are.
    """
    if name is not None:
        return [beside(run, read_published(name))]
    names = about(run)
    if not names:
        raise CompareError(
            f"no published figures are about what {run.name} audits; there are "
            f"{', '.join(published_names())}"
        )
    return [beside(run, read_published(each)) for each in names]


def about(run: Side) -> list[str]:
    """The sets of published figures on behaviors that the run audits."""
    kinds = {each.trial.behavior.kind for each in run.trials}
    return [name for name in published_names() if read_published(name).behavior in kinds]


def _rows(run: Side, mains: list[Finished], point: PublishedPoint) -> list[Beside]:
    """A row for every trial at the figure's point; one without a trial where there is none."""
    interval = point.interval
    bare = Beside(
        label=point.label,
        measure=point.measure,
        published=Value.of(interval)
        if interval
        else Value(estimate=point.estimate, n=point.n or 0),
        note=point.note,
    )
    if ANOTHER in point.where:
        return [bare.model_copy(update={"unlike": (f"another attack: {point.where[ANOTHER]}",)})]
    read = MEASURES.get(point.measure)
    if read is None:
        return [bare.model_copy(update={"unlike": ("not measured by this tool",)})]
    found = [each for each in mains if _is_at(run, each, mains, point.where)]
    if not found:
        return [bare.model_copy(update={"unlike": (_nowhere(mains, point.where),)})]
    rows: dict[tuple[Value, tuple[str, ...]], list[str]] = {}
    for each in found:  # what is the same of several trials is said once
        rows.setdefault((read(each), _unlike(each, point.where)), []).append(each.name)
    return [
        bare.model_copy(
            update={
                "trial": names[0] if len(names) == 1 else f"{names[0]}; and {len(names) - 1} more",
                "ours": ours,
                "difference": _gap(ours, interval),
                "unlike": unlike,
            }
        )
        for (ours, unlike), names in rows.items()
    ]


def _gap(ours: Value, published: Interval | None) -> Contrast | None:
    if published is None or ours.interval is None:
        return None
    gap = difference(ours.interval, published)
    return Contrast(value=Value.of(gap), paired=False, method=gap.method)


def _is_at(run: Side, each: Finished, mains: list[Finished], where: Mapping[str, Any]) -> bool:
    """Whether it is under the figure's constraint, and at its values of what the run varies.

    A figure that does not depend on the constraint is put beside the one to read first.
    """
    own = [e.constraint for e in mains if e.trial.audit == each.trial.audit]
    wanted = where.get("constraint", headline_constraint(own))
    varied = run.axes.get(each.trial.audit, frozenset())
    return each.constraint == wanted and all(
        value_at(each.trial, path) == value for path, value in where.items() if path in varied
    )


def _nowhere(mains: list[Finished], where: Mapping[str, Any]) -> str:
    points = "; ".join(dict.fromkeys(", ".join([e.constraint, *describe(e.point)]) for e in mains))
    return f"no such point in this run, which has {points}"


def _unlike(each: Finished, where: Mapping[str, Any]) -> tuple[str, ...]:
    """Coordinates of the figure that are not the trial's."""
    out = []
    for path, value in where.items():
        if path == "constraint":
            continue
        ours = value_at(each.trial, path)
        if path == "intervention.value":  # chosen on the tune split, where several are offered
            ours = each.result["intervention"].get("value", ours)
        if ours != value:
            out.append(f"{path}: {label('not set' if ours is None else ours)} here, {label(value)}")
    return tuple(out)


def _mean(column: str) -> Callable[[Finished], Value]:
    def read(each: Finished) -> Value:
        found = [row.get(column) for row in each.audited]
        values = np.array(
            [float(value) for value in found if value is not None and isfinite(value)]
        )
        return Value(estimate=float(values.mean()) if values.size else None, n=int(values.size))

    return read


def _stage(name: str) -> Callable[[Finished], Value]:
    return lambda each: Value(estimate=float(each.result["funnel"]["stages"][name]))


def _drift_relative_median(each: Finished) -> Value:
    return each.measurement("drift_relative")


MEASURES: dict[str, Callable[[Finished], Value]] = {
    "recovery_rate": lambda each: each.measurement("recovery_rate"),
    "goal_rate": lambda each: each.measurement("goal_rate"),
    "smallest_norm_relative_median": lambda each: each.measurement("smallest_norm_relative"),
    "n_tried": _stage("tried"),
    "n_valid": _stage("valid"),
    "clean_margin_mean": _mean("clean_margin"),
    "suppressed_margin_mean": _mean("suppressed_margin"),
    "recovered_margin_mean": _mean("margin"),
    "drift_absolute_mean": _mean("drift_absolute"),
    "decode_drift_mean": _mean("decode_drift"),
    "drift_relative_mean": _mean("drift_relative"),
    "drift_relative_median": _drift_relative_median,
    "reactivated_within_eligible": lambda each: each.measurement("reactivated_within_eligible"),
    "reactivated_of_all": lambda each: each.measurement("reactivated_of_all"),
    "zero_reactivation_rate": lambda each: each.measurement("zero_reactivation_rate"),
}
"""Measures of published figures that a run has too, over its audited prompts."""
