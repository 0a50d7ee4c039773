"""A run's folder: what is measured once, written whole or not at all, and never silently reused.

    runs/demo/  study.toml  study.json  lock  summary.json  batch_plan.json  report.html
    runs/demo/trials/<id>/  perturbation.safetensors  examples.parquet  record.json
    runs/demo/audits/  <sheet>.key.json  <sheet>.labels.json   where people label replies

A file appears under its name complete (temporary file in the same folder, fsync, rename), and
`record.json` is the last of its trial: where it exists the trial is finished, where it does not the
folder is unfinished work. No pickle anywhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from holdfast.canonical import SCHEMA, digest, sha256_file, trial_id
from holdfast.errors import DamagedRecordError, ForeignRunError, RunLockedError, StoreError

if TYPE_CHECKING:
    import torch

PERTURBATION = "perturbation.safetensors"
EXAMPLES = "examples.parquet"
RECORD = "record.json"
STUDY = "study.json"
STUDY_TEXT = "study.toml"
SUMMARY = "summary.json"
BATCH_PLAN = "batch_plan.json"
PICTURE = "picture.svg"
LOCK = "lock"
AUDITS = "audits"

POINTS = ("grid", "variants", "controls", "attacks")
"""Of a study and of its audits: what says which trials there are, and not what one of them does."""

_RECORD_KEYS = ("schema", "id", "trial", "result", "artifacts", "run")


def json_safe(value: Any) -> Any:
    """`value` as plain JSON: NaN (not scored) becomes None, tuples and arrays become lists.

    Numpy's numbers become Python's. Raises ValueError for an infinity, which is neither a
    measurement nor "not scored", and TypeError for what JSON cannot hold, naming the path.
    """
    return _json_safe(value, "$")


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a crash leaves the old file or the new one, whole.

    One writer at a time: the temporary file's name is fixed, so that crashes leave no litter.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{path} cannot be written: {error}") from None
    _sync_folder(path.parent)


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
        self._verified: dict[str, list[tuple[int, int, int]]] = {}

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
        _refuse_foreign(path)  # before the lock file would be put into somebody's folder
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _take_lock(path)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be used as a run's folder: {error}. Give another one with --out."
            ) from None
        try:
            if not (path / STUDY).exists():
                _write_study(path, study, study_text)
            found = _read_study(path)
            if _but_points(found["study"]) != _but_points(study):
                raise ForeignRunError(
                    f"{path} holds the run of another study: {found['name']!r} "
                    f"({found['study_hash'][:16]}), not {study.get('name')!r} ({study_hash[:16]}). "
                    f"Give this run another folder with --out, or remove {path}."
                )
            if found["study_hash"] != study_hash or not (path / STUDY_TEXT).exists():
                _write_study(path, study, study_text)
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
        return cls(path, _read_study(path)["study"], None)

    def takes(self, study: dict[str, Any]) -> bool:
        """Whether this study's trials belong into this folder: it differs in its points alone."""
        return _but_points(self.study) == _but_points(study)

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
        folder = self._folder(record["id"])
        self._require_lock()
        artifacts = {PERTURBATION: _tensor_bytes(tensors), EXAMPLES: _example_bytes(examples)}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in artifacts.items()}
        whole = json_safe({**record, "artifacts": hashes})
        whole["run"] = {**whole["run"], "result_sha256": digest(whole["result"])}
        wrong = _wrong_with(whole, record["id"])
        if wrong:
            raise StoreError(f"the record of trial {record['id']} cannot be written: {wrong}")
        if (folder / RECORD).exists():
            raise StoreError(
                f"{folder / RECORD} exists: a finished trial is never overwritten. "
                f"Remove {folder} to have it done again."
            )
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        _sync_folder(folder.parent)
        for name, data in artifacts.items():
            write_atomic(folder / name, data)
        write_atomic(folder / RECORD, _dump({key: whole[key] for key in _RECORD_KEYS}))
        return whole

    def load(self, trial_id: str) -> dict[str, Any]:
        """The record of a finished trial, its identity and its artifacts checked: once, as long as
        no file of it changes.

        Raises DamagedRecordError naming the file, what is wrong with it, and the remedy.
        """
        folder = self._folder(trial_id)
        file = folder / RECORD
        if not file.is_file():
            raise _damaged(file, "it is not there")
        try:
            record = _parse(file.read_bytes())
        except ValueError as error:
            raise _damaged(file, f"it is no JSON ({error})") from error
        before = _states([folder / name for name in (RECORD, PERTURBATION, EXAMPLES)])
        if before and self._verified.get(trial_id) == before:
            loaded: dict[str, Any] = record
            return loaded
        wrong = _wrong_with(record, trial_id)
        if wrong:
            raise _damaged(file, wrong)
        for name, expected in record["artifacts"].items():
            if not (folder / name).is_file():
                raise _damaged(folder / name, "it is not there, but the record names it")
            found = sha256_file(folder / name)
            if found != expected:
                raise _damaged(
                    folder / name, f"its sha256 is {found[:16]}…, the record says {expected[:16]}…"
                )
        self._verified[trial_id] = before
        return record

    def record_sha256(self, trial_id: str) -> str:
        """The hash of a finished trial's record, as the file is."""
        return sha256_file(self._folder(trial_id) / RECORD)

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

    def summary(self) -> dict[str, Any] | None:
        """summary.json as last written, None where no trial is finished.

        Raises DamagedRecordError where it is unreadable; the run writes it anew.
        """
        file = self.path / SUMMARY
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = _parse(file.read_bytes())
        except ValueError as error:
            raise DamagedRecordError(
                f"{file} is no JSON ({error}). Remove it; `holdfast run` makes it anew."
            ) from error
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json; NaN becomes null."""
        self._require_lock()
        write_atomic(self.path / SUMMARY, _dump(json_safe(summary)))

    def write_batch_plan(self, plan: dict[str, Any]) -> None:
        """Keep how many rows went at once (`Batching.plan`), for trials that come later."""
        self._require_lock()
        write_atomic(self.path / BATCH_PLAN, _dump(json_safe(plan)))

    def batch_plan(self) -> dict[str, Any] | None:
        """What was kept last; None where there is nothing, and an empty one where it cannot be
        read: it changes no number, so a damaged one is no reason to stop."""
        try:
            found = _parse((self.path / BATCH_PLAN).read_bytes())
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
        write_atomic(self.audit_file(f"{sheet}.labels"), _dump(json_safe(found)))

    def audits(self) -> list[dict[str, Any]]:
        """What `write_audit` kept, by sheet. Raises DamagedRecordError."""
        found = []
        for file in self.audit_files("labels"):
            try:
                found.append(_parse(file.read_bytes()))
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


def _states(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Inode, size and time of the last change of each file; nothing where one is not there."""
    try:
        found = [os.stat(file) for file in files]
    except FileNotFoundError:
        return []
    return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: expected a folder. Give another one with --out.")
    # What a run that died in its first moments leaves behind does not make a folder foreign.
    own = {STUDY, LOCK, f".{STUDY}.tmp"}
    if path.is_dir() and not (path / STUDY).exists():
        others = sorted(entry.name for entry in path.iterdir() if entry.name not in own)
        if others:
            raise ForeignRunError(
                f"{path} holds files but no run: {', '.join(others[:5])}. "
                "Give the run an empty folder or a new one with --out."
            )


def _take_lock(path: Path) -> int:
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(lock)
        raise RunLockedError(
            f"{path} is being written by another holdfast (process {holder}). "
            "Wait for it or end it, or give this run another folder with --out."
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
    return lock


def _write_study(path: Path, study: dict[str, Any], text: str | None) -> None:
    """The study's canonical JSON, and beside it the text it came from."""
    if text is None:  # that of another set of points would be taken for this one's
        (path / STUDY_TEXT).unlink(missing_ok=True)
    else:
        write_atomic(path / STUDY_TEXT, text.encode())
    whole = {"schema": SCHEMA, "name": study.get("name"), "study_hash": digest(study)}
    write_atomic(path / STUDY, _dump(whole | {"study": study}))


def _but_points(study: dict[str, Any]) -> dict[str, Any]:
    """The study without what only says which of its points are run."""
    rest = {key: value for key, value in study.items() if key not in POINTS}
    audits = rest.get("audits")
    if isinstance(audits, list):
        own = [{k: v for k, v in a.items() if k not in POINTS} for a in audits]
        rest["audits"] = own
    return rest


def _read_study(path: Path) -> dict[str, Any]:
    file = path / STUDY
    remedy = f"Remove {path}, or give this run another folder with --out."
    try:
        found = _parse(file.read_bytes())
    except ValueError as error:
        raise DamagedRecordError(f"{file} is no JSON ({error}). {remedy}") from error
    wrong = None
    if not isinstance(found, dict) or set(found) != {"schema", "name", "study_hash", "study"}:
        wrong = "is not a study as holdfast writes it"
    elif found["schema"] != SCHEMA:
        wrong = f"has schema {found['schema']!r}, this holdfast reads {SCHEMA}"
    elif not isinstance(found["study"], dict) or digest(found["study"]) != found["study_hash"]:
        wrong = "does not match its own study_hash: it was changed"
    if wrong:
        raise DamagedRecordError(f"{file} {wrong}. {remedy}")
    return found


def _wrong_with(record: Any, expected_id: str) -> str | None:
    """What makes `record` not a whole record of the trial `expected_id`; None if nothing does."""
    if not isinstance(record, dict) or set(record) != set(_RECORD_KEYS):
        got = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        return f"expected the keys {', '.join(sorted(_RECORD_KEYS))}, got {got}"
    if record["schema"] != SCHEMA:
        return f"it has schema {record['schema']!r}, this holdfast reads {SCHEMA}"
    if not isinstance(record["trial"], dict):
        return f"its trial is a {type(record['trial']).__name__}, expected a table"
    identity = trial_id(record["trial"])
    if not identity == record["id"] == expected_id:
        return (
            f"it says id {record['id']!r} in the place of {expected_id!r}, "
            f"and its trial hashes to {identity!r}: all three must be the same"
        )
    if not isinstance(record["artifacts"], dict) or set(record["artifacts"]) != {
        PERTURBATION,
        EXAMPLES,
    }:
        return f"expected artifacts {EXAMPLES} and {PERTURBATION}, got {record['artifacts']!r}"
    if not isinstance(record["run"], dict):
        return f"its run is a {type(record['run']).__name__}, expected a table"
    if record["run"].get("result_sha256") != digest(record["result"]):
        return "its result does not match the hash it was written with: it was changed"
    return None


def _damaged(file: Path, what: str) -> DamagedRecordError:
    return DamagedRecordError(
        f"{file} is damaged: {what}. Remove {file.parent}; the run will do that trial again."
    )


def _tensor_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    # A copy each: safetensors refuses tensors that share memory, as two views of one delta do.
    return save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def _example_bytes(examples: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns = list(examples[0]) if examples else []
    for index, row in enumerate(examples):
        # pyarrow takes the columns from the first row and drops all others without a word.
        if set(row) != set(columns):
            odd = ", ".join(sorted(set(row) ^ set(columns)))
            raise StoreError(f"examples row {index} has other columns than row 0: {odd}")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(examples)), sink)
    return bytes(sink.getvalue().to_pybytes())


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _parse(data: bytes) -> Any:
    """JSON, strictly: NaN and infinities, which Python would take or make, raise ValueError."""

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number} is not a finite number")
        return value

    return json.loads(data, parse_constant=finite, parse_float=finite)


def _json_safe(value: Any, path: str) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}: expected str")
        return {str(key): _json_safe(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"{path} is {value!r}: expected a finite number or NaN (not scored)")
        return None if math.isnan(value) else float(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which JSON cannot hold")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
