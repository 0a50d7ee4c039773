"""Random features: as many, others, alike in how often they fire, and always the same ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.controls.random_features import RandomFeatures, firing_rates
from holdfast.edits import Capture, FeatureEdit
from holdfast.errors import FeatureError, StudyError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.interventions.clamp import Clamp
from holdfast.interventions.several import Several
from holdfast.planning import plan
from holdfast.report import write_report
from holdfast.run import open_run, run_study
from holdfast.setting import Setting
from holdfast.sites import Site
from holdfast.study import Study
from holdfast.subject import Subject
from holdfast.testing import tiny_batch
from tests.conftest import SITE
from tests.e2e.cli import small_study
from tests.unit.test_controls import letters, make_setting, no_twin


@pytest.fixture(scope="module")
def fit(subject: Subject) -> Batch:
    return tiny_batch(subject, 20)


def drawn_ids(features: FeatureSet) -> list[tuple[int, ...]]:
    return [entry.ids for entry in features.entries]


def test_as_many_others_and_none_twice(
    subject: Subject, fit: Batch, grouped_features: FeatureSet
) -> None:
    drawn = RandomFeatures().features(subject, fit, grouped_features)
    clamped = {i for ids in drawn_ids(grouped_features) for i in ids}
    for old, new in zip(grouped_features.entries, drawn.entries, strict=True):
        assert (old.site, old.group, len(old.ids)) == (new.site, new.group, len(new.ids))
        assert len(set(new.ids)) == len(new.ids)
        assert not clamped & set(new.ids), "clamped for this group or for another"


def test_rates_are_counted_on_the_groups_tokens_without_bos(
    subject: Subject, fit: Batch, grouped_features: FeatureSet
) -> None:
    rates = firing_rates(subject, fit, grouped_features)
    sae = subject.sae(SITE)
    for group in ("g0", "g1"):
        fired = []
        for row in range(len(fit)):
            if fit.groups[row] == group:
                capture = Capture(SITE)
                subject.outputs(fit.rows([row]), (capture,))
                fired.append(sae.full().encode(capture.seen[0][1][0, 1:]) > 0)
        expected = torch.cat(fired).double().mean(0)
        assert torch.equal(rates[str(SITE), group], expected)
        assert 0 < expected.mean() < 1


def test_a_feature_is_drawn_among_the_nearest_firing_rates(
    subject: Subject, fit: Batch, features: FeatureSet
) -> None:
    rates = firing_rates(subject, fit, features)[str(SITE), "*"].numpy()
    clamped = features.entries[0].ids
    for among in (1, 5):
        (entry,) = RandomFeatures(among=among).features(subject, fit, features).entries
        used: set[int] = set()
        for feature, new in zip(clamped, entry.ids, strict=True):
            free = [i for i in range(len(rates)) if i not in {*clamped, *used}]
            away = np.sort(np.abs(rates[free] - rates[feature]))
            assert abs(rates[new] - rates[feature]) <= away[among - 1]
            used.add(new)
        assert np.allclose(entry.scores, rates[list(entry.ids)])


def test_the_draw_depends_on_prompts_and_not_on_batches(
    subject: Subject, fit: Batch, grouped_features: FeatureSet
) -> None:
    rule = RandomFeatures()
    first = rule.features(subject, fit, grouped_features)
    shuffled = fit.rows(torch.randperm(len(fit)))
    assert rule.features(subject, shuffled, grouped_features) == first
    small = replace(subject, batching=Batching(3))
    assert drawn_ids(rule.features(small, fit, grouped_features)) == drawn_ids(first)
    torch.manual_seed(7)
    assert rule.features(subject, fit, grouped_features) == first
    others = {tuple(drawn_ids(RandomFeatures(draw=d).features(subject, fit, grouped_features)))
              for d in range(4)}  # fmt: skip
    assert len(others) > 1, "another draw draws others"


def test_too_few_features_to_draw_from(subject: Subject, fit: Batch) -> None:
    many = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=tuple(range(40))),), source="t")
    with pytest.raises(FeatureError, match=r"40 of the 64 features.*clamp fewer"):
        RandomFeatures().features(subject, fit, many)


@pytest.fixture
def setting(subject: Subject, features: FeatureSet, clamp: FeatureEdit, fit: Batch) -> Setting:
    made = make_setting(subject, letters(subject), features, clamp, slice(4, 20))
    # The clean margins of the tiny model, so that what a clamp suppresses is its own doing.
    return replace(made, fit=fit, clean_margin=made.test.margin(subject.read(made.test)))


def test_its_prompts_are_those_that_the_random_clamp_suppresses(setting: Setting) -> None:
    case = RandomFeatures().case(setting, no_twin)
    assert case.setting is not None and case.own
    margin = setting.test.margin(setting.subject.read(setting.test, case.edits))
    expected = ((setting.clean_margin > 0) & (margin <= 0)).nonzero().flatten()
    assert case.rows.tolist() == expected.tolist()
    assert torch.equal(case.batch.targets, setting.test.targets[case.rows]), "the right answer"
    assert torch.equal(case.clean_margin, setting.clean_margin[case.rows])
    (edit,) = case.edits
    assert isinstance(edit, FeatureEdit) and edit.value == -2.0, "the same strength"
    assert edit.bank.ids == tuple(e.ids for e in case.features.entries)
    assert case.features.entries[0].median_active != setting.features.entries[0].median_active


def test_an_intervention_that_names_its_features_gets_the_drawn_ones(
    setting: Setting, fit: Batch
) -> None:
    own = Clamp(value=-2.0, features=(SiteFeatures(site=str(SITE), ids=(3, 8)),))
    several = Several(of=(Clamp(value=-2.0), own))
    features = several.clamped(setting.features)
    made = replace(setting, intervention=several, features=features)
    case = RandomFeatures().case(made, no_twin)
    banks = [edit.bank.ids[0] for edit in case.edits if isinstance(edit, FeatureEdit)]
    assert [len(ids) for ids in banks] == [4, 2]
    assert not {i for ids in banks for i in ids} & {1, 5, 9, 30, 3, 8}
    assert set(case.features.at(Site(2))[0].ids) == {i for ids in banks for i in ids}


def test_without_a_fit_split(setting: Setting) -> None:
    with pytest.raises(StudyError, match="matched on the fit split"):
        RandomFeatures().case(replace(setting, fit=None), no_twin)


def test_prompts_that_a_random_clamp_suppresses_are_searched(tmp_path: Path) -> None:
    """Any features set to a thousand make any model forget: then these are held, and searched."""
    made = small_study(("ioi",), controls=("random_features",), paths=False)
    made["data"] = {"fit": 60, "tune": 4, "test": 8}
    made["audits"][0]["intervention"] = {"kind": "clamp", "mode": "set", "value": 1000.0}
    made["recovery"] |= {"steps": 4, "refine_steps": 2, "tolerance": 0.2}
    study = Study.model_validate(made)
    done = run_study(plan(study), tmp_path / "run")
    _, control = done.summary["trials"]
    assert control["control"] == "random_features"
    assert 0 < control["n_valid"] == control["n_suppressed"]
    store, _, _ = open_run(tmp_path / "run")
    record = store.load(control["id"])
    held = record["result"]["features"]["entries"][0]
    audit = store.load(done.summary["trials"][0]["id"])["result"]["features"]["entries"][0]
    assert not set(held["ids"]) & set(audit["ids"])
    assert record["result"]["checks"]["preactivation_drift_max"] < 1e-5, "the drawn ones are held"
    searched = [row for row in store.examples(control["id"]) if row["outcome"]]
    assert len(searched) == control["n_valid"]
    assert all(row["suppressed_margin"] <= 0 for row in searched), "under the random clamp"


def test_several_draws_are_counted_together(setting: Setting) -> None:
    """The first is searched; of each it is counted what a control of that draw alone counts."""
    several = RandomFeatures(draws=8).case(setting, no_twin)
    alone = [RandomFeatures(draw=draw).case(setting, no_twin) for draw in range(8)]
    counts = [len(case.rows) for case in alone]
    assert len(set(counts)) > 1, "draws that all do the same would prove nothing"
    assert several.features == alone[0].features and torch.equal(several.rows, alone[0].rows)
    told = several.measured["random_clamps"]
    n_clean = int((setting.clean_margin > 0).sum())
    assert (told["n_suppressed"], told["n_clean"]) == (counts, n_clean)
    rate = told["rate"]
    assert rate["estimate"] == pytest.approx(sum(counts) / 8 / n_clean)
    assert rate["low"] <= rate["estimate"] <= rate["high"] and "both" in rate["method"]
    assert all(case.measured["random_clamps"]["rate"] is None for case in alone)


def test_a_random_clamp_that_suppresses_nothing_is_a_finding(tmp_path: Path) -> None:
    """Recorded, and read like every other trial; not an error, and not done again."""
    control = {"kind": "random_features", "draws": 2}
    made = small_study(("mcq",), controls=(control,), paths=False)
    made["audits"][0]["discovery"]["n_features"] = 2
    made["audits"][0]["intervention"]["value"] = -5.0
    made["recovery"] |= {"steps": 4, "refine_steps": 2, "tolerance": 0.2}
    study = Study.model_validate(made)
    done = run_study(plan(study), tmp_path / "run")
    assert (done.n_run, done.failures, done.skipped) == (2, (), ())
    audit, control = done.summary["trials"]
    assert audit["n_valid"] > 0, "the study is not about this"
    assert (control["n_suppressed"], control["n_valid"]) == (0, 0)
    assert control["recovery_rate"] is None and control["outcome"] == "not_searched"
    (separation,) = audit["separations"]
    assert separation["sentence"] == "random features: no prompt is valid in both"
    assert run_study(plan(study), tmp_path / "run").n_run == 0
    store, read, complete = open_run(tmp_path / "run")
    assert complete
    drawn = store.load(control["id"])["result"]["features"]["entries"][0]["ids"]
    clamped = store.load(audit["id"])["result"]["features"]["entries"][0]["ids"]
    assert len(drawn) == len(clamped) and not set(drawn) & set(clamped)
    page = write_report(store, read, tmp_path / "report.html").read_text()
    assert "random features" in page and "suppresses 0, 0 of" in page and "in 2 draws" in page
