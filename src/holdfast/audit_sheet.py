"""A sheet on which people label replies without knowing where they come from.

Two files: the sheet (CSV), which goes to the annotators, and its key (JSON), which does not. Only
the key says which example and condition a row is and what the automatic judges called it. The sheet
shows texts only where they are to be revealed; otherwise annotators find a text by its hash.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from holdfast.atomic import write_atomic
from holdfast.canonical import canonical_json, digest
from holdfast.config import Config, nearest
from holdfast.errors import SheetError
from holdfast.judges import LABELS, Label
from holdfast.judges.agreement import Agreement, agreement
from holdfast.reply import Reply
from holdfast.spreadsheet import read_table, table_bytes

ANSWERS = ("label", "label_2", "adjudicated")
"""Columns for the first annotator, the second, and what they settled on where they differ."""
PEOPLE = "people"

_SHOWN = 8


@dataclass(frozen=True)
class AuditItem:
    """A reply to be labelled; labels: what automatic judges, by name, called it."""

    reply: Reply
    condition: str
    labels: Mapping[str, Label] = field(default_factory=dict)


class KeyRow(Config):
    """What a row of the sheet is."""

    id: str
    condition: str
    sha256: str
    labels: dict[str, Label]


class Key(Config):
    """A sheet's key: row id → what it is, in the order of the sheet. trial: whose replies."""

    sheet: str
    trial: str | None = None
    seed: int
    rows: dict[str, KeyRow]


@dataclass(frozen=True)
class LabelledRow:
    """A row as it came back; None where nobody wrote a label."""

    row_id: str
    of: KeyRow
    label: Label | None
    label_2: Label | None
    adjudicated: Label | None
    notes: str

    @property
    def settled(self) -> Label | None:
        """What people say: adjudicated, or what all who labelled it agree on, else None."""
        given = {label for label in (self.label, self.label_2) if label is not None}
        return self.adjudicated or (given.pop() if len(given) == 1 else None)


@dataclass(frozen=True)
class LabelledSheet:
    """A sheet that came back whole, in the sheet's order."""

    rows: tuple[LabelledRow, ...]

    @property
    def n_unlabelled(self) -> int:
        """Rows with no label at all."""
        return sum(row.label is row.label_2 is row.adjudicated is None for row in self.rows)

    @property
    def n_unsettled(self) -> int:
        """Rows whose annotators differ and that nobody adjudicated."""
        return sum(row.settled is None for row in self.rows) - self.n_unlabelled

    def with_second(self, other: LabelledSheet) -> LabelledSheet:
        """With the labels of a copy that another annotator filled in, as second ones.

        Raises SheetError if this sheet has second labels already, or both adjudicate differently.
        """
        rows = []
        for own, copy in zip(self.rows, other.rows, strict=True):
            given = copy.label or copy.label_2
            if own.label_2 is not None and given is not None:
                raise SheetError(f"row {own.row_id} has a second label in both sheets; empty one")
            if None is not own.adjudicated != copy.adjudicated is not None:
                raise SheetError(
                    f"row {own.row_id} is adjudicated as {own.adjudicated} and {copy.adjudicated}"
                )
            adjudicated = own.adjudicated or copy.adjudicated
            rows.append(replace(own, label_2=given or own.label_2, adjudicated=adjudicated))
        return LabelledSheet(tuple(rows))

    def between_annotators(self, clusters: Mapping[str, str] | None = None) -> Agreement:
        """The two annotators, before adjudication. clusters: example id → its independent unit, for
        the interval; a prompt's replies are one unit without it."""
        return agreement(
            {
                "label": [row.label for row in self.rows],
                "label_2": [row.label_2 for row in self.rows],
            },
            _units(self.rows, clusters),
        )

    def with_judges(self, clusters: Mapping[str, str] | None = None) -> dict[str, Agreement]:
        """What people settled on (`people`) against each automatic judge, by condition.

        A judge that is right about clean replies and wrong about recovered ones shows only so.
        """
        conditions = sorted({row.of.condition for row in self.rows})
        return {
            condition: _people_and_judges(
                [row for row in self.rows if row.of.condition == condition], clusters
            )
            for condition in conditions
        }

    def with_judges_together(self, clusters: Mapping[str, str] | None = None) -> Agreement:
        """The same over the replies of all conditions, among which labels differ."""
        return _people_and_judges(self.rows, clusters)


def _people_and_judges(
    rows: Sequence[LabelledRow], clusters: Mapping[str, str] | None
) -> Agreement:
    judges = sorted({judge for row in rows for judge in row.of.labels})
    people: list[str | None] = [row.settled for row in rows]
    said = {judge: [row.of.labels.get(judge) for row in rows] for judge in judges}
    return agreement({PEOPLE: people, **said}, _units(rows, clusters))


def _units(rows: Sequence[LabelledRow], clusters: Mapping[str, str] | None) -> list[str]:
    return [row.of.id if clusters is None else clusters[row.of.id] for row in rows]


def key_path(sheet: Path | str) -> Path:
    """Where a sheet's key lies, unless it was put elsewhere."""
    return Path(sheet).with_suffix(".key.json")


def write_sheet(
    path: Path | str,
    items: Sequence[AuditItem],
    seed: int,
    reveal: bool = False,
    key: Path | str | None = None,
    trial: str | None = None,
) -> Key:
    """Write a sheet and its key.

    Rows are shuffled by seed and numbered; neither number nor order says what a row is. reveal: put
    prompts and texts into the sheet. Raises SheetError for nothing to label, an example twice in
    one condition, or a file that is there already: labels may be in it.
    """
    path = Path(path)
    key_at = key_path(path) if key is None else Path(key)
    for file in (path, key_at):
        if file.exists():
            raise SheetError(f"{file} is there already; labels may be in it: choose another name")
    if not items:
        raise SheetError("expected replies to label, got none")
    for (id, condition), count in Counter((i.reply.id, i.condition) for i in items).items():
        if count > 1:
            raise SheetError(f"{id} is there {count} times as {condition}: expected it once")
    ordered = sorted(items, key=lambda item: (item.reply.id, item.condition))
    random.Random(f"audit sheet:{seed}").shuffle(ordered)
    rows = [
        KeyRow(
            id=item.reply.id,
            condition=item.condition,
            sha256=item.reply.sha256,
            labels=dict(item.labels),
        )
        for item in ordered
    ]
    sheet = "s" + digest([seed, [row.model_dump(mode="json") for row in rows]])[:6]
    made = Key(
        sheet=sheet,
        trial=trial,
        seed=seed,
        rows={f"{sheet}-{number:04d}": row for number, row in enumerate(rows, 1)},
    )
    cells = [
        {
            "row_id": row_id,
            "sha256": _hash_cell(item.reply.sha256),
            "cut": "yes" if item.reply.truncated else "no",
            "prompt": item.reply.prompt or "",
            "text": item.reply.text,
        }
        for row_id, item in zip(made.rows, ordered, strict=True)
    ]
    write_atomic(path, table_bytes(_columns(ordered, reveal), cells))
    write_atomic(key_at, (canonical_json(made.model_dump(mode="json")) + "\n").encode())
    return made


def _columns(items: Sequence[AuditItem], reveal: bool) -> list[str]:
    asked = ["prompt"] if any(item.reply.prompt for item in items) else []
    return ["row_id", "sha256", "cut", *([*asked, "text"] if reveal else []), *ANSWERS, "notes"]


def _hash_cell(sha256: str) -> str:
    # Bare, some hashes are numbers to a spreadsheet: 123e45 comes back as another text.
    return f"sha256:{sha256[:12]}"


def read_sheet(path: Path | str, key: Path | str | None = None) -> LabelledSheet:
    """A sheet that came back, with its key.

    Takes commas, semicolons or tabs, whichever the spreadsheet left, and labels in any case, with
    spaces for underscores. Rows may have been sorted, as a whole. Raises SheetError listing what is
    wrong: a label that is none (with the nearest ones), a row that is missing, twice, or another
    sheet's, and a row whose hash is another row's (one column was sorted without the others).
    """
    path = Path(path)
    known = read_key(key_path(path) if key is None else Path(key))
    table = read_table(path, ("row_id", "sha256", *ANSWERS, "notes"))
    wrong: list[str] = []
    found: dict[str, LabelledRow] = {}
    for number, cells in enumerate(table, 2):
        row_id = cells["row_id"].strip()
        if row_id not in known.rows:
            wrong.append(f"row {number}: {row_id[:20]!r} is no row of this sheet ({known.sheet}-…)")
            continue
        if row_id in found:
            wrong.append(f"row {number}: {row_id} is there twice")
            continue
        of = known.rows[row_id]
        if cells["sha256"].strip() != _hash_cell(of.sha256):
            wrong.append(f"row {number}: {row_id} has another row's sha256: was a column sorted?")
        answers: dict[str, Label | None] = {}
        for column in ANSWERS:
            try:
                answers[column] = _label(cells[column])
            except ValueError as error:
                wrong.append(f"row {number}: {column} {error}")
        found[row_id] = LabelledRow(
            row_id=row_id,
            of=of,
            label=answers.get("label"),
            label_2=answers.get("label_2"),
            adjudicated=answers.get("adjudicated"),
            notes=cells["notes"],
        )
    missing = [row_id for row_id in known.rows if row_id not in found]
    if missing:
        wrong.append(f"{len(missing)} rows are missing (first: {', '.join(missing[:3])})")
    if wrong:
        more = f" … and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise SheetError(f"{path}: {'; '.join(wrong[:_SHOWN])}{more}")
    return LabelledSheet(tuple(found[row_id] for row_id in known.rows))


def _label(cell: str) -> Label | None:
    """Raises ValueError with the nearest labels."""
    written = "_".join(cell.strip().casefold().replace("-", " ").split())
    if not written:
        return None
    for label in LABELS:
        if written == label:
            return label
    # The cell is not repeated in full: a text may have slipped into it.
    raise ValueError(f"{written[:20]!r} is no label: {nearest(written, LABELS)}")


def sheet_of(path: Path | str) -> str:
    """Which sheet a file is, by its first row. Raises SheetError for what is none."""
    table = read_table(Path(path), ("row_id",))
    return table[0]["row_id"].strip().rpartition("-")[0][:20] if table else ""


def read_key(path: Path) -> Key:
    """A sheet's key. Raises SheetError."""
    try:
        return Key.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise SheetError(
            f"{path}: the sheet's key is not there; say where it is, labels mean nothing without it"
        ) from None
    except (OSError, ValueError, ValidationError) as error:
        raise SheetError(f"{path}: is no key of an audit sheet: {error}") from None
