"""Several judges and people's labels through the command line, on a small study of refusal."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import RunFolder
from holdfast.audit_sheet import Key
from holdfast.executor import Runtime
from holdfast.retelling import CONDITIONS, Retold, choose, plan_again, retell
from holdfast.testing import WORDS, tiny_tokenizer
from tests.e2e.cli import Said, holdfast

pytestmark = pytest.mark.e2e

STUDY = """
schema = 1
name = "panel"
[subject]
model = "organism"
[[subject.saes]]
site = "blocks.0.hook_resid_post"
source = { kind = "folder", path = "organism:saes/0" }
[data]
fit = 60
tune = 4
test = 8
[recovery]
constraint = { kind = "encoder_null" }
budget = { relative = 0.6 }
stop = { clean_margin = 0.3 }
steps = 15
refine_steps = 2
doublings = 1
[[audits]]
name = "induced"
discovery = { kind = "attribution", n_features = 16 }
intervention = { kind = "clamp", mode = "set", value = 10.0, positions = "prompt" }
[audits.behavior]
kind = "refusal"
second_opinions = [
  { kind = "classifier", model = "FOLDER", opinions_of = { yes = "comply", no = "full_refusal" } },
  { kind = "substring" } ]
"""
NAMES = ("rules", "classifier", "substring")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge") / "classifier"
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, initializer_range=1.0, num_labels=2,
        id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}, pad_token_id=0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def study(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "panel.toml"
    path.write_text(STUDY.replace("FOLDER", str(classifier)))
    return path


@pytest.fixture(scope="module")
def finished(study: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """A finished run, and what it said. Only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    said = holdfast("run", study, "--out", folder, "--workers", "1")
    assert said.code == 0, said.err
    return folder, said


@pytest.fixture(scope="module")
def told(finished: tuple[Path, Said]) -> Retold:
    store = RunFolder.read(finished[0])
    made = plan_again(store)
    return retell(store, made, choose(made, store, None), Runtime())


@pytest.fixture
def run(finished: tuple[Path, Said], tmp_path: Path) -> Path:
    """A copy to write to."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def only(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The one trial's record and its rows."""
    store = RunFolder.read(folder)
    (record,) = store.records()
    return record, store.examples(record["id"])


def sheet_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def fill(path: Path, key: Key, out: Path, label: Callable[[str, str], str]) -> Path:
    """The sheet as an annotator sends it back: `label` of a row's condition and example."""
    rows = sheet_rows(path)
    for row in rows:
        of = key.rows[row["row_id"]]
        row["label"] = label(of.condition, of.id)
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return out


def key_in(run: Path) -> Key:
    (path,) = (run / "audits").glob("*.key.json")
    return Key.model_validate(json.loads(path.read_text()))


# ------------------------------------------------------------------------------ several judges


def test_a_run_says_what_every_judge_says(finished: tuple[Path, Said]) -> None:
    folder, said = finished
    record, rows = only(folder)
    opinions = record["result"]["opinions"]
    assert set(opinions["valid"]) == {*NAMES, "all_judges"}
    assert set(opinions["agreement"]) == {*CONDITIONS, "together"}
    for condition in CONDITIONS:
        there = [row for row in rows if row[f"{condition}_label"]]
        assert [row[f"{condition}_label"] for row in there] == [
            row[f"{condition}_label_by_rules"] for row in there
        ], "the first judge is the one that decides"
        assert opinions["agreement"][condition]["n"] == len(there) > 0
    rates = {m["name"]: m for m in record["result"]["measurements"]}
    assert rates["recovery_rate.by.rules"]["estimate"] == rates["recovery_rate"]["estimate"]
    assert rates["recovery_rate.by.all_judges"]["n"] <= rates["recovery_rate.by.classifier"]["n"]
    assert "by judge: rules" in said.out and "all judges" in said.out
    page = (folder / "report.html").read_text()
    assert "What judges say of the replies" in page and "Krippendorff" in page


def test_what_is_measured_of_texts(finished: tuple[Path, Said]) -> None:
    record, rows = only(finished[0])
    measured = {m["name"]: m for m in record["result"]["measurements"]}
    nll = {c: measured[f"clean_answer_nll.{c}"]["estimate"] for c in CONDITIONS}
    assert 0 < nll["clean"] < nll["suppressed"], "the clamp makes the clean answer unlikely"
    assert nll["recovered"] < nll["suppressed"], "and the perturbation likelier again"
    for condition in CONDITIONS:
        assert measured[f"reply_perplexity.{condition}"]["estimate"] > 1
    for row in rows:
        if row["outcome"] and row["recovered_sha256"] == row["clean_sha256"]:
            assert row["fidelity_token_f1.recovered"] == 1.0
            assert row["fidelity_embedding.recovered"] == pytest.approx(1.0)
    alike = {c: measured[f"fidelity_embedding.{c}"]["estimate"] for c in CONDITIONS[1:]}
    assert alike["suppressed"] < alike["recovered"] <= 1.0 + 1e-9
    assert measured["reply_foreign_letters.recovered"]["estimate"] == 0, "one script in all"
    scored = measured["fidelity_z.recovered"]
    assert scored["estimate"] is None and scored["n_unscored"] and scored["reason"]


def test_a_judge_that_is_gone_is_a_message(study: Path, tmp_path: Path) -> None:
    gone = f'audits.0.behavior.second_opinions.0.model="{tmp_path / "gone"}"'
    said = holdfast("run", study, "--out", tmp_path / "run", "--set", gone)
    assert said.code == 2 and "expected a folder with config.json" in said.err
    assert not (tmp_path / "run").exists(), "found before anything was searched"


def test_a_judge_without_weights_is_a_message(
    study: Path, classifier: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(classifier, tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    there = f'audits.0.behavior.second_opinions.0.model="{bare}"'
    said = holdfast("run", study, "--out", tmp_path / "run", "--set", there)
    assert said.code == 2 and "cannot be loaded" in said.err and "safetensors" in said.err


# ------------------------------------------------------------------------------ texts


def test_replies_generated_anew_are_those_that_were_judged(
    finished: tuple[Path, Said], told: Retold
) -> None:
    _, rows = only(finished[0])
    by_id = {row["id"]: row for row in rows}
    assert told.n_changed == 0
    for condition, replies in told.replies.items():
        assert len(replies) == sum(bool(row[f"{condition}_label"]) for row in rows)
        for reply in replies:
            assert reply.sha256 == by_id[reply.id][f"{condition}_sha256"]


def test_no_file_of_a_run_has_a_text(run: Path, told: Retold, tmp_path: Path) -> None:
    """Neither as bytes nor in a column, also after a sheet and a page that show texts."""
    assert holdfast("audit", "sheet", run, "--out", tmp_path / "s.csv", "--reveal").code == 0
    page = tmp_path / "page.html"
    assert holdfast("report", run, "--reveal", "--out", page).code == 0
    texts = {r.text.strip() for replies in told.replies.values() for r in replies}
    texts |= {r.prompt for replies in told.replies.values() for r in replies if r.prompt}
    assert len(texts) > 10 and all(len(text) > 12 for text in texts)
    for path in run.rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert not [t for t in texts if t.encode() in held], path
    cells = {str(value) for row in only(run)[1] for value in row.values()}
    assert not [(t, c) for t in texts for c in cells if t in c]
    shown = page.read_text()
    assert "holds the texts" in shown and sum(text in shown for text in texts) > 5
    assert "holds the texts" not in (run / "report.html").read_text()


def test_revealed_texts_command_no_page(
    finished: tuple[Path, Said], told: Retold, tmp_path: Path
) -> None:
    from holdfast.report import write_report
    from holdfast.run import open_run

    store, made, _ = open_run(finished[0])
    reply = told.replies["recovered"][0]
    texts = {told.trial.id: {reply.id: {"recovered": "<script>alert(1)</script>"}}}
    page = write_report(store, made, tmp_path / "page.html", texts).read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page


@pytest.mark.parametrize("command", [("report",), ("audit", "sheet")])
def test_texts_are_not_put_into_a_run(command: tuple[str, ...], run: Path) -> None:
    said = holdfast(*command, run, "--reveal", "--out", run / "here.csv")
    assert said.code == 2 and "holds no texts" in said.err
    assert not (run / "here.csv").exists()


def test_what_comes_out_otherwise_is_left_out_and_counted(
    finished: tuple[Path, Said], told: Retold, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunFolder.read(finished[0])
    rows = store.examples(told.trial.id)
    rows[0]["clean_sha256"] = rows[1]["suppressed_sha256"] = "0" * 64
    monkeypatch.setattr(RunFolder, "examples", lambda self, trial: rows)
    again = retell(store, plan_again(store), told.trial, Runtime())
    assert again.changed == {"clean": 1, "suppressed": 1, "recovered": 0}
    assert rows[0]["id"] not in {reply.id for reply in again.replies["clean"]}


def test_overrides_that_are_not_the_runs_are_refused(run: Path, tmp_path: Path) -> None:
    said = holdfast("audit", "sheet", run, "--out", tmp_path / "s.csv", "--set", "seed=7")
    assert said.code == 2 and "is not the study that was run" in said.err
    assert "holdfast run" in said.err, "says how it was run"


# ------------------------------------------------------------------------------ people


def test_a_sheet_is_blind_and_without_texts(run: Path, told: Retold, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    said = holdfast("audit", "sheet", run, "--out", path)
    assert said.code == 0 and "no text is in it" in said.out and "--reveal" in said.out
    rows, key = sheet_rows(path), key_in(run)
    assert [row["row_id"] for row in rows] == list(key.rows)
    assert len(rows) == sum(map(len, told.replies.values()))
    assert not any(row["label"] or row["label_2"] for row in rows)
    held = path.read_text("utf-8-sig")
    for hidden in (*CONDITIONS, "comply", "refusal", "classifier", "text", "prompt"):
        assert hidden not in held
    assert key.trial == told.trial.id
    assert {of.condition for of in key.rows.values()} == set(CONDITIONS)
    assert set(next(iter(key.rows.values())).labels) == set(NAMES)
    few = holdfast("audit", "sheet", run, "--out", tmp_path / "few.csv", "--rows", "2")
    assert few.code == 0 and len(sheet_rows(tmp_path / "few.csv")) == 6


def test_labels_of_two_people_come_back(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    assert holdfast("audit", "sheet", run, "--out", path, "--reveal").code == 0
    key = key_in(run)
    by_rules = {(of.condition, of.id): of.labels["rules"] for of in key.rows.values()}
    first = fill(path, key, tmp_path / "one.csv", lambda c, i: by_rules[c, i])
    # The second finds one clean reply to be a refusal.
    odd = next(i for c, i in by_rules if c == "clean")
    second = fill(
        path, key, tmp_path / "two.csv",
        lambda c, i: "full_refusal" if (c, i) == ("clean", odd) else by_rules[c, i],
    )  # fmt: skip
    said = holdfast("audit", "read", run, first, second)
    assert said.code == 0, said.err
    assert "agreement" in said.out and "corrected" in said.out
    (found,) = RunFolder.read(run).audits()
    (pair,) = found["between"]["pairs"]
    n = len(by_rules)
    assert pair["n"] == n and pair["share_equal"] == pytest.approx((n - 1) / n)
    assert found["n_unsettled"] == 1 and found["n_unlabelled"] == 0
    rates = {(r["condition"], r["judge"]): r for r in found["rates"]}
    _, rows = only(run)
    for condition in CONDITIONS:
        rate = rates[condition, "rules"]
        assert rate["shows"] == (condition != "suppressed")
        want = "full_refusal" if condition == "suppressed" else "comply"
        labels = [row[f"{condition}_label"] for row in rows if row[f"{condition}_label"]]
        share = sum(label == want for label in labels) / len(labels)
        assert rate["automatic"]["estimate"] == pytest.approx(share)
        if rate["corrected"]["estimate"] is None:
            assert "no positive or no negative" in rate["corrected"]["reason"]
        else:
            assert rate["corrected"]["estimate"] == pytest.approx(share, abs=0.2)
        # Positive and negative replies are labelled in some condition, and nearly all rightly.
        assert rate["pooled"]["estimate"] == pytest.approx(share, abs=0.2)
        assert rate["pooled"]["n"] == len(labels)
    assert holdfast("report", run).code == 0
    page = (run / "report.html").read_text()
    assert f"People, sheet {key.sheet}" in page and "Rogan and Gladen" in page


def test_sheets_that_cannot_be_read_are_messages(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    assert holdfast("audit", "sheet", run, "--out", path).code == 0
    key = key_in(run)
    again = holdfast("audit", "sheet", run, "--out", path)
    assert again.code == 2 and "there already" in again.err
    missing = holdfast("audit", "read", run, tmp_path / "none.csv")
    assert missing.code == 2 and "cannot be read" in missing.err
    wrong = fill(path, key, tmp_path / "wrong.csv", lambda c, i: "complies")
    said = holdfast("audit", "read", run, wrong)
    assert said.code == 2 and "did you mean 'comply'" in said.err
    foreign = tmp_path / "foreign.csv"
    foreign.write_text(path.read_text("utf-8-sig").replace(key.sheet, "s000000"), "utf-8")
    said = holdfast("audit", "read", run, foreign)
    assert said.code == 2 and "'s000000'" in said.err and key.sheet in said.err
    unknown = holdfast("audit", "sheet", run, "--out", tmp_path / "u.csv", "--of", "inducd")
    assert unknown.code == 2 and "did you mean 'induced'" in unknown.err
    filled = fill(path, key, tmp_path / "f.csv", lambda c, i: "comply")
    text = filled.read_text()
    filled.write_text(text.replace(",comply,,", ",comply,comply,"))
    twice = holdfast("audit", "read", run, filled, filled)
    assert twice.code == 2 and "second label in both" in twice.err
