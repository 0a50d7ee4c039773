"""A study's forecast for people: a row for each audit and grid point, and what it rests on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from holdfast.batching import spelled
from holdfast.canonical import digest
from holdfast.forecast import Forecast
from holdfast.forecast.device import Range
from holdfast.forecast.scene import Scene
from holdfast.grid import describe

HEADINGS = (
    "audit", "constraint", "trials", "operations", "batch size", "memory", "if all is found",
    "if nothing is found",
)  # fmt: skip
"""`batch size` is the one asked for, or the most that fits of the kind of work of which the fewest
do; `memory` the peak at that."""


@dataclass(frozen=True)
class Row:
    """Trials that belong together: an audit at one grid point and its controls, or all of them.

    label: the constraint or attack, and what else tells the point from others.
    """

    audit: str
    label: str
    trials: Sequence[Forecast]

    @property
    def if_found(self) -> Range:
        return _sum([trial.if_found for trial in self.trials])

    @property
    def if_not_found(self) -> Range:
        return _sum([trial.if_not_found for trial in self.trials])

    @property
    def cells(self) -> tuple[str, ...]:
        # Comparing what is recovered can cost more than searching in vain.
        least, most = sorted(
            (
                sum(trial.found.all_flops for trial in self.trials),
                sum(trial.not_found.all_flops for trial in self.trials),
            )
        )
        fits = all(trial.fits for trial in self.trials)
        used = min(trial.scene.sizes.smallest for trial in self.trials)
        return (
            self.audit,
            self.label,
            str(len(self.trials)),
            _from_to(least, most),
            str(used) if fits else "none fits",
            amount(max(trial.peak for trial in self.trials), "B"),
            _between(self.if_found) if fits else "",
            _between(self.if_not_found) if fits else "",
        )

    def shares(self, which: Literal["found", "not_found"]) -> str:
        """Which stages take how much of the operations, the largest first; what takes less than one
        in a hundred is left out."""
        stages: Counter[str] = Counter()
        for trial in self.trials:
            for stage in trial.stages:
                stages[stage.name] += getattr(stage, which).all_flops
        whole = max(stages.total(), 1.0)
        told = [(name, of / whole) for name, of in stages.most_common() if of >= 0.01 * whole]
        return ", ".join(f"{name} {share:.0%}" for name, share in told)


def rows_of(forecasts: Sequence[Forecast]) -> list[Row]:
    """A row for each audit and grid point in order, and one for the whole study."""
    groups: dict[str, list[Forecast]] = {}
    for forecast in forecasts:
        trial = forecast.scene.trial
        key = digest([trial.audit, trial.label, forecast.point])
        groups.setdefault(key, []).append(forecast)
    rows = []
    for own in groups.values():
        trial = own[0].scene.trial
        rows.append(Row(trial.audit, ", ".join([trial.label, *describe(own[0].point)]), own))
    return [*rows, Row("all", "", list(forecasts))]


def rests_on(forecasts: Sequence[Forecast]) -> list[str]:
    """What was known and what was assumed, a sentence each."""
    heaviest: dict[str, Forecast] = {}
    said = []
    for forecast in forecasts:
        trial, device = forecast.scene.trial, forecast.device
        if trial.searches:
            kept = heaviest.setdefault(_subject_of(forecast), forecast)
            if forecast.peak > kept.peak:
                heaviest[_subject_of(forecast)] = forecast
        elif trial.attack.turns:
            said.append(
                f"{trial.attack.kind}: turns of {trial.attack.turns} for its scripts, each taken "
                "to be as long as the longest prompt."
            )
        said.append(f"{device.name}: {amount(device.memory, 'B')}; {device.source}.")
    said = [f"{what} {_memory_of(one)}" for what, one in heaviest.items()] + said
    whole = Row("all", "", forecasts)
    said.append(
        f"Of all operations: {whole.shares('found')} if all is found; "
        f"{whole.shares('not_found')} if nothing is."
    )
    said.append(
        "The memory of several GPUs adds up, but a whole SAE has to fit on one of them beside its "
        "share of the model; one at a time is at work."
    )
    said.append(
        "Every prompt is taken to be searched, and every answer to be as long as it may be. "
        "Not counted: loading, preflight, judges that are models, fitting probes, and neighbors "
        "and opposed prompts where no tokenizer is at hand. `if nothing is found` ends after the "
        "first harder search; each doubling that goes on to find something takes twice its steps."
    )
    return list(dict.fromkeys(said))


def _subject_of(forecast: Forecast) -> str:
    """What a forecast is of."""
    scene, prompts = forecast.scene, forecast.scene.prompts
    how = "as its tokenizer counts them" if prompts.measured else "as assumed"
    return (
        f"{scene.trial.audit}: {amount(scene.model.parameters, '')} parameters in "
        f"{scene.dtype}, {scene.model.n_blocks} blocks, d_model {scene.model.d_model}; "
        f"{_saes_of(scene)}; prompts of up to {prompts.width} tokens, {how}, "
        f"{prompts.n['fit']}/{prompts.n['tune']}/{prompts.n['test']} of fit/tune/test."
    )


def _saes_of(scene: Scene) -> str:
    """Their widths and sites, of many of one width the first site and the last."""
    widths = {shape.n_features for shape in scene.saes.values()}
    if len(scene.saes) > 2 and len(widths) == 1:
        where = f"{min(scene.saes)} to {max(scene.saes)}"
        return f"{len(scene.saes)} SAEs of {widths.pop():,} features each, from {where}"
    told = ", ".join(f"{shape.n_features:,} features at {s}" for s, shape in scene.saes.items())
    return f"SAE of {told}"


def _memory_of(forecast: Forecast) -> str:
    """What it holds."""
    held, scene = forecast.memory, forecast.scene
    found = held.discovery(scene.sizes)
    return (
        f"Memory: weights {amount(held.weights, 'B')}, discovery {amount(found, 'B')} beside "
        f"them, {amount(held.replay, 'B')} recorded for a batch of {scene.searched} rows, "
        f"{amount(held.row, 'B')} for a row of a full pass and {amount(held.lane, 'B')} for a "
        f"lane of the search. Rows at once: {spelled(scene.sizes)}."
    )


def table_of(forecasts: Sequence[Forecast], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(HEADINGS):
        table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
    *rows, whole = rows_of(forecasts)
    for row in rows:
        table.add_row(*row.cells)
    table.add_section()
    table.add_row(*whole.cells)
    return table


def as_json(forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """Every trial, and their sum."""
    whole = Row("all", "", forecasts)
    return {
        "trials": [
            {
                "audit": forecast.scene.trial.audit,
                "constraint": forecast.scene.trial.label,
                "control": forecast.scene.trial.control.kind,
                "attack": forecast.scene.trial.attack.kind,
                "point": forecast.point,
                **forecast.as_dict(),
            }
            for forecast in forecasts
        ],
        "seconds_if_found": list(whole.if_found),
        "seconds_if_not_found": list(whole.if_not_found),
    }


def amount(value: float, unit: str) -> str:
    """With three digits and a metric prefix, of powers of 1000."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if value < 999.5 or prefix == "E":
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    raise AssertionError


def _from_to(least: float, most: float) -> str:
    """Two amounts of operations; one where they look alike, and one unit where it is the same."""
    low, high = amount(least, "FLOP"), amount(most, "FLOP")
    if low == high:
        return high
    (digits, unit), other = low.split(), high.split()[1]
    return f"{digits if unit == other else low} to {high}"


def lasting(seconds: float) -> str:
    """Two digits of the largest fitting unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length or unit == "s":
            return f"{seconds / length:.2g} {unit}"
    raise AssertionError


def _between(seconds: Range) -> str:
    low, high = map(lasting, seconds)
    return high if low == high else f"{low} to {high}"


def _sum(ranges: Sequence[Range]) -> Range:
    return sum(r[0] for r in ranges), sum(r[1] for r in ranges)
