"""Rows of a file on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    FieldSerializationInfo,
    ValidationInfo,
    field_serializer,
    field_validator,
)

from holdfast.config import in_identity
from holdfast.datasets import DatasetKind, sha256_of_files
from holdfast.datasets.rows import check_suffix
from holdfast.errors import StudyError
from holdfast.organism.assets import resolve


class File(DatasetKind):
    """A JSON-lines, JSON, CSV or Parquet file, or plain text with a row (column `text`) a line.

    Its content, not its path, is what counts: it is hashed when the study is read, and the trial
    keeps the hash alone. sha256: given in a study, a file of other content is refused.
    """

    kind: Literal["file"] = "file"
    path: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _there(cls, path: str | None) -> str | None:
        if path is not None:
            try:
                _sha256(path)
            except StudyError as error:
                raise ValueError(str(error)) from None
        return path

    @field_validator("sha256")
    @classmethod
    def _of_the_file(cls, given: str | None, info: ValidationInfo) -> str | None:
        if "path" not in info.data:
            return given  # reported there
        path = info.data["path"]
        if path is None:
            if given is None:
                raise ValueError("a file needs a `path`")
            return given  # from a record: which content it was is known, where it lay is not
        try:
            return _sha256(path, given)
        except StudyError as error:
            raise ValueError(str(error)) from None

    @field_serializer("path")
    def _path(self, path: str | None, info: FieldSerializationInfo) -> str | None:
        return None if in_identity(info) else path

    @property
    def label(self) -> str:
        return self.path or f"the file with sha256 {self.sha256}"

    @property
    def origin(self) -> str:
        return f"sha256:{self.sha256}"

    def files(self) -> tuple[Path, ...]:
        if self.path is None:
            raise StudyError(f"{self.label}: a record keeps no path; run the study it came from")
        _sha256(self.path, self.sha256)
        return (resolve(self.path),)


def _sha256(path: str, expected: str | None = None) -> str:
    """The file's hash. Raises StudyError if there is no such file or it is another one."""
    found = resolve(path)
    if not found.is_file():
        kind = "a folder" if found.is_dir() else "nothing"
        raise StudyError(f"{path}: expected a file, found {kind} there")
    check_suffix(found)
    try:
        sha256 = sha256_of_files((found,))
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error}") from None
    if expected not in (None, sha256):
        raise StudyError(
            f"{path}: the file changed: expected sha256 {expected}, got {sha256}; put the old file "
            "back, or take `sha256` out of the study to use this one"
        )
    return sha256
