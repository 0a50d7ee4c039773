"""A run beside another run: the same trials matched, and every difference between them named.

Rates on different prompts are never compared without those on the prompts that both have (METHODS
B). What is compared at once is corrected for being several (Holm).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.canonical import digest
from holdfast.config import Config
from holdfast.errors import CompareError
from holdfast.grid import CONSTRAINT, VARIANT, Point, describe, label
from holdfast.run import open_run
from holdfast.statistics import (
    Corrected,
    Interval,
    clustered_rate,
    corrected,
    difference,
    paired_bootstrap,
    paired_ratio,
    paired_test,
)
from holdfast.trial import Trial


class Value(Config):
    """A figure with its interval; None where it was not measured, or is infinite."""

    estimate: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0

    @classmethod
    def of(cls, interval: Interval) -> Value:
        estimate, low, high = (
            float(x) if isfinite(x) else None
            for x in (interval.estimate, interval.low, interval.high)
        )
        return cls(estimate=estimate, low=low, high=high, n=interval.n)

    @classmethod
    def measured(cls, measurement: Mapping[str, Any]) -> Value:
        return cls(**{name: measurement[name] for name in ("estimate", "low", "high", "n")})

    @property
    def interval(self) -> Interval | None:
        if self.estimate is None or self.low is None or self.high is None:
            return None
        return Interval(self.estimate, self.low, self.high, 0.95, "as stored", self.n, self.n)


class Contrast(Config):
    """What two sides differ by: first minus second of rates, first over second of norms.

    paired: over prompts that both have. p: exact, that both have one rate; p_holm: the same among
    all that are compared here; p_least: what that would be if all of the n_units independent units
    had disagreed, there and everywhere.
    """

    value: Value
    paired: bool
    method: str
    p: float | None = None
    p_holm: float | None = None
    n_units: int = 0
    p_least: float | None = None

    @property
    def test(self) -> Corrected | None:
        """None where the two were not tested."""
        if self.p is None or self.p_holm is None or self.p_least is None:
            return None
        return Corrected(self.p, self.p_holm, self.n_units, self.p_least)


class Pair(Config):
    """One trial of each run. differs: the fields in which these two differ, beyond what all do.

    rates, norms (median smallest, relative), drifts (largest, of a pre-activation) of each run on
    its own valid set; shared: prompts valid in both, and the rates on them.
    """

    audit: str
    constraint: str
    control: str
    point: tuple[str, ...]
    differs: tuple[str, ...]
    rates: tuple[Value, Value]
    shared: tuple[Value, Value] | None
    rate: Contrast | None
    norms: tuple[Value, Value]
    norm: Contrast | None
    drifts: tuple[float | None, float | None]

    @property
    def n_shared(self) -> int:
        return self.shared[0].n if self.shared else 0


class Comparison(Config):
    """Two runs. differs: fields in which all matched trials differ, the same way; unmatched: trials
    of one run alone, by name."""

    runs: tuple[str, str]
    differs: tuple[str, ...]
    pairs: tuple[Pair, ...]
    unmatched: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Finished:
    """A stored trial: its place on the grid, its result, and the rows that were searched."""

    trial: Trial
    point: Point
    result: Mapping[str, Any]
    audited: tuple[Mapping[str, Any], ...]

    @property
    def constraint(self) -> str:
        return self.trial.label

    @property
    def name(self) -> str:
        parts = [self.trial.audit, self.constraint, *describe(self.point)]
        kind = self.trial.control.kind
        return ", ".join(parts if kind == "none" else [*parts, kind.replace("_", " ")])

    def measurement(self, name: str) -> Value:
        found = [m for m in self.result["measurements"] if m["name"] == name]
        return Value.measured(found[0]) if found else Value(estimate=None)

    def rows(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """Searched prompts by id and text: ids alone can be those of other prompts elsewhere."""
        return {(str(row["id"]), str(row["text_sha256"])): row for row in self.audited}


@dataclass(frozen=True)
class Side:
    """A run for comparing. axes: audit → the paths its grid varies; attempts: what was tried in the
    prompt, which stands beside published figures alone."""

    name: str
    trials: tuple[Finished, ...]
    axes: Mapping[str, frozenset[str]]
    attempts: tuple[Finished, ...] = ()


def read_side(folder: Path) -> Side:
    """Every finished trial of a run, verified. Raises StoreError where there is no run."""
    store, plan, _ = open_run(folder)
    finished = [trial for trial in plan.trials if store.has(trial.id)]
    if not finished:
        raise CompareError(f"{folder} has no finished trial yet; `holdfast run` goes on with it")
    return side_of(
        str(folder),
        [
            Finished(
                trial=trial,
                point=plan.points.get(trial.id, {}),
                result=store.load(trial.id)["result"],
                audited=tuple(row for row in store.examples(trial.id) if row.get("outcome")),
            )
            for trial in finished
        ],
    )


def side_of(name: str, finished: Sequence[Finished]) -> Side:
    """Searches and attempts apart, and what each audit's grid varies."""
    trials = tuple(each for each in finished if each.trial.searches)
    axes: dict[str, frozenset[str]] = defaultdict(frozenset)
    for each in trials:
        axes[each.trial.audit] |= frozenset(each.point) - {CONSTRAINT}
    attempts = tuple(each for each in finished if not each.trial.searches)
    return Side(name, trials, axes, attempts)


def compare(left: Side, right: Side) -> Comparison:
    """Match the trials of two runs and compare each two. Raises CompareError if none match."""
    matched, alone = _match(left, right)
    if not matched:
        raise CompareError(
            f"{left.name} and {right.name} have no point in common. The first has "
            f"{_some(left)}; the second {_some(right)}. Trials are matched by audit, behavior, "
            "constraint, control and what the grids vary"
        )
    fields = [_differences(a.trial, b.trial) for a, b in matched]
    shared = [line for line in fields[0] if all(line in own for own in fields)]
    pairs = [
        _pair(a, b, tuple(line for line in own if line not in shared))
        for (a, b), own in zip(matched, fields, strict=True)
    ]
    return Comparison(
        runs=(left.name, right.name), differs=tuple(shared), pairs=_corrected(pairs),
        unmatched=(tuple(f.name for f in alone[0]), tuple(f.name for f in alone[1])),
    )  # fmt: skip


def _some(side: Side) -> str:
    names = [each.name for each in side.trials if each.trial.control.kind == "none"]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{'; '.join(names[:4])}{more}"


# --- Matching -------------------------------------------------------------------------------------


def _match(
    left: Side, right: Side
) -> tuple[list[tuple[Finished, Finished]], tuple[list[Finished], list[Finished]]]:
    """The trials at the same point, each with its like; and those of either side without one.

    Where several of the other run are at the same point, because it varies what this one does not,
    the one with the fewest other fields is its like, and none if that is not a single one.
    """
    pairs, found = [], set()
    by_key = defaultdict(list)
    for each in right.trials:
        by_key[_key(each, left, right)].append(each)
    for each in left.trials:
        others = by_key[_key(each, left, right)]
        ranked = sorted(others, key=lambda o: len(_differences(each.trial, o.trial)))
        n = [len(_differences(each.trial, other.trial)) for other in ranked[:2]]
        if len(ranked) == 1 or (len(ranked) > 1 and n[0] < n[1]):
            pairs.append((each, ranked[0]))
            found |= {each.trial.id, ranked[0].trial.id}
    alone = tuple([t for t in side.trials if t.trial.id not in found] for side in (left, right))
    return pairs, (alone[0], alone[1])


def _key(each: Finished, left: Side, right: Side) -> str:
    """Audit, behavior, constraint, control, and the value of whatever either grid varies there."""
    trial = each.trial
    mine, other = (side.axes.get(trial.audit, frozenset()) for side in (left, right))
    axes: dict[str, Any] = {}
    for path in sorted(mine | other):
        by_name = path.split(".")[0] in (VARIANT, "subject", "ignorant")
        if not by_name:
            axes[path] = value_at(trial, path)
        elif path in mine & other:  # a trial knows these by hash: only grids can say what they are
            axes[path] = each.point[path]
    kinds = [trial.behavior.kind, each.constraint, trial.control.kind]
    return digest([trial.audit, *kinds, axes])


def value_at(trial: Trial, path: str) -> Any:
    """A trial's value at a dotted path, None where there is none."""
    value: Any = trial.described()
    for part in path.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _differences(a: Trial, b: Trial) -> list[str]:
    """`path: first → second` for every field of two trials that differs; of things of two kinds,
    the kinds alone."""
    first, second = _leaves(a.described()), _leaves(b.described())
    differ = [p for p in sorted({*first, *second}) if first.get(p) != second.get(p)]
    kinds = [p.removesuffix("kind") for p in differ if p.endswith(".kind")]
    return [
        f"{path}: {_shown(first.get(path))} → {_shown(second.get(path))}"
        for path in differ
        if not any(path.startswith(kind) and path != f"{kind}kind" for kind in kinds)
    ]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    return {
        k: v for key, item in value.items() for k, v in _leaves(item, f"{prefix}{key}.").items()
    }


def _shown(value: Any) -> str:
    text = "none" if value is None else label(value)
    return f"{text[:10]}…" if isinstance(value, str) and len(value) == 64 else text


# --- Differences ----------------------------------------------------------------------------------


def _pair(a: Finished, b: Finished, differs: tuple[str, ...]) -> Pair:
    rates = a.measurement("recovery_rate"), b.measurement("recovery_rate")
    norms = (
        a.measurement("smallest_norm_relative"),
        b.measurement("smallest_norm_relative"),
    )
    ours, theirs = a.rows(), b.rows()
    keys = [key for key in ours if key in theirs]
    both = [(ours[key], theirs[key]) for key in keys]
    drifts = [each.result["checks"]["preactivation_drift_max"] for each in (a, b)]
    return Pair(
        audit=a.trial.audit,
        constraint=a.constraint,
        control=a.trial.control.kind,
        point=tuple(describe(a.point)),
        differs=differs,
        rates=rates,
        shared=_shared(both) if both else None,
        rate=_paired_rate(both) if both else _unpaired_rate(*rates),
        norms=norms,
        norm=_paired_norm(both) if both else None,
        drifts=(drifts[0], drifts[1]),
    )


Both = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _clusters(both: Both) -> list[str]:
    return [str(one["cluster"]) for one, _ in both]


def _recovered(both: Both) -> tuple[list[bool], list[bool]]:
    return [bool(one["recovered"]) for one, _ in both], [bool(two["recovered"]) for _, two in both]


def _shared(both: Both) -> tuple[Value, Value]:
    one, two = (
        Value.of(clustered_rate(np.array(hits), _clusters(both))) for hits in _recovered(both)
    )
    return one, two


def _paired_rate(both: Both) -> Contrast:
    one, two = _recovered(both)
    clusters = _clusters(both)
    interval = paired_bootstrap(one, two, "mean", clusters)
    return Contrast(
        value=Value.of(interval), paired=True, method=f"{interval.method}; sign flips of clusters",
        p=paired_test(one, two, clusters), n_units=len(set(clusters)),
    )  # fmt: skip


def _unpaired_rate(one: Value, two: Value) -> Contrast | None:
    if one.interval is None or two.interval is None:
        return None
    interval = difference(one.interval, two.interval)
    return Contrast(value=Value.of(interval), paired=False, method=interval.method)


def _paired_norm(both: Both) -> Contrast | None:
    """The median ratio of smallest norms; a goal never reached counts as infinitely far."""
    one, two = ([_norm(row) for row in side] for side in zip(*both, strict=True))
    interval = paired_ratio(one, two, _clusters(both))
    if not interval.n:
        return None
    return Contrast(value=Value.of(interval), paired=True, method=interval.method)


def _norm(row: Mapping[str, Any]) -> float:
    if row["outcome"] in ("diverged", "infeasible"):
        return nan
    value = row["smallest_norm_relative"]
    return inf if value is None or not isfinite(value) else float(value)


def _corrected(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Every p-value with its correction for all that were tested here."""
    rates = [pair.rate for pair in pairs]
    tests = corrected(
        [nan if rate is None or rate.p is None else rate.p for rate in rates],
        [0 if rate is None else rate.n_units for rate in rates],
    )
    return tuple(
        pair if pair.rate is None or isnan(test.p)
        else pair.model_copy(update={"rate": pair.rate.model_copy(
            update={"p_holm": test.adjusted, "p_least": test.least})})
        for pair, test in zip(pairs, tests, strict=True)
    )  # fmt: skip
