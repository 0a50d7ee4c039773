"""A run that ended early goes on where it was, and finds what it would have found, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape

from holdfast import RunFolder, Runtime, plan, run_study
from holdfast.batching import Batching, Beginning, Sizes, kept_parts
from holdfast.compare import read_side
from holdfast.errors import DamagedRecordError
from holdfast.made_from import page_made_with
from holdfast.planning import Plan
from holdfast.report import write_report
from holdfast.run import RunReport, Watcher, open_run
from holdfast.stacked import StackPlan
from holdfast.store import BATCH_PLAN
from holdfast.study import parse
from holdfast.trial import Trial

STUDY = """
schema = 1
name = "resumed"
seed = 0
controls = ["wrong_target"]
[subject]
model = "organism-second-route"
[[subject.saes]]
site = 'blocks.1.hook_resid_post'
source = { kind = 'folder', path = 'organism:saes/1' }
[data]
fit = 8
tune = 1
test = 12
[recovery]
constraint = { kind = 'encoder_null' }
budget = { relative = 0.5 }
stop = { clean_margin = 0.3 }
steps = 6
refine_steps = 3
doublings = 1
tolerance = 0.1
[[audits]]
name = 'only'
behavior = { kind = 'ioi', templates = 'all' }
discovery = { kind = 'given', file = 'organism-second-route:features.json' }
intervention = { kind = 'clamp', mode = 'set_where_active', value = -5.0 }
[grid]
'recovery.constraint.kind' = ['gradient_projection', 'encoder_null']
'recovery.budget.relative' = [0.5]
"""
WIDER = STUDY.replace("[0.5]", "[0.5, 0.4]")
SEEDS = STUDY + "seed = [0, 1]\n"
NARROWER = STUDY.replace("['gradient_projection', 'encoder_null']", "['encoder_null']")


class KilledError(Exception):
    """Stands for the end of the process."""


def made(text: str = STUDY) -> Plan:
    return plan(parse(text))


def run(folder: Path, text: str = STUDY, **runtime: Any) -> RunReport:
    return run_study(made(text), folder, Runtime(**({"workers": 1} | runtime)))


def run_until(folder: Path, n: int, text: str = STUDY, **runtime: Any) -> list[str]:
    """End a run when it is to store its trial number n; the ids of those that are stored."""
    plain, written = RunFolder.write, []

    def write(self: RunFolder, record: dict[str, Any], *rest: Any) -> Any:
        if len(written) == n:
            raise KilledError
        written.append(record["id"])
        return plain(self, record, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write", write)
        with pytest.raises(KilledError):
            run(folder, text, **runtime)
    return written


def found(folder: Path) -> dict[str, Any]:
    """What must not depend on how often a run was ended: all but times and places."""
    records = RunFolder.read(folder).records()
    return {each["id"]: (each["result"], each["artifacts"]) for each in records}


def stacks_in(folder: Path) -> list[list[str]]:
    kept: list[list[str]] = json.loads((folder / BATCH_PLAN).read_text())["stacks"]
    return kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, never ended early. Only read it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder).n_run == 4
    return folder


# --- Within a stack -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_workers"), [(1, 2), (3, 1)])
def test_a_stack_that_was_cut_through_is_searched_as_it_was(
    whole: Path, tmp_path: Path, n: int, n_workers: int
) -> None:
    folder = tmp_path / "run"
    stored = run_until(folder, n)
    assert stacks_in(folder) == [[trial.id for trial in made().trials]], "all of them are one stack"
    files = {name: (folder / "trials" / name / "record.json").read_bytes() for name in stored}
    again = run(folder, workers=n_workers)
    assert (again.n_reused, again.n_run) == (n, 4 - n)
    assert found(folder) == found(whole)
    for name, record in files.items():
        assert (folder / "trials" / name / "record.json").read_bytes() == record, "it was touched"
    assert stacks_in(folder) == stacks_in(whole)
    for record in RunFolder.read(folder).records():
        assert [record["run"]["batch_plan"]["stack"]] == stacks_in(folder)


def test_prompts_of_two_seeds_are_searched_beside_each_other_again(tmp_path: Path) -> None:
    run(tmp_path / "whole", SEEDS)
    run_until(tmp_path / "cut", 5, SEEDS)
    run(tmp_path / "cut", SEEDS)
    trials = made(SEEDS).trials
    assert {trial.seed for trial in trials} == {0, 1} and len(trials) == 8
    assert stacks_in(tmp_path / "cut") == [[trial.id for trial in trials]]
    assert found(tmp_path / "cut") == found(tmp_path / "whole")


def test_it_is_the_company_that_makes_the_digits(whole: Path, tmp_path: Path) -> None:
    """Else the test above would pass without a plan."""
    folder = tmp_path / "run"
    run_until(folder, 3)
    (folder / BATCH_PLAN).unlink()
    run(folder)
    assert found(folder).keys() == found(whole).keys() and found(folder) != found(whole)


def test_ended_twice_and_a_record_that_is_taken_away(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 1)
    run_until(folder, 1)
    assert run(folder).n_run == 2 and found(folder) == found(whole)
    shutil.rmtree(folder / "trials" / made().trials[2].id)
    assert run(folder).n_run == 1 and found(folder) == found(whole)


def test_a_number_of_rows_that_was_asked_for_is_followed(tmp_path: Path) -> None:
    assert run(tmp_path / "one", batch_size=5).n_run == 4
    run_until(tmp_path / "two", 2, batch_size=5)
    run(tmp_path / "two")  # which does not say it again
    assert found(tmp_path / "one") == found(tmp_path / "two")
    (record, *_) = RunFolder.read(tmp_path / "two").records()
    assert record["run"]["batch_plan"]["batch_size"] == 5


def test_pieces_that_had_run_out_of_memory_are_those_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt fits into one piece and the bisection does not, so that sizes change in the
    middle of a search; and the memory that was lacking is there again when the run goes on."""
    from holdfast import ascent

    real = ascent._ascend

    def crowded(problem: Any, feasible: Any, climb: Any, *rest: Any) -> Any:
        if len(climb) > len(problem):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(problem, feasible, climb, *rest)

    monkeypatch.setattr(ascent, "_ascend", crowded)
    assert run(tmp_path / "one").n_run == 4
    run_until(tmp_path / "two", 2)
    monkeypatch.setattr(ascent, "_ascend", real)
    kept = json.loads((tmp_path / "two" / BATCH_PLAN).read_text())
    assert kept["work"]["steps"]["halvings"] >= 1
    (search,) = (part for name, part in kept["parts"].items() if name.startswith("search"))
    assert search["begun_with"]["steps"] == 512 and search["halved"]
    run(tmp_path / "two")
    assert found(tmp_path / "one") == found(tmp_path / "two")


# --- More and fewer points ------------------------------------------------------------------------


def test_points_that_are_added_leave_finished_ones_alone(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/record.json")}
    again = run(folder, WIDER)
    assert (again.n_reused, again.n_run) == (4, 4)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [len(ids) for ids in stacks_in(folder)] == [4, 4]
    assert found(whole).items() <= found(folder).items()
    assert run(folder, WIDER).n_run == 0


def test_points_may_be_added_to_a_run_that_was_ended(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_until(folder, 2)
    run(folder, WIDER)
    assert found(whole).items() <= found(folder).items()
    assert [len(ids) for ids in stacks_in(folder)] == [4, 4]


def ids(trials: tuple[Trial, ...]) -> list[str]:
    return [trial.id for trial in trials]


def test_what_is_planned_of_what_there_is() -> None:
    trials, more, fewer = made().trials, made(WIDER).trials, made(NARROWER).trials
    first = StackPlan.of(trials, (), None)
    assert [stack.ids for stack in first.todo] == [ids(trials)] and first.new == trials
    kept = {"stacks": first.as_json()}

    rest = StackPlan.of(trials, ids(trials[:1]), kept)
    (stack,) = rest.todo
    assert stack.trials == trials and stack.wanted == trials[1:] and not rest.new
    assert rest.as_json() == first.as_json()

    nothing = StackPlan.of(trials, ids(trials), kept)
    assert not nothing.todo and nothing.as_json() == first.as_json()

    wider = StackPlan.of(more, ids(trials[:1]), kept)
    assert wider.todo[0] == stack and set(wider.new) == set(more) - set(trials)
    assert [len(each) for each in wider.as_json()] == [4, 4]

    # One with a member that has left the study cannot be searched as it was: what is left of it is.
    left = StackPlan.of(fewer, [fewer[0].id], kept)
    assert [each.ids for each in left.todo] == [[fewer[1].id]] and not left.todo[0].ballast
    assert left.as_json() == [[fewer[1].id]]
    gone = StackPlan.of(fewer, ids(fewer), kept)
    assert not gone.todo and gone.as_json() == first.as_json(), "kept for when the rest comes back"

    for broken in ({}, {"stacks": 3}, {"stacks": [3]}, {"stacks": [[3]]}, {"stacks": [[], [[]]]},
                   {"stacks": first.as_json() * 2}):  # fmt: skip
        assert StackPlan.of(trials, (), broken) == first


# --- Parts and their pieces -----------------------------------------------------------------------


def pieces(batching: Batching, limits: list[int]) -> list[int]:
    """How three calls of one part are split, of which number i has no memory for more than
    limits[i] rows; refused pieces are left out."""
    done: list[int] = []

    def call(limit: int) -> None:
        def work(rows: torch.Tensor) -> None:
            if len(rows) > limit:
                raise torch.cuda.OutOfMemoryError
            done.append(len(rows))

        batching.over("steps", torch.arange(16), work)

    with batching.part("it"):
        for limit in limits:
            call(limit)
    return done


def test_a_part_is_split_again_as_it_was() -> None:
    batching = Batching(16)
    assert batching.parts() == {}
    first = pieces(batching, [16, 8, 3])
    assert first == [16, 8, 8, 2, 2, 2, 2, 2, 2, 2, 2]
    kept = json.loads(json.dumps(batching.plan() | {"parts": batching.parts()}))
    other = Batching()
    other.begin(Beginning(Sizes.every(16), parts=kept_parts(kept)))
    assert pieces(other, [16, 16, 16]) == first, "with all the memory it could want"
    assert other.halvings() == [] and other.sizes == Sizes.every(16)
    # With less of it than there was, it is split further, and that is known from then on.
    assert pieces(other, [4, 16, 16]) == [4] * 12
    assert pieces(other, [16, 16, 16]) == [4] * 12


def test_what_follows_a_part_begins_with_what_fitted_and_other_parts_as_they_did() -> None:
    batching, said = Batching(16), list[int]()
    batching.changed = lambda: said.append(1)
    with batching.part("before"):
        batching.over("steps", torch.arange(2), lambda rows: None)
    assert not said
    pieces(batching, [4, 4, 4])
    assert len(said) == 1
    with batching.part("after"):
        batching.over("steps", torch.arange(2), lambda rows: None)
    assert len(said) == 2, "it begins with another size than the run"
    begun = {name: part["begun_with"]["steps"] for name, part in batching.parts().items()}
    assert begun == {"before": 16, "it": 16, "after": 4}


# --- A finished run -------------------------------------------------------------------------------


def refuse(*arguments: object) -> None:
    raise AssertionError("nothing of this is needed to say that everything is there")


def test_of_a_finished_run_only_the_files_are_looked_at(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = (folder / "summary.json").read_bytes()
    names = ("summarize", "check_run", "load_lab", "execute")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(f"holdfast.run.{name}", refuse)
        patch.setattr(RunFolder, "examples", refuse)
        again = run(folder)
    assert (again.n_reused, again.n_run) == (4, 0)
    assert again.summary == json.loads(before) and again.summary["complete"]
    assert (folder / "summary.json").read_bytes() == before
    # What it was made from may not have changed.
    for change in ("holdfast.made_from.sha256_tree", "holdfast.made_from.version"):
        with monkeypatch.context() as patch:
            patch.setattr(change, lambda *arguments: "another")
            patch.setattr("holdfast.run.summarize", refuse)
            with pytest.raises(AssertionError, match="nothing of this"):
                run(folder)
    summary = json.loads(before)
    (folder / "summary.json").write_text(json.dumps(summary | {"complete": False}))
    assert run(folder).summary == summary
    (folder / "summary.json").write_text("{")
    assert run(folder).summary == summary
    file = next(folder.glob("trials/*/examples.parquet"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedRecordError, match=r"examples\.parquet"):
        run(folder)


IDLE = NARROWER.replace("'set_where_active', value = -5.0", "'multiply', value = -8.0").replace(
    "[grid]", "[grid]\n'intervention.value' = [-8.0, 1.0]"
)
"""A clamp that at one of its two points changes nothing, and leaves no prompt to search there."""


def test_a_point_without_a_prompt_is_kept_with_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a finished run needs no model to say it again; and a damaged one is found."""
    counted: list[tuple[int, int]] = []

    def watched() -> RunReport:
        watcher = Watcher(stored=lambda n, n_all, trial: counted.append((n, n_all)))
        return run_study(made(IDLE), tmp_path, Runtime(workers=1), watcher=watcher)

    first = watched()
    assert counted == [(n, 4) for n in range(5)], "each that ends brings the count on"
    assert (first.n_run, first.failures) == (2, ())
    assert len(first.skipped) == 2 and all("suppressed 0" in why for why in first.skipped)
    assert first.summary["complete"]
    with monkeypatch.context() as patch:
        for name in ("summarize", "check_run", "load_lab", "execute"):
            patch.setattr(f"holdfast.run.{name}", refuse)
        again = watched()
    assert counted[5:] == [(4, 4)]
    assert (again.n_run, again.n_reused, again.skipped) == (0, 2, first.skipped)
    assert again.summary == json.loads((tmp_path / "summary.json").read_text())
    store, read, complete = open_run(tmp_path)
    assert complete and {t.id for t in read.trials} == {t.id for t in made(IDLE).trials}
    page = write_report(store, read, tmp_path / "report.html").read_text()
    assert "2 of 4 finished trials had no valid prompt" in page and "is incomplete" not in page
    assert "only, encoder_null, intervention.value=1.0, wrong target" in page
    assert all(escape(why) in page for why in first.skipped)
    assert len(read_side(tmp_path).trials) == 2, "there is nothing to compare in the others"
    file = next(tmp_path.glob("trials/*/empty.json"))
    text = file.read_text()
    file.unlink()
    assert run(tmp_path, IDLE).skipped == first.skipped and file.read_text() == text
    for wrong in ("{", text.replace('"intervention"', '"another"'), "[]"):
        file.write_text(wrong)
        with pytest.raises(DamagedRecordError, match=r"empty\.json"):
            run(tmp_path, IDLE)


def test_a_page_is_drawn_again_when_it_is_not_of_the_summary(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    page, summary = folder / "report.html", run(folder).summary
    assert not page_made_with(summary, page)
    write_report(*open_run(folder)[:2], page)
    assert page_made_with(summary, page)
    assert not page_made_with(summary | {"made_from": "f" * 64}, page)
    assert not page_made_with({}, page), "an unfinished run says nothing of what it is made from"
    (folder / "picture.svg").unlink()
    assert not page_made_with(summary, page)


def test_a_record_is_checked_once_until_a_file_of_it_changes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    store, trial = RunFolder.read(folder), made().trials[0].id
    record = store.load(trial)
    with monkeypatch.context() as patch:
        patch.setattr("holdfast.store.sha256_file", refuse)
        assert store.load(trial) == record and store.load(trial) is not record
    file = folder / "trials" / trial / "perturbation.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedRecordError, match="sha256"):
        store.load(trial)
