"""docs/methods.md names only what there is: modules, tests, and audits of bundled studies."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from holdfast.study import bundled, parse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text()
NAMED = sorted(set(re.findall(r"`([^`]+)`", PAGE)))
TESTS = [name for name in NAMED if re.fullmatch(r"test_\w+\.py::\w+", name)]
MODULES = [name for name in NAMED if re.fullmatch(r"[a-z_/]+\.py", name)]
AUDITS = [name for name in NAMED if re.fullmatch(r"[a-z0-9-]+:\w+", name)]


@cache
def functions(file: str) -> frozenset[str]:
    """The tests of a file, wherever under tests it is."""
    paths = list((ROOT / "tests").rglob(file))
    trees = [ast.parse(path.read_text()) for path in paths]
    return frozenset(
        node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)
    )


def test_everything_named_is_there() -> None:
    here = Path(__file__).name
    modules = [name for name in MODULES if name != here]
    missing = [name for name in modules if not (ROOT / "src" / "holdfast" / name).is_file()]
    for name in TESTS:
        file, _, test = name.partition("::")
        if test not in functions(file):
            missing.append(name)
    for name in AUDITS:
        study, _, audit = name.partition(":")
        if audit not in {a.name for a in parse(bundled(study)).audits}:
            missing.append(name)
    assert not missing, f"docs/methods.md names what is not there: {missing}"
    assert len(TESTS) > 100 and len(modules) > 50 and len(AUDITS) > 15, "the scan finds them"


def test_every_entry_is_read() -> None:
    """A name in a form that the scan does not know would be checked by nobody."""
    known = {*TESTS, *MODULES, *AUDITS, "ioi", "demo", "src/holdfast", "tests"}
    assert set(NAMED) - known == set()


@pytest.mark.parametrize("row", ["A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K"])
def test_every_row_has_its_place(row: str) -> None:
    section = PAGE.split(f"\n## {row}. ")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert lines, f"row {row} says nothing"
    for line in lines:
        cells = [cell.strip() for cell in line.replace(r"\|", "").strip("|").split("|")]
        assert len(cells) == 3 and all(cells), line
