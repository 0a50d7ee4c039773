"""The first screen answers, and the terminal says the same in the same words."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from holdfast.planning import Plan
from holdfast.report import opening, verdicts
from holdfast.report.data import ReportData, gather
from holdfast.report.page import render
from holdfast.run import open_run
from holdfast.store import RunFolder
from holdfast.tables.results import results_table
from holdfast.wording import cost, percent_range, power
from tests.unit.test_curves import swept_run
from tests.unit.test_report import FAKES, Fake, make_run, own

Run = tuple[RunFolder, Plan]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def data(run: Run) -> ReportData:
    return gather(*run)


@pytest.fixture(scope="module")
def page(data: ReportData) -> str:
    return own(render(data, "<svg></svg>"))


def test_every_audit_has_an_answer_before_anything_else(data: ReportData, page: str) -> None:
    made = {row["audit"]: row for row in opening.rows(data)}
    assert list(made) == list(FAKES)
    held, known = made["bottleneck"], made["mcq"]
    assert held["recovered"].startswith("0 of 19: 0% [0%, ")
    assert (held["right"], held["wrong"]) == ("not by half", "not by half")
    assert known["right"] == "0.190 [0.170, 0.210]" and known["elsewhere"] == "music 98% → 91%"
    assert made["ioi"]["elsewhere"] == "not measured"
    first = page[: page.index('<section id="verdicts">')]
    for audit in FAKES:
        assert f">{audit}</a>" in first
    for verdict, words in verdicts.NOT_SAID.items():
        shown = any(verdict in row["counts"] for row in made.values())
        assert (words in unescape(first)) == shown, "what is not on the page needs no warning"
    targets = re.findall(r'href="#(card-\d+)"', first)
    assert len(targets) == len(FAKES)
    assert all(page.count(f'id="{target}"') == 1 for target in targets)


def test_the_guide_has_the_pages_words() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "reading-the-report.md").read_text()
    for verdict, meaning in verdicts.MEANINGS.items():
        (row,) = [line for line in guide.splitlines() if line.startswith(f"| `{verdict}` |")]
        assert row.startswith(f"| `{verdict}` | {meaning}")
        assert row.endswith(f"| {verdicts.NOT_SAID[verdict]} |")
    for words in ("Not by half", "In numbers", "Too few prompts to tell", "Foretold", "≈0%"):
        assert words in guide


def test_a_control_that_was_not_tried_is_said(tmp_path: Path) -> None:
    (row,) = opening.rows(gather(*make_run(tmp_path / "run", {"only": Fake({"none": 0.1})})))
    assert row["wrong"] == "not tried" and row["counts"] == {"undecided": 1}


def test_a_sweep_is_a_row_and_its_cards_have_their_own_point_alone(tmp_path: Path) -> None:
    store, plan, _ = open_run(swept_run(tmp_path / "run", [0, 1, 2, 3]).path)
    data = gather(store, plan)
    (row,) = opening.rows(data)
    assert row["n_points"] == sum(row["counts"].values()) == 3 and row["only"] is None
    cards = verdicts.section(data).context["cards"]
    assert len(cards) == 3
    for card, seed in zip(cards, range(3), strict=True):
        assert [other["label"] for other in card["others"]] == [f"unconstrained, seed={seed}"]


def test_no_number_on_the_page_is_a_computers(page: str) -> None:
    """Words of the study are as they were written; cells of tables are ours."""
    cells = [unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)", page)]
    numbers = [cell for cell in cells if re.search(r"\d", cell)]
    assert len(numbers) > 200
    bad = re.compile(r"(?:^|\s)-\d|−<|(?<![\d.])−0(?:\.0*)?(?![\d.])|\d[eE][-+]\d")
    assert [text for text in numbers if bad.search(text)] == []
    assert all(map(bad.search, ("-0.01", "−<1%", "[−0%, 3%]", "−0.00", "1e-07")))


def test_the_terminal_has_the_pages_numbers(
    data: ReportData, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results_table(dict(data.summary))
    said = capsys.readouterr().out
    for row in data.summary["trials"]:
        if row["control"] != "none":
            continue
        texts = [percent_range(row["ci_low"], row["ci_high"]), cost(row),
                 power(row["preactivation_drift_max"])]  # fmt: skip
        plain = unescape(re.sub(r"<[^>]*>", "", page))
        for text in texts:
            assert text in said and text in plain
    assert not re.search(r"\de[-+]\d", said)
