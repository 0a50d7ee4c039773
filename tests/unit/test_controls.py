"""Controls ask for something else on the same prompts, and say what they left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.batch import Batch, Example
from holdfast.controls import CONTROLS, Case, aim_elsewhere
from holdfast.controls.ignorant import Ignorant
from holdfast.controls.no_clamp import NoClamp
from holdfast.controls.none import NoControl
from holdfast.controls.wrong_target import WrongTarget
from holdfast.edits import FeatureEdit
from holdfast.errors import EmptyValidSetError, StudyError
from holdfast.features import FeatureSet
from holdfast.interventions.clamp import Clamp
from holdfast.planning import plan
from holdfast.setting import Setting
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.testing import WORDS, tiny_subject
from holdfast.trial import Lab, run_trial

N = 24
ANSWERS = WORDS[:4]


def letters(subject: Subject, n: int = N) -> Batch:
    """n prompts with four answers in play, like a question's letters."""
    return subject.batch(
        [
            Example(
                id=f"q{i}",
                text=" ".join(WORDS[10 + (i * k) % 30] for k in range(1, 6)),
                target=ANSWERS[i % 4],
                rivals=tuple(a for a in ANSWERS if a != ANSWERS[i % 4]),
                alternatives=tuple(a for a in ANSWERS if a != ANSWERS[i % 4]),
                cluster=f"c{i // 2}",
                group="g",
            )
            for i in range(n)
        ]
    )


def names(subject: Subject, n: int = N) -> Batch:
    """n prompts with a single answer that is neither the target nor its rival."""
    return subject.batch(
        [
            Example(
                id=f"n{i}",
                text=" ".join(WORDS[10 + (i * k) % 30] for k in range(1, 6)),
                target=WORDS[i % 5],
                rivals=(WORDS[5],),
                alternatives=(WORDS[6],),
                cluster=f"n{i}",
            )
            for i in range(n)
        ]
    )


def make_setting(
    subject: Subject, test: Batch, features: FeatureSet, clamp: FeatureEdit, valid: slice
) -> Setting:
    """A setting in which the clamp flips the rows `valid` from the target to the first rival."""
    suppressed = torch.full((len(test),), 0.5)
    suppressed[valid] = -0.5
    flipped = suppressed <= 0
    return Setting(
        subject=subject,
        features=features,
        intervention=Clamp(mode="set_where_active", value=-2.0),
        edits=(clamp,),
        sizes={"fit": 1, "tune": 1, "test": len(test)},
        test=test,
        clean_margin=torch.linspace(0.5, 3.0, len(test)),
        suppressed_margin=suppressed,
        suppressed_answer=torch.where(flipped, test.rivals[:, 0], test.targets),
        neighbors={},
    )


@pytest.fixture
def setting(subject: Subject, features: FeatureSet, clamp: FeatureEdit) -> Setting:
    return make_setting(subject, letters(subject), features, clamp, slice(4, 20))


def no_twin() -> Setting:
    raise AssertionError("this control needs no twin")


def check_wrong(case: Case, before: Batch) -> None:
    """What is aimed at is in play, is not right, and must beat everything else in play."""
    for row, example in enumerate(case.batch.ids):
        old = before.ids.index(example)
        in_play = set(before.answers()[old].tolist())
        target = int(case.batch.targets[row])
        assert target in in_play and target != int(before.targets[old])
        assert set(case.batch.rivals[row].tolist()) == in_play - {target}
        assert int(before.targets[old]) in case.batch.rivals[row].tolist()


# --- Wrong target ---------------------------------------------------------------------------------


def test_a_wrong_target_is_neither_right_nor_given_and_must_beat_both(setting: Setting) -> None:
    case = WrongTarget().case(setting, no_twin)
    assert case.rows.tolist() == list(range(4, 20))
    check_wrong(case, setting.test)
    given = setting.suppressed_answer[case.rows]
    assert not (case.batch.targets == given).any()
    for row, token in enumerate(given.tolist()):
        assert token in case.batch.rivals[row].tolist()
    assert case.edits == setting.edits and case.subject is setting.subject
    assert torch.equal(case.clean_margin, setting.clean_margin[case.rows]), "the right one's goal"
    assert torch.equal(case.batch.tokens, setting.test.rows(case.rows).tokens)


def test_a_wrong_target_is_forced_only_when_it_beats_the_right_answer(setting: Setting) -> None:
    case = WrongTarget().case(setting, no_twin)
    logits = torch.zeros(len(case.batch), 44)
    logits.scatter_(1, case.batch.targets[:, None], 1.0)
    assert (case.batch.margin(logits) == 1).all()
    right = setting.test.targets[case.rows]
    logits.scatter_(1, right[:, None], 1.5)
    assert (case.batch.margin(logits) == -0.5).all()


def test_a_wrong_target_is_drawn_by_id(setting: Setting) -> None:
    """Not by row, batch or generator: a prompt is aimed the same way wherever it stands."""
    batch = setting.test
    whole = aim_elsewhere(batch, batch.targets)
    drawn = dict(zip(whole.ids, whole.targets.tolist(), strict=True))
    torch.manual_seed(123)
    for rows in (torch.arange(N - 1, -1, -1), torch.tensor([7]), torch.arange(3, N, 5)):
        part = aim_elsewhere(batch.rows(rows), batch.targets[rows])
        assert [drawn[i] for i in part.ids] == part.targets.tolist()
    picks = {
        batch.alternatives[row].tolist().index(drawn[example])
        for row, example in enumerate(batch.ids)
    }
    assert picks == {0, 1, 2}, "neither always the first nor always the last"


def test_a_prompt_whose_only_wrong_answer_is_given_is_left_out(
    subject: Subject, features: FeatureSet, clamp: FeatureEdit
) -> None:
    setting = make_setting(subject, names(subject), features, clamp, slice(0, 10))
    given = setting.suppressed_answer.clone()
    given[[2, 5]] = setting.test.alternatives[[2, 5], 0]
    setting = replace(setting, suppressed_answer=given)
    case = WrongTarget().case(setting, no_twin)
    assert case.batch.ids == tuple(f"n{i}" for i in range(10) if i not in (2, 5))
    assert case.rows.tolist() == [i for i in range(10) if i not in (2, 5)]
    assert torch.equal(case.clean_margin, setting.clean_margin[case.rows])
    assert set(case.dropped) == {"n2", "n5"}
    assert all("answer given under the clamp" in reason for reason in case.dropped.values())
    check_wrong(case, setting.test)


# --- No clamp, and none ---------------------------------------------------------------------------


def test_no_clamp_edits_nothing_and_aims_at_a_wrong_answer(setting: Setting) -> None:
    case = NoClamp().case(setting, no_twin)
    assert case.edits == ()
    assert case.features == setting.features, "the same features are held"
    assert case.rows.tolist() == setting.valid.tolist()
    assert torch.equal(case.clean_margin, setting.clean_margin[case.rows])
    assert case.dropped == {}
    check_wrong(case, setting.test)


def test_the_audit_itself_asks_for_the_right_answer_with_the_clamp_on(setting: Setting) -> None:
    case = NoControl().case(setting, no_twin)
    assert case.rows.tolist() == list(range(4, 20)), "the valid rows and no other"
    assert case.edits == setting.edits
    assert torch.equal(case.batch.targets, setting.test.targets[case.rows])
    assert torch.equal(case.batch.rivals, setting.test.rivals[case.rows])


def test_rows_that_were_never_clean_or_not_suppressed_are_not_valid(setting: Setting) -> None:
    margin = setting.clean_margin.clone()
    margin[10] = 0.0
    margin[11] = -1.0
    unclean = replace(setting, clean_margin=margin)
    assert unclean.valid.tolist() == [i for i in range(4, 20) if i not in (10, 11)]


# Random features have a valid set of their own, and say what its being empty means.
@pytest.mark.parametrize("name", sorted({*CONTROLS.names()} - {"random_features"}))
def test_an_empty_valid_set_is_a_case_without_rows(
    name: str, subject: Subject, features: FeatureSet, clamp: FeatureEdit
) -> None:
    """The trial then says so with the funnel; a control must not fail before."""
    nothing = make_setting(subject, letters(subject), features, clamp, slice(0, 0))
    case = CONTROLS.get(name)(kind=name).case(nothing, lambda: nothing)  # type: ignore[attr-defined]
    assert len(case.rows) == len(case.batch) == len(case.clean_margin) == 0


# --- Ignorant twin --------------------------------------------------------------------------------


@pytest.fixture
def twin(features: FeatureSet, clamp: FeatureEdit) -> Setting:
    """Another subject, in which rows 6 and 9 happen to be right under its clamp."""
    other = tiny_subject(seed=5)
    setting = make_setting(other, letters(other), features, clamp, slice(0, N))
    margin = setting.suppressed_margin.clone()
    margin[[6, 9]] = 0.1
    return replace(setting, suppressed_margin=margin, clean_margin=torch.full((N,), -1.0))


def test_the_twin_is_asked_the_audits_prompts_by_id(setting: Setting, twin: Setting) -> None:
    case = Ignorant().case(setting, lambda: twin)
    valid = [setting.test.ids[row] for row in setting.valid.tolist()]
    assert case.batch.ids == tuple(i for i in valid if i not in ("q6", "q9"))
    assert set(case.dropped) == {"q6", "q9"}
    assert case.subject is twin.subject and case.edits == twin.edits
    assert case.features == twin.features
    assert torch.equal(case.batch.targets, setting.test.targets[case.rows]), "the right answer"
    assert torch.equal(case.clean_margin, setting.clean_margin[case.rows]), "the audit's goal"


def test_a_twin_with_another_tokenizer_is_refused(setting: Setting, twin: Setting) -> None:
    tokens = twin.test.tokens.clone()
    tokens[0, -1] += 1
    other = replace(twin, test=replace(twin.test, tokens=tokens))
    with pytest.raises(StudyError, match="must share the subject's tokenizer"):
        Ignorant().case(setting, lambda: other)


def test_an_ignorant_control_without_a_twin_says_what_to_write() -> None:
    study = parse(bundled("demo"), ["controls=['ignorant']"])
    audit = study.audits[0].model_copy(update={"ignorant": None})
    lone = study.model_copy(update={"ignorant": None, "audits": (audit,)})
    trial = next(t for t in plan(lone).trials if t.control.kind == "ignorant")
    assert trial.twin is None
    with pytest.raises(StudyError, match=r"trained without the knowledge.*under \[ignorant\]"):
        Lab({}).twin_setting(trial)


# --- In a trial -----------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["none", "wrong_target", "no_clamp"])
def test_a_trial_without_a_valid_prompt_shows_the_funnel(
    control: str,
    subject: Subject,
    features: FeatureSet,
    clamp: FeatureEdit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = make_setting(subject, letters(subject), features, clamp, slice(0, 0))
    monkeypatch.setattr(Lab, "setting", lambda self, trial, identity: nothing)
    trial = plan(parse(bundled("demo"))).trials[0]
    trial = trial.model_copy(update={"control": CONTROLS.get(control)(kind=control)})
    with pytest.raises(EmptyValidSetError, match=r"tried 24, clean 24, suppressed 0") as error:
        run_trial(trial, Lab({}))
    assert error.value.funnel["valid"] == 0


def test_right_and_wrong_target_have_the_same_task() -> None:
    """As many rivals each, or the one with fewer is cheaper for that reason alone."""
    from holdfast.behaviors.ioi import IOI
    from holdfast.behaviors.mcq import MultipleChoice

    for behavior in (IOI(), MultipleChoice()):
        for example in behavior.examples(None, "test", 20, seed=0):
            everything = {example.target, *example.rivals, *example.alternatives}
            assert len(everything) - 1 == len(example.rivals), example
