"""Several judges of the same replies: rates, identity, and what is measured beside them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast import likelihood
from holdfast.batch import Batch
from holdfast.behaviors.observation import Observation, Reading
from holdfast.behaviors.refusal import Refusal
from holdfast.edits import Perturbation
from holdfast.errors import JudgeError
from holdfast.judges import LABELS, complies, named, refuses
from holdfast.judges.rules import Rules
from holdfast.likelihood import nll
from holdfast.planning import plan
from holdfast.reply import Reply
from holdfast.second_opinions import ALL, PREFIX, TOGETHER, labels_of, opinions_of, rates_of
from holdfast.sites import Site
from holdfast.study import parse
from holdfast.subject import Subject
from holdfast.testing import WORDS, tiny_tokenizer
from tests.unit.test_judges import of_set

# ------------------------------------------------------------------------------ rates by judge

JUDGES = ("first", "second", "third")


def observation(labels: dict[str, list[str]]) -> Observation:
    refusal = Refusal()

    def reading(said: list[str]) -> Reading:
        shows, opposite = zip(*map(refusal.counts, said), strict=True)
        return Reading(tuple(said), torch.tensor(shows), torch.tensor(opposite))

    first = reading(labels["first"])
    replies = tuple(Reply(f"p{i}", "", False, 1) for i in range(len(first.labels)))
    return Observation(
        first.shows, first.opposite, first.labels, replies,
        readings={name: reading(said) for name, said in labels.items()},
    )  # fmt: skip


def made(
    clean: dict[str, list[str]], suppressed: dict[str, list[str]], recovered: dict[str, list[str]],
    overtaken: frozenset[int] = frozenset(),
) -> tuple[Any, Any, Any]:  # fmt: skip
    """A setting, a case of its valid rows and what came back; recovered: of all prompts."""
    observed, changed = observation(clean), observation(suppressed)
    rows = (observed.shows & changed.opposite).nonzero().flatten()
    n = len(observed.shows)
    ids = [f"p{i}" for i in range(n)]
    setting = SimpleNamespace(
        observed=observed, changed=changed, test=SimpleNamespace(ids=ids, clusters=ids)
    )
    case = SimpleNamespace(
        rows=rows, batch=SimpleNamespace(clusters=[ids[row] for row in rows.tolist()])
    )
    seen = None
    if len(rows):
        some = {name: [said[row] for row in rows.tolist()] for name, said in recovered.items()}
        seen = observation(some)
        seen = Observation(
            seen.shows, seen.opposite, seen.labels,
            tuple(Reply(ids[row], "", False, 1) for row in rows.tolist()), readings=seen.readings,
        )  # fmt: skip
    counted = torch.tensor([row not in overtaken for row in rows.tolist()], dtype=torch.bool)
    return setting, case, SimpleNamespace(seen=seen, counted=counted)


SAID = st.lists(
    st.tuples(*[st.sampled_from(["comply", "full_refusal", "partial"])] * 9),
    min_size=1, max_size=12,
)  # fmt: skip


@given(SAID)
def test_rates_by_judge_and_on_the_intersection_by_their_definitions(rows: list[Any]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    clean, suppressed, recovered = (
        dict(zip(JUDGES, columns[i : i + 3], strict=True)) for i in (0, 3, 6)
    )
    setting, case, regained = made(clean, suppressed, recovered)
    valid = {
        j: [complies(clean[j][i]) and refuses(suppressed[j][i]) for i in range(len(rows))]
        for j in JUDGES
    }
    searched = [i for i in range(len(rows)) if valid["first"][i]]
    if not searched:
        assert rates_of(setting, case, regained) == []
        return
    found = {m.name.removeprefix(PREFIX): m for m in rates_of(setting, case, regained)}
    assert list(found) == [*JUDGES, ALL]
    for name, measured in found.items():
        by = JUDGES if name == ALL else (name,)
        within = [i for i in searched if all(valid[j][i] for j in by)]
        back = [i for i in within if all(complies(recovered[j][i]) for j in by)]
        assert measured.n == len(within) and measured.n_unscored == len(searched) - len(within)
        if within:
            assert measured.estimate == pytest.approx(len(back) / len(within))
        else:
            assert measured.estimate is None and "not valid by" in measured.reason
    told = opinions_of(setting, regained)
    assert told["valid"] == {j: sum(valid[j]) for j in JUDGES} | {
        ALL: sum(all(valid[j][i] for j in JUDGES) for i in range(len(rows)))
    }
    assert told["agreement"][TOGETHER]["n"] == 2 * len(rows) + len(searched)


def test_no_judges_word_counts_where_a_feature_was_overtaken() -> None:
    yes, no = ["comply"] * 3, ["full_refusal"] * 3
    same = {name: yes for name in JUDGES}
    there = made(same, {name: no for name in JUDGES}, same, frozenset({1}))
    assert [m.estimate for m in rates_of(*there)] == [pytest.approx(2 / 3)] * 4


def test_one_judge_has_nothing_to_agree_with() -> None:
    said = {"first": ["comply", "comply"]}
    setting, case, regained = made(said, {"first": ["full_refusal"] * 2}, said)
    assert rates_of(setting, case, regained) == [] and opinions_of(setting, regained) == {}
    assert labels_of(None, "clean", 0) == {}


def test_second_opinions_decide_nothing(subject: Subject, batch: Batch) -> None:
    alone = Refusal(judge=Rules(language="none", refusals=("w1",)), n_forced=2, max_new_tokens=6)
    asked = alone.model_copy(update={"second_opinions": (Rules(),)})
    one, two = alone.observe(subject, batch), asked.observe(subject, batch)
    assert one.labels == two.labels and torch.equal(one.shows, two.shows)
    again = asked.read_again(subject, two)
    assert again.labels == one.labels and torch.equal(again.opposite, one.opposite)
    assert list(again.readings) == ["rules", "rules_2"]
    assert again.readings["rules"].labels == one.labels
    assert again.readings["rules_2"].labels == tuple(Rules().labels(one.replies))


# ------------------------------------------------------------------------------ the golden set


def pairs_of(name: str) -> list[tuple[str, str]]:
    return [(str(each.values[0]), str(each.values[1])) for each in of_set(name)]


def test_the_golden_set_has_what_judges_stumble_over() -> None:
    golden, cut = pairs_of("golden"), pairs_of("cut")
    said = {label: [text for expected, text in golden if expected == label] for label in LABELS}
    assert any("\u2019" in text for text in said["full_refusal"]), "curly apostrophes"
    assert any("I can't help" in text and '"' in text for text in said["comply"]), "quoted"
    assert any(not text for text in said["empty"]) and any(text.isspace() for text in said["empty"])
    assert len(said["degenerate"]) > 10 and len(cut) > 10


def test_the_same_text_has_the_same_label_in_all_three_conditions() -> None:
    """Clean replies are judged without references, the others against the clean ones."""
    texts = [text for _, text in (*pairs_of("golden"), *pairs_of("cut"))]
    replies = [Reply(f"r{i}", text, i % 5 == 0, 9) for i, text in enumerate(texts)]
    judge = Rules()
    clean = judge.labels(replies)
    assert judge.labels(replies, replies) == clean
    assert len(set(clean)) >= 6


# ------------------------------------------------------------------------------ likelihood


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    return [[7, 9, 11], [8], [5, 6], [12, 13, 14, 15], [], [9, 4], [21], [22, 23, 24]]


def test_the_likelihood_is_that_of_the_model_without_padding(
    subject: Subject, batch: Batch, answers: list[list[int]]
) -> None:
    got = nll(subject, batch, answers)
    for row, answer in enumerate(answers):
        if not answer:
            assert got[row].isnan()
            continue
        prompt = batch.tokens[row, batch.positions[row] >= 0].tolist()
        ids = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        loss = subject.model(input_ids=ids, labels=labels).loss
        assert got[row] == pytest.approx(float(loss), rel=1e-4)


def test_the_likelihood_knows_no_batches(
    subject: Subject, batch: Batch, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nll(subject, batch, answers)
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 1)
    torch.testing.assert_close(
        nll(subject, batch, answers), whole, equal_nan=True, rtol=1e-5, atol=1e-6
    )


def test_the_likelihood_is_read_with_edits_on(
    subject: Subject, batch: Batch, answers: list[list[int]]
) -> None:
    site = Site(2)
    positions = batch.prompt_length[:, None] - 1
    push = Perturbation(batch.ids, positions, {site: torch.randn(len(batch), 1, subject.d_model)})
    none = Perturbation(batch.ids, positions, {site: torch.zeros(len(batch), 1, subject.d_model)})
    plain = nll(subject, batch, answers)
    torch.testing.assert_close(nll(subject, batch, answers, (none,)), plain, equal_nan=True)
    moved = nll(subject, batch, answers, (push,))
    assert ((moved - plain).abs().nan_to_num(1.0) > 1e-4).all()


# ------------------------------------------------------------------------------ identity


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, initializer_range=1.0, num_labels=2,
        id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


STUDY = """
schema = 1
name = "panel"
subject = { model = "organism", saes = [
  { site = "blocks.0.hook_resid_post", source = { kind = "folder", path = "organism:saes/0" } } ] }
recovery = { constraint = { kind = "encoder_null" }, budget = { relative = 0.5 } }
[[audits]]
name = "induced"
discovery = { kind = "given", features = [{ site = "blocks.0.hook_resid_post", ids = [1] }] }
intervention = { kind = "clamp", value = 8.0 }
[audits.behavior]
kind = "refusal"
second_opinions = [
  { kind = "classifier", model = "FOLDER", opinions_of = { yes = "comply", no = "full_refusal" } } ]
"""


def ids_of(folder: Path, *sets: str) -> list[str]:
    return [t.id for t in plan(parse(STUDY.replace("FOLDER", str(folder)), sets)).trials]


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_a_trial_knows_its_judges_by_their_weights(classifier_folder: Path, tmp_path: Path) -> None:
    here = ids_of(classifier_folder)
    moved = copied(classifier_folder, tmp_path / "moved")
    assert ids_of(moved) == here, "where a judge lies is no part of a trial"
    from safetensors.torch import load_file, save_file

    weights = load_file(moved / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert ids_of(moved) != here, "another classifier is another trial"
    made = plan(parse(STUDY.replace("FOLDER", str(classifier_folder))))
    for text in (str(made.trials[0].canonical()), str(made.study.canonical())):
        assert str(classifier_folder) not in text and "'sha256': None" not in text
    assert made.hash == plan(made.study).hash


def test_a_grid_over_judges_is_known_by_their_weights(
    classifier_folder: Path, tmp_path: Path
) -> None:
    other = copied(classifier_folder, tmp_path / "other")
    (other / "config.json").write_text(
        (other / "config.json").read_text().replace('"gelu"', '"relu"')
    )
    grid = f'grid={{"behavior.judge.model" = ["{classifier_folder}", "{other}"]}}'
    opinions = '{yes="comply", no="full_refusal"}'
    judge = f'audits.0.behavior.judge={{kind="classifier", model="x", opinions_of={opinions}}}'
    text = STUDY.replace("FOLDER", str(classifier_folder))
    same = copied(classifier_folder, tmp_path / "same")
    with pytest.raises(JudgeError, match="classifier and classifier_2 are the same"):
        plan(parse(text, (judge.replace('"x"', f'"{same}"'),)))
    text = text.split("second_opinions")[0]
    trials = plan(parse(text, (judge.replace('"x"', f'"{other}"'), grid))).trials
    hashes = {t.canonical()["behavior"]["judge"]["sha256"] for t in trials}
    assert len(trials) == len(hashes) == 2 and None not in hashes


def test_a_judge_that_is_not_there_stops_the_plan(classifier_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"nowhere: expected a folder with config\.json"):
        ids_of(tmp_path / "nowhere")
    pinned = 'audits.0.behavior.second_opinions.0.sha256="' + "0" * 64 + '"'
    assert ids_of(classifier_folder, pinned) != ids_of(classifier_folder)
    with pytest.raises(JudgeError, match="its files changed"):
        behavior = (
            parse(STUDY.replace("FOLDER", str(classifier_folder)), (pinned,)).audits[0].behavior
        )
        assert isinstance(behavior, Refusal)
        behavior.identified().judges["classifier"].labels([Reply("p", "w1 w2", False, 2)])


def test_judges_are_named_by_kind_and_differ() -> None:
    english, own = Rules(), Rules(refusals=("nope",))
    assert list(named((english, own))) == ["rules", "rules_2"]
    with pytest.raises(JudgeError, match="rules and rules_3 are the same"):
        Refusal(judge=english, second_opinions=(own, english)).identified()
