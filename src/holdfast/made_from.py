"""What a run's summary and page were made from, so that they are made again only if it changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from holdfast.canonical import digest, sha256_file, sha256_tree
from holdfast.errors import DamagedRecordError
from holdfast.store import PICTURE, RunFolder

KEY = "made_from"
"""Where a summary says it. It is there only when a run is complete and its tables agree."""

HEAD = 2048
"""Bytes of a page in which it stands."""

LIBRARIES = ("numpy", "scipy", "plotly", "jinja2")
"""What figures are worked out and drawn with."""


def made_from(store: RunFolder, ids: Sequence[str]) -> str:
    """The hash of a run's study, of its ended trials' records, in order, of people's labels, of
    this program and of the libraries it works figures out with.

    A record has the hashes of its trial's other files in it; whether they are right says `load`.
    """
    package = Path(str(files("holdfast")))
    return digest(
        {
            "study": store.study_hash,
            "records": [[each, store.sha256(each)] for each in ids],
            "labels": [[file.name, sha256_file(file)] for file in store.audit_files("labels")],
            "program": sha256_tree(package, ("**/*.py", "report/templates/*")),
            "libraries": {name: version(name) for name in LIBRARIES},
        }
    )


def summary_made_from(store: RunFolder, key: str) -> dict[str, Any] | None:
    """The summary in the folder if it was made from this, else None."""
    try:
        found = store.summary()
    except DamagedRecordError:  # the run makes it anew
        return None
    return found if found is not None and found["complete"] and found.get(KEY) == key else None


def page_made_with(summary: Mapping[str, Any], page: Path) -> bool:
    """Whether the page in a run's folder, and the picture beside it, are of this summary."""
    key = summary.get(KEY)
    if not key or not page.is_file() or not page.with_name(PICTURE).is_file():
        return False
    with open(page, "rb") as file:
        return f'content="{key}"'.encode() in file.read(HEAD)
