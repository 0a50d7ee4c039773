"""Grids: every point once, named so that a reader can tell it from the others."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from holdfast.errors import ForeignRunError, StudyError
from holdfast.grid import MAX_LABEL, axis_name, describe, expanded, label, points
from holdfast.planning import plan
from holdfast.run import default_folder, open_run, run_study
from holdfast.store import RunFolder
from holdfast.study import Study, bundled, parse
from tests.e2e.cli import small_study

SAES = [
    [{"site": f"blocks.{i}.hook_resid_post",
      "source": {"kind": "folder", "path": f"organism:saes/{i}"}}]
    for i in (0, 1)
]  # fmt: skip


def study(grid: dict[str, list[object]], **more: object) -> Study:
    """One audit of the shipped organism, without controls."""
    return Study.model_validate(small_study(**{"controls": (), "grid": grid} | more))


def test_points_are_the_product_of_the_axes() -> None:
    grid = {"a.b": (1, 2, 3), "c": ("x", "y"), "d": (None,)}
    found = [tuple(point.values()) for point in points(grid)]
    assert found == list(itertools.product(*grid.values()))
    assert points({}) == [{}]


def test_a_variant_moves_its_paths_together() -> None:
    variants = {"late": {"recovery": {"steps": 7, "budget": {"kind": "x"}}, "seed": 2}}
    found = expanded({"variant": "late", "data.test": 5}, variants)
    assert found == {
        "recovery.steps": 7, "recovery.budget": {"kind": "x"}, "seed": 2, "data.test": 5,
    }  # fmt: skip
    with pytest.raises(StudyError, match=r"no variant 'lat'.*did you mean 'late'"):
        expanded({"variant": "lat"}, variants)


def test_everything_that_a_sweep_varies_reaches_its_trial() -> None:
    axes: dict[str, list[object]] = {
        "recovery.budget.relative": [0.1, 0.4],
        "recovery.steps": [5, 9],
        "intervention.value": [-2.0, -5.0],
        "intervention.include_bos": [False, True],
        "discovery.n_features": [1, 4],
        "seed": [0, 3],
        "subject.saes": SAES,
        "variant": ["plain", "small"],
    }
    variants = {"plain": {"data.test": 16}, "small": {"data.test": 8}}
    planned = plan(study(axes, variants=variants))
    assert len(planned.trials) == 2 ** len(axes)
    for trial in planned.trials:
        at = planned.points[trial.id]
        assert trial.recovery.budget.relative == at["recovery.budget.relative"]
        assert trial.recovery.steps == at["recovery.steps"]
        assert trial.seed == at["seed"]
        dumped = trial.canonical()
        for name in ("value", "include_bos"):
            assert dumped["intervention"][name] == at[f"intervention.{name}"]
        assert dumped["discovery"]["n_features"] == at["discovery.n_features"]
        assert [sae.site for sae in trial.subject.saes] == [at["subject.saes"][0]["site"]]
        assert trial.data.test == (16 if at["variant"] == "plain" else 8)
        # One spec for each subject, from which that very subject is loaded.
    assert len(planned.specs) == 2


def test_a_point_is_the_same_trial_however_its_grid_is_written() -> None:
    """Else a finished point would be computed again for being named otherwise."""
    (alone,) = plan(study({"recovery.steps": [7]})).trials
    (named,) = plan(study({"variant": ["v"]}, variants={"v": {"recovery.steps": 7}})).trials
    wider = plan(study({"recovery.steps": [5, 7], "seed": [0, 1]}))
    assert alone.id == named.id and alone.id in {trial.id for trial in wider.trials}


def test_labels() -> None:
    assert axis_name("recovery.budget.relative") == "budget.relative"
    assert axis_name("discovery.n_features") == "n_features"
    assert label(-2.5) == "-2.5" and label(True) == "True"
    assert label({"kind": "clamp", "value": 3}) == "clamp 3"
    assert label(SAES[1]).startswith("blocks.1.hook_resid_post folder")
    assert len(label(SAES[0] + SAES[1])) == MAX_LABEL
    assert describe({"recovery.constraint.kind": "x", "recovery.budget.relative": 0.1}) == [
        "budget.relative=0.1"
    ]


# --- Finished points are not recomputed -----------------------------------------------------------

FAST = {"steps": 4, "refine_steps": 2, "tolerance": 0.2, "doublings": 1}


def sweep(values: list[object], **more: object) -> Study:
    grid = {"recovery.budget.relative": values}
    made = small_study(controls=(), grid=grid, paths=False)
    made["recovery"] |= FAST
    made["data"] = {"fit": 60, "tune": 4, "test": 6}
    made["audits"][0]["intervention"]["value"] = -5.0
    return Study.model_validate(made | more)


def test_one_more_point_computes_only_this_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run_study(plan(sweep([0.3, 0.5])), folder)
    assert (first.n_run, first.n_reused) == (2, 0)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/*")}
    planned = plan(sweep([0.2, 0.3, 0.5]))
    second = run_study(planned, folder)
    assert (second.n_run, second.n_reused) == (1, 2)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/*")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 3
    store, read, complete = open_run(folder)
    assert complete and store.study_hash == planned.hash
    assert read.points == planned.points
    assert [row["point"] for row in second.summary["trials"]] == [
        {"recovery.budget.relative": value} for value in (0.2, 0.3, 0.5)
    ]
    fewer = run_study(plan(sweep([0.5])), folder)
    assert (fewer.n_run, len(fewer.summary["trials"])) == (0, 1), "what is not asked for stays"
    assert len(store.records()) == 3


def test_a_study_of_other_points_goes_on_in_its_folder(tmp_path: Path) -> None:
    old, more, other = (
        plan(study) for study in (sweep([0.3]), sweep([0.3, 0.5]), sweep([0.3], seed=1))
    )
    folder = default_folder(old, tmp_path)
    RunFolder.open(folder, old.study.canonical(), "old").close()
    assert default_folder(more, tmp_path) == folder
    assert default_folder(other, tmp_path) != folder
    with pytest.raises(ForeignRunError, match="another study"):
        RunFolder.open(folder, other.study.canonical(), "other")
    assert (folder / "study.toml").read_text() == "old", "a refused study leaves no trace"
    RunFolder.open(folder, more.study.canonical(), "more").close()
    assert (folder / "study.toml").read_text() == "more"
    assert RunFolder.read(folder).study_hash == more.hash


def test_controls_can_be_added_to_a_run(tmp_path: Path) -> None:
    one, two = sweep([0.5]), sweep([0.5], controls=["wrong_target"])
    assert run_study(plan(one), tmp_path / "run").n_run == 1
    again = run_study(plan(two), tmp_path / "run")
    assert (again.n_run, again.n_reused) == (1, 1)


def test_the_bundled_text_parses_with_nested_variants() -> None:
    text = """
    schema = 1
    name = "v"
    [subject]
    model = "organism"
    saes = [{site="blocks.0.hook_resid_post", source={kind="folder", path="organism:saes/0"}}]
    [recovery]
    constraint = {kind="encoder_null"}
    [[audits]]
    name = "ioi"
    behavior = {kind="ioi"}
    discovery = {kind="attribution"}
    intervention = {kind="clamp", value=-5.0}
    [grid]
    variant = ["low", "high"]
    [variants.low]
    seed = 0
    [variants.high]
    recovery.constraint.kind = "feature_hold"
    [[variants.high.subject.saes]]
    site = "blocks.1.hook_resid_post"
    source = {kind="folder", path="organism:saes/1"}
    """
    low, high = plan(parse(text)).trials
    assert low.recovery.constraint.kind == "encoder_null"
    assert high.recovery.constraint.kind == "feature_hold"
    assert [sae.site for sae in high.subject.saes] == ["blocks.1.hook_resid_post"]


def test_the_bundled_sweeps_are_sweeps() -> None:
    planned = plan(parse(bundled("sweeps")))
    axes = {
        audit.name: [path for path, values in planned.study.grid_of(audit.name).items()
                     if len(values) > 1]
        for audit in planned.study.audits
    }  # fmt: skip
    assert axes["features"] == ["discovery.n_features"]
    assert axes["budget"] == ["recovery.constraint.kind", "recovery.budget.relative"]
    assert axes["strength"] == ["intervention.value"] and axes["seed"] == ["seed"]
    assert axes["objectives"] == ["recovery.objective.kind"]
    assert axes["amplify"] == ["intervention.value"]
    modes = {t.intervention.mode for t in planned.trials if t.audit == "modes"}  # type: ignore[attr-defined]
    assert modes == {"set", "floor", "multiply"}
    assert axes["steps"] == ["recovery.constraint.kind", "recovery.steps"]
    assert len(planned.study.grid_of("steps")["recovery.steps"]) >= 3
    assert axes["bos"] == ["intervention.include_bos"]
    sites = [t.subject.saes[0].site for t in planned.trials if t.audit == "layer"]
    assert len(set(sites)) == 3, "a layer each"
    kinds = [t.subject.saes for t in planned.trials if t.audit == "sae" and t.is_audit]
    assert len({sae.sha256 for (sae,) in kinds}) == len(kinds) == 2, "an SAE each"
    assert len({sae.site for (sae,) in kinds}) == 1, "at one site"
    beside = [t for t in planned.trials if t.control.kind == "random_features"]
    assert len(beside) == len(planned.study.grid_of("features")["discovery.n_features"])


def test_two_controls_of_one_kind_are_refused() -> None:
    twice = [{"kind": "random_features", "draw": draw} for draw in (0, 1)]
    with pytest.raises(StudyError, match="two controls 'random_features' beside one constraint"):
        plan(study({"seed": [0]}, **{"controls": twice}))
    apart = [
        {"kind": "wrong_target", "only_with": [kind]} for kind in ("unconstrained", "encoder_null")
    ]
    grid: dict[str, list[object]] = {"recovery.constraint.kind": ["unconstrained", "encoder_null"]}
    assert len(plan(study(grid, controls=apart)).trials) == 4
