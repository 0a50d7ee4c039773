"""The folder of a finished trial: its record, which is written last, its tensors and its rows.

Where the record exists the trial is finished; where it does not the folder is unfinished work. Of a
trial that had no prompt left to search the folder holds nothing but why.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.atomic import sync_folder, write_atomic
from holdfast.canonical import SCHEMA, digest, sha256_file, trial_id
from holdfast.errors import DamagedRecordError, EmptyValidSetError, StoreError
from holdfast.strict_json import dump, json_safe, parse

if TYPE_CHECKING:
    import torch

PERTURBATION = "perturbation.safetensors"
EXAMPLES = "examples.parquet"
RECORD = "record.json"
EMPTY = "empty.json"

KEYS = ("schema", "id", "trial", "result", "artifacts", "run")
EMPTY_KEYS = ("schema", "id", "trial", "reason", "funnel")


def write_trial(
    folder: Path,
    record: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    examples: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Write all of it and return the record as stored; see `RunFolder.write`."""
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
    sync_folder(folder.parent)
    for name, data in artifacts.items():
        write_atomic(folder / name, data)
    write_atomic(folder / RECORD, dump({key: whole[key] for key in KEYS}))
    return whole


def write_empty(folder: Path, trial: dict[str, Any], error: EmptyValidSetError) -> None:
    """Write that the trial of the folder had no prompt to search, and why."""
    whole = {
        "schema": SCHEMA, "id": folder.name, "trial": trial, "reason": str(error),
        "funnel": error.funnel,
    }  # fmt: skip
    wrong = _wrong_identity(whole, EMPTY_KEYS, folder.name)
    if wrong:
        raise StoreError(f"what trial {folder.name} lacked cannot be written: {wrong}")
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    write_atomic(folder / EMPTY, dump(whole))


def load_empty(folder: Path) -> dict[str, Any] | None:
    """The trial that had no prompt to search, and why; None where nothing says so."""
    file = folder / EMPTY
    try:
        found: dict[str, Any] = parse(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(file, f"it is no JSON ({error})") from error
    wrong = _wrong_identity(found, EMPTY_KEYS, folder.name)
    if wrong:
        raise _damaged(file, wrong)
    return found


Verified = dict[str, list[tuple[int, int, int]]]
"""Trials whose files were checked, by id, with inode, size and time of the last change of each."""


def load_trial(folder: Path, verified: Verified) -> dict[str, Any]:
    """The record of the trial whose id is the folder's name, its identity and its artifacts
    checked, unless they were and no file has changed since; see `RunFolder.load`."""
    file = folder / RECORD
    if not file.is_file():
        raise _damaged(file, "it is not there")
    try:
        record: dict[str, Any] = parse(file.read_bytes())
    except ValueError as error:
        raise _damaged(file, f"it is no JSON ({error})") from error
    before = _states([folder / name for name in (RECORD, PERTURBATION, EXAMPLES)])
    if before and verified.get(folder.name) == before:
        return record
    wrong = _wrong_with(record, folder.name)
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
    verified[folder.name] = before
    return record


def _states(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Inode, size and time of the last change of each file; nothing where one is not there."""
    try:
        found = [os.stat(file) for file in files]
    except FileNotFoundError:
        return []
    return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def _wrong_with(record: Any, expected_id: str) -> str | None:
    """What makes `record` not a whole record of the trial `expected_id`; None if nothing does."""
    wrong = _wrong_identity(record, KEYS, expected_id)
    if wrong:
        return wrong
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


def _wrong_identity(record: Any, keys: Sequence[str], expected_id: str) -> str | None:
    """What makes `record` say of another trial, or with other keys than these."""
    if not isinstance(record, dict) or set(record) != set(keys):
        got = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        return f"expected the keys {', '.join(sorted(keys))}, got {got}"
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
