"""Reading rows from a file: JSON lines, a JSON list, CSV, Parquet or plain text. Nothing that runs
code."""

from __future__ import annotations

import csv
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from holdfast.canonical import sha256_file
from holdfast.errors import StudyError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".parquet")


def check_suffix(path: Path) -> None:
    """Raise StudyError for a format that is not read: pickles and archives could run code."""
    if path.suffix.lower() not in SUFFIXES:
        raise StudyError(
            f"{path.name}: expected a file that ends in {', '.join(SUFFIXES)}, got "
            f"{path.suffix or 'no ending'!r}; convert it to one of them"
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, computed again only after the file was written again."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, mtime: int, inode: int) -> str:
    return sha256_file(path)


def read(path: Path, label: str) -> list[dict[str, Any]]:
    """The rows of one file as plain Python values. Raises StudyError that begins with `label`."""
    check_suffix(path)
    what, parse = {
        ".parquet": ("Parquet", _parquet), ".csv": ("CSV", _csv), ".txt": ("plain text", _lines),
    }.get(path.suffix.lower(), ("JSON", _json))  # fmt: skip
    try:
        rows = parse(path)
    except OSError as error:
        raise StudyError(f"{label}: cannot be read: {error}") from None
    except (ValueError, RecursionError, csv.Error) as error:  # pyarrow's are ValueErrors too
        raise StudyError(
            f"{label}: expected {what}, as its name ends in {path.suffix!r}, got something else: "
            f"{str(error).splitlines()[0]}"
        ) from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise StudyError(
                f"{label}: row {number} must be a table of column and value, got "
                f"{type(row).__name__}"
            )
    return rows


def _json(path: Path) -> list[Any]:
    """A list, or one object a line; `.json` is used for both."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows: list[Any] = json.loads(text)
        return rows
    rows = []
    # Not splitlines: it would also cut at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _lines(path: Path) -> list[Any]:
    """A row with the column `text` for each line that is not empty."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [{"text": line.strip()} for line in lines if line.strip()]


def _csv(path: Path) -> list[Any]:
    """A header and as many cells in every row; every value is a text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        header = next(lines, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise ValueError(f"the header names the column {twice[0]!r} twice")
        rows: list[Any] = []
        for cells in lines:
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"line {lines.line_num}: {len(cells)} cells under a header of {len(header)}"
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
    return rows


def _parquet(path: Path) -> list[Any]:
    from pyarrow.parquet import ParquetFile

    # Not read_table: it makes columns of `name=value` folders in the path.
    with ParquetFile(path) as file:
        rows: list[Any] = file.read().to_pylist()
    return rows
