"""Whose folder it is: one study's, and one process's at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from holdfast.errors import ForeignRunError, RunLockedError, StoreError
from holdfast.stored_study import STUDY

LOCK = "lock"


def refuse_foreign(path: Path) -> None:
    """Raise ForeignRunError where a folder is somebody's and no run's, StoreError for a file."""
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


def take_lock(path: Path) -> int:
    """The open lock file, locked until it is closed or the process ends. Raises RunLockedError
    where another process has it."""
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
