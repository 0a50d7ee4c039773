"""Baselines on the page: compared on the same prompts, and tested where a test can tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.report import forcing, heads, path
from holdfast.report.data import gather
from holdfast.report.forcing import as_often_as_found, best_of
from holdfast.report.page import environment
from tests.unit.test_report import Fake, make_run


def baseline(name: str, back: float, n: int, inside: bool = True, p: float = 1.0) -> dict[str, Any]:
    """A row of the page for one baseline at one scale."""
    rate = {"estimate": back, "n": n, "n_clusters": n, "low": 0.0, "high": 1.0, "reason": ""}
    return {
        "name": name, "meaning": name, "inside": inside, "scored": True, "n": n, "p": p,
        "back": rate, "at": [{"back": rate}],
    }  # fmt: skip


def test_the_best_is_sought_among_those_of_all_prompts() -> None:
    """A baseline that is defined for three easy prompts of six has another rate to beat."""
    few, all_of_them = baseline("transfer_inside", 1.0, 3), baseline("random_inside", 0.5, 6)
    free = baseline("answer_mean", 0.2, 5, inside=False)
    best = best_of([few, all_of_them, free], 6)
    assert best == {"inside": all_of_them, "free": None}
    assert best_of([baseline("nothing", 1.0, 6), few], 6)["inside"] is None


@pytest.mark.parametrize("n, tells", [(6, False), (9, True)])
def test_six_prompts_do_not_tell_among_several_baselines(n: int, tells: bool) -> None:
    rows = [baseline(f"b{i}", 0.0, n, p=2 / 2**n) for i in range(4)]
    found = as_often_as_found([*rows, baseline("drawn", 0.0, n, p=float("nan"))])
    assert [found[row["name"]].tells for row in rows] == [tells] * 4
    assert not found["drawn"].tells, "averages over draws are not tested"
    assert found["b0"].adjusted == pytest.approx(4 * 2 / 2**n)


@pytest.mark.parametrize("module", [forcing, path, heads])
def test_nothing_recovered_is_said_and_not_left_out(module: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"only": Fake({"none": None}, constraints=("encoder_null",))})
    data = gather(*run)
    (point,) = data.points
    said = "no prompt was recovered, <b>"
    result = {**point.main.result, "paths": {"n": 0, "reason": said}}
    main = replace(point.main, record={**point.main.record, "result": result})
    audit = replace(data.audits[0], points=(replace(point, main=main),))
    section = module.section(replace(data, audits=(audit,)))
    assert section is not None
    text = environment().get_template(section.template).render(section.context)
    assert "no prompt was recovered, &lt;b&gt;" in text and said not in text
    assert "<table" not in text and text.count("<h3>") == 1
