"""Behaviors: what is asked is one token, the splits share nothing, and the seed alone decides."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from holdfast.batch import Batch, Example
from holdfast.behaviors import BehaviorKind, english
from holdfast.behaviors.asking import CUE, INSTRUCTION
from holdfast.behaviors.continuation import as_one_token
from holdfast.behaviors.ioi import IOI
from holdfast.behaviors.mcq import MultipleChoice
from holdfast.config import IDENTITY
from holdfast.errors import StudyError, SubjectError
from holdfast.organism import corpus
from holdfast.organism.prompts import PERMUTATIONS
from holdfast.organism.tokenizer import build_tokenizer
from holdfast.readouts.logits import LOGITS
from holdfast.readouts.spelled import Spelled
from holdfast.splits import check_disjoint
from holdfast.subject import Subject
from holdfast.testing import tiny_subject

SPLITS = ("fit", "tune", "test")
KNOWN = english.NAMES[::2]  # the names that the made-up tokenizers have a token for
TEXT = [
    template.format(a=a, b=b, s=b, place=place, object=thing) + f" {a}. Answer: A Answer: B C D"
    for template in english.TEMPLATES
    for a, b, place, thing in zip(
        KNOWN,
        KNOWN[1:],
        itertools.cycle(english.PLACES),
        itertools.cycle(english.OBJECTS),
        strict=False,
    )
]


def wrapped(backend: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_level(size: int = 900, bos: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: the space belongs to the word's first token."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<s>", "<unk>", "<pad>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return wrapped(backend, bos)


def metaspace(prepend: str, bos: bool = True) -> PreTrainedTokenizerFast:
    """sentencepiece's kind: a space is a letter, and one may be put in front of the text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if prepend == "normalizer":  # Llama's, which adds it even in front of a space
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        text = [" ".join(line.split()) for line in TEXT]
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        text = TEXT
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<s>", "<unk>", "<pad>"], show_progress=False
        ),
    )
    return wrapped(backend, bos)


def word_level() -> PreTrainedTokenizerFast:
    """One token a word or mark; the space is in none of them."""
    marks = pre_tokenizers.Whitespace()
    words = sorted({word for line in TEXT for word, _ in marks.pre_tokenize_str(line)})
    ids = {word: i for i, word in enumerate(["<s>", "<unk>", "<pad>", *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = marks
    return wrapped(backend, True)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level with BOS": lambda: byte_level(bos=True),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never", bos=False),
    "normalizer": lambda: metaspace("normalizer"),
    "word level": word_level,
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def gpt() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@cache
def tiny() -> Subject:
    return tiny_subject()


def token_id(tokenizer: PreTrainedTokenizerBase, continuation: str) -> int:
    """As a subject does it."""
    return replace(tiny(), tokenizer=tokenizer).token_id(continuation)


def encoded(tokenizer: PreTrainedTokenizerBase, example: Example, more: str = "") -> list[int]:
    ids: list[int] = tokenizer.encode(example.text + more, add_special_tokens=example.special)
    return ids


def check_continues(tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    """Each answer in play is the one token that its word is, written after the prompt."""
    before = encoded(tokenizer, example)
    for answer in (example.target, *example.rivals, *example.alternatives):
        after = encoded(tokenizer, example, " " + answer.strip())
        assert after == [*before, token_id(tokenizer, answer)], (example.text[-30:], answer)


def all_splits(
    behavior: BehaviorKind, tokenizer: PreTrainedTokenizerBase, n: int, seed: int
) -> dict[str, list[Example]]:
    return {split: behavior.examples(tokenizer, split, n, seed) for split in SPLITS}


def check_shares_nothing(splits: dict[str, list[Example]]) -> None:
    for one, other in itertools.combinations(splits.values(), 2):
        for what in ("text", "cluster", "id"):
            assert not {getattr(e, what) for e in one} & {getattr(e, what) for e in other}


# --- A word as one token --------------------------------------------------------------------------


def test_a_word_is_found_in_every_convention(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "Yesterday the letter was handed to"
    found = as_one_token(tokenizer, prompt, english.NAMES)
    assert len(found) >= 12
    before = tokenizer.encode(prompt)
    for name, text in found.items():
        assert tokenizer.encode(f"{prompt} {name}") == [*before, token_id(tokenizer, text)]
        assert text.strip() == name


def test_words_of_several_tokens_and_unknown_words_are_left_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert as_one_token(tokenizer, "handed to", ["Zxqwvub", "two words"]) == {}


def test_the_text_differs_by_convention() -> None:
    name = KNOWN[0]
    texts = {
        kind: as_one_token(make(), "handed to", [name]).get(name) for kind, make in MAKERS.items()
    }
    assert texts["byte level"] == f" {name}"  # without the space it would be another token
    assert texts["normalizer"] == name  # with one it would be two tokens
    assert None not in texts.values()


# --- Indirect objects in English ------------------------------------------------------------------


def test_the_lists_hold_no_word_twice() -> None:
    for words in (english.NAMES, english.PLACES, english.OBJECTS, english.TEMPLATES):
        assert len(set(words)) == len(words)
    assert not set(english.NAMES) & {w for t in english.TEMPLATES for w in t.split()}


@pytest.mark.parametrize("template", english.TEMPLATES)
def test_templates_name_two_and_then_one_and_end_before_the_answer(template: str) -> None:
    said = template.format(a="@a", b="@b", s="@s", place="@place", object="@object").split()
    names = [word.strip(",;.") for word in said if word.startswith("@")]
    assert [n for n in names if n in ("@a", "@b", "@s")] == ["@a", "@b", "@s"]
    assert sorted(names) == ["@a", "@b", "@object", "@place", "@s"]
    # The name has a space in front of it everywhere, and so has the answer.
    assert said[0][0] != "@" and said[-1] == "to"


def test_every_answer_is_one_token_of_the_prompts_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    behavior = IOI(source="english", n_names=12)
    for split, examples in all_splits(behavior, tokenizer, 60, 0).items():
        assert len(examples) == 60, split
        for example in examples:
            check_continues(tokenizer, example)


def test_a_prompt_asks_for_the_name_that_was_said_once(gpt: PreTrainedTokenizerFast) -> None:
    for example in IOI(source="english").examples(gpt, "test", 80, 0):
        io, s, third = (a.strip() for a in (example.target, *example.rivals))
        said = Counter(word.strip(",;") for word in example.text.split())
        assert (said[io], said[s], said[third]) == (1, 2, 0)
        assert example.alternatives == example.rivals[1:] and example.group == io
        assert example.cluster == "|".join(sorted((io, s)))
        assert example.special and not example.suffix


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 50),
    n_names=st.integers(english.MIN_NAMES, 20),
    n=st.integers(1, 60),
    templates=st.sets(st.integers(0, len(english.TEMPLATES) - 1), min_size=5),
)
def test_splits_share_no_pair_and_test_names_are_in_fit(
    seed: int, n_names: int, n: int, templates: set[int]
) -> None:
    names = sorted(english.NAMES, key=lambda name: f"{seed}{name}"[::-1])[:n_names]
    chosen, enough = sorted(templates), max(n, english.PER_NAME * n_names)
    made = {
        split: english.prompts(names, split, enough if split == "fit" else n, seed, chosen)
        for split in SPLITS
    }
    pairs = {split: {frozenset((p.io, p.s)) for p in prompts} for split, prompts in made.items()}
    texts = {split: {p.text for p in prompts} for split, prompts in made.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not pairs[one] & pairs[other] and not texts[one] & texts[other]
    fitted = Counter(p.io for p in made["fit"])
    assert all(fitted[p.io] >= english.PER_NAME for p in made["test"] + made["tune"])
    for prompts in made.values():
        assert len({p.id for p in prompts}) == len(prompts)
        orders = Counter(p.order for p in prompts)
        assert abs(orders["ABBA"] - orders["BABA"]) <= 1
        turns = Counter(p.io for p in prompts)
        assert max(turns.values()) - min(turns[name] for name in names) <= 1
        assert {p.template for p in prompts} <= templates


@pytest.mark.parametrize("n", range(english.MIN_NAMES, 25))
def test_every_pair_is_in_one_split_and_every_name_in_all(n: int) -> None:
    names = english.NAMES[:n]
    pairs = [english.name_pairs(names, split) for split in SPLITS]
    assert sorted(itertools.chain(*pairs)) == list(itertools.combinations(names, 2))
    for split in pairs:
        assert set(itertools.chain(*split)) == set(names)
        turns = Counter(itertools.chain(*split))
        assert len(set(turns.values())) == 1


def test_abba_names_the_indirect_object_first(gpt: PreTrainedTokenizerFast) -> None:
    for example in IOI(source="english").examples(gpt, "fit", 60, 3):
        order, io, s = example.id.split(":")[3:]
        first = example.text.index(io) < example.text.index(s)
        assert first == (order == "ABBA")


def test_one_order_of_names_alone(gpt: PreTrainedTokenizerFast) -> None:
    behavior = IOI(source="english", templates=(0,), orders=("BABA",))
    found = behavior.examples(gpt, "test", 64, 0)
    assert {example.id.split(":")[3] for example in found} == {"BABA"} and len(found) == 64
    both = {e.id for e in IOI(source="english", templates=(0,)).examples(gpt, "test", 180, 0)}
    assert {example.id for example in found} <= both, "the same prompts, fewer of them"
    assert "orders" not in IOI(source="english").model_dump(mode="json", context=IDENTITY), (
        "an identity that was"
    )
    with pytest.raises(ValueError, match="orders are different ones"):
        IOI(source="english", orders=("BABA", "BABA"))
    with pytest.raises(ValueError, match="the organism is asked in both"):
        IOI(orders=("ABBA",))


def test_a_prompt_is_the_same_in_every_draw(gpt: PreTrainedTokenizerFast) -> None:
    """An id names one text, so that runs with different seeds can be compared by it."""
    drawn = [IOI(source="english").examples(gpt, "test", 200, seed) for seed in range(4)]
    texts: dict[str, set[str]] = {}
    for example in itertools.chain(*drawn):
        texts.setdefault(example.id, set()).add(example.text)
    assert max(map(len, texts.values())) == 1
    assert [e.id for e in drawn[0]] != [e.id for e in drawn[1]]


def test_more_prompts_begin_with_the_same_ones(gpt: PreTrainedTokenizerFast) -> None:
    behavior = IOI(source="english", templates=(0, 2, 5))
    many = behavior.examples(gpt, "test", 90, 1)
    assert behavior.examples(gpt, "test", 20, 1) == many[:20]


def test_chosen_templates_alone_are_used(gpt: PreTrainedTokenizerFast) -> None:
    examples = IOI(source="english", templates=(3,)).examples(gpt, "test", 50, 0)
    assert {example.id.split(":")[2] for example in examples} == {"3"}
    assert all("were waiting outside" in example.text for example in examples)


def test_too_few_names_are_counted() -> None:
    letters = byte_level(size=270)  # hardly more than bytes
    with pytest.raises(StudyError, match=r"expected 16 names .* got 0 of the \d+ known"):
        IOI(source="english").examples(letters, "fit", 200, 0)
    few = byte_level(size=900)
    found = english.single_token_names(few, range(12))
    assert english.MIN_NAMES <= len(found) < len(english.NAMES)
    with pytest.raises(StudyError, match=rf"got {len(found)} .* set n_names to {len(found)} or"):
        IOI(source="english", n_names=len(found) + 1).examples(few, "fit", 999, 0)


def test_too_few_and_too_many_prompts_are_refused(gpt: PreTrainedTokenizerFast) -> None:
    behavior = IOI(source="english", n_names=8, templates=(0,))
    with pytest.raises(StudyError, match=r"ioi: 23 fit prompts are too few for 8 .*data.fit to 24"):
        behavior.examples(gpt, "fit", 23, 0)
    with pytest.raises(StudyError, match=r"n_names to 7"):
        behavior.examples(gpt, "fit", 23, 0)
    with pytest.raises(StudyError, match=r"asked for 33 prompts of split 'test', but 8 names"):
        behavior.examples(gpt, "test", 33, 0)
    assert len(behavior.examples(gpt, "test", 32, 0)) == 32


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"source": "english", "templates": (12,)}, r"from 0 to 11 .*'english', got \(12,\)"),
        ({"source": "english", "templates": ()}, "from 0 to 11"),
        ({"source": "english", "templates": (1, 1)}, "different indices"),
        ({"templates": (-1,)}, "'organism'"),
        ({"n_names": 8}, 'n_names needs source = "english"'),
        ({"source": "english", "n_names": 5}, "greater than or equal to 6"),
        ({"source": "englsh"}, "'organism' or 'english'"),
    ],
)
def test_impossible_ioi_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IOI.model_validate({"kind": "ioi"} | fields)


def test_the_organisms_prompts_are_what_they_were(words: PreTrainedTokenizerFast) -> None:
    for split in SPLITS:
        prompts = corpus.ioi_prompts(split, 40, 2)
        examples = IOI().examples(words, split, 40, 2)
        assert [(e.id, e.text, e.target) for e in examples] == [
            (p.id, p.text, p.io) for p in prompts
        ]
        assert [e.rivals for e in examples] == [(p.s, p.third) for p in prompts]
    assert IOI().model_dump(context=IDENTITY) == {
        "kind": "ioi", "source": "organism", "templates": "all", "n_names": None
    }  # fmt: skip


# --- Questions of one's own -----------------------------------------------------------------------

THINGS = "maple walnut cedar birch willow poplar hazel linden aspen spruce".split()  # noqa: SIM905


def quiz(n: int, what: str = "leaf") -> list[dict[str, Any]]:
    rows = []
    for i in range(n):
        choices = [f"{what} of {THINGS[(i + j) % 10]} {i}" for j in range(4)]
        rows.append(
            {"question": f"Which {what} is number {i}?", "choices": choices, "answer": i % 4}
        )
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def source(path: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "file", "path": str(path)} | more


def mcq(tmp_path: Path, n: int = 40, **fields: Any) -> MultipleChoice:
    path = written(tmp_path / "quiz.jsonl", quiz(n))
    return MultipleChoice.model_validate({"kind": "mcq", "source": source(path)} | fields)


def test_letters_are_one_token_after_the_cue(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    behavior = mcq(tmp_path, permutations=24)
    for examples in all_splits(behavior, tokenizer, 60, 0).values():
        for example in examples:
            check_continues(tokenizer, example)
            answers = {a.strip() for a in (example.target, *example.rivals)}
            assert answers == set("ABCD") and example.alternatives == example.rivals


def test_the_prompt_is_instruction_question_choices_cue(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    example = mcq(tmp_path).examples(gpt, "test", 1, 0)[0]
    head, blank, question, a, b, c, d, cue = example.text.split("\n")
    assert (head, blank, cue) == (INSTRUCTION, "", CUE)
    assert question.startswith("Which leaf is number")
    assert [line[:3] for line in (a, b, c, d)] == ["A. ", "B. ", "C. ", "D. "]
    own = mcq(tmp_path, instruction="Pick.").examples(gpt, "test", 1, 0)[0]
    assert own.text == example.text.replace(INSTRUCTION, "Pick.") and own.id == example.id
    bare = mcq(tmp_path, instruction="").examples(gpt, "test", 1, 0)[0]
    assert bare.text == example.text.removeprefix(f"{INSTRUCTION}\n\n")


def test_all_orders_are_asked_and_the_gold_letter_goes_along(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = {row["question"]: row for row in quiz(40)}
    examples = mcq(tmp_path, permutations=24).examples(gpt, "test", 10_000, 0)
    assert len(examples) == 20 * 24 and len({e.text for e in examples}) == len(examples)
    orders: dict[str, set[str]] = {}
    for example in examples:
        orders.setdefault(example.cluster, set()).add(example.id.split(":")[1])
        *_, question, a, b, c, d, _ = example.text.split("\n")
        shown = {line[0]: line[3:] for line in (a, b, c, d)}
        row = rows[question]
        assert shown[example.target.strip()] == row["choices"][row["answer"]]
    everything = {"".join(map(str, order)) for order in PERMUTATIONS}
    assert len(orders) == 20 and all(asked == everything for asked in orders.values())
    assert Counter(e.target for e in examples) == {f" {letter}": 120 for letter in "ABCD"}


def test_a_letter_is_spelled_as_it_can_come_after_the_cue(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Once with a space and once without, in every convention that knows both."""
    behavior = mcq(tmp_path, spellings=True)
    subject = replace(tiny(), tokenizer=tokenizer)
    (example,) = behavior.examples(tokenizer, "test", 1, 0)
    prompt = tokenizer.encode(example.text, add_special_tokens=example.special)
    try:
        readout = behavior.readout(subject)
    except StudyError as error:  # a tokenizer that knows one spelling alone
        assert "in one way alone" in str(error)
        whole = tokenizer.encode(example.text + "A", add_special_tokens=example.special)
        spaced = tokenizer.encode(example.text + " A", add_special_tokens=example.special)
        assert whole[:-1] != prompt or whole == spaced or whole[-1] == tokenizer.unk_token_id
        return
    assert isinstance(readout, Spelled) and len(readout.pairs) == 4
    for letter, (name, other) in zip("ABCD", readout.pairs, strict=True):
        assert tokenizer.convert_ids_to_tokens(name) in {f"Ġ{letter}", f"▁{letter}"}
        assert tokenizer.convert_ids_to_tokens(other) == letter


def test_two_spellings_are_there_in_gpt2s_kind(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    subject = replace(tiny(), tokenizer=gpt)
    readout = mcq(tmp_path, spellings=True).readout(subject)
    assert isinstance(readout, Spelled)
    assert readout.pairs == tuple(
        (gpt.encode(f" {letter}")[-1], gpt.encode(letter)[-1]) for letter in "ABCD"
    )
    assert mcq(tmp_path).readout(subject) is LOGITS


BRACKET = "Answer: ("


def test_a_letter_follows_an_open_bracket_without_a_space(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """SAEBench's ending, in every convention that can write a letter so; else it is refused."""
    behavior = mcq(tmp_path, cue=BRACKET)
    try:
        (example,) = behavior.examples(tokenizer, "test", 1, 0)
    except StudyError as error:  # one that has no letter without a space
        assert "no single logit" in str(error)
        alone = tokenizer.encode("A", add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(alone) != ["A"]
        return
    assert example.text.endswith(f"\n{BRACKET}")
    for answer in (example.target, *example.rivals):
        assert tokenizer.convert_ids_to_tokens(token_id(tokenizer, answer)) == answer.strip()
    assert {answer.strip() for answer in (example.target, *example.rivals)} == set("ABCD")


def test_a_letter_after_a_bracket_may_have_two_spellings(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    subject = replace(tiny(), tokenizer=gpt)
    readout = mcq(tmp_path, cue=BRACKET, spellings=True).readout(subject)
    assert isinstance(readout, Spelled)
    assert readout.pairs == tuple(
        (gpt.encode(letter)[-1], gpt.encode(f" {letter}")[-1]) for letter in "ABCD"
    ), "the one that is there first is the one right after the bracket"
    (example,) = mcq(tmp_path, cue=BRACKET).examples(gpt, "test", 1, 0)
    before = encoded(gpt, example)
    assert encoded(gpt, example, "A") == [*before, gpt.encode("A")[-1]]


def test_a_token_for_bracket_and_letter_is_no_answer(tmp_path: Path) -> None:
    """Where whole texts are written with one the letter alone is read, which comes after the
    bracket."""
    joins = byte_level()
    joins.add_tokens([f"({letter}" for letter in "ABCD"])
    (example,) = mcq(tmp_path, cue=BRACKET).examples(joins, "test", 1, 0)
    whole = joins.convert_ids_to_tokens(encoded(joins, example, "A"))
    assert whole[-1] == "(A", "the fixture: the text is written with the token of both"
    assert {example.target, *example.rivals} == set("ABCD")
    assert joins.convert_ids_to_tokens(token_id(joins, "A")) == "A"


def test_an_open_question_has_no_bracket_at_its_end(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    behavior = mcq(tmp_path, cue="I pick [")
    (example,) = behavior.examples(gpt, "test", 1, 0)
    (asked,) = behavior.openly(gpt, [example])
    assert not isinstance(asked, str) and asked.example.text.endswith("\nI pick")


@pytest.mark.parametrize("cue", ["", "Answer: ", " Answer:"])
def test_a_cue_has_no_space_at_its_ends(tmp_path: Path, cue: str) -> None:
    with pytest.raises(ValueError, match="without a space at its ends"):
        mcq(tmp_path, cue=cue)


def test_a_cut_keeps_as_many_questions_as_it_can(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    behavior = mcq(tmp_path, permutations=5)
    many = behavior.examples(gpt, "test", 10_000, 0)
    assert len(many) == 20 * 5
    for n in (1, 19, 20, 21, 50):
        some = behavior.examples(gpt, "test", n, 0)
        assert some == many[:n] and len({e.cluster for e in some}) == min(n, 20)


def test_whole_questions_are_asked_in_every_order_and_count_together(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    behavior = mcq(tmp_path, permutations=24, every_order=True)
    for n, n_questions in ((1, 1), (24, 1), (47, 1), (48, 2), (10_000, 20)):
        found = behavior.examples(gpt, "test", n, 0)
        orders = Counter(example.cluster for example in found)
        assert len(orders) == n_questions and set(orders.values()) == {24}
        assert len({example.id for example in found}) == 24 * n_questions
    two = behavior.examples(gpt, "test", 48, 0)
    clusters = [example.cluster for example in two]
    shown = torch.ones(48, dtype=torch.bool)
    assert behavior.counted(clusters, shown).all()
    shown[5] = False  # one order of one question
    left = behavior.counted(clusters, shown)
    assert left.tolist() == [cluster != clusters[5] for cluster in clusters]
    assert torch.equal(mcq(tmp_path, permutations=24).counted(clusters, shown), shown)
    assert "every_order" not in mcq(tmp_path).model_dump(mode="json", context=IDENTITY), (
        "an identity that was"
    )
    with pytest.raises(ValueError, match="every_order needs a dataset"):
        MultipleChoice(every_order=True)


def test_the_files_place_for_the_answer_means_nothing(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Some public sets always have the right one first."""
    rows = [row | {"answer": 0} for row in quiz(400)]
    path = written(tmp_path / "first.jsonl", rows)
    behavior = MultipleChoice.model_validate({"source": source(path), "permutations": 1})
    gold = Counter(e.target for e in behavior.examples(gpt, "test", 200, 0))
    assert len(gold) == 4 and min(gold.values()) > 25


@settings(max_examples=30, deadline=None)
@given(n_questions=st.integers(3, 60), n=st.integers(1, 200), seed=st.integers(0, 99))
def test_questions_are_in_one_split_whatever_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
    gpt: PreTrainedTokenizerFast,
    n_questions: int,
    n: int,
    seed: int,
) -> None:
    behavior = mcq(tmp_path_factory.mktemp("quiz"), n_questions, permutations=3)
    splits = all_splits(behavior, gpt, n, seed)
    check_shares_nothing(splits)
    assert all(splits.values())
    whole = all_splits(behavior, gpt, 10_000, seed)
    assert len({e.cluster for split in whole.values() for e in split}) == n_questions
    for name, examples in splits.items():
        assert {e.cluster for e in examples} <= {e.cluster for e in whole[name]}


def test_the_seed_draws_the_splits(gpt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    behavior = mcq(tmp_path)
    one, other = (behavior.examples(gpt, "test", 20, seed) for seed in (0, 1))
    assert {e.cluster for e in one} != {e.cluster for e in other}
    assert behavior.examples(gpt, "test", 20, 0) == one


def test_other_sets_are_neighbors(gpt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    other = written(tmp_path / "other.jsonl", quiz(30, "root"))
    behavior = mcq(tmp_path, retain={"roots": source(other)})
    for split in SPLITS:
        ((name, examples),) = behavior.neighbors(gpt, split, 9, 0).items()
        assert name == "roots" and len(examples) == 9
        assert all("Which root" in example.text for example in examples)
    check_shares_nothing({s: behavior.neighbors(gpt, s, 99, 0)["roots"] for s in SPLITS})
    assert mcq(tmp_path).neighbors(gpt, "fit", 9, 0) == {}


def test_what_should_go_cannot_be_what_should_stay(
    gpt: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = written(tmp_path / "other.jsonl", [*quiz(30, "root"), *quiz(5)])
    with pytest.raises(ValueError, match=r"retain.roots: 5 of its 35 questions are the source's"):
        mcq(tmp_path, retain={"roots": source(other)})
    behavior = mcq(tmp_path, retain={"roots": source(other)}, drop_repeats=True)
    asked = [e for s in SPLITS for e in behavior.neighbors(gpt, s, 999, 0)["roots"]]
    assert len({e.cluster for e in asked}) == 30


def test_the_rows_own_label_is_the_group(gpt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [row | {"subject": f"part {i % 2}"} for i, row in enumerate(quiz(20))]
    path = written(tmp_path / "parts.jsonl", rows)
    behavior = MultipleChoice.model_validate({"source": source(path)})
    assert {e.group for e in behavior.examples(gpt, "fit", 99, 0)} == {"part 0", "part 1"}


def test_a_chat_prompt_ends_in_the_begun_reply(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    examples = mcq(tmp_path, chat=True).examples(words, "test", 8, 0)
    plain = mcq(tmp_path).examples(words, "test", 8, 0)
    for example, same in zip(examples, plain, strict=True):
        asked = same.text.removesuffix(f"\n{CUE}")
        assert example.text == f"<bos><user> {asked} <end> <assistant>{CUE}"
        assert example.suffix == f" <end> <assistant>{CUE}" and not example.special
        assert (example.id, example.target) == (same.id, same.target)
        ids = words.encode(example.text, add_special_tokens=False)
        assert ids.count(words.bos_token_id) == 1
        check_continues(words, example)


def test_a_base_models_tokenizer_has_no_chat(gpt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no chat template"):
        mcq(tmp_path, chat=True).examples(gpt, "test", 8, 0)


def test_letters_without_a_token_are_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "<pad>": 2, "A": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(StudyError, match=r"A, B, C, D to be one token each .* got A"):
        mcq(tmp_path).examples(wrapped(backend, False), "test", 8, 0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"source": "wmdp"}, "expected 'organism' or a table with a `kind`.*got 'wmdp'"),
        ({"chat": True}, "chat needs a dataset"),
        ({"instruction": "Say."}, "instruction needs a dataset"),
        ({"drop_repeats": True}, "drop_repeats needs a dataset"),
        ({"permutations": 25}, "less than or equal to 24"),
        ({"domain": "hazzard"}, "did you mean 'hazard'"),
    ],
)
def test_impossible_mcq_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultipleChoice.model_validate({"kind": "mcq"} | fields)


def test_a_dataset_has_no_domain_and_sets_have_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="domain is one of the organism's"):
        mcq(tmp_path, domain="hazard")
    other = written(tmp_path / "other.jsonl", quiz(9, "root"))
    with pytest.raises(ValueError, match="name of letters"):
        mcq(tmp_path, retain={"a.b": source(other)})
    with pytest.raises(ValueError, match="retain needs a dataset as the source"):
        MultipleChoice.model_validate({"retain": {"other": source(other)}})
    with pytest.raises(ValueError, match="spellings needs a dataset as the source"):
        MultipleChoice(spellings=True)
    with pytest.raises(ValueError, match="cue needs a dataset as the source"):
        MultipleChoice(cue=BRACKET)


def test_the_organisms_quiz_is_what_it_was(words: PreTrainedTokenizerFast) -> None:
    assert MultipleChoice().model_dump(context=IDENTITY) == {
        "kind": "mcq", "source": "organism", "domain": "hazard", "permutations": 12, "retain": {},
        "instruction": None, "chat": False, "drop_repeats": False,
        "subsets": False,
    }  # fmt: skip
    first = corpus.questions("hazard", "test")[0]
    order = corpus.held_out_permutations(first)[0]
    example = MultipleChoice().examples(words, "test", 1, 5)[0]
    assert example.text == corpus.question_text(first, order)
    assert example.target == "ABCD"[order.index(first.answer)]
    assert set(MultipleChoice().neighbors(words, "fit", 5, 0)) == {"harvest", "weather", "music"}


# --- Both -----------------------------------------------------------------------------------------


def test_a_subject_takes_the_prompts(tmp_path: Path) -> None:
    """Batches of a subject: unique ids, disjoint splits, single-token answers, one BOS."""
    subject = replace(tiny(), tokenizer=byte_level(bos=True))
    for behavior in (IOI(source="english", n_names=8), mcq(tmp_path)):
        batches: dict[str, Batch] = {
            split: subject.batch(examples)
            for split, examples in all_splits(behavior, subject.tokenizer, 60, 0).items()
        }
        check_disjoint(batches)
        assert all(bool(batch.bos.all()) for batch in batches.values())


def test_a_subject_refuses_what_is_not_one_token(gpt: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SubjectError, match=r"expected one token .* ask for answers"):
        token_id(gpt, " Zxqwvub")


DRAW = """
import sys
from holdfast.behaviors import BEHAVIORS
from holdfast.canonical import digest
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
for fields in ({"kind": "ioi", "source": "english", "n_names": 8},
               {"kind": "mcq", "source": {"kind": "file", "path": sys.argv[2]}}):
    for split in ("fit", "tune", "test"):
        examples = BEHAVIORS.parse(fields).examples(tokenizer, split, 60, 7)
        print(digest([[e.id, e.text, e.target, *e.rivals] for e in examples]))
"""


def test_nothing_depends_on_the_hash_seed(gpt: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    gpt.save_pretrained(tmp_path / "tokenizer")
    path = written(tmp_path / "quiz.jsonl", quiz(40))
    said = [
        subprocess.run(
            [sys.executable, "-c", DRAW, tmp_path / "tokenizer", path],
            env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] and len(said[0].split()) == 6
