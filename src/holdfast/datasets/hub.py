"""Rows of a dataset on the hub, or in its cache on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from holdfast.datasets import DatasetKind, sha256_of_files
from holdfast.datasets.unread import left_unread
from holdfast.errors import StudyError

_COMMIT = re.compile("[0-9a-f]{40}")
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"


class Hub(DatasetKind):
    """A dataset by hub id: one split of one config, at one revision.

    config: the folder it is in, as `wmdp-bio`; None for a dataset without configs. file: its path
    in the repository, where it is not `<config>/<split>-….parquet` or the like. revision: a branch,
    tag or commit; the trial keeps the commit it stood for when the study was read. Nothing but
    these files is downloaded, and those once.
    """

    kind: Literal["hub"] = "hub"
    id: str
    config: str | None = Field(None, pattern=_NAME)
    split: str = Field("test", pattern=_NAME)
    file: str | None = Field(None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$")
    revision: str = Field("main", min_length=1)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _inside(cls, file: str | None) -> str | None:
        if file is not None and ".." in Path(file).parts:
            raise ValueError("a path inside the repository cannot contain '..'")
        return file

    @model_validator(mode="after")
    def _resolved(self) -> Hub:
        """Commit and hash, filled in. What has both, a record's say, is not looked up."""
        known = self.sha256 is not None and _COMMIT.fullmatch(self.revision)
        if known or left_unread():
            return self
        try:
            folder = self._snapshot()
            found = self._found(folder)
        except StudyError as error:
            raise ValueError(str(error)) from None
        # Still being made: nobody has seen it without them.
        object.__setattr__(self, "revision", folder.name)
        object.__setattr__(self, "sha256", found[1])
        return self

    @property
    def label(self) -> str:
        where = self.file or "/".join(part for part in (self.config, self.split) if part)
        return f"{self.id} ({where})"

    @property
    def origin(self) -> str:
        return f"{self.label} at {self.revision}"

    def files(self) -> tuple[Path, ...]:
        return self._found(self._snapshot())[0]

    def _snapshot(self) -> Path:
        """The revision's folder, named by its commit, with the split's files downloaded.

        Raises StudyError if neither the hub nor its cache has it.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(
                snapshot_download(
                    self.id,
                    repo_type="dataset",
                    revision=self.revision,
                    allow_patterns=self._patterns(),
                )
            )
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise StudyError(
                f"{self.label} at revision {self.revision!r}: the hub gave "
                f"{type(error).__name__}, and its cache on this machine does not have it; check "
                "id and revision, the network, and whether its terms must be accepted first"
            ) from None

    def _found(self, folder: Path) -> tuple[tuple[Path, ...], str]:
        """The split's files in a snapshot and their hash. Raises StudyError if it is another."""
        patterns = self._patterns()
        matches = (sorted(path for path in folder.glob(p) if path.is_file()) for p in patterns)
        files = tuple(next((found for found in matches if found), ()))
        if not files:
            there = sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*.*"))
            raise StudyError(
                f"{self.label}: no such file at revision {folder.name}; looked for "
                f"{', '.join(patterns)}; downloaded so far: {', '.join(there[:10]) or 'nothing'}. "
                'Check `config` and `split`, or name it with file = "…"'
            )
        sha256 = sha256_of_files(files)
        if self.sha256 not in (None, sha256):
            raise StudyError(
                f"{self.label}: expected sha256 {self.sha256}, got {sha256}; delete the dataset "
                "from the hub's cache, or take `sha256` out of the study to use it as it is"
            )
        return files, sha256

    def _patterns(self) -> list[str]:
        """Where a split can be in a repository, the usual layout first."""
        if self.file is not None:
            return [self.file]
        folders = (f"{self.config}/", f"data/{self.config}/") if self.config else ("data/", "")
        endings = ("-*.parquet", ".parquet", ".jsonl", ".json", ".csv")
        names = [f"{self.split}{ending}" for ending in endings]
        return [folder + name for name in names for folder in folders]
