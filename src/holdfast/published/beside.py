"""A run beside published figures. They are of other things, and every row says of which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import isclose
from typing import Any

from holdfast.compare import Contrast, Finished, Side, Value, value_at
from holdfast.config import Config
from holdfast.datasets.preset import Preset
from holdfast.discovery.given import Given
from holdfast.errors import CompareError
from holdfast.grid import describe, is_numeric, label
from holdfast.published import Published, PublishedPoint, published_names, read_published
from holdfast.published.measures import MEASURES
from holdfast.statistics import Interval, difference
from holdfast.study import headline_constraint
from holdfast.trial import Trial

UNSAID = ("features", "features_of")
"""Coordinates that no study says: how the features were found elsewhere, and on which prompts."""

ATTACK = ("attack.kind", "attack.weight")
"""What a figure has to share that was made by other means than the audit's own search."""


def _dataset(trial: Trial) -> Any:
    """The prompt set audited: a published one by its short name, else the source's kind."""
    source = getattr(trial.behavior, "source", None)
    return source.name if isinstance(source, Preset) else getattr(source, "kind", source)


def _n_features(trial: Trial) -> Any:
    """How many features are clamped, as asked for: over all sites where they are named."""
    found = trial.discovery
    if isinstance(found, Given):
        return sum(len(entry.ids) for entry in found.features)
    return getattr(found, "n_features", None)


COORDINATES: dict[str, Callable[[Trial], Any]] = {
    "constraint": lambda trial: trial.label,
    "dataset": _dataset,
    "n_features": _n_features,
    "layers": lambda trial: "one" if len(trial.subject.saes) == 1 else "several",
}
"""Coordinates that are no path of a trial → how they are read from one."""


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
    own = about_it(run, published)
    if not own.trials:
        kinds = sorted({each.trial.behavior.kind for each in run.trials})
        raise CompareError(
            f"{published.name} has figures about {published.behavior}, and {run.name} audits "
            f"{', '.join(kinds)}; published figures about that: {', '.join(about(run)) or 'none'}"
        )
    subjects = dict.fromkeys(
        f"{each.trial.subject.name}, {' + '.join(s.site for s in each.trial.subject.saes)}"
        for each in own.trials
    )
    rows = [row for point in published.points for row in _rows(own, point)]
    return PublishedComparison(
        run=run.name, of="; ".join(subjects), name=published.name, source=published.source,
        published_of=published.subject, rows=tuple(rows),
    )  # fmt: skip


def about_it(run: Side, published: Published) -> Side:
    """What of a run can stand beside the figures: audits and attempts about the same behavior."""

    def own(trials: Sequence[Finished]) -> tuple[Finished, ...]:
        return tuple(
            each for each in trials
            if each.trial.control.kind == "none"
            and each.trial.behavior.kind == published.behavior
        )  # fmt: skip

    return Side(run.name, own(run.trials), run.axes, own(run.attempts))


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


def _rows(own: Side, point: PublishedPoint) -> list[Beside]:
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
    if point.reason:
        return [bare.model_copy(update={"unlike": (point.reason,)})]
    read = MEASURES.get(point.measure)
    if read is None:
        return [bare.model_copy(update={"unlike": ("not measured by this tool",)})]
    found = at_point(own, point.where)
    if not found:
        return [bare.model_copy(update={"unlike": (_nowhere(own, point.where),)})]
    if point.pooled:
        found = _most_of_one_audit(found)
        values = [read(each) for each in found]
        ours = _pooled(values, [len(each.audited) for each in found], point.pooled == "prompts")
        told = tuple(dict.fromkeys(s for each in found for s in unlike(each, point.where)))
        told += tuple(dict.fromkeys(s for each in found for s in _adapted(each)))
        update = {"trial": _names(found), "ours": ours, "unlike": told}
        return [bare.model_copy(update=update)]
    rows: dict[tuple[Value, tuple[str, ...]], list[Finished]] = {}
    for each in found:  # what is the same of several trials is said once
        told = (*unlike(each, point.where), *_adapted(each))
        rows.setdefault((read(each), told), []).append(each)
    return [
        bare.model_copy(
            update={
                "trial": _names(same),
                "ours": ours,
                "difference": _gap(ours, interval),
                "unlike": told,
            }
        )
        for (ours, told), same in rows.items()
    ]


def _adapted(each: Finished) -> tuple[str, ...]:
    """In what the search is not the published one that its constraint is kept for."""
    spec = each.trial.recovery
    return (f"adapted: {spec.adapted}",) if spec is not None and spec.adapted else ()


def _names(found: Sequence[Finished]) -> str:
    return found[0].name if len(found) == 1 else f"{found[0].name}; and {len(found) - 1} more"


def _gap(ours: Value, published: Interval | None) -> Contrast | None:
    if published is None or ours.interval is None:
        return None
    gap = difference(ours.interval, published)
    return Contrast(value=Value.of(gap), paired=False, method=gap.method)


def _most_of_one_audit(found: Sequence[Finished]) -> list[Finished]:
    """The trials of the audit that has most of them: a trial of another may be one of these."""
    by_audit: dict[str, list[Finished]] = defaultdict(list)
    for each in found:
        by_audit[each.trial.audit].append(each)
    return max(by_audit.values(), key=len)


def _pooled(values: Sequence[Value], counts: Sequence[int], by_prompts: bool) -> Value:
    """The mean of what several trials measured, which count alike or by their audited prompts."""
    weights = counts if by_prompts else [1] * len(values)
    known = [
        (value.estimate, weight)
        for value, weight in zip(values, weights, strict=True)
        if value.estimate is not None
    ]
    total = sum(weight for _, weight in known)
    estimate = sum(value * weight for value, weight in known) / total if total else None
    return Value(estimate=estimate, n=sum(value.n for value in values))


# --- Where a figure stands ------------------------------------------------------------------------


def at_point(own: Side, where: Mapping[str, Any]) -> list[Finished]:
    """The trials that a figure stands beside: of those under its constraint, or made by its attack,
    on its prompts, and at its values of what the run varies, those that differ from it in the
    fewest of its other coordinates.

    A figure that does not depend on the constraint is put beside the one to read first.
    """
    pool = _pool(own, where)
    there = [each for each in pool if _is_at(each, pool, where)]
    fewest = min((len(unlike(each, where)) for each in there), default=0)
    return [each for each in there if len(unlike(each, where)) == fewest]


def _pool(own: Side, where: Mapping[str, Any]) -> Sequence[Finished]:
    """What a figure may stand beside: searches, or attempts if it is of one."""
    return own.attempts if ATTACK[0] in where else own.trials


def _is_at(each: Finished, pool: Sequence[Finished], where: Mapping[str, Any]) -> bool:
    audit = [other for other in pool if other.trial.audit == each.trial.audit]
    if each.trial.searches:
        wanted = where.get("constraint", headline_constraint([e.constraint for e in audit]))
        if each.constraint != wanted:
            return False
    for path, value in where.items():
        if path in UNSAID or path == "constraint":
            continue
        ours = coordinate(each.trial, path)
        # Another published set is another question; a file may hold any.
        fixed = path in ATTACK or (path == "dataset" and _is_published(each.trial))
        if (fixed or _varies(audit, path)) and not _same(ours, value):
            return False
    return True


def _is_published(trial: Trial) -> bool:
    return isinstance(getattr(trial.behavior, "source", None), Preset)


def _varies(audit: Sequence[Finished], path: str) -> bool:
    first = coordinate(audit[0].trial, path)
    return any(not _same(coordinate(each.trial, path), first) for each in audit[1:])


def coordinate(trial: Trial, path: str) -> Any:
    """A trial's value of a figure's coordinate, None where it has none."""
    return COORDINATES[path](trial) if path in COORDINATES else value_at(trial, path)


def _same(a: Any, b: Any) -> bool:
    return isclose(a, b, rel_tol=1e-6) if is_numeric(a) and is_numeric(b) else bool(a == b)


def _nowhere(own: Side, where: Mapping[str, Any]) -> str:
    points = dict.fromkeys(
        ", ".join([each.constraint, *describe(each.point)]) for each in _pool(own, where)
    )
    return f"no such point in this run, which has {'; '.join(points) or 'no attack beside its own'}"


def unlike(each: Finished, where: Mapping[str, Any]) -> tuple[str, ...]:
    """Coordinates of the figure that are not the trial's."""
    out = []
    for path, value in where.items():
        if path == "constraint":
            continue
        if path in UNSAID:
            out.append(f"{path.replace('_', ' ')}: {label(value)}")
            continue
        ours = coordinate(each.trial, path)
        if path == "intervention.value":  # chosen on the tune split, where several are offered
            ours = each.result.get("intervention", {}).get("value", ours)
        if not _same(ours, value):
            out.append(f"{path}: {label('not set' if ours is None else ours)} here, {label(value)}")
    return tuple(out)
