"""A grid: the dotted paths that vary, the values each takes, and what its points are called.

An axis is a path of a trial's fields; the axis `variant` names tables of paths that move together.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from holdfast.config import nearest
from holdfast.errors import StudyError

Axis = Annotated[tuple[Any, ...], Field(min_length=1)]
Grid = dict[str, Axis]
Variants = dict[str, dict[str, Any]]
Point = dict[str, Any]
"""Path → value, in the order of the grid."""

VARIANT = "variant"
CONSTRAINT = "recovery.constraint.kind"
MAX_LABEL = 36

_VAGUE = ("relative", "absolute", "kind", "value", "test", "fit", "seed")
"""Last parts of a path that say little without the part before them."""


def points(grid: Mapping[str, tuple[Any, ...]]) -> list[Point]:
    """Every combination of one value an axis; a single empty point where there is no axis."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def expanded(point: Point, variants: Variants) -> Point:
    """The point with its variant's paths in the variant's place.

    Tables within a variant are paths too (`subject = {saes = …}` is `subject.saes`), except one
    with a `kind`, which replaces the whole. Raises StudyError for an unknown variant, or a path
    that a variant and an axis both set.
    """
    if VARIANT not in point:
        return point
    name = point[VARIANT]
    if name not in variants:
        raise StudyError(f"grid: no variant {name!r} under [variants]: {nearest(name, variants)}")
    out = _flat(variants[name])
    others = {path: value for path, value in point.items() if path != VARIANT}
    if twice := sorted(set(out) & set(others)):
        raise StudyError(f"grid: {twice[0]!r} is set by the variant {name!r} and by an axis")
    return out | others


def _flat(table: Mapping[str, Any], prefix: str = "") -> Point:
    out: Point = {}
    for key, value in table.items():
        path = prefix + key
        if isinstance(value, Mapping) and "kind" not in value:
            out |= _flat(value, f"{path}.")
        else:
            out[path] = value
    return out


def shown(point: Point, grid: Mapping[str, tuple[Any, ...]]) -> Point:
    """The coordinates that tell a point from others of its grid, and always the constraint."""
    return {
        path: value
        for path, value in point.items()
        if path == CONSTRAINT or len(grid.get(path, ())) > 1
    }


def axis_name(path: str) -> str:
    """A path as tables call it: its last part, or its last two where one says too little."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1] in _VAGUE else parts[-1:])


def label(value: Any) -> str:
    """A value as tables call it. Of a table, its kind or name first; SAEs by site and files."""
    text = _text(value)
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        first = [str(value[key]) for key in ("kind", "name", "site") if key in value]
        rest = [_text(v) for k, v in value.items() if k not in ("kind", "name", "site")]
        return " ".join(first + rest)
    if isinstance(value, list | tuple):
        return " + ".join(_text(item) for item in value)
    return str(value)


def describe(point: Point) -> list[str]:
    """A line's worth of words a coordinate, the constraint left out: it is named by itself."""
    return [
        f"{axis_name(path)}={label(value)}" for path, value in point.items() if path != CONSTRAINT
    ]


def is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
