"""The tables of docs/support.md say what the tests proved, and only full sessions judge them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.families import FAMILIES, Family
from tests import proves
from tests.proves import Claim, Support, family_row, filled, tables

TEXT = """\
intro
<!-- generated: families -->
old
<!-- end -->
rest
<!-- generated: a row -->
row
<!-- end -->
"""


def test_a_cell_holds_if_every_test_that_claims_it_passed() -> None:
    proofs = [
        (Claim("families", "llama", "padding"), True),
        (Claim("families", "gpt2", "padding"), True),
        (Claim("families", "llama", "generation"), True),
        (Claim("families", "llama", "padding"), False),
        (Claim("sae formats", "npz", "loads"), True),
    ]
    assert tables(proofs) == {
        "families": (
            "| | padding | generation |\n|---|---|---|\n| llama | ✗ | ✓ |\n| gpt2 | ✓ | – |"
        ),
        "sae formats": "| | loads |\n|---|---|\n| npz | ✓ |",
    }


def test_only_what_is_between_the_marks_is_replaced() -> None:
    blocks = {"families": "| table |", "a row": "code"}
    once = filled(TEXT, blocks)
    assert once == TEXT.replace("old", "| table |").replace("row\n<", "code\n<")
    assert filled(once, blocks) == once
    with pytest.raises(LookupError, match="no `<!-- generated: clamp modes -->`"):
        filled(TEXT, {"clamp modes": "| table |"})


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "mixtral"])
def test_the_row_shown_is_a_row_of_the_table(name: str) -> None:
    code = family_row(name).removeprefix("```python\n").removesuffix("\n```")
    assert eval(f"{{{code}}}", {"Family": Family}) == {name: FAMILIES[name]}


Play = Callable[..., tuple[Any, str]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs a made-up session over two files with one claim each; gives exit status and message."""
    names = ("tests/test_a.py", "tests/test_b.py")
    (tmp_path / "tests").mkdir()
    for name in names:
        (tmp_path / name).write_text("@pytest.mark" + '.proves("families", ...)')
    file = tmp_path / "support.md"
    file.write_text(TEXT.replace("old", "| | works |\n|---|---|\n| a | ✓ |\n| b | ✓ |"))
    monkeypatch.setattr(proves, "ROOT", tmp_path)
    monkeypatch.setattr(proves, "FILE", file)
    monkeypatch.setattr(proves, "family_row", lambda: "row")

    def run(
        outcomes: str = "..",
        collected: int = 2,
        write: bool = False,
        arg: str = "tests",
        several: bool = False,
        keyword: str = "",
    ) -> tuple[Any, str]:
        """outcomes: one sign a test that ran: passed, Failed, skipped, xfailed. several: tests run
        in processes of their own, the last one first."""
        option = SimpleNamespace(keyword=keyword, markexpr="")
        config: Any = SimpleNamespace(args=[arg], getoption=lambda name: write, option=option)
        support = Support(config)
        nodes = [f"{name}::test" for name in names]
        collects = Support(config) if several else support
        properties: dict[str, list[Any]] = {node: [] for node in nodes}
        for node in nodes[:collected]:
            marks = [SimpleNamespace(args=("families", node[11], "works"))]
            item: Any = SimpleNamespace(
                nodeid=node, iter_markers=lambda name, marks=marks: marks,
                user_properties=properties[node],
            )  # fmt: skip
            collects.pytest_itemcollected(item)
        if several:
            support.pytest_xdist_node_collection_finished(None, nodes[:collected])
        ran = list(zip(nodes, outcomes, strict=False))
        for node, sign in reversed(ran) if several else ran:
            report: Any = SimpleNamespace(
                nodeid=node, passed=sign == ".", user_properties=properties[node]
            )
            if sign == "x":
                report.wasxfail = ""
            support.pytest_runtest_logreport(report)
        failed = "F" in outcomes
        session: Any = SimpleNamespace(exitstatus=int(failed))
        support.pytest_sessionfinish(session)
        return session.exitstatus, support.message

    return run


def test_a_full_session_fails_if_the_file_is_not_what_was_proven(play: Play) -> None:
    assert play("..") == (0, "")
    proves.FILE.write_text(proves.FILE.read_text().replace("| b | ✓ |", "| b | – |"))
    status, message = play("..")
    assert status == 1 and message.endswith("is not what the tests prove: pytest --write-support")
    assert play("..", write=True) == (0, "")
    assert play("..") == (0, "")


@pytest.mark.parametrize(
    ("outcomes", "session"),
    [
        pytest.param(".", {}, id="one test deselected"),
        pytest.param(".", {"collected": 1}, id="one file not collected"),
        pytest.param("..", {"arg": "tests/test_a.py::test"}, id="some tests of a file named"),
        pytest.param(".F", {}, id="one failed"),
        pytest.param(".s", {}, id="one skipped"),
    ],
)
def test_other_sessions_do_not_judge_the_file(
    play: Play, outcomes: str, session: dict[str, Any]
) -> None:
    proves.FILE.write_text(TEXT)
    assert play(outcomes, **session) == (int("F" in outcomes), "")


def test_an_expected_failure_is_no_proof_and_no_surprise(play: Play) -> None:
    status, message = play(".x")
    assert status == 1 and "--write-support" in message
    play(".x", write=True)
    assert "| b | ✗ |" in proves.FILE.read_text()
    assert play(".x") == (0, "")


def test_some_of_the_tests_cannot_write_the_file(play: Play) -> None:
    before = proves.FILE.read_text()
    status, message = play(".", write=True)
    assert status == 1 and message.endswith("was not written: tests/test_b.py::test did not run")
    assert proves.FILE.read_text() == before


def test_an_area_without_a_place_in_the_file_is_named(play: Play) -> None:
    proves.FILE.write_text("intro\n<!-- generated: a row -->\n<!-- end -->\n")
    assert play("..") == (1, "support.md has no `<!-- generated: families -->` … `<!-- end -->`")


def test_several_processes_fill_the_same_file_in_the_same_order(play: Play) -> None:
    assert play(several=True) == play()
    before = proves.FILE.read_text()
    assert play(write=True, several=True) == (0, "") and proves.FILE.read_text() == before
    proves.FILE.write_text(before.replace("| b | ✓ |", "| b | – |"))
    assert play(several=True)[0] == pytest.ExitCode.TESTS_FAILED
    assert play(several=True, keyword="a") == (0, ""), "some tests were left out by name"
