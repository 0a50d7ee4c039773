"""A comparison as words and a table, for the terminal and for a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from holdfast.atomic import write_atomic
from holdfast.compare import Comparison, Contrast, Pair, Value
from holdfast.config import Config
from holdfast.errors import CompareError
from holdfast.published.beside import Beside, PublishedComparison
from holdfast.significance import SIGNIFICANT
from holdfast.wording import (
    NOTHING,
    arm_name,
    norm,
    p_values,
    percent,
    points,
    points_range,
    power,
    power_range,
    share,
    times,
)


@dataclass(frozen=True)
class Table:
    """What a comparison shows. head: what must be known before the table; foot: how to read it."""

    title: str
    head: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    foot: tuple[str, ...]


class Notes:
    """Footnotes: a text that stands beside several rows is written once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, texts: Sequence[str]) -> str:
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
        return " ".join(f"[{self.texts.index(text) + 1}]" for text in texts)

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(f"[{i}] {text}" for i, text in enumerate(self.texts, 1))


class Comparisons(Config):
    """What the JSON file holds."""

    comparisons: tuple[Comparison | PublishedComparison, ...]


def write_comparisons(made: Sequence[Comparison | PublishedComparison], path: Path) -> Path:
    """Write them as a self-contained page or as JSON, by the file's name. Raises CompareError."""
    if path.suffix == ".json":
        text = Comparisons(comparisons=tuple(made)).model_dump_json(indent=1) + "\n"
    elif path.suffix in (".html", ".htm"):
        env = Environment(
            loader=PackageLoader("holdfast.report", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        css = (files("holdfast.report") / "templates" / "page.css").read_text()
        text = env.get_template("compare.html.j2").render(
            tables=[page_of(each) for each in made], css=Markup(css)
        )
    else:
        raise CompareError(f"a comparison is written to a .html or .json file, got {path.name!r}")
    write_atomic(path, text.encode())
    return path


def page_of(comparison: Comparison | PublishedComparison) -> Table:
    """The comparison in words; without its notes' column where there are none."""
    if isinstance(comparison, Comparison):
        table = _of_runs(comparison)
    else:
        table = _of_published(comparison)
    if any(row[-1] for row in table.rows):
        return table
    return replace(table, columns=table.columns[:-1], rows=tuple(row[:-1] for row in table.rows))


# --- Two runs -------------------------------------------------------------------------------------


def _of_runs(made: Comparison) -> Table:
    first, second = made.runs
    notes = Notes()
    rows = tuple(_pair_row(pair, notes) for pair in made.pairs)
    head = [f"1: {first}", f"2: {second}"]
    if made.differs:
        head.append(f"All matched trials differ in: {'; '.join(made.differs)}")
    elif any(pair.differs for pair in made.pairs):
        head.append("Matched trials differ in what the notes of the last column say.")
    else:
        head.append("Matched trials are the same trials: no field differs.")
    for name, alone in zip(made.runs, made.unmatched, strict=True):
        if alone:
            more = f"; and {len(alone) - 8} more" if len(alone) > 8 else ""
            head.append(f"Only in {name}: {'; '.join(alone[:8])}{more}")
    return Table(
        title="point by point",
        head=tuple(head),
        columns=(
            "trial", "recovered 1", "recovered 2", "valid in both", "1 − 2 [95%]", "p (Holm)",
            "norm 1, 2", "norm 1 ÷ 2 [95%]", "drift 1, 2", "notes",
        ),
        rows=rows,
        foot=(
            *notes.lines,
            "recovered: share of each run's own valid prompts. 1 − 2: difference in percentage "
            "points; paired over the prompts valid in both where there are any (with the two rates "
            "on these), else unpaired (Newcombe).",
            "p: exact test that paired rates are equal, whole clusters exchanged (McNemar's where "
            "every prompt is its own); in brackets after Holm's correction for all rows here. None "
            "where even full disagreement of so many independent prompts would not reach "
            f"{SIGNIFICANT:g}.",
            "norm: median smallest norm, relative to the residual (not by half: half of the "
            "prompts or more were never reached); ÷: median paired ratio, a goal never reached "
            "counting as infinitely far. drift: largest of a pre-activation.",
        ),
    )  # fmt: skip


def _pair_row(pair: Pair, notes: Notes) -> tuple[str, ...]:
    shared = NOTHING
    if pair.shared:
        one, two = (percent(value.estimate) for value in pair.shared)
        shared = f"{pair.n_shared}: {one}, {two}"
    name = [pair.audit, pair.constraint, *pair.point]
    return (
        ", ".join(name if pair.control == "none" else [*name, arm_name(pair.control)]),
        *(_rate(value) for value in pair.rates),
        shared,
        _points(pair.rate),
        p_values(pair.rate.test if pair.rate else None),
        ", ".join(map(_norm, pair.norms)),
        _ratio(pair.norm),
        ", ".join(power(value) for value in pair.drifts),
        notes.mark(pair.differs),
    )


def _rate(value: Value) -> str:
    if value.estimate is None:
        return "no prompt"
    if value.low is None or value.high is None:
        return percent(value.estimate)
    return f"{share(value.low, value.estimate, value.high)} of {value.n}"


def _points(contrast: Contrast | None) -> str:
    """A difference of rates in percentage points."""
    if contrast is None or contrast.value.estimate is None:
        return NOTHING
    found = contrast.value
    ends = points_range(found.low, found.high)
    return " ".join(filter(None, (points(found.estimate), ends, _paired(contrast))))


def _paired(contrast: Contrast) -> str:
    return "" if contrast.paired else "unpaired"


def _norm(value: Value) -> str:
    """A median smallest norm, as the report has it: nothing where nothing was searched."""
    if not value.n:
        return NOTHING
    return "not by half" if value.estimate is None else norm(value.estimate)


def _ratio(contrast: Contrast | None) -> str:
    if contrast is None:
        return NOTHING
    found = contrast.value
    if found.low is None or found.low == found.high:
        return times(found.estimate)
    return f"{times(found.estimate)} [{times(found.low)}, {times(found.high)}]"


# --- Published figures ----------------------------------------------------------------------------


def _of_published(made: PublishedComparison) -> Table:
    notes = Notes()
    rows = tuple(_beside_row(row, notes) for row in made.rows)
    return Table(
        title=f"beside published:{made.name}",
        head=(
            f"this run ({made.run}): {made.of}",
            f"published: {made.published_of}",
            f"source: {made.source}",
            "Another model, other prompts or another search: differences are between two settings, "
            "and agreement is no replication.",
        ),
        columns=(
            "published", "measure", "figure [95%]", "this run's trial", "here [95%]",
            "here − published", "notes",
        ),
        rows=rows,
        foot=(
            *notes.lines,
            "Notes say in what a figure is unlike the run's (or why the run has none), and what "
            "to know of it. here − published: in points, unpaired "
            "(Newcombe), for rates with an interval on both sides.",
        ),
    )  # fmt: skip


def _beside_row(row: Beside, notes: Notes) -> tuple[str, ...]:
    rate = row.measure.endswith("_rate")
    return (
        row.label,
        row.measure.replace("_", " "),
        _figure(row.published, rate),
        row.trial or NOTHING,
        NOTHING if row.ours is None else _figure(row.ours, rate),
        _points(row.difference),
        notes.mark([*row.unlike, *([row.note] if row.note else [])]),
    )


def _figure(value: Value, rate: bool) -> str:
    if rate:
        return _rate(value)
    return f"{power(value.estimate)} {power_range(value.low, value.high)}".strip()
