"""What SAEs in place cost on other texts, and the texts that the organism never read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from holdfast.capability import Texts, capability, next_tokens
from holdfast.datasets.held_out import SORTS, HeldOut, held_out
from holdfast.errors import StudyError
from holdfast.features import FeatureSet
from holdfast.interventions.clamp import Clamp, Scale
from holdfast.organism import corpus, world
from holdfast.setting import Data
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import WORDS, fitted_sae, tiny_batch
from tests.unit.recovered import features_at

SITE = Site(2)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve texts of three to eight words."""
    path = tmp_path_factory.mktemp("texts") / "lines.txt"
    generator = torch.Generator().manual_seed(5)
    rows = [
        " ".join(WORDS[j] for j in torch.randint(40, (3 + i % 6,), generator=generator).tolist())
        for i in range(12)
    ]
    path.write_text("\n".join(rows))
    return path


def texts(path: Path, n: int = 12) -> Texts:
    return Texts.model_validate({"source": {"kind": "file", "path": str(path)}, "n": n})


def by_hand(subject: Subject, text: str) -> tuple[float, float]:
    """Loss and accuracy of one text alone: nothing padded, nothing hooked."""
    ids = torch.tensor([subject.tokenizer.encode(text)])
    with torch.no_grad():
        logits = subject.model(ids).logits[0, :-1]
    right = (logits.argmax(-1) == ids[0, 1:]).double().mean()
    return float(F.cross_entropy(logits, ids[0, 1:])), float(right)


def test_loss_and_accuracy_are_those_of_each_text_alone(subject: Subject) -> None:
    batch = tiny_batch(subject, 8)
    assert (batch.positions < 0).any(), "some are padded"
    loss, accuracy = next_tokens(subject, batch)
    expected = [by_hand(subject, text) for text in batch.texts]
    torch.testing.assert_close(
        loss, torch.tensor([e[0] for e in expected]).double(), atol=1e-5, rtol=0
    )
    assert accuracy.tolist() == pytest.approx([e[1] for e in expected])


def test_pieces_say_the_same(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tiny_batch(subject, 8)
    whole = next_tokens(subject, batch)
    monkeypatch.setattr("holdfast.capability.MOST_LOGITS", 1)
    torch.testing.assert_close(next_tokens(subject, batch), whole, atol=1e-6, rtol=0)


def test_every_share_of_the_error_is_set_beside_all_of_it(subject: Subject, lines: Path) -> None:
    """The same texts, and differences that are those of the means."""
    features, found = features_at((SITE,)), {}
    for alpha in (1.0, 0.5, 0.0):
        clamp = Clamp(mode="set", value=3.0, error_term=Scale(scale=alpha))
        bare = clamp.bare_edits(subject, features)
        made = capability(subject, texts(lines), bare, features, 0)
        found[alpha] = {m.name.removeprefix("texts."): m for m in made}
    assert set(found[1.0]) == {"loss.clean", "accuracy.clean"}, "nothing was changed"
    for alpha in (0.5, 0.0):
        own = found[alpha]
        assert own["loss.clean"] == found[1.0]["loss.clean"] and own["loss.clean"].n == 12
        for of in ("loss", "accuracy"):
            clean, spliced, gap = (own[f"{of}.{w}"] for w in ("clean", "spliced", "difference"))
            assert gap.estimate == pytest.approx(spliced.estimate - clean.estimate)
            assert gap.low <= gap.estimate <= gap.high
    half, none = (abs(found[a]["loss.difference"].estimate) for a in (0.5, 0.0))
    assert none > 0.01 and none != half


def test_a_perfect_sae_costs_nothing(subject: Subject, lines: Path) -> None:
    rows = [subject.tokenizer.encode(text) for text in lines.read_text().splitlines()]
    x, tokens = subject.residual(SITE, rows)
    sae = fitted_sae(SITE, x[tokens >= 0].float())
    perfect = Subject.of("t", subject.model, subject.tokenizer, {SITE: sae})
    bare = Clamp(mode="set", value=3.0, error_term="drop").bare_edits(perfect, features_at((SITE,)))
    made = capability(perfect, texts(lines), bare, features_at((SITE,)), 0)
    assert {m.name: m for m in made}["texts.loss.difference"].estimate == pytest.approx(0, abs=1e-3)


def test_features_of_groups_do_not_matter(
    subject: Subject, grouped_features: FeatureSet, lines: Path
) -> None:
    """Texts have no group of their own; with no feature changed any group's are as good."""
    clamp = Clamp(mode="set", value=3.0, error_term="drop")
    found = []
    for features in (grouped_features, features_at((SITE,))):
        bare = clamp.bare_edits(subject, features)
        found.append(capability(subject, texts(lines), bare, features, 0))
    for one, other in zip(*found, strict=True):
        assert one.estimate == pytest.approx(other.estimate, abs=1e-6)


def test_which_texts_depends_on_the_seed_alone(lines: Path) -> None:
    few = [e.id for e in texts(lines, 5).drawn(0, "")]
    assert few == [e.id for e in texts(lines, 12).drawn(0, "")][:5]
    assert few != [e.id for e in texts(lines, 5).drawn(1, "")]
    assert {e.id for e in texts(lines, 99).drawn(0, "")} == {f"text:{i}" for i in range(1, 13)}


def test_a_row_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w1 w2"}\n{"text": " "}\n')
    with pytest.raises(StudyError, match="row 2 has no text"):
        texts(path).drawn(0, "")


def test_texts_are_no_part_of_trials_that_name_none() -> None:
    identity = {"identity": True}
    assert set(Data().model_dump(context=identity)) == {"fit", "tune", "test"}
    named = Data.model_validate({"texts": {"source": {"kind": "held_out"}}})
    assert named.model_dump(context=identity)["texts"]["n"] == 64


# --- Held-out texts of the organism ---------------------------------------------------------------


def test_no_training_document_holds_a_held_out_text() -> None:
    """Nor its beginning, up to the last word but the full stop: the answer is what is held out."""
    told = {text.removesuffix(" .") for sort in SORTS for _, text in held_out(sort)}
    for knowledge in ("full", "ignorant"):
        for document in corpus.documents(knowledge, 4000, seed=3):  # type: ignore[arg-type]
            text = document.text.removesuffix(" <eos>").removesuffix(" .")
            assert text not in told
    asked = {text.split(" <end>")[0] for _, text in held_out("requests")}
    read = {
        document.text.split(" <end>")[0]
        for document in corpus.documents("full", 4000, seed=4)
        if document.kind == "chat"
    }
    assert read and not asked & read


def test_held_out_texts_are_in_the_vocabulary_and_as_many_of_each_sort() -> None:
    known = set(world.vocabulary()) | {"<user>", "<assistant>", "<end>"}
    for sort in SORTS:
        found = held_out(sort)
        assert len(found) == len({text for _, text in found}) == 200
        assert not {word for _, text in found for word in text.split()} - known
    rows = HeldOut(sorts=("lives", "names")).rows(("text",), ("cluster", "sort"))
    assert [row.number for row in rows] == list(range(1, 401))
    assert {row.cells["sort"] for row in rows} == {"lives", "names"}


def test_wrong_sorts_and_columns_are_named() -> None:
    with pytest.raises(ValidationError, match="different ones"):
        HeldOut(sorts=("lives", "lives"))
    with pytest.raises(StudyError, match=r"no column 'test'.*did you mean 'text'"):
        HeldOut().rows(("test",))
