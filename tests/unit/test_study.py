"""Studies: what a user writes is what runs, and what a user gets wrong is said."""

from __future__ import annotations

import tomllib
from math import prod
from pathlib import Path

import pytest

from holdfast.attacks import ATTACKS
from holdfast.attacks.soft_suffix import SoftSuffix
from holdfast.canonical import trial_id
from holdfast.errors import StudyError
from holdfast.planning import plan
from holdfast.study import Study, bundled, load, parse

TEXT = bundled("demo")
SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
ELSEWHERE = "[{site='blocks.1.hook_resid_post', source={kind='folder', path='organism:saes/1'}}]"


def test_the_bundled_study_round_trips() -> None:
    study = parse(TEXT)
    assert Study.model_validate(study.canonical()) == study
    assert study.canonical()["schema"] == tomllib.loads(TEXT)["schema"]


def test_trials_are_audits_times_points_times_controls() -> None:
    planned = plan(parse(TEXT))
    study = planned.study
    expected = 0
    for audit in study.audits:
        grid = study.grid_of(audit.name)
        controls = study.controls if audit.controls is None else audit.controls
        beside = prod(len(v) for path, v in grid.items() if not path.startswith("recovery."))
        others = prod(len(v) for path, v in grid.items() if not path.endswith("constraint.kind"))
        for constraint in grid["recovery.constraint.kind"]:
            own = 1 + sum(not c.only_with or constraint in c.only_with for c in controls)
            expected += others * own
        expected += beside * len(study.attacks if audit.attacks is None else audit.attacks)
    assert len(planned.trials) == expected
    assert len({trial.id for trial in planned.trials}) == expected


def test_the_demo_has_every_attack_a_monitored_suffix_and_a_dropped_error() -> None:
    """Each beside what it is to be compared with: no monitor, and the error kept."""
    trials = plan(parse(TEXT)).trials
    tried = {trial.attack.kind for trial in trials}
    assert tried == set(ATTACKS.builtin)
    suffixes = [t for t in trials if isinstance(t.attack, SoftSuffix)]
    weights = [(t.audit, t.attack.weight) for t in suffixes if isinstance(t.attack, SoftSuffix)]
    assert {weight for _, weight in weights} >= {0.0} and max(w for _, w in weights) > 0
    assert len({audit for audit, _ in weights}) == 1, "on the same prompts"
    passed_on = {
        kind: {
            trial.intervention.error_term.scale
            for trial in trials
            if trial.audit == "error_term" and trial.control.kind == kind
        }
        for kind in ("none", "wrong_target")
    }
    assert passed_on == {"none": {1.0, 0.5, 0.0}, "wrong_target": {1.0, 0.5, 0.0}}


def test_the_demo_holds_a_refused_answers_tokens_by_the_true_jacobian() -> None:
    """Behind a vector at the last token of the prompt, and beside its control."""
    held = [
        trial.control.kind
        for trial in plan(parse(TEXT)).trials
        if trial.audit == "induced_refusal" and trial.label == "jacobian_null"
    ]
    assert sorted(held) == ["none", "wrong_target"]


def test_the_refusal_study_has_the_answers_tokens_beside_the_anchor_alone() -> None:
    trials = [t for t in plan(parse(bundled("refusal"))).trials if t.audit == "answer"]
    settings = {
        (t.recovery.constraint.kind, t.recovery.perturb.answer, t.control.kind)
        for t in trials
        if t.recovery is not None and t.recovery.perturb.positions == "last_prompt"
    }
    for constraint in ("unconstrained", "encoder_null"):
        for control in ("none", "wrong_target"):
            at = {n for name, n, kind in settings if (name, kind) == (constraint, control)}
            assert 0 in at and max(at) > 0


def test_a_trial_is_identified_by_hashes_and_never_by_a_path() -> None:
    planned = plan(parse(TEXT))
    trial = planned.trials[0]
    assert trial.id == trial_id(trial.canonical())
    dumped = trial.model_dump_json()
    assert "assets" not in dumped and str(Path(__file__).anchor + "work") not in dumped
    assert len(trial.subject.weights_sha256) == 64
    assert type(trial).model_validate(trial.canonical()).id == trial.id


@pytest.mark.parametrize(
    "path, value",
    [
        ("seed", "3"),
        ("recovery.steps", "7"),
        ("recovery.budget.relative", "0.3"),
        ("recovery.stop.clean_margin", "0.7"),
        ("audits.0.intervention.value", "-3.0"),
        ("audits.0.discovery.n_features", "4"),
        ("data.test", "50"),
        ("recovery.order", "perturbation_then_clamp"),
    ],
)
def test_everything_that_changes_numbers_changes_the_id(path: str, value: str) -> None:
    before, after = plan(parse(TEXT)), plan(parse(TEXT, [f"{path}={value}"]))
    assert before.trials[0].id != after.trials[0].id
    assert before.hash != after.hash


def test_two_constraints_do_not_share_an_id_through_their_base_class() -> None:
    """A field typed as a base class would dump only the base's fields."""
    ids = {
        trial.recovery.constraint.kind: trial.id
        for trial in plan(parse(TEXT)).trials
        if trial.control.kind == "none" and trial.audit == "mcq"
    }
    assert len(set(ids.values())) == len(ids) == 3
    one, two = (
        plan(
            parse(
                TEXT, ["grid={}", f"recovery.constraint={{kind='gradient_projection', ridge={r}}}"]
            )
        )
        for r in (1e-4, 1e-3)
    )
    assert one.trials[0].id != two.trials[0].id


def test_limit_shrinks_the_audited_split_alone() -> None:
    study = parse(TEXT, limit=7)
    assert study.data.test == 7 and study.data.fit == parse(TEXT).data.fit


@pytest.mark.parametrize(
    "sets, message",
    [
        (["recovery.constraint.kind=encoder_nul"], r"did you mean 'encoder_null'"),
        (["recovry.steps=3"], r"unknown key 'recovry': did you mean 'recovery'"),
        (["recovery.step=3"], r"unknown key 'step': did you mean 'steps'"),
        (["audits.0.behavior.kind=io"], r"unknown kind 'io' in behaviors: did you mean 'ioi'"),
        (["audits.99.name=x"], r"no index into the \d+ entries"),
        (["recovery.steps"], r"--set takes path=value"),
        (["recovery.steps=0"], r"recovery.steps"),
        (["recovery.budget={relative=0.1, absolute=3.0}"], r"either `relative` or `absolute`"),
        (["schema=2"], r"schema"),
        (["audits.0.behavior.domain=hazard"], r"unknown key 'domain'"),
        (["audits.1.behavior.domain=hazzard"], r"did you mean 'hazard'"),
        (["controls=['wrong_targt']"], r"did you mean 'wrong_target'"),
        (["audits.1.name=ioi"], r"two audits have the name 'ioi'"),
        (["grid={'verdict.level'=[0.9]}"], r"'verdict.level' cannot vary"),
        (["grid={'recovery.steps'=[]}"], r"grid.recovery.steps: .*at least 1 item"),
        (["grid={'recovery.stepz'=[3]}"], r"unknown key 'stepz': did you mean 'steps'"),
        (["grid={variant=['wid']}", "variants={wide={seed=1}}"], r"no variant 'wid'.*'wide'"),
        (
            ["grid={variant=['a'], seed=[1]}", "variants={a={seed=2}}"],
            r"'seed' is set by the variant 'a' and by an axis",
        ),
        (
            ["grid={variant=['a']}", f"variants={{a={{subject.saes={ELSEWHERE}}}}}"],
            r"comes to SAEs at blocks.1.*twin has them at blocks.0.*`ignorant.saes`",
        ),
        (
            ["grid={'ignorant.dtype'=['float32']}"],
            r"audit 'bottleneck' has no ignorant twin",
        ),
        (["subject.saes.0.site=blocks.1.mlp"], r"only the residual stream"),
        (["seed=nan"], r"seed"),
        (["name=a/b"], r"name"),
    ],
)
def test_mistakes_are_named_with_the_nearest_known_names(sets: list[str], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        parse(TEXT, sets)


def test_broken_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no study file at"):
        load(tmp_path / "nothing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(StudyError, match=r"broken\.toml: the study is no valid TOML"):
        load(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyError, match="not a text file"):
        load(broken)


def test_repeated_grid_values_are_refused() -> None:
    with pytest.raises(StudyError, match="the same trial"):
        plan(parse(TEXT, ["grid={'recovery.steps'=[5, 5]}"]))
