"""Datasets: rows with named columns, from a file or from the hub. One file a kind.

What a trial keeps of one is a hash and, for the hub, where it was published; never a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny

from holdfast.canonical import digest
from holdfast.config import Kind, nearest
from holdfast.datasets.rows import read, sha256_of
from holdfast.errors import StudyError
from holdfast.registry import Registry

DATASETS = Registry(
    "datasets",
    {
        "file": "holdfast.datasets.file:File",
        "held_out": "holdfast.datasets.held_out:HeldOut",
        "hub": "holdfast.datasets.hub:Hub",
        "invented": "holdfast.datasets.invented:Invented",
        "preset": "holdfast.datasets.preset:Preset",
    },
)


@dataclass(frozen=True)
class Row:
    """A row's cells by the names a behavior asks for, and which of the dataset's rows it is, from
    1."""

    number: int
    cells: dict[str, Any]


class DatasetKind(Kind):
    """A place rows can be read from.

    columns: what a behavior asks for → the column it is in, where the two names differ; several
    columns make one list. where: column → the values of the rows that are meant, an empty cell
    being ""; other rows are left out.
    """

    columns: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    where: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """What messages call it."""
        raise NotImplementedError

    @property
    def origin(self) -> str:
        """What manifests call it: which content it is, and never where it lies."""
        raise NotImplementedError

    def files(self) -> tuple[Path, ...]:
        """The files on disk, downloaded first if need be, proven to be those that were hashed.

        Raises StudyError.
        """
        raise NotImplementedError

    def rows(self, required: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
        """Every row that is meant, with the columns asked for and nothing else.

        Raises StudyError for files that cannot be read, hold no such rows or lack a column.
        """
        for name in self.columns:
            if name not in (*required, *optional):
                raise StudyError(
                    f"{self.label}: `columns` names {name!r}, which is not asked for: "
                    f"{nearest(name, (*required, *optional))}"
                )
        rows = [row for path in self.files() for row in read(path, self.label)]
        if not rows:
            raise StudyError(f"{self.label}: expected rows, got an empty file")
        needed = (*required, *(name for name in optional if name in self.columns))
        return [
            Row(
                number,
                {name: self._cell(row, name, number) for name in needed}
                | {name: row[name] for name in optional if name not in needed and name in row},
            )
            for number, row in self._meant(rows)
        ]

    def _meant(self, rows: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
        """The rows that `where` leaves, by number. Raises StudyError if it leaves none."""
        left = list(enumerate(rows, 1))
        for column, meant in self.where.items():
            values = (meant,) if isinstance(meant, str) else meant
            before, left = left, []
            for number, row in before:
                if column not in row:
                    raise StudyError(
                        f"{self.label}: row {number} has no column {column!r}, which `where` "
                        f"reads: {nearest(column, row)}"
                    )
                if _text(row[column]) in values:
                    left.append((number, row))
            if not left:
                there = sorted({_text(row[column])[:40] for _, row in before})
                raise StudyError(
                    f"{self.label}: no row has {' or '.join(map(repr, values))} in column "
                    f"{column!r}, which holds {', '.join(map(repr, there[:10]))}"
                )
        return left

    def _cell(self, row: dict[str, Any], name: str, number: int) -> Any:
        """What a row holds for `name`. Raises StudyError naming the columns there are."""
        column = self.columns.get(name, name)
        for each in (column,) if isinstance(column, str) else column:
            if each not in row:
                raise StudyError(
                    f"{self.label}: row {number} has no column {each!r} for {name!r}: "
                    f"{nearest(each, row)}; "
                    f'say where it is with columns = {{ {name} = "…" }}'
                )
        return row[column] if isinstance(column, str) else [row[each] for each in column]

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


Dataset = Annotated[SerializeAsAny[DatasetKind], BeforeValidator(DATASETS.parse)]


def sha256_of_files(files: Sequence[Path]) -> str:
    """The hash of one file's bytes; of the list of their hashes where there are several."""
    hashes = [sha256_of(path) for path in files]
    return hashes[0] if len(hashes) == 1 else digest(hashes)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
