"""Behaviors read from generated text: what is forced, what is read, and what counts as back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from holdfast.attacks.residual import _positions, pose
from holdfast.batch import Batch, Example
from holdfast.behaviors.refusal import Refusal
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.controls import aim_elsewhere, aimed_among
from holdfast.controls.no_clamp import NoClamp
from holdfast.controls.none import NoControl
from holdfast.controls.wrong_target import WrongTarget
from holdfast.discovery.attribution import Attribution
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.errors import ContextError, EmptyValidSetError
from holdfast.features import FeatureSet
from holdfast.funnel import collapsed_of, funnel_of
from holdfast.interventions.clamp import Clamp
from holdfast.judges import complies, refuses
from holdfast.loading import SubjectSpec
from holdfast.margins import lead
from holdfast.recovery import Budget, Perturb, RecoverySpec, Stop, recover
from holdfast.regain import regain
from holdfast.replay import Replay
from holdfast.saes.sources import Folder, SAESpec
from holdfast.setting import Data, Setting, prepare
from holdfast.subject import Subject
from holdfast.verify import verify

ANSWERS = [[7, 9, 11], [8], [5, 6], [12, 13, 14], [6, 6, 6], [9, 4], [21], [22, 23, 24]]


# ------------------------------------------------------------------------------ forced answers


def test_forcing_and_taking_back(batch: Batch) -> None:
    forced = batch.forcing(ANSWERS)
    assert torch.equal(forced.prompt_length, batch.prompt_length), "the answer is no prompt"
    assert forced.n_read == 3
    for row, answer in enumerate(ANSWERS):
        own = forced.tokens[row, forced.positions[row] >= 0].tolist()
        prompt = batch.tokens[row, batch.positions[row] >= 0].tolist()
        assert own == prompt + answer[:-1]
        assert [t for t in forced.forced[row].tolist() if t >= 0] == answer
    back = forced.unforced()
    assert torch.equal(back.tokens, batch.tokens) and torch.equal(back.positions, batch.positions)
    part = forced.rows(torch.tensor([5, 1]))
    assert part.prompt_length.tolist() == batch.prompt_length[[5, 1]].tolist()


def test_a_forced_answer_leads_exactly_if_greedy_decoding_gives_it(
    subject: Subject, batch: Batch
) -> None:
    made = subject.generate(batch, max_new_tokens=4)
    greedy = batch.forcing(made[:, :3].tolist())
    assert (greedy.margin(subject.read(greedy)) > 0).all()
    other = made[:, :3].clone()
    other[:, 1] = (other[:, 1] + 1) % 40 + 4
    wrong = batch.forcing(other.tolist())
    assert (wrong.margin(subject.read(wrong)) < 0).all()


def test_the_lead_is_the_smallest_and_its_gradient_works_on_all_that_lag() -> None:
    logits = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]]], requires_grad=True)
    margin = lead(logits, torch.zeros(1), torch.zeros(1, 1), torch.tensor([[0, 1]]))
    assert margin.tolist() == [-1.0]
    (gradient,) = torch.autograd.grad(margin.sum(), logits)
    assert gradient[0, 1, 1] > gradient[0, 0, 0] > 0
    short = lead(logits, torch.zeros(1), torch.zeros(1, 1), torch.tensor([[-1, 1]]))
    assert short.tolist() == [-1.0]


def test_replay_reads_what_the_full_pass_reads(subject: Subject, batch: Batch, clamp: Any) -> None:
    """Anchor only, and anchor with answer positions, in answers of different lengths."""
    forced = batch.forcing(ANSWERS)
    anchor = forced.prompt_length[:, None] - 1
    site = clamp.sites[0]
    last = (forced.forced >= 0).sum(1, keepdim=True)
    both = torch.cat([torch.where(last > 1, anchor + 1, -1), anchor], 1)
    for positions in (anchor, both):
        delta = torch.randn(len(batch), positions.shape[1], 32)
        replay = Replay.record(subject, forced, site, positions, before=(clamp,))
        push = Perturbation(forced.ids, positions, {site: delta})
        full = subject.read(forced, (clamp, push))
        torch.testing.assert_close(replay.logits(delta), full, atol=1e-5, rtol=1e-5)


def test_an_unrelated_answer_is_as_long_and_another(batch: Batch) -> None:
    forced = batch.forcing(ANSWERS)
    elsewhere = aim_elsewhere(forced, forced.targets)
    for row, answer in enumerate(ANSWERS):
        other = [t for t in elsewhere.forced[row].tolist() if t >= 0]
        assert len(other) == len(answer) and other != answer
    assert torch.equal(elsewhere.prompt_length, forced.prompt_length)
    alike = batch.forcing([[7, 9]] * len(batch))
    for row, other in enumerate(aim_elsewhere(alike, alike.targets).forced.tolist()):
        assert other != [7, 9]
        assert all(other != batch.tokens[row, -2:].tolist() for _ in [0])


def test_a_prompt_without_unrelated_text_is_left_out_and_the_others_are_searched(
    batch: Batch,
) -> None:
    """One long answer: no other answer and no prompt gives so many other tokens."""
    forced = batch.forcing([list(range(4, 34)), *ANSWERS[1:]])
    aimed = aim_elsewhere(forced, forced.targets)
    assert aimed.ids == batch.ids[1:]
    rows, left = aimed_among(forced, aimed)
    assert rows.tolist() == list(range(1, len(batch))) and set(left) == {batch.ids[0]}
    assert all("no other prompt" in reason for reason in left.values())
    # What the others are aimed at does not depend on who was left out.
    for row, answer in zip(aimed.forced.tolist(), ANSWERS[1:], strict=True):
        other = [token for token in row if token >= 0]
        assert len(other) == len(answer) and other != answer
    alone = forced.rows(torch.tensor([0]))
    with pytest.raises(EmptyValidSetError, match=r"no prompt of 1 .*up to 30.*n_forced"):
        aim_elsewhere(alone, alone.targets)


@pytest.mark.parametrize("control", [WrongTarget(), NoClamp()])
def test_a_control_says_why_it_searches_fewer_prompts(
    subject: Subject, batch: Batch, features: FeatureSet, clamp: FeatureEdit, control: Any
) -> None:
    forced = batch.forcing([list(range(4, 34)), *ANSWERS[1:]])
    n = len(batch)
    setting = Setting(
        subject=subject, features=features, intervention=Clamp(mode="set", value=1.0),
        edits=(clamp,), sizes={}, test=forced, clean_margin=torch.arange(1.0, n + 1),
        suppressed_margin=-torch.ones(n), suppressed_answer=torch.zeros(n, dtype=torch.long),
        neighbors={},
    )  # fmt: skip
    case = control.case(setting, lambda: setting)
    assert case.batch.ids == batch.ids[1:] and case.rows.tolist() == list(range(1, n))
    assert case.clean_margin.tolist() == list(range(2, n + 1)), "goals stay with their prompts"
    assert set(case.dropped) == {batch.ids[0]}


@pytest.mark.parametrize("control", [WrongTarget(), NoClamp()])
@pytest.mark.parametrize(
    ("answers", "kinds"),
    [
        (ANSWERS, {"answer": len(ANSWERS), "instruction": 0}),
        ([[7, 9]] * len(ANSWERS), {"answer": 0, "instruction": len(ANSWERS)}),
        # One answer of another length: the others, all alike, have only it to force.
        ([[7, 9, 8], *[[7, 9]] * (len(ANSWERS) - 1)], {"answer": 0, "instruction": len(ANSWERS)}),
        ([[6, 9, 8], *[[7, 9]] * (len(ANSWERS) - 1)],
         {"answer": len(ANSWERS) - 1, "instruction": 1}),
    ],
)  # fmt: skip
def test_a_control_says_what_kind_of_text_it_forces_on_how_many(
    subject: Subject, batch: Batch, features: FeatureSet, clamp: FeatureEdit, control: Any,
    answers: list[list[int]], kinds: dict[str, int],
) -> None:  # fmt: skip
    forced, n = batch.forcing(answers), len(batch)
    setting = Setting(
        subject=subject, features=features, intervention=Clamp(mode="set", value=1.0),
        edits=(clamp,), sizes={}, test=forced, clean_margin=torch.ones(n),
        suppressed_margin=-torch.ones(n), suppressed_answer=torch.zeros(n, dtype=torch.long),
        neighbors={},
    )  # fmt: skip
    case = control.case(setting, lambda: setting)
    assert len(case.rows) == n and case.measured == {"forced_text": kinds}
    texts = [text.tolist() for text in batch.tokens]
    for row, other in enumerate(case.batch.forced.tolist()):
        own = [token for token in other if token >= 0]
        ends = any(text[-len(own) :] == own for i, text in enumerate(texts) if i != row)
        assert ends or kinds["answer"], "an instruction's end is one"
    single = replace(setting, test=batch)
    assert control.case(single, lambda: single).measured == {}, "one token is a wrong answer"


# ------------------------------------------------------------------------------ on the organism


@pytest.fixture(scope="module")
def organism() -> Subject:
    source = Folder(path="organism:saes/0")
    spec = SAESpec(site="blocks.0.hook_resid_post", source=source)
    return Subject.load(SubjectSpec(model="organism", saes=(spec,)))


def setting_of(subject: Subject, direction: Any, **clamp: Any) -> Setting:
    return prepare(
        subject, Refusal(direction=direction), Attribution(n_features=16), Clamp(**clamp),
        Data(fit=100, tune=16, test=16), seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def induced(organism: Subject) -> Setting:
    return setting_of(organism, "comply", mode="set", value=10.0, positions="prompt")


@pytest.fixture(scope="module")
def removed(organism: Subject) -> Setting:
    return setting_of(organism, "refuse", mode="set_where_active", value=0.0)


def test_both_directions_flip_by_what_the_judge_says(induced: Setting, removed: Setting) -> None:
    assert induced.observed and induced.changed and removed.observed and removed.changed
    for setting, before, after in ((induced, complies, refuses), (removed, refuses, complies)):
        assert len(setting.valid) >= 12
        for row in setting.valid.tolist():
            assert before(setting.observed.labels[row]) and after(setting.changed.labels[row])


def test_broken_text_is_not_suppression(organism: Subject) -> None:
    """A clamp on every token, new ones too, breaks the organism's sentences."""
    broken = setting_of(organism, "comply", mode="set", value=40.0, positions="all")
    assert broken.changed is not None
    labels = broken.changed.labels
    assert sum(map(refuses, labels)) < len(labels) / 2
    assert len(broken.valid) == sum(map(refuses, labels))
    nonsense = [
        bool(broken.clean[row]) and label in ("degenerate", "empty")
        for row, label in enumerate(labels)
    ]
    assert collapsed_of(broken) == sum(nonsense) > 0, "counted apart, as what it is"
    assert not any(nonsense[row] for row in broken.valid.tolist())
    funnel = funnel_of(broken, NoControl().case(broken, lambda: broken), None)
    assert funnel["collapsed"] == sum(nonsense)


SPEC = RecoverySpec(
    constraint=EncoderNull(), steps=30, refine_steps=8, tolerance=0.05, doublings=1,
    budget=Budget(relative=0.6), stop=Stop(clean_margin=0.5),
)  # fmt: skip


@pytest.mark.parametrize("answer", [0, 3])
def test_what_is_recovered_is_read_from_text_generated_with_the_perturbation_on(
    answer: int, induced: Setting
) -> None:
    """Anchor only, and anchor with answer positions; under the cache as in full passes."""
    spec = SPEC.model_copy(update={"perturb": Perturb(answer=answer)})
    case = NoControl().case(induced, lambda: induced)
    problem = pose(spec, case)
    found = recover(problem, spec, seed=0)
    positions = _positions(spec, case)
    assert positions.shape[1] == 1 + answer
    push = Perturbation(case.batch.ids, positions, problem.replay.parts(found.delta))
    scale = {site: case.features.median_active(site) for site in problem.held}
    checks = verify(case.subject, case.batch, case.edits, push, problem.held, scale, True)
    back = regain(induced, case, problem, push, checks, True)
    assert back.recovered.float().mean() > 0.8
    assert checks.preactivation_drift.max() < 1e-6
    assert (checks.drift_relative.nan_to_num() >= 0).all() and (back.drift >= 0).all()
    # The texts are those of full passes: a forced answer made of them leads at every token.
    assert back.seen is not None
    text = case.batch.unforced().forcing([list(tokens[:8]) for tokens in back.seen.tokens])
    assert (text.margin(case.subject.read(text, (*case.edits, push))) > -1e-4).all()
    none = replace(push, deltas={s: torch.zeros_like(d) for s, d in push.deltas.items()})
    same = regain(induced, case, problem, none, checks, True)
    assert not same.recovered.any(), "without the perturbation the clamp holds"


def test_a_wrong_answer_counts_by_its_own_tokens(induced: Setting) -> None:
    case = WrongTarget().case(induced, lambda: induced)
    assert not case.own and torch.equal(case.clean_margin, induced.clean_margin[case.rows])
    assert case.batch.forced is not None
    right = induced.test.rows(case.rows).forced
    assert not (case.batch.forced == right).all(1).any()


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("direction", ["comply", "refuse"])
def test_an_empty_answer_and_one_that_is_cut_are_neither(
    direction: Any, organism: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labelled as what they are; they show no behavior and no opposite, however they begin."""
    behavior = Refusal(direction=direction)
    batch = organism.batch(behavior.examples(organism.tokenizer, "test", 4, 0))
    whole = organism.generate(batch, max_new_tokens=24)
    made = whole.clone()
    end = organism.tokenizer.eos_token_id
    made[0] = organism.tokenizer.pad_token_id
    made[0, 0] = end
    monkeypatch.setattr(Subject, "generate", lambda *_: made)
    seen = behavior.observe(organism, batch)
    assert seen.labels[0] == "empty" and len(seen.tokens[0]) == 1
    assert not seen.shows[0] and not seen.opposite[0]
    assert seen.shows[1:].all() or direction == "refuse"
    cut = whole[:, :4]
    assert not torch.isin(cut, torch.tensor(sorted(organism.ends))).any()
    monkeypatch.setattr(Subject, "generate", lambda *_: cut)
    seen = behavior.observe(organism, batch)
    complying = seen.shows if direction == "comply" else seen.opposite
    assert not complying.any(), "a cut answer never complies"
    if direction == "comply":
        assert set(seen.labels) == {"truncated"} and not seen.opposite.any()


def test_prompts_and_answers_that_do_not_fit(organism: Subject) -> None:
    def prompt(n: int) -> Example:
        return Example(f"of {n}", "ring " * n, "sure", ("sorry",), ("sorry",), f"of {n}")

    fits = organism.batch([prompt(100), prompt(3)])
    n = int(fits.prompt_length.max())
    assert organism.context == 128 and n <= 128
    assert organism.generate(fits, max_new_tokens=128 - n).shape[0] == 2
    with pytest.raises(
        ContextError, match=rf"1 of 2 .* of 100 has {n} and {129 - n} are to be gen"
    ):
        organism.generate(fits, max_new_tokens=129 - n)
    with pytest.raises(
        ContextError, match=r"2 of 3 prompts do not fit into the 128 .*: of 300 has"
    ):
        organism.outputs(organism.batch([prompt(200), prompt(3), prompt(300)]))


def test_what_is_read_has_to_be_generated() -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        Refusal(n_forced=30, max_new_tokens=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"goal": "a"}\n{"goal": "b"}\n{"goal": "c"}', "no column 'prompt' for 'prompt': .*goal"),
        ('{"prompt": 3}\n{"prompt": "b"}\n{"prompt": "c"}', "expected a text as prompt"),
        ('{"prompt": "a"}\n{"prompt": "b"}', "too few for splits"),
    ],
)
def test_datasets_that_cannot_be_asked(content: str, message: str, tmp_path: Path) -> None:
    """Found when the study is read: no model is needed to know it."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    sound = tmp_path / "sound.jsonl"
    sound.write_text("".join(f'{{"prompt": "{p}"}}\n' for p in "abc"))
    for role in ("source", "refused", "benign"):
        given = {"kind": "refusal", "source": {"kind": "file", "path": str(sound)}}
        with pytest.raises(ValidationError, match=message):
            Refusal.model_validate(given | {role: {"kind": "file", "path": str(path)}})


def test_a_dataset_of_prompts_is_split_and_rendered(tmp_path: Path, organism: Subject) -> None:
    path = tmp_path / "prompts.jsonl"
    words = ["how do i make a ladder", "where is the garden", "who has the ring"]
    texts = [f"{w} {i}" for i in range(10) for w in words]
    path.write_text("\n".join(f'{{"goal": "{t}"}}' for t in texts))
    source = {"kind": "file", "path": str(path), "columns": {"prompt": "goal"}}
    behavior = Refusal.model_validate({"kind": "refusal", "source": source})
    splits = {s: behavior.examples(organism.tokenizer, s, 99, 0) for s in ("fit", "tune", "test")}
    seen = [e.text for made in splits.values() for e in made]
    assert len(seen) == len(set(seen)) == 30
    for example in splits["test"]:
        assert example.suffix and example.text.endswith(example.suffix) and not example.special
