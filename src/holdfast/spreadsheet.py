"""Tables that go through a spreadsheet program and come back, with no cell that it computes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from holdfast.errors import SheetError

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "＝", "＋", "－", "＠")
_SEPARATORS = ",;\t"


def neutralized(cell: str) -> str:
    """The cell so that no spreadsheet computes it (CWE-1236): an apostrophe in front.

    `restored` is its inverse.
    """
    return f"'{cell}" if _computed(cell) else cell


def restored(cell: str) -> str:
    """What `neutralized` was given."""
    return cell[1:] if cell.startswith("'") and _computed(cell[1:]) else cell


def _computed(cell: str) -> bool:
    return cell.startswith(_FORMULA) or cell.lstrip().startswith(_FORMULA)


def table_bytes(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> bytes:
    """A CSV of rows by column; what a row lacks is left empty, every cell is neutralized."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    writer.writerows([neutralized(row.get(column, "")) for column in columns] for row in rows)
    # With a byte order mark: without one Excel takes UTF-8 for something else.
    return ("\ufeff" + out.getvalue()).encode("utf-8", "backslashreplace")


def read_table(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV by column, restored, those without a cell left out.

    Takes commas, semicolons or tabs, whichever the program left. Raises SheetError for what is no
    CSV in UTF-8, has a required column not once, or a row of too many cells.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SheetError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    separator = max(_SEPARATORS, key=text.partition("\n")[0].count)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise SheetError(f"{path}: is no CSV: {error}") from None
    # Spreadsheets add empty cells at the end of lines, and leave them out.
    stripped = [_without_empty_end(line) for line in lines]
    columns = [column.strip() for column in stripped[0]] if stripped else []
    for column in required:
        if columns.count(column) != 1:
            what = "there twice" if column in columns else "missing"
            got = ", ".join(name[:20] for name in columns[:12])
            raise SheetError(f"{path}: column {column!r} is {what}; got {got}")
    rows = []
    for number, line in enumerate(stripped[1:], 2):
        if len(line) > len(columns):
            raise SheetError(
                f"{path}: row {number} has {len(line)} cells, expected at most {len(columns)}"
            )
        if line:
            cells = zip_longest(columns, line, fillvalue="")
            rows.append({column: restored(cell) for column, cell in cells})
    return rows


def _without_empty_end(line: Sequence[str]) -> list[str]:
    kept = list(line)
    while kept and not kept[-1].strip():
        kept.pop()
    return kept
