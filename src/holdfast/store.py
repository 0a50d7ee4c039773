"""A run's folder: what is measured once, written whole or not at all, and never silently reused.

    runs/demo/  study.toml  study.json  lock  summary.json  batch_plan.json  report.html
    runs/demo/trials/<id>/  perturbation.safetensors  examples.parquet  record.json
    runs/demo/trials/<id>/  empty.json   where the trial had no prompt to search
    runs/demo/audits/  <sheet>.key.json  <sheet>.labels.json   where people label replies

A file appears under its name complete (temporary file in the same folder, fsync, rename), and
`record.json` is the last of its trial: where it exists the trial is finished, where it does not the
folder is unfinished work. No pickle anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from holdfast.atomic import write_atomic
from holdfast.canonical import digest, sha256_file
from holdfast.errors import DamagedRecordError, EmptyValidSetError, ForeignRunError, StoreError
from holdfast.run_lock import refuse_foreign, take_lock
from holdfast.stored_study import STUDY, STUDY_TEXT, but_points, read_study, write_study
from holdfast.stored_trial import (
    EMPTY,
    EXAMPLES,
    PERTURBATION,
    RECORD,
    Verified,
    load_empty,
    load_trial,
    write_empty,
    write_trial,
)
from holdfast.strict_json import dump, json_safe, parse

if TYPE_CHECKING:
    import torch

    from holdfast.trial import Trial

SUMMARY = "summary.json"
BATCH_PLAN = "batch_plan.json"
PICTURE = "picture.svg"
AUDITS = "audits"


class RunFolder:
    """The folder of one study's run, opened for writing with `open` or for reading with `read`.

    While it is open for writing the folder is locked against other processes; `close`, or leaving
    a `with` block, lets go of it. The lock file stays: removing it would let two processes lock
    two different files of one name.
    """

    def __init__(self, path: Path, study: dict[str, Any], lock: int | None):
        self.path = path
        self.study = study
        self.study_hash = digest(study)
        self._lock = lock
        self._verified: Verified = {}

    @classmethod
    def open(cls, path: Path | str, study: dict[str, Any], study_text: str | None) -> Self:
        """Open the folder for writing, make it if it is not there, or continue its run.

        `study` is the study as canonical JSON types, without Runtime fields: its hash says whether
        the folder is this study's. A study that differs in its points alone (`POINTS`) takes the
        old one's place: trials know themselves by their ids, so finished ones stay finished.
        `study_text` is the TOML the user wrote, kept beside it. Raises ForeignRunError,
        RunLockedError or DamagedRecordError, each naming folder and remedy.
        """
        path = Path(path)
        study_hash = digest(study)
        refuse_foreign(path)  # before the lock file would be put into somebody's folder
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be used as a run's folder: {error}. Give another one with --out."
            ) from None
        try:
            if not (path / STUDY).exists():
                write_study(path, study, study_text)
            found = read_study(path)
            if but_points(found["study"]) != but_points(study):
                raise ForeignRunError(
                    f"{path} holds the run of another study: {found['name']!r} "
                    f"({found['study_hash'][:16]}), not {study.get('name')!r} ({study_hash[:16]}). "
                    f"Give this run another folder with --out, or remove {path}."
                )
            if found["study_hash"] != study_hash or not (path / STUDY_TEXT).exists():
                write_study(path, study, study_text)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, study, lock)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Open the folder for reading, also while another process writes to it.

        Raises StoreError where there is no run, DamagedRecordError where its study is unreadable.
        """
        path = Path(path)
        if not (path / STUDY).is_file():
            raise StoreError(
                f"{path} holds no run: expected {path / STUDY}. "
                "Name the folder of a run, or make one with `holdfast run STUDY --out FOLDER`."
            )
        return cls(path, read_study(path)["study"], None)

    def takes(self, study: dict[str, Any]) -> bool:
        """Whether this study's trials belong into this folder: it differs in its points alone."""
        return but_points(self.study) == but_points(study)

    def close(self) -> None:
        """Let go of the lock; the folder can still be read."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def has(self, trial_id: str) -> bool:
        """Whether the trial is finished: its record exists. Whether it is sound says `load`."""
        return (self._folder(trial_id) / RECORD).exists()

    def write(
        self,
        record: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        examples: Sequence[dict[str, Any]],
    ) -> dict[str, Any]:
        """Write a finished trial and return its record as stored.

        `record` has schema, id, trial, result and run; `artifacts` is filled in here, NaN becomes
        null. `tensors` keep their dtype and lose their device. `examples` are rows of the same
        columns; in them NaN and infinities stay what they are. What an interrupted run left in the
        trial's folder is removed. Raises StoreError where the trial is finished already, or the
        record is not that of its trial.
        """
        self._require_lock()
        return write_trial(self._folder(record["id"]), record, tensors, examples)

    def load(self, trial_id: str) -> dict[str, Any]:
        """The record of a finished trial, its identity and its artifacts checked: once, as long as
        no file of it changes.

        Raises DamagedRecordError naming the file, what is wrong with it, and the remedy.
        """
        return load_trial(self._folder(trial_id), self._verified)

    def write_empty(self, trial: Trial, error: EmptyValidSetError) -> None:
        """Keep that a trial had no prompt to search, and why."""
        self._require_lock()
        write_empty(self._folder(trial.id), trial.canonical(), error)

    def empty(self, trial_id: str) -> EmptyValidSetError | None:
        """Why a trial had no prompt to search, None where it is not known to have had none. Raises
        DamagedRecordError."""
        found = None if self.has(trial_id) else load_empty(self._folder(trial_id))
        return EmptyValidSetError(found["reason"], found["funnel"]) if found else None

    def sha256(self, trial_id: str) -> str:
        """The hash of a finished trial's record, or of why it had no prompt, as the file is."""
        return sha256_file(self._folder(trial_id) / (RECORD if self.has(trial_id) else EMPTY))

    def tensors(self, trial_id: str) -> dict[str, torch.Tensor]:
        """The trial's saved tensors, on the CPU. Verified as by `load`."""
        from safetensors.torch import load_file

        self.load(trial_id)
        return load_file(self._folder(trial_id) / PERTURBATION)

    def examples(self, trial_id: str) -> list[dict[str, Any]]:
        """The trial's rows, one per audited example. Verified as by `load`."""
        from pyarrow import parquet

        self.load(trial_id)
        rows: list[dict[str, Any]] = parquet.read_table(
            self._folder(trial_id) / EXAMPLES
        ).to_pylist()
        return rows

    def records(self) -> list[dict[str, Any]]:
        """The records of all finished trials, in the order of their ids, each verified."""
        return [self.load(file.parent.name) for file in sorted(self._trials.glob(f"*/{RECORD}"))]

    def empties(self) -> list[dict[str, Any]]:
        """The trials that had no prompt to search, and why, in the order of their ids: each with
        schema, id, trial, reason and funnel, verified. Raises DamagedRecordError."""
        folders = [file.parent for file in sorted(self._trials.glob(f"*/{EMPTY}"))]
        return [found for folder in folders if (found := load_empty(folder))]

    def summary(self) -> dict[str, Any] | None:
        """summary.json as last written, None where no trial is finished.

        Raises DamagedRecordError where it is unreadable; the run writes it anew.
        """
        file = self.path / SUMMARY
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = parse(file.read_bytes())
        except ValueError as error:
            raise DamagedRecordError(
                f"{file} is no JSON ({error}). Remove it; `holdfast run` makes it anew."
            ) from error
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json; NaN becomes null."""
        self._require_lock()
        write_atomic(self.path / SUMMARY, dump(json_safe(summary)))

    def write_batch_plan(self, plan: dict[str, Any]) -> None:
        """Keep how many rows went at once (`Batching.plan`), for trials that come later."""
        self._require_lock()
        write_atomic(self.path / BATCH_PLAN, dump(json_safe(plan)))

    def batch_plan(self) -> dict[str, Any] | None:
        """What was kept last; None where there is nothing, and an empty one where it cannot be
        read: it changes no number, so a damaged one is no reason to stop."""
        try:
            found = parse((self.path / BATCH_PLAN).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def audit_file(self, name: str) -> Path:
        """Where a file of a manual audit lies; its folder is made. Texts are never put there."""
        self._require_lock()
        folder = self.path / AUDITS
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.json"

    def audit_files(self, kind: str) -> list[Path]:
        """Files `<name>.<kind>.json` of manual audits: `key` or `labels`."""
        return sorted((self.path / AUDITS).glob(f"*.{kind}.json"))

    def write_audit(self, sheet: str, found: dict[str, Any]) -> None:
        """Keep what people's labels of a sheet amount to; labels read again replace the older."""
        write_atomic(self.audit_file(f"{sheet}.labels"), dump(json_safe(found)))

    def audits(self) -> list[dict[str, Any]]:
        """What `write_audit` kept, by sheet. Raises DamagedRecordError."""
        found = []
        for file in self.audit_files("labels"):
            try:
                found.append(parse(file.read_bytes()))
            except ValueError as error:
                raise DamagedRecordError(
                    f"{file} is no JSON ({error}). Remove it, and read the sheet again."
                ) from error
        return found

    @property
    def _trials(self) -> Path:
        return self.path / "trials"

    def _folder(self, trial_id: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{16}", trial_id):
            raise StoreError(f"expected a trial's id of 16 hex digits, got {trial_id!r}")
        return self._trials / trial_id

    def _require_lock(self) -> None:
        if self._lock is None:
            raise StoreError(f"{self.path} is open for reading only: open it with RunFolder.open")
