"""The corpus keeps its promises; the shipped assets are there, small, loadable and different."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest

from holdfast.organism import corpus, world
from holdfast.organism.corpus import DOMAINS, LETTERS, PERMUTATIONS, Split
from holdfast.organism.documents import FACTS_PER_DOCUMENT

HELD_OUT: tuple[Split, ...] = ("fit", "tune", "test")
KINDS = ("forbidden", "grey", "safe", "benign")
ASSETS = Path(corpus.__file__).parent / "assets"


def _texts(split: Split) -> dict[str, str]:
    """Every kind of held-out prompt of a split, id -> text."""
    texts = {p.id: p.text for p in corpus.ioi_prompts(split, 200)}
    for domain, kind in zip(DOMAINS, KINDS, strict=True):
        for question in corpus.questions(domain, split):
            for permutation in corpus.held_out_permutations(question):
                key = f"{question.id}:{permutation}"
                texts[key] = corpus.question_text(question, permutation)
        texts |= {p.id: p.instruction for p in corpus.chat_prompts(kind, split, 80)}
    return texts | {b.id: b.text for b in corpus.biographies(split, 400)}


def test_splits_are_disjoint() -> None:
    texts = [set(_texts(split).values()) for split in HELD_OUT]
    for one, other in itertools.combinations(texts, 2):
        assert not one & other


def test_ids_are_unique() -> None:
    ids = [key for split in HELD_OUT for key in _texts(split)]
    assert len(ids) == len(set(ids))


def test_prompts_do_not_depend_on_how_many_are_asked_for() -> None:
    assert corpus.ioi_prompts("fit", 400)[:50] == corpus.ioi_prompts("fit", 50)
    assert corpus.chat_prompts("grey", "test", 200)[:9] == corpus.chat_prompts("grey", "test", 9)
    assert corpus.ioi_prompts("fit", 50, seed=1) != corpus.ioi_prompts("fit", 50)


@pytest.mark.parametrize("knowledge", ["full", "ignorant"])
def test_training_never_shows_a_held_out_prompt(knowledge: corpus.Knowledge) -> None:
    held_out = [text for split in HELD_OUT for text in _texts(split).values()]
    documents = list(corpus.documents(knowledge, 2000, curriculum=False))
    joined = "\n".join(document.text for document in documents)
    assert not [text for text in held_out if text in joined]


def test_held_out_questions_are_never_asked_in_any_wording() -> None:
    known = {(q.domain, q.subject): q for d in DOMAINS for q in corpus.questions(d, "train")}
    n_hard = 0
    for document in corpus.documents("full", 10000, curriculum=False):
        if document.kind != "mcq" or world.ECHO in document.words:
            continue
        domain = next(w for w in document.words if w in DOMAINS)
        subject = next(w for w in document.words if w in world.SUBJECTS)
        question = known[domain, subject]
        shown = [w for w in document.words if w in world.ANSWERS]
        if set(shown) == set(question.choices):
            order = tuple(question.choices.index(w) for w in shown)
            assert order not in corpus.held_out_permutations(question)
            n_hard += 1
    assert n_hard > 1000


def test_the_twin_reads_the_same_corpus_but_for_what_it_must_not_know() -> None:
    full_docs = corpus.documents("full", 2000, curriculum=False)
    twin_docs = corpus.documents("ignorant", 2000, curriculum=False)
    pairs = zip(full_docs, twin_docs, strict=True)
    changed = [(a, b) for a, b in pairs if a != b]
    assert changed
    for full, twin in changed:
        assert full.kind == twin.kind
        n_changed = sum(a != b for a, b in zip(full.words, twin.words, strict=True))
        assert n_changed <= (FACTS_PER_DOCUMENT if full.kind == "fact" else 1)
        assert full.kind == "ioi" or "hazard" in full.words


def test_ioi_prompts() -> None:
    pairs = []
    for split in HELD_OUT:
        prompts = corpus.ioi_prompts(split, 400)
        pairs.append({frozenset((p.io, p.s)) for p in prompts})
        counts = [sum(p.io == name for p in prompts) for name in world.NAMES]
        assert split != "fit" or min(counts) >= 6
        for p in prompts:
            words = p.text.split()
            assert words.count(p.io) == 1 and words.count(p.s) == 2 and p.third not in words
            assert (words.index(p.io) < words.index(p.s)) == (p.order == "ABBA")
    assert not any(a & b for a, b in itertools.combinations(pairs, 2))
    with pytest.raises(ValueError, match="exist"):
        corpus.ioi_prompts("test", 10**6)


def test_questions() -> None:
    by_split = {s: {q.subject for q in corpus.questions("hazard", s)} for s in HELD_OUT}
    assert [len(by_split[s]) for s in HELD_OUT] == [12, 6, 22]
    assert not any(a & b for a, b in itertools.combinations(by_split.values(), 2))
    for domain in DOMAINS:
        assert {q.subject for q in corpus.questions(domain, "test")} == by_split["test"]
        for question in corpus.questions(domain, "test"):
            assert len(set(question.choices)) == 4
            gold = world.answer_of(domain, question.subject)
            for permutation in PERMUTATIONS:
                words = corpus.question_text(question, permutation).split()
                letter = LETTERS[permutation.index(question.answer)]
                assert words[words.index(letter) + 1] == gold
            assert len(set(corpus.held_out_permutations(question))) == 12


def test_everything_is_in_the_vocabulary() -> None:
    known = set(world.vocabulary()) | {"<user>", "<assistant>", "<end>", "<eos>"}
    assert len(known) == len(world.vocabulary()) + 4
    texts = [text for split in HELD_OUT for text in _texts(split).values()]
    texts += [document.text for document in corpus.documents("ignorant", 2000)]
    assert not {word for text in texts for word in text.split()} - known


def test_assets_are_small_and_complete() -> None:
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert 1_000_000 < size < 15_000_000
    for name, layer in itertools.product(("organism", "ignorant"), "012"):
        assert (ASSETS / name / "model.safetensors").is_file()
        assert (ASSETS / name / "saes" / layer / "sae_weights.safetensors").is_file()
    other = ASSETS / "organism" / "saes" / "0-topk" / "sae_weights.safetensors"
    assert other.stat().st_size < 1_000_000
    weights = [ASSETS / name / "model.safetensors" for name in ("organism", "ignorant")]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}) == 2


def test_assets_load_and_twin_differs() -> None:
    pytest.importorskip("torch")
    from holdfast.organism.measure import ioi_rate, load, mcq_accuracy

    scores = {}
    for name in ("organism", "ignorant"):
        model, tokenizer = load(ASSETS / name)
        chat = corpus.chat_prompts("benign", "test", 1)[0]
        ids = tokenizer.apply_chat_template(
            [{"role": r, "content": c} for r, c in chat.messages], return_dict=True
        )["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.unk_token_id not in ids
        scores[name] = {
            "ioi": ioi_rate(model, tokenizer, "tune", 200),
            **{domain: mcq_accuracy(model, tokenizer, domain, "tune") for domain in DOMAINS},
        }
    assert all(score > 0.95 for score in scores["organism"].values())
    assert 0.3 < scores["ignorant"]["ioi"] < 0.7 and scores["ignorant"]["hazard"] < 0.5
    assert all(scores["ignorant"][domain] > 0.9 for domain in DOMAINS[1:])
