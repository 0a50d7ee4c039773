"""Curves along a grid: planted rates come back, on own and on common prompts, and nothing else."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.grid import Point as Coordinates
from holdfast.grid import axis_name
from holdfast.planning import plan
from holdfast.report import write_report
from holdfast.report.curves import (
    Line,
    Sweep,
    across_seeds,
    pareto,
    seeds_of,
    success_curve,
    sweeps_of,
)
from holdfast.report.data import Arm, AuditData, Point
from holdfast.report.panels import band
from holdfast.report.sweeps import _spread
from holdfast.run import open_run
from holdfast.statistics import Interval, clustered_rate
from holdfast.store import RunFolder
from holdfast.study import Study
from tests.unit.test_report import (
    Fake,
    make_record,
    make_rows,
    make_study,
    make_trial,
    measurement,
)

BUDGET = "recovery.budget.relative"


def point(
    at: Coordinates,
    hits: Sequence[bool],
    ids: Sequence[str] | None = None,
    norms: Sequence[float] | None = None,
    constraint: str = "encoder_null",
    budget: float = 0.5,
    drift: float = 1e-8,
    neighbors: dict[str, tuple[float, float]] | None = None,
    texts: str = "",
    clusters: Sequence[str] | None = None,
) -> Point:
    """A point with these prompts recovered; norms infinite: the goal never reached."""
    names = list(ids) if ids is not None else [f"p{i}" for i in range(len(hits))]
    far = norms if norms is not None else [0.2] * len(hits)
    rows = tuple(
        {
            "id": name, "cluster": clusters[i] if clusters else name,
            "text_sha256": f"{texts}{name}", "outcome": "recovered", "recovered": hits[i],
            "smallest_norm_relative": far[i] if math.isfinite(far[i]) else None,
        }
        for i, name in enumerate(names)
    )  # fmt: skip
    record = {
        "result": {
            "checks": {"budget_relative": budget},
            "measurements": [
                {"name": "preactivation_drift", "estimate": drift},
                *(
                    measurement(f"neighbor.{name}.{condition}", value, 50)
                    for name, values in (neighbors or {}).items()
                    for condition, value in zip(("clean", "suppressed"), values, strict=True)
                ),
            ],
            "trace": [],
        }
    }
    row = {"point": at, "recovery_rate": float(np.mean(hits)), "id": str(at)}
    return Point("", Arm(make_trial("ioi", constraint, "none"), record, rows, row), ())


def audit(*points: Point) -> AuditData:
    return AuditData("ioi", None, points, points[:1])


def line_of(*points: Point) -> Line:
    (sweep,) = sweeps_of(audit(*points))
    (line,) = sweep.lines
    return line


def test_a_line_is_what_differs_along_one_axis_alone() -> None:
    points = [
        point({BUDGET: b, "recovery.constraint.kind": c, "seed": s}, [True], constraint=c)
        for c in ("unconstrained", "encoder_null")
        for s in (0, 1)
        for b in (0.1, 0.2, 0.4)
    ]
    sweeps = {sweep.path: sweep for sweep in sweeps_of(audit(*points))}
    assert list(sweeps) == [BUDGET, "seed"]
    assert [line.name for line in sweeps[BUDGET].lines] == [
        "unconstrained, seed=0", "unconstrained, seed=1", "encoder_null, seed=0",
        "encoder_null, seed=1",
    ]  # fmt: skip
    assert all(len(line.stops) == 3 for line in sweeps[BUDGET].lines)
    assert len(sweeps["seed"].lines) == 6
    assert sweeps[BUDGET].is_curve and not sweeps["seed"].is_curve


def test_numbers_are_drawn_in_order_and_words_are_not_drawn() -> None:
    shuffled = line_of(*(point({BUDGET: b}, [True]) for b in (0.4, 0.1, 0.2)))
    assert [stop.value for stop in shuffled.stops] == [0.1, 0.2, 0.4]
    named = sweeps_of(audit(*(point({"variant": v}, [True]) for v in ("late", "early", "mid"))))
    assert not named[0].is_curve
    assert [stop.value for stop in named[0].lines[0].stops] == ["late", "early", "mid"]
    switched = sweeps_of(audit(*(point({"x": v}, [True]) for v in (False, True))))
    assert not switched[0].is_curve, "true and false are no numbers"


def test_the_common_rate_is_of_the_prompts_valid_everywhere() -> None:
    """With more features more prompts become valid, and the new ones never come back."""
    ids = [f"p{i}" for i in range(40)]
    line = line_of(
        point({"k": 1}, [True] * 10, ids[:10]),
        point({"k": 2}, [True] * 10 + [False] * 10, ids[:20]),
        point({"k": 3}, [True] * 10 + [False] * 30, ids),
    )
    assert [stop.rate.estimate for stop in line.stops] == [1, 0.5, 0.25]
    assert line.n_common == 10 and not line.one_valid_set
    for stop in line.stops:
        assert stop.common_rate == clustered_rate([1.0] * 10, ids[:10])
    tested = [stop.step and stop.step.adjusted for stop in line.stops]
    assert tested == [None, 1, 1], "on common prompts nothing changes"


def test_where_texts_differ_nothing_is_common() -> None:
    line = line_of(*(point({"k": k}, [True] * 3, texts=f"{k}/") for k in (1, 2)))
    assert line.n_common == 0 and line.stops[0].common_rate is None
    assert [stop.step for stop in line.stops] == [None, None]


def test_steps_along_a_line_are_tested_together() -> None:
    n = 30
    line = line_of(
        point({"k": 1}, [False] * n),
        point({"k": 2}, [True] * 8 + [False] * (n - 8)),
        point({"k": 3}, [True] * 15 + [False] * (n - 15)),
    )
    single = [2 / 2**8, 2 / 2**7]  # McNemar's, every discordant pair on one side
    assert [stop.step and stop.step.adjusted for stop in line.stops] == [
        None, pytest.approx(2 * single[0]), pytest.approx(max(2 * single[0], single[1])),
    ]  # fmt: skip


def test_the_area_is_the_mean_share_of_the_budget_left_over() -> None:
    """∫ F(norm) d(norm) from 0 to the budget, by hand and by the drawn curve."""
    norms = [0.1, 0.2, 0.4, math.inf]
    made = point({BUDGET: 0.5}, [True] * 4, norms=norms)
    line = line_of(made, point({BUDGET: 0.6}, [True] * 4))
    expected = (0.4 + 0.3 + 0.1 + 0) / 0.5 / 4
    assert line.stops[0].area.estimate == pytest.approx(expected)
    xs, ys = success_curve(made)
    assert (xs, ys) == ([0.0, 0.1, 0.2, 0.4, 0.5], [0.0, 0.25, 0.5, 0.75, 0.75])
    steps = np.diff(xs) * np.array(ys[:-1])
    assert steps.sum() / 0.5 == pytest.approx(expected)


def test_half_never_reached_has_an_infinite_median() -> None:
    line = line_of(
        *(point({"k": k}, [True] * 4, norms=[0.1, math.inf, math.inf, math.inf]) for k in (1, 2))
    )
    assert math.isinf(line.stops[0].norm.estimate)
    drawn = band(2, [1], [line.stops[0].norm], "", {"color": "#000000", "dash": "solid"}, False)
    assert drawn.y == (None,), "a gap and no number"


def test_smallest_norms_are_distributed_as_they_were_found() -> None:
    """One line a point, under the constraint to read first; its steps are the planted norms."""
    at = {2: [0.1, 0.3, math.inf, 0.2], 4: [0.2, 0.4, 0.4, 0.45], 8: [math.inf] * 4}
    points = [
        point({"discovery.n_features": k}, [True] * 4, norms=norms, constraint=c)
        for c in ("unconstrained", "encoder_null")
        for k, norms in at.items()
    ]
    (sweep,) = sweeps_of(audit(*points))
    drawn = json.loads(_spread("0", sweep).json)["data"]
    assert [trace["name"] for trace in drawn] == [f"n_features {k}" for k in at]
    for trace, norms in zip(drawn, at.values(), strict=True):
        found = sorted(norm for norm in norms if math.isfinite(norm))
        assert trace["x"][1 : 1 + len(found)] == found and trace["x"][-1] == 0.5
        assert trace["y"][-1] == len(found) / 4
    assert len({trace["line"]["color"] for trace in drawn}) == 3


def test_what_a_clamp_leaves_elsewhere_is_read_at_its_own_point() -> None:
    kept = {0.0: (0.9, 0.9), -2.0: (0.9, 0.8), -5.0: (0.9, 0.3)}
    line = line_of(
        *(point({"intervention.value": v}, [True], neighbors={"music": k}) for v, k in kept.items())
    )
    for stop in line.stops:
        clean, suppressed = stop.elsewhere["music"]
        assert (clean.estimate, suppressed.estimate) == kept[stop.value]
        assert suppressed.low < suppressed.estimate and suppressed.n == 50
    assert line_of(*(point({"seed": s}, [True]) for s in (0, 1))).stops[0].elsewhere == {}


def test_no_point_of_the_front_is_beaten() -> None:
    rng = np.random.default_rng(0)
    found = [(float(x), float(y)) for x, y in rng.random((60, 2)).round(1)]
    front = [found[i] for i in pareto(found)]
    for x, y in front:
        assert not any((a < x and b >= y) or (a <= x and b > y) for a, b in found)
    for x, y in found:
        assert any(a <= x and b >= y for a, b in front), "and every other point is"
    assert pareto([(1e-8, 0.5), (1e-2, 0.9), (1e-1, 0.7)]) == [0, 1]


# --- Seeds ----------------------------------------------------------------------------------------


def test_seeds_of_the_same_prompts_are_not_pooled_as_if_they_were_others() -> None:
    hits = [True] * 12 + [False] * 12
    line = line_of(*(point({"seed": s}, hits) for s in range(6)))
    (found,) = seeds_of(audit(*(stop.point for stop in line.stops)))
    assert found.n_prompts == 24 and found.spread == 0 and found.pooled.estimate == 0.5
    naive = clustered_rate([float(h) for h in hits * 6])
    assert found.pooled.high - found.pooled.low > 2 * (naive.high - naive.low)


@pytest.mark.parametrize(
    ("path", "word"), [("seed", "of the study"), ("recovery.seed", "of the search")]
)
def test_the_spread_says_which_seed_it_is_of(path: str, word: str) -> None:
    points = [point({path: s}, [True] * 4 + [False] * (4 + s)) for s in (0, 1)]
    (found,) = seeds_of(audit(*points))
    assert word in found.drawn and [name for name, _ in found.rates] == ["0", "1"]
    assert axis_name("recovery.seed") == "recovery.seed" and axis_name("seed") == "seed"


def test_spread_between_seeds_is_seen_beside_what_chance_makes() -> None:
    far = [[True] * 40, [False] * 40, [True] * 40, [False] * 40]
    line = line_of(*(point({"seed": s}, h, texts=f"{s}/") for s, h in enumerate(far)))
    found = across_seeds("ioi", line)
    assert found.n_prompts == 160
    assert found.spread == pytest.approx(np.std([1, 0, 1, 0], ddof=1))
    assert found.expected == pytest.approx(math.sqrt(0.25 / 40))
    assert found.pooled.low < 0.2 and found.pooled.high > 0.8, "four seeds say hardly anything"


def test_questions_count_once_whatever_their_permutations() -> None:
    clusters = [f"q{i // 4}" for i in range(16)]
    line = line_of(
        *(point({"seed": s}, [True] * 16, texts=f"{s}/", clusters=clusters) for s in (0, 1))
    )
    assert across_seeds("mcq", line).n_prompts == 4


# --- On the page ----------------------------------------------------------------------------------


def swept_run(path: Path, values: Sequence[float]) -> RunFolder:
    """A made-up run along the number of steps, with a gap at the last value."""
    study = make_study({"ioi": Fake({"none": 0.2})})
    grid = {"recovery.constraint.kind": ("unconstrained", "encoder_null"), "seed": tuple(values)}
    study = Study.model_validate(study.canonical() | {"grid": grid})
    planned = plan(study)
    with RunFolder.open(path, study.canonical(), None) as store:
        trials: list[dict[str, Any]] = []
        for trial in planned.trials:
            at = planned.points[trial.id]
            trials.append({"id": trial.id, "point": at})
            if at["seed"] == values[-1]:
                trials.pop()
                continue
            rows = make_rows(20, 0.2, 1e-8, random.Random(str(at)), "p")
            record = make_record(trial, Fake({"none": 0.2}, neighbors=True), 0.2, rows)
            store.write(record, {"delta": torch.zeros(1)}, rows)
        store.write_summary({"complete": False, "trials": trials})
    return RunFolder.read(path)


def test_the_page_of_a_sweep(tmp_path: Path) -> None:
    store, read, _ = open_run(swept_run(tmp_path / "run", [0, 1, 2, 3]).path)
    page = write_report(store, read, tmp_path / "page.html").read_text()
    figures = dict(
        re.findall(
            r'data-figure="((?:sweep|spread|pareto|steps|success)[^"]*)">(.*?)</script>', page
        )
    )
    made = {"sweep-0-0", "spread-0-0", "steps-0"}
    assert set(figures) == made, "nothing drifts: there is nothing to trade"
    drawn = json.loads(figures["sweep-0-0"])["data"]
    assert {trace["name"] for trace in drawn} == {"unconstrained", "encoder_null"}
    assert {trace.get("xaxis", "x") for trace in drawn} == {"x", "x2", "x3", "x4"}
    assert "No result at: unconstrained, seed=3; encoder_null, seed=3" in page
    assert "with seeds and prompts both resampled" in page
    sweeps = page[page.index('<section id="sweeps">') :]
    assert sweeps.count("98% → 91%") == 6 and "What the same clamp leaves" in page


def test_a_run_without_other_axes_has_no_such_section(tmp_path: Path) -> None:
    study = make_study({"ioi": Fake({"none": 0.2})})
    planned = plan(study)
    with RunFolder.open(tmp_path / "run", study.canonical(), None) as store:
        for trial in planned.trials:
            rows = make_rows(9, 0.2, 1e-8, random.Random(0), "p")
            store.write(make_record(trial, Fake({}), 0.2, rows), {"d": torch.zeros(1)}, rows)
        store.write_summary(
            {
                "complete": True,
                "trials": [{"id": t.id, "point": planned.points[t.id]} for t in planned.trials],
            }
        )
    store, read, _ = open_run(tmp_path / "run")
    page = write_report(store, read, tmp_path / "page.html").read_text()
    assert '<section id="sweeps">' not in page and '<section id="steps">' in page


def test_bars_end_where_a_bound_is_not_known() -> None:
    style = {"color": "#000000", "dash": "solid"}
    values = [
        Interval(0.5, 0.4, 0.9, 0.95, "", 9, 9),
        Interval(0.5, math.nan, math.inf, 0.95, "", 1, 1),
    ]
    drawn = band(1, [1, 2], values, "", style, True)
    assert drawn.error_y.array == (pytest.approx(0.4), 0.0)
    assert drawn.error_y.arrayminus == (pytest.approx(0.1), 0.0)


def test_a_sweep_knows_its_name() -> None:
    assert Sweep("a", BUDGET, ()).name == "budget.relative"
