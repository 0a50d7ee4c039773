"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.e2e
@pytest.mark.slow
def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 3
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    said = capsys.readouterr().out
    assert "none" in said and "wrong_target" in said
    assert (tmp_path / "runs" / "mine" / "summary.json").is_file()


def test_every_file_it_names_is_there() -> None:
    text = README.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((README.parent / link).is_file() for link in links)
    tree = text.split("src/holdfast/\n")[1].split("tests/ ")[0]
    names = re.findall(r"[a-z_]+\.py|[a-z_]+/", tree)
    missing = [n for n in names if not (README.parent / "src" / "holdfast" / n).exists()]
    assert not missing
