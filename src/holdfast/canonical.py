"""The one canonicalizer: what a trial's identity and every checksum are computed from.

Nothing else turns an object into the text that is hashed: pydantic and `json.dumps` write small
floats differently, so two ways of doing it would be two identities for one trial.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PLAIN = frozenset((str, int, bool, type(None)))

# The version of the record and of the trial's identity: raised when either changes its meaning.
SCHEMA = 1


def canonical_json(obj: Any) -> str:
    """`obj` as JSON with sorted keys, no spaces and ASCII only, the same on every machine.

    Only dict (with str keys), list, str, int, float, bool and None are taken, no subclasses: what
    would be written differently than it reads back has no identity. A float is written as Python's
    repr, so 1.0 and 1 differ. Raises TypeError, and ValueError for NaN and infinities, naming the
    path of the offending value.
    """
    if not _plain(obj):
        _check(obj, "$")  # says where
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(obj: Any) -> str:
    """The sha256 of `canonical_json(obj)`, 64 hex digits."""
    return hashlib.sha256(canonical_json(obj).encode("ascii")).hexdigest()


def trial_id(trial: dict[str, Any]) -> str:
    """The identity of a trial: 16 hex digits of the hash of its canonical JSON and the schema."""
    return digest({"schema": SCHEMA, "trial": trial})[:16]


def sha256_file(path: Path | str) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path | str, patterns: Sequence[str]) -> str:
    """The sha256 over the relative names and contents of the files that match any glob pattern.

    Files are taken in the order of their names, so where the folder lies does not matter; a name
    that is a link counts with the content it points to. Raises FileNotFoundError where nothing
    matches: a hash of nothing would be the same for every model.
    """
    if isinstance(patterns, str):
        raise TypeError(f"expected a sequence of patterns, got the string {patterns!r}")
    folder = Path(folder)
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not found:
        raise FileNotFoundError(f"no file in {folder} matches {', '.join(patterns)}")
    tree = {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}
    return digest(tree)


def _plain(value: Any) -> bool:
    """Whether `_check` would find nothing; of a large record that is most of what a hash costs."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(_plain, value.values()))
    if kind is list:
        return all(map(_plain, value))
    if kind is float:
        return math.isfinite(value)
    return kind in _PLAIN


def _check(value: Any, path: str) -> None:
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(
                    f"{path} has the key {key!r} of type {type(key).__name__}: expected str"
                )
            _check(item, f"{path}.{key}")
    elif kind is list:
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
    elif kind is float:
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value!r}: expected a finite number, or null and a reason")
    elif kind not in (str, int, bool, type(None)):
        raise TypeError(
            f"{path} is a {kind.__module__}.{kind.__qualname__}: "
            "expected dict, list, str, int, float, bool or None"
        )
