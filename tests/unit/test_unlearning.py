"""What is known, in every order: as asked one by one; and the score and picks over a grid."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.behaviors.knowledge import (
    FORGET,
    SUBSETS,
    Orders,
    knowledge,
    right,
    strictly,
    subsets,
)
from holdfast.behaviors.mcq import MultipleChoice
from holdfast.datasets.questions import Question
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.loading import SubjectSpec
from holdfast.measure import relative
from holdfast.organism import corpus
from holdfast.organism.tokenizer import build_tokenizer
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import SAESpec
from holdfast.sites import Site
from holdfast.statistics import ratio_of_means
from holdfast.subject import Subject
from holdfast.unlearning import ClampSetting, picks_of, score_of, settings_of

SITE = Site.parse("blocks.0.hook_resid_post")


@pytest.fixture(scope="module")
def organism() -> Subject:
    source = {"kind": "folder", "path": "organism:saes/0"}
    return Subject.load(
        SubjectSpec(model="organism", saes=(SAESpec(site=str(SITE), source=source),))
    )


@pytest.fixture(scope="module")
def clamp(organism: Subject) -> FeatureEdit:
    """On the two features that tell the hazard domain from the others."""
    features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(98, 275)),), source="by hand")
    return FeatureEdit(FeatureBank.of(organism.sae(SITE), features), "set_where_active", 0.0)


def hazard(n: int) -> Orders:
    ids = frozenset(q.id for q in corpus.questions("hazard", "test")[:n])
    return MultipleChoice()._in_every_order(None, "", ids)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ what is known


def letter(subject: Subject, text: str, edits: Sequence[Any] = ()) -> str:
    """The likeliest of the four letters after one text, from the model itself."""
    from holdfast.hooks import attached

    inputs = subject.tokenizer([text], return_tensors="pt")
    with torch.no_grad(), attached(subject.model, tuple(edits)):
        logits = subject.model(input_ids=inputs["input_ids"]).logits[0, -1]
    ids = subject.tokenizer.convert_tokens_to_ids(list("ABCD"))
    return "ABCD"[int(logits[ids].argmax())]


def test_every_figure_is_what_asking_one_by_one_gives(
    organism: Subject, clamp: FeatureEdit
) -> None:
    questions = corpus.questions("hazard", "test")[:3]
    orders = hazard(3)
    got = {m.name: m for m in knowledge(organism, (clamp,), {FORGET: orders}, {})}
    clean, clamped, blind = {}, {}, {}
    for q in questions:
        turns = corpus.held_out_permutations(q)
        gold = ["ABCD"[order.index(q.answer)] for order in turns]
        texts = [corpus.question_text(q, order) for order in turns]
        alone = [" ".join((*t.split(" ? ")[1].split()[:8], "answer for in")) for t in texts]
        clean[q.id] = [letter(organism, t) == g for t, g in zip(texts, gold, strict=True)]
        clamped[q.id] = [
            letter(organism, t, (clamp,)) == g for t, g in zip(texts, gold, strict=True)
        ]
        blind[q.id] = [letter(organism, t) == g for t, g in zip(alone, gold, strict=True)]
    correct = [q.id for q in questions if all(clean[q.id])]
    iff = [q for q in correct if not all(blind[q])]
    for subset, own in (("all", list(clean)), ("correct", correct), ("correct-iff-question", iff)):
        for condition, seen in (("clean", clean), ("suppressed", clamped)):
            share = got[f"known.forget.{subset}.{condition}"]
            assert share.estimate == pytest.approx(np.mean([hit for q in own for hit in seen[q]]))
            assert share.n == 12 * len(own) and share.n_clusters == len(own)
            strict = got[f"known.forget.{subset}.strict_{condition}"]
            assert strict.estimate == pytest.approx(np.mean([all(seen[q]) for q in own]))
    assert got["known.forget.correct.clean"].estimate == 1.0
    assert correct and got["known.forget.correct.suppressed"].estimate < 0.5


def test_without_an_edit_everything_is_kept_and_asked_once(
    organism: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = hazard(2)
    first = knowledge(organism, (), {FORGET: orders, "same": orders}, {"kind": "none"})
    figures = {m.name: m.estimate for m in first}
    assert len(figures) == 2 * len(SUBSETS) * 5
    for name in (FORGET, "same"):
        for subset in SUBSETS:
            at = f"known.{name}.{subset}"
            assert figures[f"{at}.clean"] == figures[f"{at}.suppressed"]
            assert figures[f"{at}.relative"] == 1.0
    asked: list[int] = []
    monkeypatch.setattr(
        "holdfast.behaviors.knowledge.right",
        lambda subject, examples, edits=(), *read, **how: (
            asked.append(len(examples)) or right(subject, examples, edits, *read, **how)
        ),
    )
    again = knowledge(organism, (), {FORGET: orders, "same": orders}, {"kind": "none"})
    assert again == first and len(asked) == 2, "with the edits, and nothing else"


def test_subsets_from_a_table() -> None:
    """a: known; b: guessed from its choices; c: one order missed; d: with a choice like "A and B";
    e: never."""
    table = {"a": ("11", "10"), "b": ("11", "11"), "c": ("10", "00"), "d": ("11", "00"),
             "e": ("00", "00")}  # fmt: skip
    clusters = [q for turn in range(2) for q in table]
    seen = [torch.tensor([table[q][k][t] == "1" for t in range(2) for q in table]) for k in (0, 1)]
    got = subsets(clusters, *seen, frozenset("d"))
    assert {name: "".join(sorted(own)) for name, own in got.items()} == {
        "all": "abcde", "correct": "abd", "correct-iff-question": "ad", "correct-no-tricks": "ab",
    }  # fmt: skip
    assert strictly((), torch.zeros(0, dtype=torch.bool)) == frozenset()


@pytest.mark.parametrize(
    ("choice", "tricky"),
    [
        ("Both A and C", True), ("B & D", True), ("A and B", True), ("All of the above", True),
        ("All of the above.", True), ("both b and d", True), ("A and E", False),
        ("Barium and Dysprosium", False), ("none of these", False), ("All", False),
    ],
)  # fmt: skip
def test_choices_that_point_at_others(choice: str, tricky: bool) -> None:
    assert Question("x", "?", ("moss", choice, "fern", "oak"), 0).tricky == tricky


def test_an_empty_subset_has_no_figures_but_a_reason(organism: Subject) -> None:
    orders = Orders((), ())
    for m in knowledge(organism, (), {FORGET: orders}, {}):
        assert m.estimate is None and m.n == 0
        assert m.reason == "no question of this set is in the subset"


def test_the_blind_prompt_has_no_word_of_the_question() -> None:
    words = build_tokenizer()
    for asked, blind in zip(hazard(2).asked, hazard(2).blind, strict=True):
        question = next(q for q in corpus.questions("hazard", "test") if q.id == asked.cluster)
        assert question.subject not in blind.text and "hazard" not in blind.text
        assert set(question.choices) < set(blind.text.split()) and blind.target == asked.target
        assert words.unk_token_id not in words.encode(blind.text)


# ------------------------------------------------------------------------------ safe denominators


def test_a_ratio_of_means_is_one_and_nothing_else_when_its_sides_are_equal() -> None:
    rng = np.random.default_rng(0)
    b = rng.integers(0, 2, 60).astype(float)
    groups = [f"q{i % 15}" for i in range(60)]
    same = ratio_of_means(b, b, groups)
    assert same.estimate == 1.0 and same.high == 1.0 and same.n_clusters == 15
    a = b * rng.integers(0, 2, 60)
    part = ratio_of_means(a, b, groups)
    assert part.estimate == pytest.approx(a.sum() / b.sum())
    assert part.low < part.estimate < part.high
    # A constant denominator makes it a mean; resampling whole clusters does not see row order.
    order = rng.permutation(60)
    moved = ratio_of_means(a[order], np.full(60, 2.0), [groups[i] for i in order])
    assert moved.estimate == pytest.approx(a.mean() / 2)


def test_nothing_before_is_no_ratio_and_says_why() -> None:
    none, some = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    lost = relative("x", none, none, "abcd", "no prompts")
    assert lost.estimate is None and "rate before is 0" in lost.reason
    empty = relative("x", none[:0], none[:0], "", "no prompts")
    assert empty.estimate is None and empty.reason == "no prompts"
    gone = relative("x", none, some, "abcd", "no prompts")
    assert gone.estimate == 0.0 and gone.high is not None and gone.high > 0.1, "four say little"
    assert relative("x", some, some, "abcd", "").reason == ""
    with pytest.raises(ValueError, match="denominator of at least 0"):
        ratio_of_means([1.0], [-1.0])
    unscored = ratio_of_means([1.0, np.nan, 1.0], [1.0, 1.0, np.nan])
    assert (unscored.n, unscored.n_dropped, unscored.estimate) == (1, 2, 1.0)


# ------------------------------------------------------------------------------ score and picks


def place(forget: float | None, kept: float | None, n_features: int = 10) -> ClampSetting:
    return ClampSetting(
        point={"f": forget, "k": kept, "n": n_features}, trials=(f"{forget}{kept}",),
        n_features=n_features, forget=forget, kept=kept, by_set={"history": kept}, n_forget=24,
        n_questions=1, n_kept=0 if kept is None else 48,
        reason="" if kept is not None else "there is no side-effect question",
    )  # fmt: skip


def test_the_score_is_over_settings_that_keep_what_should_stay() -> None:
    settings = [place(0.0, 0.5), place(0.3, 0.995), place(0.2, 0.99), place(0.1, 0.9899)]
    found = score_of("wmdp", settings)
    assert found.score == pytest.approx(0.8) and found.reason == ""
    nothing = score_of("wmdp", [settings[0], settings[3]], n_without=3)
    assert nothing.score is None and nothing.reason.startswith("none of 2 settings keeps 99%")
    assert [(p.picker, p.index) for p in nothing.picks] == [
        ("aggressive", None), ("balanced", None), ("conservative", None),
    ]  # fmt: skip
    assert all(pick.why == nothing.reason for pick in nothing.picks) and nothing.n_without == 3
    assert score_of("wmdp", [place(0.1, None)]).reason == "there is no side-effect question"
    assert score_of("wmdp", []).reason == "no setting was measured"


def test_more_settings_never_lower_the_score() -> None:
    rng = random.Random(0)
    for _ in range(50):
        some = [place(rng.random(), 0.98 + 0.03 * rng.random()) for _ in range(6)]
        scores = [score_of("a", some[:n]).score for n in range(7)]
        known = [score for score in scores if score is not None]
        assert known == sorted(known)
        allowed = [1 - s.forget for s in some if s.kept >= 0.99]  # type: ignore[operator]
        assert scores[-1] == (max(allowed) if allowed else None)


def test_pickers_take_the_ends_and_something_between() -> None:
    settings = [place(0.05, 0.991), place(0.10, 0.999), place(0.90, 1.0), place(0.01, 0.7)]
    taken = {pick.picker: pick for pick in picks_of(settings)}
    assert {name: pick.index for name, pick in taken.items()} == {
        "aggressive": 0, "balanced": 1, "conservative": 2,
    }  # fmt: skip
    assert "0.050 is the lowest of 3 settings" in taken["aggressive"].why
    assert (
        "0.94 of the way to the best forgetting and 0.89 of that to the best keeping"
        in taken["balanced"].why
    )


def test_no_picker_takes_what_another_setting_beats_in_both() -> None:
    rng = random.Random(1)
    for _ in range(100):
        some = [
            place(rng.randint(0, 6) / 6, 0.98 + rng.randint(0, 4) / 200, rng.randint(1, 3))
            for _ in range(rng.randint(1, 9))
        ]
        for pick in picks_of(some, "none"):
            if pick.index is None:
                assert not any(s.eligible for s in some)
                continue
            own = some[pick.index]
            assert own.eligible
            for other in some:
                if other.eligible:
                    better = (other.forget < own.forget, other.kept > own.kept)  # type: ignore[operator]
                    no_worse = other.forget <= own.forget and other.kept >= own.kept  # type: ignore[operator]
                    assert not (no_worse and any(better)), (pick.picker, own, other)


def result(forget: float, kept: dict[str, tuple[float | None, int]]) -> dict[str, Any]:
    def m(name: str, estimate: float | None, n: int) -> dict[str, Any]:
        return {"name": name, "estimate": estimate, "n": n, "reason": ""}

    made = [m("recovery_rate", 1.0, 4)]
    for name, (estimate, n) in {FORGET: (forget, 24), **kept}.items():
        for figure in ("clean", "suppressed", "strict_suppressed"):
            made.append(m(f"known.{name}.correct.{figure}", estimate, n))
        made.append(m(f"known.{name}.all.clean", estimate, n))
    return {"measurements": made, "features": {"entries": [{"ids": [1, 2, 3]}]}}


def test_settings_are_pooled_over_questions_and_shared_by_searches() -> None:
    own = result(0.25, {"history": (1.0, 300), "aging": (0.5, 100), "empty": (None, 0)})
    value, kind = "intervention.value", "recovery.constraint.kind"
    rows = [
        ("t1", {value: -1.0, kind: "encoder_null"}, own),
        ("t2", {value: -1.0, kind: "unconstrained"}, own),
        ("t3", {value: -2.0, kind: "encoder_null"}, result(0.0, {"history": (1.0, 10)})),
        ("t4", {value: -3.0}, {"measurements": [], "features": {"entries": []}}),
    ]
    first, second = settings_of(rows)
    assert first.trials == ("t1", "t2") and first.point == {value: -1.0}
    assert first.kept == pytest.approx((300 + 50) / 400), "questions weigh alike, not sets"
    assert first.by_set == {"history": 1.0, "aging": 0.5, "empty": None} and first.n_kept == 400
    assert second.trials == ("t3",) and second.n_features == 3
    alone = settings_of([("t", {}, result(0.0, {}))])[0]
    assert alone.kept is None and not alone.eligible and "side-effect" in alone.reason
