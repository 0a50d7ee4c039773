"""Dotted paths into nested tables, as `--set` and a grid write them."""

from __future__ import annotations

import re
from typing import Any

from holdfast.errors import StudyError

_PART = re.compile(r'"([^"]+)"|([^."]+)')


def put(data: Any, path: str, value: Any) -> None:
    """Set a dotted path; a number is an index into a list, and a part in double quotes may hold
    dots, as in TOML. Raises StudyError on a dead end."""
    parts = [quoted or bare for quoted, bare in _PART.findall(path)]
    here = data
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) >= len(here):
                raise StudyError(
                    f"{path}: {part!r} is no index into the {len(here)} entries of "
                    f"{'.'.join(parts[:i])}"
                )
            key: Any = int(part)
        elif isinstance(here, dict):
            key = part
        else:
            raise StudyError(f"{path}: {'.'.join(parts[:i])} holds a value, not a table")
        if last:
            here[key] = value
        else:
            if isinstance(here, dict) and key not in here:
                here[key] = {}
            here = here[key]


def value_at(data: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for part in path.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data
