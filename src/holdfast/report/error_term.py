"""What the SAE's error carries: behavior, capability, clamp and recovery as less of it is passed
on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.interventions import INTERVENTIONS, InterventionKind
from holdfast.measure import Measurement, rate
from holdfast.report.data import Arm, AuditData, Point, ReportData
from holdfast.report.figures import DASHES, Figure, label_safe, shade
from holdfast.report.panels import SCALES, band, panel
from holdfast.report.section import Section
from holdfast.wording import percent

ORDERS = {
    "clamp_then_perturbation": "vector added after the clamp",
    "perturbation_then_clamp": "vector passes through the clamp",
}
LINES: tuple[tuple[str, str, str], ...] = (
    ("capability", "behavior, SAE in place, no clamp", "#57606a"),
    ("clamped", "behavior under the clamp", "#e8702a"),
    ("recovered", "recovered, of its own valid prompts", "#1f8ad2"),
    ("common", "recovered, of prompts valid at every α", "#12a594"),
)
"""Rates over α: key, name, color."""


@dataclass(frozen=True)
class Texts:
    """How well other texts are predicted with the SAE in place, no feature changed: loss and
    accuracy of the next token, and how much these are above what they are without the SAE, paired
    by text; None where nothing was changed."""

    loss: Measurement
    accuracy: Measurement
    more_loss: Measurement | None
    more_accuracy: Measurement | None


@dataclass(frozen=True)
class Alpha:
    """One point of a sweep over the share α of the SAE's error that is passed on."""

    alpha: float
    value: str
    n_valid: int
    n_common: int
    survive: Measurement
    capability: Measurement
    clamped: Measurement
    recovered: Measurement
    common: Measurement
    norm: float | None
    drift: float
    texts: Texts | None


def section(data: ReportData) -> Section | None:
    """None where no audit varies the error term."""
    sweeps: list[dict[str, Any]] = []
    figures = []
    for audit in data.audits:
        for (constraint, order, saes), points in _sweeps(audit):
            rows = _rows(points)
            label = f"{audit.name}, {constraint}: {ORDERS.get(order, order)}"
            drawn = _figure(len(sweeps), label, rows)
            figures.append(drawn)
            explained: Mapping[str, float] = next(
                (e for p in points if (e := p.main.result.get("explained"))), {}
            )
            sweeps.append(
                {
                    "name": audit.name, "constraint": constraint, "order": ORDERS.get(order, order),
                    "saes": saes, "rows": rows, "figure": drawn, "explained": explained,
                    "several": len({row.value for row in rows}) > 1,
                    "texts": any(row.texts for row in rows),
                }
            )  # fmt: skip
    if not sweeps:
        return None
    fidelity = _fidelity(sweeps)
    for index, group in enumerate(fidelity):
        if group["texts"]:
            group["figure"] = _losses(index, group)
            figures.append(group["figure"])
    context = {
        "sweeps": sweeps,
        "fidelity": fidelity,
        "texts": any(sweep["texts"] for sweep in sweeps),
    }
    return Section("error_term", "What the SAE's error carries", context, tuple(figures))


def _fidelity(sweeps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sweeps that differ in their SAEs alone, the one that explains most first; none where an
    audit has one SAE."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for sweep in sweeps:
        if sweep["explained"]:
            key = (sweep["name"], sweep["constraint"], sweep["order"])
            groups.setdefault(key, []).append(sweep)
    return [
        {
            "name": name, "constraint": constraint, "order": order,
            "alphas": [row.alpha for row in own[0]["rows"]],
            "sweeps": sorted(own, key=lambda sweep: -min(sweep["explained"].values())),
            "texts": any(sweep["texts"] for sweep in own),
            "figure": None,
        }
        for (name, constraint, order), own in groups.items()
        if len(own) > 1
    ]  # fmt: skip


Key = tuple[str, str, tuple[str, ...]]


def _sweeps(audit: AuditData) -> Iterator[tuple[Key, list[Point]]]:
    """Points of an audit that differ in the error term alone, by constraint, order and SAEs."""
    groups: dict[Key, dict[float, Point]] = {}
    for point in audit.points:
        alpha = _alpha(point)
        if alpha is not None:
            saes = tuple(f"{sae.site} {sae.sha256[:8]}" for sae in point.main.trial.subject.saes)
            key = (point.constraint, str(point.main.recovery.order), saes)
            groups.setdefault(key, {}).setdefault(alpha, point)
    for key, points in groups.items():
        if len(points) > 1:
            yield key, [points[alpha] for alpha in sorted(points, reverse=True)]


def _alpha(point: Point) -> float | None:
    """The share of the error passed on; None for an intervention without one such number."""
    kind = INTERVENTIONS.parse(point.main.result["intervention"])
    alpha = getattr(kind, "error_scale", None) if isinstance(kind, InterventionKind) else None
    return None if alpha is None else float(alpha)


def _rows(points: Sequence[Point]) -> list[Alpha]:
    audited = [{row["id"]: row for row in point.main.audited} for point in points]
    common = set.intersection(*(set(rows) for rows in audited))
    made = []
    for point, rows in zip(points, audited, strict=True):
        main = point.main
        alpha = _alpha(point)
        assert alpha is not None
        clean = main.measured("clean_rate")
        spliced = main.measured("spliced_rate")
        assert clean is not None
        stages = main.result["funnel"]["stages"]
        valid = list(rows.values())
        # With all of the error passed on the SAE in place changes nothing.
        kept = [alpha == 1.0 or row["spliced"] == 1.0 for row in valid]
        shared = [rows[name] for name in sorted(common)]
        made.append(
            Alpha(
                alpha=alpha,
                value=str(main.result["intervention"].get("value")),
                n_valid=len(valid),
                n_common=len(shared),
                survive=_rate(kept, valid),
                capability=Measurement.model_validate(spliced or clean),
                clamped=_remaining(clean, stages),
                recovered=_rate([bool(row["recovered"]) for row in valid], valid),
                common=_rate([bool(row["recovered"]) for row in shared], shared),
                norm=main.row["norm_relative_median"],
                drift=point.drift,
                texts=_texts(main),
            )
        )
    return made


def _texts(main: Arm) -> Texts | None:
    """None where the study named no texts."""

    def measured(name: str) -> Measurement | None:
        found = main.measured(f"texts.{name}")
        return None if found is None else Measurement.model_validate(found)

    loss, accuracy = measured("loss.clean"), measured("accuracy.clean")
    if loss is None or accuracy is None:
        return None
    return Texts(
        measured("loss.spliced") or loss,
        measured("accuracy.spliced") or accuracy,
        measured("loss.difference"),
        measured("accuracy.difference"),
    )


def _rate(hits: Sequence[bool], rows: Sequence[Mapping[str, Any]]) -> Measurement:
    return rate("rate", torch.tensor(hits, dtype=torch.bool), [str(row["cluster"]) for row in rows])


def _remaining(clean: Mapping[str, Any], stages: Mapping[str, int]) -> Measurement:
    """Of the prompts that showed the behavior, those that still do under the clamp; prompts taken
    as independent, since only counts of the others are kept."""
    n = stages["clean"]
    hits = torch.arange(n) < n - stages["suppressed"]
    return rate("clamped", hits, [str(i) for i in range(n)])


def _figure(index: int, label: str, rows: Sequence[Alpha]) -> Figure:
    alphas, traces = [row.alpha for row in rows], []
    for key, name, color in LINES:
        style = {"color": color, "dash": "solid"}
        traces.append(band(1, alphas, [getattr(row, key) for row in rows], name, style))
    what = f"Rates over the share of the SAE's error passed on: {label_safe(label)}"
    y = ("share of prompts", SCALES["share"])
    return panel(f"error-{index}", what, traces, _over(alphas), y)


def _losses(index: int, group: Mapping[str, Any]) -> Figure:
    """How much worse other texts are predicted with each SAE in place, over α."""
    traces = []
    for place, sweep in enumerate(group["sweeps"]):
        told = [(row.alpha, row.texts.more_loss) for row in sweep["rows"] if row.texts is not None]
        name = f"explains {percent(min(sweep['explained'].values()))}"
        style = {
            "color": shade(place, len(group["sweeps"])),
            "dash": DASHES[place % len(DASHES)],
        }
        traces.append(band(1, [alpha for alpha, _ in told], [m for _, m in told], name, style))
    label = f"{group['name']}, {group['constraint']}: {group['order']}"
    what = f"Loss that each SAE adds on other texts, over the error passed on: {label_safe(label)}"
    y = ("nats a token more", {"rangemode": "tozero"})
    return panel(f"error-loss-{index}", what, traces, _over(group["alphas"]), y)


def _over(alphas: Sequence[float]) -> tuple[str, dict[str, Any]]:
    """A horizontal axis from all of the error to none."""
    marks = {"autorange": "reversed", "tickmode": "array", "tickvals": list(alphas)}
    return "α: share of the SAE's error passed on", marks
