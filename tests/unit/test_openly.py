"""Questions without their choices: what is scored, and what counts as brought back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.batch import Example
from holdfast.behaviors.mcq import MultipleChoice
from holdfast.behaviors.open_question import POINTS, OpenQuestion
from holdfast.edits import Edit, FeatureEdit, Perturbation
from holdfast.errors import StudyError
from holdfast.openly import JOINED, Asked, _measured, another, continuations, openly
from holdfast.organism import corpus
from holdfast.planning import plan
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.study import Study, bundled, parse
from holdfast.subject import Subject
from holdfast.subspace import norms
from holdfast.testing import WORDS, tiny_batch, tiny_subject
from holdfast.variants import Recovered
from tests.unit.recovered import features_at, search, set_up

SITE = Site(2)


class Quiz:
    """A behavior that offers four texts of one to three words."""

    asks_openly = True

    def __init__(self, left_out: int = 0):
        self.left_out = left_out

    def counted(self, clusters: Sequence[str], shown: Tensor) -> Tensor:
        return shown

    def openly(self, tokenizer: Any, examples: Sequence[Example]) -> list[OpenQuestion | str]:
        made: list[OpenQuestion | str] = []
        for i, example in enumerate(examples):
            words = [WORDS[(7 * i + 3 * j) % 40] for j in range(8)]
            choices = (words[0], " ".join(words[1:3]), " ".join(words[3:6]), words[6])
            alone = replace(example, text=example.text.split(" ", 1)[1])
            made.append(POINTS if i < self.left_out else OpenQuestion(alone, choices, i % 4))
        return made


@pytest.fixture(scope="module")
def found() -> Recovered:
    subject, features = tiny_subject(), features_at((SITE,))
    clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "set", 3.0)
    batch = tiny_batch(subject, 12)
    setting = set_up(subject, batch, features, (clamp,))
    examples = tuple(
        Example(i, text, WORDS[0], (WORDS[1],), (WORDS[1],), i)
        for i, text in zip(batch.ids, batch.texts, strict=True)
    )
    made = search(replace(setting, examples=examples, behavior=Quiz()))  # type: ignore[arg-type]
    assert len(made) >= 8
    return made


def questions(found: Recovered) -> list[OpenQuestion]:
    example_of = {example.id: example for example in found.setting.examples}
    made = Quiz().openly(None, [example_of[i] for i in found.case.batch.ids])
    return [question for question in made if isinstance(question, OpenQuestion)]


def leads(found: Recovered, edits_of: Any) -> Tensor:
    """By whole passes, one prompt and choice at a time."""
    subject, out = found.case.subject, []
    for row, question in enumerate(questions(found)):
        alone, scores = subject.batch([question.example]), []
        for choice in question.choices:
            told = subject.tokenizer.encode(choice, add_special_tokens=False)
            whole = replace(question.example, text=f"{question.example.text} {choice}")
            batch = subject.batch([whole])
            edits = edits_of(row, int(alone.prompt_length) - 1)
            # The words of the answer are generated, not prompt: the clamp acts on both alike.
            logits = subject.outputs(batch, edits, keep=len(told) + 1)[0, :-1]
            p = torch.log_softmax(logits.double(), -1)
            scores.append(float(p.gather(-1, torch.tensor(told)[:, None]).sum()))
        rivals = [score for j, score in enumerate(scores) if j != question.right]
        out.append(scores[question.right] - max(rivals))
    return torch.tensor(out, dtype=torch.float64)


def test_leads_are_what_one_pass_a_choice_gives(found: Recovered) -> None:
    """In every condition, with the vector at the last token of the shorter prompt."""
    lent, there = another(found)
    assert there.all()
    torch.testing.assert_close(norms(lent).flatten(), found.length, rtol=1e-4, atol=0)

    def with_(delta: Tensor) -> Any:
        def edits(row: int, position: int) -> tuple[Edit, ...]:
            push = Perturbation(
                (found.case.batch.ids[row],),
                torch.tensor([[position]]),
                {SITE: delta[row][None]},
            )
            return (*found.case.edits, push)

        return edits

    wanted = {
        "clean": leads(found, lambda *_: ()),
        "suppressed": leads(found, lambda *_: found.case.edits),
        "recovered": leads(found, with_(found.delta)),
        "another": leads(found, with_(lent)),
    }
    record = openly(found)
    assert record["n"] == len(found) and record["left_out"] == {}
    assert [c["name"] for c in record["conditions"]] == list(wanted)
    for condition in record["conditions"]:
        own = wanted[condition["name"]]
        assert condition["lead"]["estimate"] == pytest.approx(float(own.mean()), abs=1e-4)
        assert condition["right"]["estimate"] == pytest.approx(float((own > 0).double().mean()))
    assert len({round(float(own.mean()), 3) for own in wanted.values()}) == 4, "all four differ"
    flips = (wanted["clean"] > 0) & (wanted["suppressed"] <= 0)
    assert record["n_flips"] == int(flips.sum())
    assert record["preactivation_drift_max"] < 1e-5, "the clamped features are held here too"


def test_what_is_brought_back_is_counted_where_the_clamp_took_it(
    found: Recovered, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(
        [
            torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 1.0]),  # clean
            torch.tensor([-1.0, -1.0, -1.0, 1.0, -1.0, 0.0]),  # the clamp took four
            torch.tensor([2.0, 1.0, -1.0, 1.0, 5.0, 1.0]),  # the vector gives back three of them
            torch.tensor([-1.0, 1.0, -1.0, 1.0, 5.0, -1.0]),
        ]
    )
    monkeypatch.setattr(Asked, "leads", lambda *_: next(given))
    six = torch.arange(6)
    batch = found.case.subject.batch([q.example for q in questions(found)[:6]])
    record = _measured(found, six, Asked(batch, [[]], six))
    assert record["n_flips"] == 4
    own, lent = (row["back"] for row in record["back"])
    assert (own["estimate"], own["n"]) == (0.75, 4) and (lent["estimate"], lent["n"]) == (0.25, 4)
    right = [c["right"]["estimate"] for c in record["conditions"]]
    assert right == pytest.approx([5 / 6, 1 / 6, 5 / 6, 3 / 6])


def test_who_cannot_be_asked_so_is_counted_by_reason(found: Recovered) -> None:
    some = replace(found, setting=replace(found.setting, behavior=Quiz(2)))  # type: ignore[arg-type]
    record = openly(some)
    assert record["n"] == len(found) - 2 and record["left_out"] == {POINTS: 2}
    none = replace(found, setting=replace(found.setting, behavior=Quiz(99)))  # type: ignore[arg-type]
    assert openly(none)["n"] == 0 and openly(none)["left_out"] == {POINTS: len(found)}


def test_a_choice_that_changes_the_prompts_tokens_is_not_scored(
    found: Recovered, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, question = found.case.subject, questions(found)[0]
    told = continuations(subject, question)
    assert [len(own) for own in told] == [1, 2, 3, 1]
    encode = Subject.encode

    def joined(self: Subject, example: Example) -> list[int]:
        ids = encode(self, example)
        return ids if example.text == question.example.text else [*ids[:-2], 7]

    monkeypatch.setattr(Subject, "encode", joined)
    assert continuations(subject, question) == []
    assert openly(found)["left_out"][JOINED] >= 1


# ------------------------------------------------------------------------------ whose questions


def test_the_organism_knows_its_facts_without_choices() -> None:
    behavior = MultipleChoice()
    examples = behavior.examples(None, "test", 30, 0)  # type: ignore[arg-type]
    for example, asked in zip(examples, behavior.openly(None, examples), strict=True):  # type: ignore[arg-type]
        assert isinstance(asked, OpenQuestion)
        _, domain, about = example.cluster.split(":")
        assert asked.example.text.endswith(f"{about} in {domain}")
        assert asked.choices[asked.right] == corpus.question_on(domain, about).choices[asked.right]
        assert not set(asked.choices) & set(asked.example.text.split())
        slot = "ABCD".index(example.target)
        order = [int(i) for i in example.id.rpartition(":")[2]]
        assert order[slot] == asked.right, "the letter and the text are of one choice"


def test_questions_of_a_file_lose_their_choices_or_are_left_out(tmp_path: Path) -> None:
    rows = [
        ("What do plants need?", ["light", "sand", "noise", "salt"]),
        ("Which of the following is red?", ["blood", "snow", "coal", "milk"]),
        ("All are birds except", ["bats", "owls", "gulls", "ducks"]),
        ("What is wet?", ["water", "All of the above", "rain", "ice"]),
        ("Where do fish live?", ["rivers", "trees", "clouds", "caves"]),
    ]
    lines = [
        f'{{"question": "{q}", "choices": {c}, "answer": 0}}'.replace("'", '"') for q, c in rows
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    source = {"kind": "file", "path": str(tmp_path / "q.jsonl")}
    behavior = MultipleChoice.model_validate({"source": source})
    tokenizer: Any = tiny_subject().tokenizer
    questions = {q.text: q for q in behavior._question_sets()[""].questions}
    asked = {}
    for text, question in questions.items():
        example = Example(f"{question.id}:0123", "", "A", ("B",), ("B",), question.id)
        (asked[text],) = behavior.openly(tokenizer, [example])
    assert [isinstance(asked[q], str) for q, _ in rows] == [False, True, True, True, False]
    one = asked["What do plants need?"]
    assert isinstance(one, OpenQuestion)
    assert one.example.text == "What do plants need?\nAnswer:"
    assert one.choices == ("light", "sand", "noise", "salt") and one.right == 0


@pytest.mark.parametrize(
    ("behavior", "positions", "said"),
    [("mcq", "all", "last_prompt"), ("ioi", "last_prompt", "ioi has none")],
)
def test_what_cannot_be_asked_openly_is_refused_in_the_plan(
    behavior: str, positions: str, said: str
) -> None:
    study = parse(bundled("unlearning")).model_dump(mode="json", by_alias=True)
    audit = next(a for a in study["audits"] if a["name"] == "orders")
    audit["behavior"] = {"kind": behavior}
    study["recovery"]["perturb"]["positions"] = positions
    study["audits"] = [audit]
    with pytest.raises(StudyError, match=said):
        plan(Study.model_validate(study))
