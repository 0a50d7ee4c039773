"""Targeted probe perturbation: texts, effects, the score, and an audit of the organism."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from holdfast.behaviors.cutting import readable
from holdfast.behaviors.tpp import REST, TPP
from holdfast.behaviors.tpp_score import tpp_score
from holdfast.controls.none import NoControl
from holdfast.controls.wrong_target import WrongTarget
from holdfast.datasets.file import File
from holdfast.datasets.labelled import (
    PRESETS,
    SHARES,
    LabelledText,
    in_turns,
    labelled_texts,
    split_texts,
)
from holdfast.discovery.tpp_effect import TPPEffect
from holdfast.edits import Capture
from holdfast.errors import FeatureError, StudyError
from holdfast.loading import SubjectSpec
from holdfast.planning import plan
from holdfast.readouts.probes import NONE, Probes
from holdfast.report import side_effects, strata
from holdfast.report.data import Arm, AuditData, Point
from holdfast.report.page import environment
from holdfast.setting import Data, Setting, prepare, readout_of
from holdfast.sites import Site
from holdfast.study import parse
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_tokenizer
from holdfast.trial import Lab, TrialResult, run_trial

AUDIT = """
schema = 1
name   = "tpp"
controls = ["wrong_target", "no_clamp"]
[subject]
model = "organism"
[[subject.saes]]
site   = "blocks.0.hook_resid_post"
source = { kind = "folder", path = "organism:saes/0" }
[data]
fit  = 60
tune = 30
test = 30
[recovery]
constraint = { kind = "encoder_null" }
perturb    = { positions = "all" }
budget     = { relative = 0.5 }
stop       = { clean_margin = 0.5 }
steps      = 30
refine_steps = 10
doublings  = 1
[[audits]]
name         = "tpp"
behavior     = { kind = "tpp", target = "teacher", penalties = [0.1, 1.0] }
discovery    = { kind = "tpp_effect", n_features = 8 }
intervention = { kind = "clamp", mode = "set", value = 0.0 }
"""


# --- texts ----------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> File:
    path.write_text("\n".join(map(json.dumps, rows)))
    return File(path=str(path))


def rows_of(n: int, labels: tuple[Any, ...] = (11, 13, 14), attributes: Any = (0, 1)) -> Any:
    return [
        {
            "text": f"w{i} w{(3 * i) % 40} about {label} and {a}, number {i}",
            "label": label, "attribute": a,
        }
        for label in labels for a in attributes for i in range(n)
    ]  # fmt: skip


CLASSES = (("a", "11"), ("b", "13"), ("c", "14"))


def test_texts_are_taken_by_class_once_each(tmp_path: Path) -> None:
    rows = rows_of(4)
    repeated = rows[0] | {"text": "  " + rows[0]["text"].upper() + " "}
    both = {"text": "of two classes", "attribute": 0}
    stray = {"text": "of none", "label": 99, "attribute": 0}
    data = write(
        tmp_path / "texts.jsonl",
        [*rows, repeated, stray, both | {"label": 11}, both | {"label": 13}],
    )
    found = labelled_texts(data, CLASSES)
    assert {name: len(own) for name, own in found.items()} == {"a": 8, "b": 8, "c": 8}
    every = [text for own in found.values() for text in own]
    assert len({text.id for text in every}) == 24
    assert not any("two classes" in text.text for text in every), "its labels disagree"


def test_splits_share_no_text_and_balance_the_attribute(tmp_path: Path) -> None:
    lopsided = [*rows_of(40, attributes=(0,)), *rows_of(12, attributes=(1,))]
    texts = labelled_texts(write(tmp_path / "texts.jsonl", lopsided), CLASSES)["a"]
    splits = {name: split_texts(texts, name, 0) for name in SHARES}
    ids = [text.id for own in splits.values() for text in own]
    assert len(set(ids)) == len(ids)
    for own in splits.values():
        for n in (2, 4, len(own)):
            counts = [sum(t.attribute == a for t in own[:n]) for a in ("0", "1")]
            assert counts[0] == counts[1] > 0, "any first few are balanced"
    other = split_texts(texts, "test", 1)
    assert [t.id for t in other] != [t.id for t in splits["test"]], "drawn by the seed"


def test_in_turns_takes_as_many_of_each() -> None:
    assert in_turns([[1, 2, 3], [4, 5]], 10) == [1, 4, 2, 5]
    assert in_turns([[1, 2, 3], [4, 5]], 3) == [1, 4, 2] and in_turns([], 3) == []


def test_bad_rows_and_missing_classes_are_named(tmp_path: Path) -> None:
    rows = rows_of(2)
    rows[3]["text"] = "   "
    with pytest.raises(StudyError, match="row 4: expected a text"):
        labelled_texts(write(tmp_path / "blank.jsonl", rows), CLASSES)
    rows[3]["text"] = 7
    with pytest.raises(StudyError, match="row 4: expected a text, got int"):
        labelled_texts(write(tmp_path / "number.jsonl", rows), CLASSES)
    with pytest.raises(StudyError, match=r"no text of the class 'd', label '12'.*11"):
        labelled_texts(write(tmp_path / "few.jsonl", rows_of(2)), (*CLASSES, ("d", "12")))


@dataclass
class EndsTexts:
    """A tokenizer that puts EOS behind every text."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        coded = self.inner(text, **kwargs)
        end = {"input_ids": 2, "offset_mapping": (0, 0)}
        return {name: [*coded[name], last] for name, last in end.items() if name in coded}


def test_texts_are_cut_to_what_is_read_and_special_tokens_left_out() -> None:
    tokenizer: Any = tiny_tokenizer()
    plain = LabelledText("1", " ".join(f"w{i}" for i in range(30)), "a")
    marked = LabelledText("2", f"w1 w2 {tokenizer.eos_token} w3", "a")
    short = LabelledText("3", "w1 w2", "a")
    kept = readable(tokenizer, [plain, marked, short, short], 2, 10)
    assert [text.id for text in kept] == ["1", "3"]
    assert len(tokenizer(kept[0].text)["input_ids"]) == 10
    assert kept[0].text == plain.text[: len(kept[0].text)] and kept[1].text == "w1 w2"
    assert readable(EndsTexts(tokenizer), [plain, short], 2, 10) == []  # type: ignore[arg-type]


def test_texts_that_are_one_after_the_cut_are_refused_before_anything_is_read() -> None:
    tokenizer: Any = tiny_tokenizer()
    long = " ".join(f"w{i}" for i in range(12))
    first, second = LabelledText("1", f"{long} w20", "a"), LabelledText("2", f"{long} w21", "a")
    assert len(readable(tokenizer, [first, second], 2, 14)) == 2
    with pytest.raises(StudyError, match=r"1 and 2 of class 'a' are the same.*max_tokens = 10"):
        readable(tokenizer, [first, second], 2, 10)
    assert len(readable(tokenizer, [first, second], 1, 10)) == 1, "nobody asked for the second"


def test_neighbors_are_balanced_and_ask_every_probe(tmp_path: Path) -> None:
    source = write(tmp_path / "texts.jsonl", rows_of(30))
    behavior = TPP(source=source, classes=dict(CLASSES), target="b", max_tokens=20)
    tokenizer: Any = tiny_tokenizer()
    own = behavior.examples(tokenizer, "test", 12, 0)
    assert len(own) == 12 and {e.target for e in own} == {"b"}
    assert {e.rivals for e in own} == {(NONE,)} and {e.alternatives for e in own} == {("a", "c")}
    found = behavior.neighbors(tokenizer, "test", 12, 0)
    assert set(found) == {REST, "a", "c"}
    assert {e.target for e in found[REST]} == {NONE} and {e.rivals for e in found[REST]} == {("b",)}
    for name in ("a", "c"):
        targets = [e.target for e in found[name]]
        assert targets.count(name) == targets.count(NONE) == 6
        denied = {e.rivals for e in found[name] if e.target == NONE}
        assert denied == {(name,)}, "the same probe is asked of texts of other classes"
        assert len({e.id for e in found[name]}) == 12


# --- what can be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target": "teecher"}, "unknown target 'teecher'.*'teacher'"),
        ({"target": "b", "classes": {"a": 1, "b": 2}}, "three or more"),
        ({"target": "none", "classes": {"a": 1, "b": 2, "none": 3}}, "called 'none'"),
        ({"target": "dentist", "preset": "bias_in_bios_4"}, "unknown preset.*'bias_in_bios_1'"),
        ({"target": "dentist", "preset": "bias_in_bios_1"}, "LabHC/bias_in_bios"),
        ({"target": "nurse", "classes": {"nurse": 1, "pilot": 2, "judge": 3}}, "'judge'"),
        ({"target": "nurse", "site": "layer one"}, "cannot read the site"),
        ({"target": "nurse", "penalties": []}, "at least 1 item"),
        ({"target": "nurse", "source": "organisms"}, "a table with a `kind`"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_said_in_full(fields: dict[str, Any], said: str) -> None:
    with pytest.raises((ValidationError, StudyError), match=said):
        TPP.model_validate({"kind": "tpp"} | fields)


def test_a_preset_names_columns_and_classes_of_a_local_file(tmp_path: Path) -> None:
    for name, preset in PRESETS.items():
        columns = preset.columns
        rows = [
            {columns["text"]: f"{label} {i} text", columns["label"]: int(label),
             columns["attribute"]: i % 2}
            for label in preset.classes.values() for i in range(8)
        ]  # fmt: skip
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        behavior = TPP.model_validate(
            {
                "preset": name, "target": next(iter(preset.classes)),
                "source": {"kind": "file", "path": str(path)},
            }
        )  # fmt: skip
        assert behavior.classes == dict(preset.classes) and len(behavior.classes) == 5
        assert len(behavior.examples(tiny_tokenizer(), "test", 9, 0)) == 4  # type: ignore[arg-type]
        again = TPP.model_validate(behavior.model_dump(mode="json", context={"identity": True}))
        assert again.classes == behavior.classes, "a record can be read back"


def test_classes_of_another_preset_are_not_taken_for_its_own() -> None:
    source = {"kind": "file", "path": "texts.jsonl"}
    fields = {"kind": "tpp", "target": "nurse", "preset": "bias_in_bios_1", "source": source}
    bios = {"nurse": 13, "painter": 14, "dentist": 6}
    with pytest.raises(ValidationError, match=r"'nurse' with the label 13 is none of preset"):
        TPP.model_validate(fields | {"classes": bios})


def test_the_order_of_classes_is_that_of_a_record() -> None:
    one = TPP(target="nurse", classes={"pilot": 1, "nurse": 2, "baker": 3})  # type: ignore[dict-item]
    assert list(one.classes) == ["baker", "nurse", "pilot"]


def test_data_that_cannot_be_used_is_found_with_the_study(tmp_path: Path) -> None:
    lopsided = [*rows_of(30, attributes=(0,)), *rows_of(2, attributes=(1,))]
    for name, rows, said in (
        ("few.jsonl", lopsided, r"too few texts of class 'a' for the split 'tune'.*2 of '1'"),
        ("other.jsonl", rows_of(9, labels=(11, 13)), "no text of the class 'c'"),
        ("columns.jsonl", [{"words": "x", "label": 11}], "no column 'text'.*words"),
    ):
        path = tmp_path / name
        write(path, rows)
        fields = {"kind": "tpp", "target": "a", "classes": dict(CLASSES)}
        with pytest.raises(ValidationError, match=said):
            TPP.model_validate(fields | {"source": {"kind": "file", "path": str(path)}})


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "texts.jsonl", rows_of(30))
    behavior = TPP(source=source, classes=dict(CLASSES), target="b")
    with pytest.raises(StudyError, match="add_eos_token"):
        behavior.examples(EndsTexts(tiny_tokenizer()), "test", 5, 0)  # type: ignore[arg-type]


def test_a_control_that_says_nothing_is_refused_by_name() -> None:
    text = AUDIT.replace('"wrong_target", "no_clamp"', '"ignorant"')
    with pytest.raises(StudyError, match=r"'ignorant' says nothing about tpp.*no twin"):
        plan(parse(text))


def test_several_saes_leave_open_where_the_probes_read(subject: Subject) -> None:
    behavior = TPP(target="nurse")
    with pytest.raises(StudyError, match=r"behavior\.site"):
        behavior.readout(subject)
    assert behavior.model_copy(update={"site": "blocks.1.hook_resid_post"}).readout(
        subject
    ).site == Site(2)
    with pytest.raises(StudyError, match="3 blocks"):
        behavior.model_copy(update={"site": "blocks.7.hook_resid_post"}).readout(subject)


def test_effects_need_a_probe(subject: Subject) -> None:
    with pytest.raises(FeatureError, match="read from logits"):
        TPPEffect().find(subject, tiny_batch(subject), {})


# --- the organism ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def organism() -> Subject:
    study = parse(AUDIT)
    assert isinstance(study.subject, SubjectSpec)
    return Subject.load(study.subject)


@pytest.fixture(scope="module")
def setting(organism: Subject) -> Setting:
    (audit,) = parse(AUDIT).audits
    data = Data(fit=60, tune=30, test=30)
    return prepare(organism, audit.behavior, audit.discovery, audit.intervention, data, 0)


def test_probes_name_professions_that_they_were_not_fitted_on(setting: Setting) -> None:
    readout = setting.test.readout
    assert isinstance(readout, Probes)
    assert min(readout.validation) > 0.75
    for name, (_, clean, _) in setting.neighbors.items():
        assert float(clean.float().mean()) > 0.75, name
    assert setting.clean.float().mean() > 0.6
    assert setting.suppressed.sum() >= 9, "the clamp takes it away"
    data = Data(fit=60, tune=30, test=7)
    assert isinstance(setting.behavior, TPP)
    again = setting.behavior.model_copy(update={"target": "pilot"})
    assert readout_of(setting.subject, again, data, 0) is readout, "whatever is audited"
    assert readout_of(setting.subject, again, data, 1) is not readout


def test_effects_are_those_worked_out_by_hand(setting: Setting) -> None:
    """Text by text from the residual, the codes pooled in plain loops."""
    subject, readout = setting.subject, setting.test.readout
    assert isinstance(readout, Probes)
    behavior = TPP(target="teacher")
    tokenizer = subject.tokenizer
    own = subject.batch(behavior.examples(tokenizer, "fit", 10, 0), readout)
    rest = subject.batch(behavior.neighbors(tokenizer, "fit", 10, 0)[REST], readout)
    sae = subject.sae(readout.site).full()

    def mean(batch: Any) -> Tensor:
        codes = []
        for row in range(len(batch)):
            capture = Capture(readout.site)
            subject.outputs(batch.rows([row]), (capture,))
            codes.append(sae.encode(capture.seen[0][1][0, 1:]).mean(0))
        return torch.stack(codes).mean(0)

    w = readout.weight[readout.classes.index("teacher")]
    effects = (mean(own) - mean(rest)).relu() * (sae.W_dec @ w)
    found = TPPEffect(n_features=12).find(subject, own, {REST: rest})
    (entry,) = found.entries
    best = effects.topk(12)
    assert entry.ids == tuple(best.indices.tolist())
    np.testing.assert_allclose(entry.scores, best.values.numpy(), rtol=1e-4)
    assert min(entry.scores) > 0
    with pytest.raises(FeatureError, match="texts of other classes"):
        TPPEffect().find(subject, own, {})


def test_the_score_is_a_difference_of_accuracies_whose_interval_holds_it(setting: Setting) -> None:
    found = {m.name: m for m in tpp_score(setting, REST)}

    def fall(clean: Tensor, suppressed: Tensor) -> float:
        return float(clean.double().mean() - suppressed.double().mean())

    own = fall(setting.clean_margin > 0, setting.suppressed_margin > 0)
    falls = {name: fall(*seen) for name, (_, *seen) in setting.neighbors.items()}
    intended = (own + falls.pop(REST)) / 2
    unintended = float(np.mean(list(falls.values())))
    assert found["score.tpp.intended"].estimate == pytest.approx(intended)
    assert found["score.tpp.unintended"].estimate == pytest.approx(unintended)
    assert found["score.tpp"].estimate == pytest.approx(intended - unintended)
    for m in found.values():
        assert m.low is not None and m.high is not None and m.estimate is not None
        assert m.low < m.estimate < m.high


def test_the_interval_of_the_score_covers_as_often_as_it_says() -> None:
    """On texts that flip with known probabilities, where the true score is .2."""
    rng, covered, n_runs = np.random.default_rng(0), 0, 30
    for _ in range(n_runs):

        def batch(name: str, n: int = 80) -> SimpleNamespace:
            return SimpleNamespace(ids=tuple(f"{name}{i}" for i in range(n)))

        def after(fall: float) -> tuple[Tensor, Tensor]:
            kept = torch.from_numpy(rng.random(80) >= fall)
            return torch.ones(80, dtype=torch.bool), kept

        clean, suppressed = after(0.6)
        made: Any = SimpleNamespace(
            test=batch("own"), clean_margin=clean.double() - 0.5,
            suppressed_margin=suppressed.double() - 0.5,
            neighbors={REST: (batch("rest"), *after(0.0)), "x": (batch("x"), *after(0.1)),
                       "y": (batch("y"), *after(0.1))},
        )  # fmt: skip
        m = tpp_score(made, REST)[0]
        assert m.low is not None and m.high is not None
        covered += m.low <= 0.2 <= m.high
    assert covered >= 0.85 * n_runs


def test_wrong_targets_are_not_there_before_the_search(setting: Setting) -> None:
    case = WrongTarget().case(setting, lambda: setting)
    own = NoControl().case(setting, lambda: setting)
    scores = case.subject.read(case.batch, case.edits)
    assert (case.batch.margin(scores) <= 0).all()
    assert set(case.batch.ids) | set(case.dropped) == set(own.batch.ids)
    assert (case.batch.targets != setting.test.targets[case.rows]).all()
    # A class that is named under the clamp already is dropped, with its reason.
    bias = own.batch.readout.bias + 100.0  # type: ignore[attr-defined]
    eager = replace(own.batch.readout, bias=bias)  # type: ignore[type-var]
    shown = WrongTarget().case(
        replace(setting, test=replace(setting.test, readout=eager)), lambda: setting
    )
    assert len(shown.rows) == 0 and set(shown.dropped) == set(own.batch.ids)


@pytest.fixture(scope="module")
def ran(organism: Subject) -> dict[str, TrialResult]:
    made = plan(parse(AUDIT))
    lab = Lab({key: organism for key in made.specs})
    return {trial.control.kind: run_trial(trial, lab) for trial in made.trials}


def test_an_audit_recovers_at_the_closed_form_and_verifies_it(ran: dict[str, TrialResult]) -> None:
    for kind, made in ran.items():
        audited = [row for row in made.examples if row["outcome"]]
        assert audited and all(row["recovered"] for row in audited), kind
        for row in audited:
            ratio = row["smallest_norm"] / row["closed_form_norm"]
            assert 1 - 1e-5 <= ratio <= 1.01, (kind, row["id"], ratio)
            assert row["margin"] >= row["goal"] * (1 - 1e-4) - 1e-4
        checks = made.result["checks"]
        assert checks["preactivation_drift_max"] < 1e-6 and checks["replay_error"] < 1e-4
        assert 0 < checks["free_share_mean"] < 1
        assert -1e-5 < checks["closed_form_error_min"] <= checks["closed_form_error_max"] < 0.01
        rates = {m["name"]: m["estimate"] for m in made.result["measurements"]}
        assert checks["n_eligible"] > 0 and checks["n_reactivated"] == 0, "every feature is held"
        assert rates["none_reactivated_rate"] == rates["recovery_rate"]
        assert rates["reactivated_within_eligible"] == rates["reactivated_of_all"] == 0
        assert rates["other_order_rate"] == 1 and checks["other_order_margin_max"] < 1e-3
        assert rates["zero_reactivation_rate"] <= rates["none_reactivated_rate"]
        if kind == "none":  # a probe is linear: the same is added whatever the clamp did
            assert rates["gain_unclamped"] == pytest.approx(1, abs=1e-3)
        assert rates["lane_steps"] >= 1


def test_a_record_can_be_read_again_without_the_run(
    organism: Subject, ran: dict[str, TrialResult]
) -> None:
    """The saved vectors and probes alone: the mean of saved deltas moves each logit as recorded."""
    tensors, result = ran["none"].tensors, ran["none"].result
    weight = tensors["probes.weight"][result["readout"]["classes"].index("teacher")]
    T = (tensors["positions"] >= 0).sum(1)
    moved = tensors["blocks.0.hook_resid_post"].sum(1) / T[:, None] @ weight
    audited = [row for row in ran["none"].examples if row["outcome"]]
    expected = torch.tensor([row["margin"] - row["suppressed_margin"] for row in audited])
    torch.testing.assert_close(moved, expected.float(), rtol=1e-3, atol=1e-3)
    assert "geometry" in result["caveat"]
    names = {m["name"] for m in result["measurements"]}
    assert {"score.tpp", "recovery_rate.near", "neighbor.nurse.suppressed"} <= names


def test_the_report_shows_thirds_and_scores_once(ran: dict[str, TrialResult]) -> None:
    trial: Any = SimpleNamespace(control=SimpleNamespace(kind="none"))
    arm = Arm(trial, {"result": ran["none"].result}, (), {})
    points = (Point("encoder_null", arm, ()), Point("unconstrained", arm, ()))
    audit = AuditData("tpp", None, points, points[:1])
    data: Any = SimpleNamespace(audits=(audit,))
    thirds, effects = strata.section(data), side_effects.section(data)
    assert thirds is not None
    rows = thirds.context["audits"][0]["rows"]
    assert [row["name"] for row in rows] == ["near", "middle", "deep"] * 2
    margins = [row["margin"]["estimate"] for row in rows[:3]]
    assert margins == sorted(margins, reverse=True) and margins[0] < 0
    (shown,) = effects.context["audits"]
    assert [s["name"] for s in shown["scores"]] == ["tpp", "tpp.intended", "tpp.unintended"]
    env = environment()
    for part in (thirds, effects):
        html = env.get_template(part.template).render(part.context)
        assert "tpp" in html and "None" not in html
    assert strata.section(SimpleNamespace(audits=())) is None  # type: ignore[arg-type]


def test_published_figures_are_whole() -> None:
    from importlib.resources import files

    said = json.loads((files("holdfast") / "published" / "tpp.json").read_text())
    assert said["behavior"] == "tpp" and "arXiv" in said["source"]
    fields = {"label", "where", "measure", "estimate", "low", "high", "k", "n", "note"}
    for point in said["points"]:
        assert fields <= set(point) <= fields | {"pooled"} and 0 <= point["estimate"] <= 1
        preset = PRESETS.get(point["where"].get("behavior.preset", ""))
        target = point["where"].get("behavior.target")
        assert target is None or (preset is not None and target in preset.classes)
    scores = {p["label"]: p["estimate"] for p in said["points"] if p["measure"] == "score.tpp"}
    parts = {
        (p["label"], p["measure"]): p["estimate"] for p in said["points"] if "tpp." in p["measure"]
    }
    for name, total in scores.items():
        difference = parts[name, "score.tpp.intended"] - parts[name, "score.tpp.unintended"]
        assert difference == pytest.approx(total, abs=1.01e-3)
