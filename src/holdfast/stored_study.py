"""The study that a run's folder holds: its canonical JSON, and beside it the text it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.atomic import write_atomic
from holdfast.canonical import SCHEMA, digest
from holdfast.errors import DamagedRecordError
from holdfast.strict_json import dump, parse

STUDY = "study.json"
STUDY_TEXT = "study.toml"

POINTS = ("grid", "variants", "controls", "attacks")
"""Of a study and of its audits: what says which trials there are, and not what one of them does."""


def write_study(path: Path, study: dict[str, Any], text: str | None) -> None:
    """The study's canonical JSON, and beside it the text it came from."""
    if text is None:  # that of another set of points would be taken for this one's
        (path / STUDY_TEXT).unlink(missing_ok=True)
    else:
        write_atomic(path / STUDY_TEXT, text.encode())
    whole = {"schema": SCHEMA, "name": study.get("name"), "study_hash": digest(study)}
    write_atomic(path / STUDY, dump(whole | {"study": study}))


def read_study(path: Path) -> dict[str, Any]:
    """What `write_study` wrote. Raises DamagedRecordError saying what is wrong, and the remedy."""
    file = path / STUDY
    remedy = f"Remove {path}, or give this run another folder with --out."
    try:
        found = parse(file.read_bytes())
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


def but_points(study: dict[str, Any]) -> dict[str, Any]:
    """The study without what only says which of its points are run."""
    rest = {key: value for key, value in study.items() if key not in POINTS}
    audits = rest.get("audits")
    if isinstance(audits, list):
        own = [{k: v for k, v in a.items() if k not in POINTS} for a in audits]
        rest["audits"] = own
    return rest
