"""Templates that an instruction is put into: a local file of the user's, known by its hash alone.

None for real models are shipped. A trial keeps the file's hash and the templates' names, never a
path and never a text.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import FieldSerializationInfo, field_serializer, model_validator

from holdfast.canonical import digest
from holdfast.config import Config, in_identity
from holdfast.datasets import sha256_of_files
from holdfast.errors import StudyError

PLACEHOLDER = "{instruction}"
SUFFIXES = (".json", ".toml", ".txt")
Script = tuple[str, ...]
"""What the user says, turn by turn; the placeholder stands in at least one of the turns."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")


def filled(turn: str, instruction: str) -> str:
    """A turn with the instruction in the placeholder's place. Other braces stay what they are."""
    return turn.replace(PLACEHOLDER, instruction)


class TemplateFile(Config):
    """A local file of templates, hashed when the study is read.

    JSON: a list, or an object of name and template; TOML: `name = template`; text: one template, in
    a conversation a turn a line. A template is a text or, for a conversation, a list of texts.
    Without a path it stands for what had that hash: an attack's own, or a record's.
    """

    path: str | None = None
    sha256: str = ""

    @model_validator(mode="before")
    @classmethod
    def _hashed(cls, data: Any) -> Any:
        """`"file.toml"` is short for `{path = "file.toml"}`. Raises ValueError for a file that
        holds no templates, or another content than the study says."""
        data = {"path": data} if isinstance(data, str) else data
        if not isinstance(data, dict) or data.get("path") is None:
            return data
        try:
            path = Path(str(data["path"])).expanduser()
            _parse(path)
            return data | {"sha256": _checked_hash(path, data.get("sha256") or None)}
        except StudyError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _known(self) -> TemplateFile:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError("templates need a `path`, or the 64 hex digits of a sha256")
        return self

    @field_serializer("path")
    def _path(self, path: str | None, info: FieldSerializationInfo) -> str | None:
        return None if in_identity(info) else path

    def read(self) -> dict[str, Script]:
        """Name → script. Raises StudyError if the file is gone, or another one than was hashed."""
        if self.path is None:
            raise StudyError(
                f"templates with sha256 {self.sha256[:12]}…: a record keeps no path; run the study "
                "it came from"
            )
        path = Path(self.path).expanduser()
        _checked_hash(path, self.sha256)
        return _parse(path)


def sha256_of_own(own: Mapping[str, Script]) -> str:
    """The hash that stands for templates which come with an attack."""
    return digest({name: list(script) for name, script in own.items()})


def _checked_hash(path: Path, expected: str | None) -> str:
    try:
        sha256 = sha256_of_files((path,))
    except OSError as error:
        raise StudyError(f"templates {path.name}: cannot be read: {error.strerror}") from None
    if expected not in (None, sha256):
        raise StudyError(
            f"templates {path.name}: the file changed: expected sha256 {expected}, got {sha256}; "
            "put the old file back, or take `sha256` out of the study to use this one"
        )
    return sha256


def _parse(path: Path) -> dict[str, Script]:
    """Name → script of a file. Raises StudyError naming file and template, never a text."""
    where = f"templates {path.name}"
    if path.suffix.lower() not in SUFFIXES:
        raise StudyError(
            f"{where}: expected a file that ends in {', '.join(SUFFIXES)}, got "
            f"{path.suffix or 'no ending'!r}"
        )
    try:
        found = _read(path)
    except OSError as error:
        raise StudyError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StudyError(
            f"{where}: expected {path.suffix[1:].upper()}, as its name ends, got something else "
            f"({type(error).__name__})"
        ) from None
    if isinstance(found, list):
        found = {str(number): each for number, each in enumerate(found, 1)}
    if not isinstance(found, dict):
        raise StudyError(
            f"{where}: expected a list of templates, or names with a template each, got "
            f"{type(found).__name__}"
        )
    if not found:
        raise StudyError(f"{where}: expected at least one template, got an empty file")
    return {name: _script(name, said, where) for name, said in found.items()}


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        return json.loads(text) if text.strip() else []
    if path.suffix.lower() == ".toml":
        return tomllib.loads(text)
    return [text.strip()] if text.strip() else []


def _script(name: str, said: Any, where: str) -> Script:
    if not _NAME.fullmatch(name):
        raise StudyError(
            f"{where}: a template's name is in every record: expected at most 40 letters, digits, "
            f"- and _, got {len(name)} characters"
        )
    turns = (said,) if isinstance(said, str) else said
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, str) for turn in turns):
        raise StudyError(
            f"{where}: template {name!r}: expected a text, or a list of texts for a conversation, "
            f"got {type(said).__name__}"
        )
    if not turns or not all(turn.strip() for turn in turns):
        raise StudyError(f"{where}: template {name!r}: expected a text in every turn, got none")
    if not any(PLACEHOLDER in turn for turn in turns):
        raise StudyError(
            f"{where}: template {name!r} has no {PLACEHOLDER}: put it where the instruction goes"
        )
    return tuple(turns)
