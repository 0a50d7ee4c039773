"""The command line in this process, and small studies cut from the bundled one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast.study import bundled

SMALL = {"fit": 100, "tune": 16, "test": 16}
SEARCH = {"steps": 12, "refine_steps": 6, "tolerance": 0.005, "doublings": 1}
BESIDE = {"scales": [1.0], "draws": 1, "margin_draws": 10}
"""Every kind of baseline and part beside a recovery, of each no more than it takes."""


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def holdfast(*arguments: str | Path) -> Said:
    """Run a command as the console script does, in this process.

    An exception that would reach the user as a traceback is raised.
    """
    from holdfast.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["holdfast", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code
    assert code is None or isinstance(code, int), f"exited with {code!r}"
    return Said(code or 0, out.getvalue(), err.getvalue())


def small_study(
    audits: Sequence[str] = ("ioi",),
    constraints: Sequence[str] = ("encoder_null",),
    controls: Sequence[str | dict[str, Any]] | None = ("wrong_target",),
    **changes: Any,
) -> dict[str, Any]:
    """The bundled study with some of its audits, few prompts, short searches and few
    vectors beside what they find.

    controls: None for the bundled study's own. `changes` replace whole tables of the study.
    """
    study: dict[str, Any] = tomllib.loads(bundled("demo"))
    study["audits"] = [audit for audit in study["audits"] if audit["name"] in audits]
    assert len(study["audits"]) == len(audits), f"the bundled study has not all of {audits}"
    for audit in study["audits"]:
        audit.pop("data", None)
        audit.pop("controls", None)
    study["data"] = dict(SMALL)
    if controls is not None:
        study["controls"] = list(controls)
    study["recovery"] |= SEARCH
    study["paths"] = dict(BESIDE)
    study["grid"] = {"recovery.constraint.kind": list(constraints)}
    if "ignorant" not in json.dumps(study["controls"]):
        del study["ignorant"]
    return study | changes


def write(path: Path, study: dict[str, Any]) -> Path:
    """Write a study as a TOML file."""
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in study.items()))
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return "{" + inside + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def files_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file of a run's trials: inode, size and time of its last change."""
    found = {}
    for path in sorted((folder / "trials").rglob("*")):
        if path.is_file():
            status = os.stat(path)
            key = path.relative_to(folder).as_posix()
            found[key] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
