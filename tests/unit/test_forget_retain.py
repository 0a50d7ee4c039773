"""Sparsity on two corpora: as counted by hand, whatever the batches; and what is taken by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.datasets.file import File
from holdfast.datasets.invented import Invented
from holdfast.discovery import forget_retain
from holdfast.discovery.forget_retain import ForgetRetain, firing
from holdfast.errors import ContextError, EditError, FeatureError, StudyError
from holdfast.organism import corpus
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import WORDS, tiny_subject

SITE = Site(2)
N, LENGTH = 30, 9
"""Texts of a corpus that are read, and tokens of each, BOS included."""


def write(path: Path, seed: int) -> Path:
    """Random texts of 6 to 15 words, one in three with an <eos> in it, and some that are short."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(N + 10):
        n = 6 + i % 10
        words = [WORDS[j] for j in torch.randint(20, (n,), generator=generator)]
        if i % 3 == 0:
            words[3] = "<eos>"
        rows.append({"text": " ".join(words), "title": f"text {i}"})
    rows += [{"text": "w1 w2"}, {"text": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def kind(tmp_path: Path) -> ForgetRetain:
    """Reads two small corpora of random words."""
    return ForgetRetain(
        forget=File(path=str(write(tmp_path / "forget.jsonl", 1))),
        retain=File(path=str(write(tmp_path / "retain.jsonl", 2))),
        n_features=6, retain_threshold=0.45, n_sequences=N, n_tokens=LENGTH, min_chars=15,
    )  # fmt: skip


def by_hand(subject: Subject, sequences: list[list[int]]) -> torch.Tensor:
    """One text after another, one token after another, from the model's own hidden states."""
    sae = subject.sae(SITE).full()
    fired, n = torch.zeros(sae.n_features), 0
    for row in sequences:
        passed = subject.model(input_ids=torch.tensor([row]), output_hidden_states=True)
        for token, h in zip(row, passed.hidden_states[SITE.depth][0].float(), strict=True):
            if token in (0, 1, 2):  # <pad>, <bos>, <eos>
                continue
            p = h @ sae.W_enc + sae.b_enc
            fired += (p > sae.threshold).float()
            n += 1
    return fired / n


def test_sparsity_is_what_counting_by_hand_gives(
    subject: Subject, kind: ForgetRetain, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = kind._sequences(subject, kind.forget)
    assert len(sequences) == N and max(map(len, sequences)) == LENGTH
    assert any(2 in row for row in sequences) and all(row[0] == 1 for row in sequences)
    expected = by_hand(subject, sequences)
    torch.testing.assert_close(
        kind.sparsity(subject, SITE, kind.forget).float(), expected, atol=1e-6, rtol=0
    )
    monkeypatch.setattr(forget_retain, "_TOKENS", 5)  # five tokens at a time
    monkeypatch.setattr(forget_retain, "_TOKENS", 20)  # two texts at a time
    few = Subject(**{**vars(subject), "batching": Batching(4), "counted": {}})
    assert torch.equal(kind.sparsity(few, SITE, kind.forget).float(), expected.float())


def test_features_that_fire_on_the_retain_corpus_are_dropped_and_the_rest_ranked(
    subject: Subject, batch: Batch, kind: ForgetRetain
) -> None:
    forget, retain = (kind.sparsity(subject, SITE, d) for d in (kind.forget, kind.retain))
    found = kind.find(subject, batch, {}).at(SITE)[0]
    allowed = [i for i in range(len(forget)) if retain[i] < 0.45 and forget[i] > 0]
    assert len(allowed) > 6, "something has to be left to rank"
    assert list(found.ids) == sorted(allowed, key=lambda i: -forget[i])[:6]
    assert found.scores == tuple(forget[list(found.ids)].tolist())
    everything = kind.model_copy(update={"retain_threshold": 1.0, "n_features": 64})
    assert set(found.ids) < set(everything.find(subject, batch, {}).at(SITE)[0].ids)


def test_the_threshold_itself_is_too_much(
    subject: Subject, batch: Batch, kind: ForgetRetain
) -> None:
    first = kind.find(subject, batch, {}).at(SITE)[0].ids[0]
    at = float(kind.sparsity(subject, SITE, kind.retain)[first])
    above = torch.nextafter(torch.tensor(at).double(), torch.tensor(1.0).double()).item()
    for threshold, taken in ((at, False), (above, True)):
        if threshold == 0:
            continue
        own = kind.model_copy(update={"retain_threshold": threshold, "n_features": 64})
        assert (first in own.find(subject, batch, {}).at(SITE)[0].ids) == taken


def test_what_reads_the_same_counts_once(
    kind: ForgetRetain, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, calls = tiny_subject(sites=(SITE,)), []
    monkeypatch.setattr(forget_retain, "firing", lambda *args: calls.append(args) or firing(*args))
    for change in ({}, {"retain_threshold": 0.5}, {"n_features": 2}):
        kind.model_copy(update=change).find(subject, batch, {})
    assert len(calls) == 2, "a corpus each"
    kind.model_copy(update={"n_tokens": 5}).find(subject, batch, {})
    assert len(calls) == 4


def test_a_corpus_is_known_by_its_content(tmp_path: Path, kind: ForgetRetain) -> None:
    def identity(of: ForgetRetain) -> str:
        return json.dumps(of.model_dump(mode="json", context={"identity": True}))

    assert str(tmp_path) not in identity(kind)
    assert identity(ForgetRetain.model_validate_json(identity(kind))) == identity(kind)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text((tmp_path / "forget.jsonl").read_text())
    assert identity(kind.model_copy(update={"forget": File(path=str(moved))})) == identity(kind)
    moved.write_text(moved.read_text() + '\n{"text": "w1 w2 w3 w4 w5 w6"}')
    assert identity(kind.model_copy(update={"forget": File(path=str(moved))})) != identity(kind)


def test_a_line_of_plain_text_is_a_text(
    tmp_path: Path, subject: Subject, kind: ForgetRetain
) -> None:
    rows = map(json.loads, (tmp_path / "forget.jsonl").read_text().splitlines())
    texts = [row["text"] for row in rows if row["text"]]
    (tmp_path / "forget.txt").write_text("\n\n".join(texts) + "\n")
    plain = File(path=str(tmp_path / "forget.txt"))
    assert [row.cells for row in plain.rows(("text",))] == [{"text": text} for text in texts]
    assert torch.equal(
        kind.sparsity(subject, SITE, plain), kind.sparsity(subject, SITE, kind.forget)
    )


def test_too_few_texts_and_nothing_to_take_are_said(
    subject: Subject, batch: Batch, kind: ForgetRetain
) -> None:
    with pytest.raises(StudyError, match=r"40 different texts .* n_sequences asks for 90"):
        kind.model_copy(update={"n_sequences": 90}).find(subject, batch, {})
    same = kind.model_copy(update={"retain": kind.forget, "retain_threshold": 1e-9})
    with pytest.raises(FeatureError, match=r"fires on .* and on less than 1e-09 of the tokens"):
        same.find(subject, batch, {})


def test_a_pass_ends_where_it_is_read(subject: Subject) -> None:
    rows = [[1, 7, 8, 9], [1, 5]]
    blocks = subject.family.blocks_of(subject.model)
    before = [len(block._forward_hooks) for block in blocks]
    seen: list[int] = []
    handles = [
        block.register_forward_hook(lambda *a, layer=layer: seen.append(layer))
        for layer, block in enumerate(blocks)
    ]
    try:
        x, tokens = subject.residual(Site(1), rows)
    finally:
        for handle in handles:
            handle.remove()
    assert set(seen) <= {0} and x.shape == (2, 4, 32)
    assert tokens.tolist() == [[1, 7, 8, 9], [-1, -1, 1, 5]]
    assert [len(block._forward_hooks) for block in blocks] == before
    alone = subject.model(input_ids=torch.tensor([rows[1]]), output_hidden_states=True)
    torch.testing.assert_close(x[1, 2:], alone.hidden_states[1][0], atol=1e-5, rtol=0)
    with pytest.raises(ContextError):
        subject.residual(Site(1), [[5] * 1000])
    with pytest.raises(EditError):
        subject.residual(Site(9), rows)


def test_invented_corpora_tell_of_the_fit_split_alone() -> None:
    made = Invented(domains=("hazard",)).rows(("text",), ("domain",))
    texts = [row.cells["text"] for row in made]
    assert len(set(texts)) == len(texts) > 300
    for split in ("tune", "test"):
        audited = {question.subject for question in corpus.questions("hazard", split)}
        assert not any(audited & set(text.split()) for text in texts)
    asked = {
        corpus.question_text(q, order)
        for q in corpus.questions("hazard", "fit")
        for order in corpus.held_out_permutations(q)
    }
    assert not any(text.startswith(tuple(asked)) for text in texts), "of training, not held out"
    with pytest.raises(StudyError, match="no column 'question'"):
        Invented(domains=("hazard",)).rows(("question",))
    with pytest.raises(ValueError, match="unknown domain 'hazzard': did you mean 'hazard'"):
        Invented(domains=("hazzard",))
