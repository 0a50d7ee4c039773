"""Rows of texts that a dataset makes and does not read from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdfast.config import nearest
from holdfast.datasets import Row
from holdfast.errors import StudyError


def made_rows(
    label: str, made: Sequence[dict[str, Any]], required: Sequence[str], optional: Sequence[str]
) -> list[Row]:
    """The columns asked for of rows that all have the same ones. Raises StudyError for a required
    one that they have not; label: what it calls the dataset."""
    for name in required:
        if name not in made[0]:
            raise StudyError(f"{label}: there is no column {name!r}: {nearest(name, made[0])}")
    wanted = (*required, *optional)
    return [
        Row(number, {name: row[name] for name in wanted if name in row})
        for number, row in enumerate(made, 1)
    ]
