"""Whole studies through the command line: the same again, cut short, and checked from the files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import (
    Perturbation,
    RunFolder,
    Runtime,
    Site,
    Trial,
    load_study,
    plan,
    run_study,
    verify_recovery,
)
from holdfast.controls import Case
from holdfast.executor import load_lab
from holdfast.saes.bank import FeatureBank
from holdfast.undone import COLUMNS as UNDONE
from tests.e2e.cli import Said, files_of, holdfast, small_study, write

pytestmark = pytest.mark.e2e

CONSTRAINTS = ("unconstrained", "gradient_projection", "encoder_null")
SUMMARY = {"schema", "study", "study_hash", "complete", "trials"}
ROW = {
    "id", "audit", "behavior", "constraint", "order", "control", "n_tried", "n_clean", "n_valid",
    "n_clusters", "n_recovered", "recovery_rate", "ci_low", "ci_high", "drift_relative_mean",
    "drift_relative_max", "n_drift_undefined", "preactivation_drift_max",
    "preactivation_drift_max_absolute", "norm_relative_median", "outcome", "verdict", "seconds",
}  # fmt: skip
"""What CONTRACTS promises of summary.json."""

Records = dict[str, dict[str, Any]]


def records_of(folder: Path) -> Records:
    return {record["id"]: record for record in RunFolder.read(folder).records()}


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def audited(folder: Path, trial: str) -> list[dict[str, Any]]:
    """The rows of the prompts that were searched."""
    return [row for row in RunFolder.read(folder).examples(trial) if row["outcome"]]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One behavior under the three constraints, with all controls of the bundled study."""
    path = tmp_path_factory.mktemp("study") / "small.toml"
    return write(path, small_study(("ioi",), CONSTRAINTS, controls=None))


@pytest.fixture(scope="module")
def finished(study: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    """An uninterrupted run through the command line, and what it said. Only read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    said = holdfast("run", study, "--out", folder)
    assert said.code == 0, said.err
    return folder, said


@pytest.fixture
def folder(finished: tuple[Path, Said], tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


# --- What a run writes ----------------------------------------------------------------------------


def test_the_folder_is_laid_out_as_documented(finished: tuple[Path, Said], study: Path) -> None:
    folder, _ = finished
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"study.toml", "study.json", "lock", "summary.json", "report.html"} <= files
    assert (folder / "study.toml").read_text() == study.read_text()
    for trial in (folder / "trials").iterdir():
        names = {path.name for path in trial.iterdir()}
        assert names == {"perturbation.safetensors", "examples.parquet", "record.json"}
    assert not list(folder.rglob("*.tmp"))


def test_the_report_is_one_file_and_is_named(finished: tuple[Path, Said]) -> None:
    folder, said = finished
    page = folder / "report.html"
    assert f"report: {page}" in said.out
    html = page.read_text()
    assert html.lstrip().lower().startswith("<!doctype html")
    loads = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']([^\"'#]+)", html)
    assert [target for target in loads if not target.startswith("data:")] == []


def test_every_search_says_what_takes_the_clamp_back_does_alone_and_left_out(
    finished: tuple[Path, Said],
) -> None:
    """Of its recovered prompts, and with rates that its own columns say."""
    folder, _ = finished
    some = 0
    for id_, record in records_of(folder).items():
        told = {m["name"]: m for m in record["result"]["measurements"]}
        rows = [row for row in audited(folder, id_) if row["recovered"]]
        assert record["result"]["undo"]["n"] == len(rows)
        assert (told["undo.whole.rate"]["estimate"] or 1) == 1, "recovered is a margin above 0 here"
        for name in UNDONE:
            values = np.array([row[name] for row in rows], dtype=float)
            values = values[~np.isnan(values)]
            rate = told[f"{name}.rate"]
            assert rate["n"] == len(values) and told[f"{name}.margin"]["n"] == len(values)
            if len(values):
                assert rate["estimate"] == pytest.approx(float((values > 0).mean()))
                some += 1
    assert some >= 3 * len(UNDONE)


def test_the_table_shows_every_verdict(finished: tuple[Path, Said]) -> None:
    folder, said = finished
    for row in summary_of(folder)["trials"]:
        if row["control"] == "none":
            assert row["audit"] in said.out
            assert re.search(rf"{row['constraint']} +{row['verdict']} ", said.out)


def test_the_summary_has_every_key_and_agrees_with_the_records(
    finished: tuple[Path, Said], study: Path
) -> None:
    folder, _ = finished
    summary, records = summary_of(folder), records_of(folder)
    assert summary.keys() >= SUMMARY
    assert summary["schema"] == 1 and summary["complete"] is True
    assert summary["study_hash"] == RunFolder.read(folder).study_hash
    assert [row["id"] for row in summary["trials"]] == [
        t.id for t in plan(load_study(study)).trials
    ]
    for row in summary["trials"]:
        assert row.keys() >= ROW
        record = records[row["id"]]
        result, trial = record["result"], record["trial"]
        stages = result["funnel"]["stages"]
        assert (row["audit"], row["behavior"]) == (trial["audit"], trial["behavior"]["kind"])
        assert row["constraint"] == trial["recovery"]["constraint"]["kind"]
        assert row["order"] == trial["recovery"]["order"]
        assert row["control"] == trial["control"]["kind"]
        for name in ("tried", "clean", "valid", "recovered"):
            assert row[f"n_{name}"] == stages[name]
        for name in ("drift_relative_max", "n_drift_undefined", "preactivation_drift_max"):
            assert row[name] == result["checks"][name]
        assert row["outcome"] == result["outcome"]["outcome"]
        assert row["seconds"] == record["run"]["seconds"] >= 0
        is_audit = row["control"] == "none"
        assert (row["verdict"] in ("held", "breached", "forcible", "undecided")) == is_audit
        assert is_audit or row["verdict"] is None


def test_counts_add_up(finished: tuple[Path, Said]) -> None:
    folder, _ = finished
    for row in summary_of(folder)["trials"]:
        every = RunFolder.read(folder).examples(row["id"])
        rows = [example for example in every if example["outcome"]]
        funnel = records_of(folder)[row["id"]]["result"]["funnel"]
        outcome = records_of(folder)[row["id"]]["result"]["outcome"]
        assert len({example["id"] for example in every}) == len(every) == row["n_tried"]
        assert len(rows) == row["n_valid"] >= 3, "too few to test anything with"
        assert sum(funnel["dropped"].values()) == row["n_tried"] - row["n_valid"]
        assert Counter(e["dropped"] for e in every if e["dropped"]) == funnel["dropped"]
        assert all(bool(e["dropped"]) != bool(e["outcome"]) for e in every)
        assert sum(example["clean_margin"] > 0 for example in every) == row["n_clean"]
        assert sum(outcome["counts"].values()) == row["n_valid"]
        assert {k: n for k, n in outcome["counts"].items() if n} == Counter(
            example["outcome"] for example in rows
        )
        assert sum(example["recovered"] for example in rows) == row["n_recovered"]
        assert all(example["recovered"] == (example["margin"] > 0) for example in rows)
        assert len({example["cluster"] for example in rows}) == row["n_clusters"]
        assert row["recovery_rate"] == pytest.approx(row["n_recovered"] / row["n_valid"])
        assert row["ci_low"] <= row["recovery_rate"] <= row["ci_high"]
        for example in rows:
            assert example["clean_margin"] > 0 >= example["suppressed_margin"]


def test_no_file_says_where_the_study_or_the_run_lies(
    finished: tuple[Path, Said], study: Path
) -> None:
    """Both were given with all their folders; what is kept repeats the run from beside them."""
    folder, _ = finished
    for record in records_of(folder).values():
        assert record["run"]["command"] == f"holdfast run {study.name} --out {folder.name}"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert not [p for p in (study.parent, folder) if str(p).encode() in file.read_bytes()], file


# --- The same again -------------------------------------------------------------------------------


def test_a_finished_run_is_printed_again_and_not_repeated(
    folder: Path, study: Path, finished: tuple[Path, Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, summary = files_of(folder), summary_of(folder)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a finished run loads no model")

    monkeypatch.setattr("holdfast.executor.load_lab", refuse)
    said = holdfast("run", study, "--out", folder)
    assert said.code == 0
    assert files_of(folder) == before
    assert summary_of(folder) == summary

    def table(text: str) -> list[str]:
        # Where the report lies differs, and only a run that searches is checked before.
        own = ("report:", "preflight:")
        return [line for line in text.splitlines() if line and not line.startswith(own)]

    assert table(said.out) == table(finished[1].out)
    planned = plan(load_study(study))
    report = run_study(planned, folder)
    assert (report.n_run, report.n_reused) == (0, len(planned.trials))


def test_the_report_command_needs_the_records_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(folder)
    (folder / "report.html").unlink()
    monkeypatch.setattr("holdfast.executor.load_lab", lambda *a: pytest.fail("no model is needed"))
    said = holdfast("report", folder)
    assert said.code == 0 and (folder / "report.html").is_file()
    assert files_of(folder) == before


@pytest.mark.slow
def test_another_batch_size_gives_the_same_answers(
    finished: tuple[Path, Said], study: Path, tmp_path: Path
) -> None:
    other = tmp_path / "ten"
    assert holdfast("run", study, "--out", other, "--batch-size", "10").code == 0
    one, two = summary_of(finished[0]), summary_of(other)
    same = (
        "id",
        "verdict",
        "outcome",
        "n_tried",
        "n_clean",
        "n_valid",
        "n_clusters",
        "n_recovered",
    )
    for a, b in zip(one["trials"], two["trials"], strict=True):
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
        first, second = audited(finished[0], a["id"]), audited(other, b["id"])
        assert [e["id"] for e in first] == [e["id"] for e in second]
        assert [e["outcome"] for e in first] == [e["outcome"] for e in second]
        norms = [[e["smallest_norm_relative"] for e in rows] for rows in (first, second)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=0.01, err_msg=a["constraint"])
        funnels = [records_of(f)[a["id"]]["result"]["funnel"] for f in (finished[0], other)]
        assert funnels[0] == funnels[1]


# --- Cut short ------------------------------------------------------------------------------------


def until_first_record(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("trials/*/record.json")):
        assert process.poll() is None, "the run ended before it wrote a record"
        assert time.monotonic() < deadline, "no record within two minutes"
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_what_an_uninterrupted_one_does(
    finished: tuple[Path, Said], study: Path, tmp_path: Path
) -> None:
    """The same study run a second time, in two processes: the same results bit for bit."""
    folder = tmp_path / "run"
    code = "import sys; from holdfast.cli import main; sys.argv[0] = 'holdfast'; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", str(study), "--out", str(folder)],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until_first_record(process, folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = [path.parent.name for path in folder.glob("trials/*/record.json")]
    files = {
        name: status for name, status in files_of(folder).items() if name.split("/")[1] in kept
    }
    planned = plan(load_study(study))
    assert 1 <= len(kept) < len(planned.trials), "it was to be killed in the middle"
    if (folder / "summary.json").exists():
        assert summary_of(folder)["complete"] is False

    report = run_study(planned, folder, Runtime())
    assert (report.n_run, report.n_reused) == (len(planned.trials) - len(kept), len(kept))
    assert files.items() <= files_of(folder).items(), "a finished trial was touched"
    assert not list(folder.rglob("*.tmp"))
    assert summary_of(folder)["complete"] is True
    whole, pieced = records_of(finished[0]), records_of(folder)
    assert whole.keys() == pieced.keys()
    for trial, record in whole.items():
        assert record["trial"] == pieced[trial]["trial"]
        assert record["result"] == pieced[trial]["result"]
        assert record["artifacts"] == pieced[trial]["artifacts"], "another vector, or other rows"


# --- From the saved perturbation alone ------------------------------------------------------------


@pytest.fixture(scope="module")
def cases(study: Path) -> dict[str, tuple[Trial, Case]]:
    """Every trial's case, built anew from the study."""
    planned = plan(load_study(study))
    lab = load_lab(planned, planned.trials, Runtime())
    made = {}
    for trial in planned.trials:
        setting = lab.setting(trial, trial.subject)
        made[trial.id] = (
            trial, trial.control.case(setting, lambda t=trial: lab.twin_setting(t))
        )  # fmt: skip
    return made


def test_the_saved_perturbation_alone_brings_the_margins_back(
    finished: tuple[Path, Said], cases: dict[str, tuple[Trial, Case]]
) -> None:
    store = RunFolder.read(finished[0])
    for trial, case in cases.values():
        rows = audited(finished[0], trial.id)
        assert case.batch.ids == tuple(row["id"] for row in rows)
        tensors = store.tensors(trial.id)
        positions = tensors.pop("positions")
        deltas = {Site.parse(name): delta for name, delta in tensors.items()}
        assert len(deltas) == 1
        perturbation = Perturbation(case.batch.ids, positions, deltas)
        (site,) = deltas
        checks = verify_recovery(
            case.subject, case.batch, case.edits, perturbation,
            {site: FeatureBank.of(case.subject.sae(site), case.features)},
            {site: case.features.median_active(site)},
            trial.recovery.order == "clamp_then_perturbation",
        )  # fmt: skip
        for name in ("margin", "norm", "norm_relative", "preactivation_drift_absolute"):
            stored = torch.tensor([row[name] for row in rows], dtype=torch.float64)
            torch.testing.assert_close(getattr(checks, name).double(), stored, rtol=1e-5, atol=1e-6)
        # Without that: the perturbation is an edit like any other.
        logits = case.subject.outputs(case.batch, (*case.edits, perturbation))[:, -1]
        stored = torch.tensor([row["margin"] for row in rows])
        torch.testing.assert_close(case.batch.margin(logits), stored, rtol=1e-5, atol=1e-4)
        # And without it the prompt is as suppressed as it was said to be.
        logits = case.subject.outputs(case.batch, case.edits)[:, -1]
        assert (case.batch.margin(logits) <= 0).all()


def test_the_goal_is_reached_where_a_smallest_norm_is_given(finished: tuple[Path, Said]) -> None:
    n_reached = 0
    for trial in records_of(finished[0]):
        for row in audited(finished[0], trial):
            if not np.isnan(row["smallest_norm_relative"]):
                n_reached += 1
                assert row["margin"] >= row["goal"] - 1e-4
                assert row["recovered"] and row["outcome"] == "recovered"
                assert row["norm_relative"] == pytest.approx(
                    row["smallest_norm_relative"], rel=1e-4
                )
    assert n_reached >= 3


def test_the_norm_never_exceeds_the_budget(
    finished: tuple[Path, Said], cases: dict[str, tuple[Trial, Case]]
) -> None:
    store = RunFolder.read(finished[0])
    for trial, _ in cases.values():
        budget = trial.recovery.budget.relative
        assert budget is not None
        for row in audited(finished[0], trial.id):
            assert 0 < row["norm_relative"] <= budget * (1 + 1e-4)
        tensors = store.tensors(trial.id)
        lengths = [t.double().norm(dim=(1, 2)) for n, t in tensors.items() if n != "positions"]
        stored = torch.tensor([row["norm"] for row in audited(finished[0], trial.id)])
        torch.testing.assert_close(sum(lengths), stored.double(), rtol=1e-5, atol=1e-6)


def test_the_exact_constraint_holds_and_the_published_one_leaks(
    finished: tuple[Path, Said],
) -> None:
    for control in ("none", "wrong_target"):
        drift = {
            row["constraint"]: row["preactivation_drift_max"]
            for row in summary_of(finished[0])["trials"]
            if row["control"] == control
        }
        assert drift["encoder_null"] <= 1e-6
        assert drift["gradient_projection"] >= 1000 * drift["encoder_null"]
        assert drift["unconstrained"] >= 1000 * drift["encoder_null"]
    for trial, record in records_of(finished[0]).items():
        worst = max(row["preactivation_drift"] for row in audited(finished[0], trial))
        assert record["result"]["checks"]["preactivation_drift_max"] == pytest.approx(worst)


# --- A known answer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The known-answer pair: one subject with the clamped route alone, one with a second."""
    path = tmp_path_factory.mktemp("known")
    data = {"fit": 100, "tune": 1, "test": 60}
    pair = small_study(
        ("bottleneck", "second_route"), ("gradient_projection", "encoder_null"), data=data,
        paths=False,
    )  # fmt: skip
    pair["recovery"]["steps"] = 30
    said = holdfast("run", write(path / "pair.toml", pair), "--out", path / "run")
    # Where nothing is recovered a wrong target can still be searched; an empty set is a mistake.
    assert said.code == 0, said.err
    return path / "run"


def row_of(folder: Path, audit: str, constraint: str) -> dict[str, Any]:
    (row,) = (
        row
        for row in summary_of(folder)["trials"]
        if (row["audit"], row["constraint"], row["control"]) == (audit, constraint, "none")
    )
    found: dict[str, Any] = row
    return found


def test_a_clamp_on_the_only_route_holds(known: Path) -> None:
    """METHODS Q 8. The null space of what the later layers see is nothing they could read."""
    row = row_of(known, "bottleneck", "encoder_null")
    assert row["n_valid"] >= 1
    assert (row["verdict"], row["outcome"], row["n_recovered"]) == ("held", "not_recovered", 0)
    assert {e["outcome"] for e in audited(known, row["id"])} == {"not_recovered"}
    assert row["sentence"].endswith("longer searches from other starts changed nothing")
    assert row["preactivation_drift_max"] <= 1e-6


def test_the_published_search_reports_a_false_breach_there(known: Path) -> None:
    row = row_of(known, "bottleneck", "gradient_projection")
    assert row["n_recovered"] >= 1, "it leaks into the clamped features themselves"
    assert row["preactivation_drift_max"] >= 1e-3
    assert row["verdict"] != "held"


def test_a_clamp_beside_a_second_route_is_seen_not_to_hold(known: Path) -> None:
    row = row_of(known, "second_route", "encoder_null")
    assert row["n_valid"] >= 1 and row["n_recovered"] >= 1
    assert row["outcome"] == "recovered" and row["verdict"] != "held"
    assert row["preactivation_drift_max"] <= 1e-6
