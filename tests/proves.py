"""Fills the tables of docs/support.md from the tests that prove them.

`@pytest.mark.proves(area, row, column)`, on a test or one of its parameters, claims a cell. It is ✓
if every test that claims it passed. `pytest --write-support` fills the file; a session in which all
of these tests ran without a surprise fails if the file differs. Where several processes run them
(`pytest -n 2`) claims come with the reports of tests to the one that compares, and it looks only if
nothing was selected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "support.md"
PLACE = re.compile(r"(?<=<!-- generated: )([^\n]+) -->\n.*?(?=<!-- end -->)", re.S)


MARK = "proves"
"""What claims are called among the properties of a report."""


class Claim(NamedTuple):
    area: str
    row: str
    column: str


def tables(proofs: Iterable[tuple[Claim, bool]]) -> dict[str, str]:
    """Area → its table, of claims and whether their tests passed; rows and columns as they come."""
    cells: dict[Claim, bool] = {}
    for claim, passed in proofs:
        cells[claim] = cells.get(claim, True) and passed
    sign = {True: "✓", False: "✗", None: "–"}
    made = {}
    for area in dict.fromkeys(claim.area for claim in cells):
        columns = list(dict.fromkeys(claim.column for claim in cells if claim.area == area))
        lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
        for row in dict.fromkeys(claim.row for claim in cells if claim.area == area):
            signs = [sign[cells.get(Claim(area, row, column))] for column in columns]
            lines.append(f"| {row} | " + " | ".join(signs) + " |")
        made[area] = "\n".join(lines)
    return made


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """`text` with each block at its place. Raises LookupError if there is no place for one."""
    if lost := blocks.keys() - set(PLACE.findall(text)):
        raise LookupError(f"{FILE.name} has no `<!-- generated: {min(lost)} -->` … `<!-- end -->`")
    return PLACE.sub(lambda p: f"{p[1]} -->\n{blocks.get(p[1], '')}\n", text)


def family_row(name: str = "gpt_neox") -> str:
    """The source of one row of the family table, as a block of code."""
    source = (ROOT / "src" / "holdfast" / "families.py").read_text()
    row = re.search(rf'^    ("{name}": Family\(.*?\),)$', source, re.M | re.S)
    assert row, f"no row {name!r} in the family table"
    return f"```python\n{row[1]}\n```"


class Support:
    """Collects claims and results in a session; fills the file or compares it at the end."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.claims: dict[str, list[Claim]] = {}
        self.passed: dict[str, bool] = {}
        self.settled = True
        self.message = ""
        self.order: list[str] = []

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if claims := [Claim(*mark.args) for mark in item.iter_markers(MARK)]:
            self.claims[item.nodeid] = claims
            item.user_properties.append((MARK, [list(claim) for claim in claims]))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        self.order = list(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, claims in report.user_properties:
            if name == MARK:
                self.claims[report.nodeid] = [Claim(*claim) for claim in claims]
        if report.nodeid in self.claims:
            passed = report.passed and not hasattr(report, "wasxfail")
            self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and passed
            self.settled &= report.passed or hasattr(report, "wasxfail")

    def left_out(self) -> list[str]:
        """Tests that claim cells and did not run, files of such tests that were not collected."""
        if self.order:  # as they were collected, and not as they ended
            self.claims = {test: self.claims[test] for test in self.order if test in self.claims}
        files = {test.split("::")[0] for test in self.claims}
        claiming = [p for p in ROOT.glob("tests/**/test_*.py") if "mark.proves(" in p.read_text()]
        uncollected = {p.relative_to(ROOT).as_posix() for p in claiming} - files
        named = [arg for arg in self.config.args if "::" in arg]  # some of a file's tests
        if self.order:
            named += [self.config.option.keyword, self.config.option.markexpr]
            named = [name for name in named if name]
        return [*(t for t in self.claims if t not in self.passed), *sorted(uncollected), *named]

    def fill_or_compare(self, write: bool) -> str:
        """What is wrong with the file; empty if nothing."""
        proofs = [(c, self.passed[test]) for test, own in self.claims.items() for c in own]
        before = FILE.read_text()
        try:
            text = filled(before, {**tables(proofs), "a row": family_row()})
        except LookupError as error:
            return str(error)
        if write:
            FILE.write_text(text)
        differs = text != before and not write
        return f"{FILE.name} is not what the tests prove: pytest --write-support" if differs else ""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return  # one of several processes, which saw some of the tests
        write, left_out = self.config.getoption("--write-support"), self.left_out()
        if left_out and write:
            self.message = f"{FILE.name} was not written: {left_out[0]} did not run"
        elif not left_out and (write or self.settled):
            self.message = self.fill_or_compare(write)
        if self.message and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.message:
            terminalreporter.write_line(self.message, red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="fill docs/support.md")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Support(config))
