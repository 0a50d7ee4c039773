"""The manifest: a row for every candidate, and an end in an error for whatever contradicts it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.batch import Example
from holdfast.errors import ManifestError
from holdfast.executor import Done, Runtime
from holdfast.manifest import COLUMNS, check_rows, check_run, origin_of, prompt_sha256
from holdfast.run import _write, open_run
from holdfast.store import RunFolder
from tests.e2e.cli import holdfast, small_study, write

Record = dict[str, Any]
Rows = list[dict[str, Any]]
Change = Callable[[Record, Rows], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two constraints and a control on the same few prompts."""
    path = tmp_path_factory.mktemp("manifest")
    study = small_study(
        constraints=("encoder_null", "unconstrained"), data={"fit": 60, "tune": 8, "test": 12}
    )
    study["recovery"] |= {"steps": 5, "refine_steps": 2, "tolerance": 0.5}
    said = holdfast("run", write(path / "study.toml", study), "--out", path / "run")
    assert said.code == 0, said.err
    return path / "run"


def tables(run: Path, control: str = "none") -> tuple[Record, Rows]:
    """A trial's record and rows, to be spoilt."""
    store = RunFolder.read(run)
    record = next(r for r in store.records() if r["trial"]["control"]["kind"] == control)
    return copy.deepcopy(record), store.examples(record["id"])


def searched(rows: Rows) -> dict[str, Any]:
    return next(row for row in rows if row["outcome"])


def left_out(rows: Rows) -> dict[str, Any]:
    return next(row for row in rows if not row["outcome"])


# --- What is written ------------------------------------------------------------------------------


def test_every_candidate_has_a_row_that_says_what_became_of_it(run: Path) -> None:
    for control in ("none", "wrong_target"):
        record, rows = tables(run, control)
        assert set(COLUMNS) <= set(rows[0])
        assert len(rows) == record["result"]["funnel"]["stages"]["tried"] == 12
        assert any(row["outcome"] for row in rows) and any(row["dropped"] for row in rows)
        check_rows("sound", record["result"], rows)


def test_one_prompt_in_two_writings_is_one_and_another_is_another() -> None:
    assert prompt_sha256(" how  do\ti go ") == prompt_sha256("how do i go")
    assert prompt_sha256("caf\u00e9") == prompt_sha256("cafe\u0301")
    assert len({prompt_sha256(text) for text in ("a b", "ab", "A b", "a b.")}) == 4


def test_an_origin_tells_prompt_template_and_tokens_apart() -> None:
    def origin(instruction: str, before: str, after: str, tokens: list[int]) -> Any:
        return origin_of(
            Example(
                "id", f"{before}{instruction}{after}", "a", ("b",), ("b",), "c", suffix=after,
                instruction=instruction, dataset="made/up", row=7,
            ),
            tokens,
        )  # fmt: skip

    one = origin("where is the ring", "<user> ", " <model>", [1, 2])
    assert (one.dataset, one.row) == ("made/up", 7)
    other = origin("who is there", "<user> ", " <model>", [1, 3])
    assert one.template_sha256 == other.template_sha256
    assert one.prompt_sha256 != other.prompt_sha256 and one.tokens_sha256 != other.tokens_sha256
    for before, after in (("<user>", " <model>"), ("<user> ", " <bot>")):
        moved = origin("where is the ring", before.rstrip() + "! ", after, [1, 2])
        assert moved.template_sha256 != one.template_sha256
        assert moved.prompt_sha256 == one.prompt_sha256
    assert origin("where is the ring", "", "", [1, 2]).template_sha256 == ""


# --- Faults in one trial --------------------------------------------------------------------------


def repeat_id(record: Record, rows: Rows) -> None:
    rows[1]["id"] = rows[0]["id"]


def repeat_prompt(record: Record, rows: Rows) -> None:
    rows[1]["prompt_sha256"] = rows[0]["prompt_sha256"]


def lose_a_row(record: Record, rows: Rows) -> None:
    rows.remove(left_out(rows))


def lose_a_searched_row(record: Record, rows: Rows) -> None:
    rows.remove(searched(rows))


def lose_a_column(record: Record, rows: Rows) -> None:
    for row in rows:
        del row["tokens_sha256"]


def lose_every_row(record: Record, rows: Rows) -> None:
    rows.clear()


def lose_a_reason(record: Record, rows: Rows) -> None:
    left_out(rows)["dropped"] = ""


def drop_what_was_searched(record: Record, rows: Rows) -> None:
    searched(rows)["dropped"] = "too long"


def search_what_is_not_valid(record: Record, rows: Rows) -> None:
    searched(rows)["valid"] = False


def call_valid_what_is_not_clean(record: Record, rows: Rows) -> None:
    searched(rows)["clean"] = False


def recover_what_was_not_searched(record: Record, rows: Rows) -> None:
    left_out(rows)["recovered"] = True


def count_one_more(record: Record, rows: Rows) -> None:
    record["result"]["funnel"]["stages"]["recovered"] += 1


def forget_a_stage(record: Record, rows: Rows) -> None:
    del record["result"]["funnel"]["stages"]["suppressed"]


def measurement(record: Record, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in record["result"]["measurements"] if m["name"] == name)
    return found


def forget_a_denominator(record: Record, rows: Rows) -> None:
    del measurement(record, "recovery_rate")["n"]


def lose_a_shard(record: Record, rows: Rows) -> None:
    measurement(record, "goal_rate")["n"] -= 1


def forget_the_rate(record: Record, rows: Rows) -> None:
    record["result"]["measurements"].remove(measurement(record, "recovery_rate"))


FAULTS: dict[Change, str] = {
    repeat_id: "1 prompts are there twice, by their id",
    repeat_prompt: "1 prompts are there twice, by their prompt_sha256",
    lose_a_row: "the funnel says tried 12, its table has 11",
    lose_a_searched_row: "the funnel says tried 12, its table has 11",
    lose_a_column: "has no tokens_sha256: written by another version",
    lose_every_row: "has no .*valid",
    lose_a_reason: "was not searched, and no reason is given",
    drop_what_was_searched: "was searched, and left out .too long.",
    search_what_is_not_valid: "was searched, and it is not valid",
    call_valid_what_is_not_clean: "is called valid, and the clean model does not",
    recover_what_was_not_searched: "is called recovered, and was not searched",
    count_one_more: "the funnel says recovered",
    forget_a_stage: "the funnel says suppressed None",
    forget_a_denominator: "recovery_rate does not say of how many prompts it is",
    lose_a_shard: r"the denominator of goal_rate is \d+ prompts .*, expected \d+, as many",
    forget_the_rate: "no recovery_rate among its measurements",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_trial_that_contradicts_its_table(run: Path, fault: Change) -> None:
    record, rows = tables(run)
    fault(record, rows)
    with pytest.raises(ManifestError, match=f"^here: .*{FAULTS[fault]}"):
        check_rows("here", record["result"], rows)


# --- Faults between trials, and where they are found ----------------------------------------------


def rewritten(run: Path, to: Path, fault: Change, control: str = "none") -> Path:
    """A copy of a run, every hash of it sound, in which one trial was changed."""
    old = RunFolder.read(run)
    spoilt, _ = tables(run, control)
    with RunFolder.open(to, old.study, None) as new:
        for record in old.records():
            rows = old.examples(record["id"])
            if record["id"] == spoilt["id"]:
                fault(record, rows)
            new.write(record, old.tensors(record["id"]), rows)
        summary = old.summary()
        assert summary is not None
        new.write_summary(summary)
    return to


def other_prompts(record: Record, rows: Rows) -> None:
    rows[0]["prompt_sha256"] = "0" * 64


def other_tokens(record: Record, rows: Rows) -> None:
    rows[0]["tokens_sha256"] = "0" * 64


def other_valid_set(record: Record, rows: Rows) -> None:
    """One prompt fewer is valid, and everything in this trial agrees on it."""
    row = searched(rows)
    stages = record["result"]["funnel"]["stages"]
    stages["recovered"] -= row["recovered"]
    stages["valid"] -= 1
    stages["suppressed"] -= 1
    row |= {"valid": False, "outcome": "", "recovered": False, "dropped": "not suppressed"}
    for each in record["result"]["measurements"]:
        if not each["name"].startswith("neighbor."):
            each["n" if each["n"] else "n_unscored"] -= 1


def other_features(record: Record, rows: Rows) -> None:
    """A control that clamps other features has valid prompts of its own."""
    other_valid_set(record, rows)
    record["result"]["features"]["entries"][0]["ids"][0] += 1


def test_other_features_have_a_valid_set_of_their_own(run: Path, tmp_path: Path) -> None:
    open_run(rewritten(run, tmp_path / "run", other_features, "wrong_target"))


@pytest.mark.parametrize("control", ["none", "wrong_target"])
@pytest.mark.parametrize("fault", [other_prompts, other_tokens, other_valid_set])
def test_methods_of_one_audit_are_compared_on_the_same_prompts(
    run: Path, tmp_path: Path, fault: Change, control: str
) -> None:
    record, rows = tables(run, control)
    fault(record, rows)
    check_rows("alone it is sound", record["result"], rows)
    folder = rewritten(run, tmp_path / "run", fault, control)
    message = r"methods of one audit on different prompts: \d+ of 12 are valid in one"
    with pytest.raises(ManifestError, match=message):
        open_run(folder)
    said = holdfast("report", folder)
    assert said.code == 2 and said.err.startswith("holdfast:") and "1 differ" in said.err
    assert not (folder / "report.html").exists()


def test_a_fault_is_found_when_a_run_is_read(run: Path, tmp_path: Path) -> None:
    folder = rewritten(run, tmp_path / "run", count_one_more)
    said = holdfast("report", folder)
    assert said.code == 2 and "the funnel says recovered" in said.err


def test_a_trial_that_contradicts_itself_is_never_stored(run: Path, tmp_path: Path) -> None:
    store, plan, _ = open_run(run)
    trial = plan.trials[0]
    record, rows = store.load(trial.id), store.examples(trial.id)
    found = SimpleNamespace(result=record["result"], tensors=store.tensors(trial.id), examples=rows)
    done = Done(trial, found, "now", 1.0, 1, (trial,))  # type: ignore[arg-type]
    unforeseen: Any = SimpleNamespace(of=lambda done: {})
    with RunFolder.open(tmp_path / "new", store.study, None) as new:
        rows[0]["dropped"], rows[0]["outcome"] = "", ""
        with pytest.raises(ManifestError, match="was not searched, and no reason is given"):
            _write(done, new, Runtime(), (), unforeseen)
        assert not new.has(trial.id) and not list((tmp_path / "new").glob("trials/*"))
        found.examples = store.examples(trial.id)
        _write(done, new, Runtime(), (), unforeseen)
        assert new.has(trial.id)


def test_a_sound_run_is_read_as_it_is(run: Path, tmp_path: Path) -> None:
    store, plan, complete = open_run(rewritten(run, tmp_path / "run", lambda record, rows: None))
    assert complete
    check_run(store, plan.trials)
