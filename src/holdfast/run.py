"""Run a study: each trial stored whole as it ends, the summary after it.

What is here changes speed and place, never numbers. A run that was killed goes on with the trials
that are not stored yet.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast.batching import explained
from holdfast.canonical import SCHEMA
from holdfast.errors import EmptyValidSetError, StudyError
from holdfast.executor import (
    Done,
    Runtime,
    check_device,
    execute,
    load_lab,
    threads_for,
    workers_for,
)
from holdfast.finding import Finding
from holdfast.forecast.outlook import Outlook
from holdfast.forecast.sizing import beginning
from holdfast.made_from import KEY, made_from, summary_made_from
from holdfast.manifest import check_rows, check_run
from holdfast.planning import Plan
from holdfast.preflight import preflight, require
from holdfast.stacked import StackPlan, stacked
from holdfast.store import RunFolder
from holdfast.study import Study
from holdfast.summary import LISTS, summarize
from holdfast.trial import Lab, Trial

__all__ = ["RunReport", "Runtime", "Watcher", "default_folder", "open_run", "run_study"]

PACKAGES = ("holdfast", "torch", "transformers", "safetensors", "numpy", "scipy", "pydantic")


@dataclass
class Watcher:
    """Told what preflight found, how many trials are stored and which one was last, and what there
    is to say of how many rows go at once; the default says nothing."""

    stored: Callable[[int, int, Trial | None], None] = lambda n_stored, n_all, trial: None
    checked: Callable[[Sequence[Finding], float], None] = lambda findings, seconds: None
    sized: Callable[[str], None] = lambda sentence: None


@dataclass(frozen=True)
class RunReport:
    """How a run ended. failures: audits whose valid set was empty at every point, one message each;
    skipped: single points, and controls, that had no prompt to search, likewise."""

    folder: Path
    summary: dict[str, Any]
    n_run: int
    n_reused: int
    failures: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def run_study(
    plan: Plan,
    out: Path,
    runtime: Runtime | None = None,
    text: str | None = None,
    watcher: Watcher | None = None,
) -> RunReport:
    """Run or continue a study in the folder `out`.

    An audit without a valid prompt at any point is reported at the end and keeps nothing else from
    running; any other mistake stops the run, with everything finished so far stored.
    """
    runtime, watcher = runtime or Runtime(), watcher or Watcher()
    check_device(runtime.device)
    with RunFolder.open(out, plan.study.canonical(), text) as store, explained():
        done = {trial.id for trial in plan.trials if store.has(trial.id)}
        for trial_id in done:  # a damaged record is found before anything is searched
            store.load(trial_id)
        n_reused = len(done)
        ids = [trial.id for trial in plan.trials]
        empty = {each: error for each in ids if (error := store.empty(each)) is not None}
        todo = [trial for trial in plan.trials if trial.id not in {*done, *empty}]
        if not todo and (kept := summary_made_from(store, made_from(store, ids))):
            watcher.stored(len(ids), len(ids), None)
            return RunReport(Path(out), kept, 0, n_reused, *_unsearched(plan, empty))

        def summary() -> dict[str, Any]:
            return summarize(plan, store, len(done) + len(empty) == len(plan.trials))

        so_far = Sparingly(lambda: store.write_summary(summary()))
        if done:  # of these points, should the run be cut short before its first new trial
            so_far.now()
        watcher.stored(len(done) + len(empty), len(plan.trials), None)
        lab = load_lab(plan, todo, runtime)
        outlook = Outlook.before(lab, runtime, todo)
        earlier = store.batch_plan()
        stacks = StackPlan.of(plan.trials, {*done, *empty}, earlier)

        def keep_batches() -> None:
            kept = {"stacks": stacks.as_json(), "parts": lab.batching.parts()}
            store.write_batch_plan(lab.batching.plan() | kept)

        if todo:
            n_workers = workers_for(stacks.todo, runtime, lab)
            first = beginning(
                outlook.memories([stack.trials for stack in stacks.todo]),
                runtime,
                n_workers,
                earlier,
                outlook.memories(stacked(stacks.new)),
            )
            lab.batching.begin(first)
            lab.batching.changed = keep_batches
            if first.note:
                watcher.sized(first.note)
        findings = _checked(plan, todo, lab, runtime, watcher)
        if todo:  # before anything of a stack is stored, so that the rest is searched beside it
            keep_batches()
        try:
            for ended in execute(plan, stacks.todo, runtime, lab):
                if isinstance(ended.result, EmptyValidSetError):
                    empty[ended.trial.id] = ended.result
                    store.write_empty(ended.trial, ended.result)
                else:
                    _write(ended, store, runtime, findings[ended.trial.id], outlook)
                    done.add(ended.trial.id)
                    so_far.perhaps()
                watcher.stored(len(done) + len(empty), len(plan.trials), ended.trial)
        except BaseException:
            so_far.now()
            raise
        finally:
            if todo:  # also where the run ends early: what goes on there begins with what fits
                keep_batches()
                for sentence in lab.batching.halvings():
                    watcher.sized(sentence)
        check_run(store, [trial for trial in plan.trials if trial.id in done])
        final = summary()
        if final["complete"]:  # and whole: this stands for all that was checked above
            final[KEY] = made_from(store, ids)
        store.write_summary(final)
    n_run = len(done) - n_reused
    return RunReport(Path(out), final, n_run, n_reused, *_unsearched(plan, empty))


class Sparingly:
    """Does something again and again, but spends at most a tenth of the time on it: a summary reads
    every record anew, and is only there for who looks at a run that goes on, or was killed."""

    def __init__(self, do: Callable[[], None]):
        self._do = do
        self._next = 0.0

    def now(self) -> None:
        began = time.perf_counter()
        self._do()
        ended = time.perf_counter()
        self._next = ended + 10 * (ended - began)

    def perhaps(self) -> None:
        if time.perf_counter() >= self._next:
            self.now()


def _checked(
    plan: Plan, todo: Sequence[Trial], lab: Lab, runtime: Runtime, watcher: Watcher
) -> dict[str, list[Finding]]:
    """What preflight finds, by trial id. Raises PreflightError on an error, and on a fault unless
    told not to."""
    if not todo:
        return {}
    clock = time.perf_counter()
    with threads_for(lab, runtime):
        findings = preflight(plan, lab, todo)
    every = list(dict.fromkeys(finding for made in findings.values() for finding in made))
    watcher.checked(every, time.perf_counter() - clock)
    require(every, runtime.despite_faults)
    return findings


def _unsearched(
    plan: Plan, empty: dict[str, EmptyValidSetError]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `RunReport` has of trials that had no prompt to search: failures, and skipped ones."""
    failures = _failures(plan, empty)
    failed = {trial.audit for trial in plan.trials if trial.id in failures}
    skipped = [
        str(empty[trial.id])
        for trial in plan.trials
        if trial.id in empty and trial.audit not in failed
    ]
    return tuple(dict.fromkeys(map(str, failures.values()))), tuple(skipped)


def _failures(plan: Plan, empty: dict[str, EmptyValidSetError]) -> dict[str, EmptyValidSetError]:
    """The audits themselves, not what is beside them, that had no prompt to search at any point.

    That one point of a sweep leaves nothing to search is what a sweep is to find out.
    """
    mains = [trial for trial in plan.trials if trial.is_audit]
    begun = {trial.audit for trial in mains if trial.id not in empty}
    failed = {trial.id for trial in mains if trial.audit not in begun}
    return {key: error for key, error in empty.items() if key in failed}


def _write(
    done: Done,
    store: RunFolder,
    runtime: Runtime,
    findings: Sequence[Finding],
    outlook: Outlook,
) -> None:
    assert not isinstance(done.result, EmptyValidSetError)
    trial, found = done.trial, done.result
    if trial.searches:
        check_rows(f"{trial.audit} ({trial.id})", found.result, found.examples)
    record = {
        "schema": SCHEMA,
        "id": trial.id,
        "trial": trial.canonical(),
        "result": found.result,
        "run": {
            "started": done.started,
            "seconds": done.seconds,
            "peak_memory_bytes": done.peak_bytes,
            "peak_memory_of": "the devices" if runtime.device != "cpu" else "the process so far",
            "forecast": outlook.of(done),
            "device": runtime.device,
            "threads": done.threads,
            "batch_plan": done.batch_plan,
            "versions": {name: version(name) for name in PACKAGES} | {
                "python": platform.python_version()
            },
            "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "weights_sha256": trial.subject.weights_sha256,
            "command": runtime.command,
            "preflight": [finding.model_dump(mode="json") for finding in findings],
        },
    }  # fmt: skip
    store.write(record, found.tensors, found.examples)


def default_folder(plan: Plan, base: Path = Path("runs")) -> Path:
    """runs/<name>, unless that holds another study's run: then runs/<name>-<hash>.

    So a changed bundled study never trips over an old folder. A study that differs in its points
    alone is the same one with more, or fewer, of them, and goes on where it was.
    """
    folder = base / plan.study.name
    if not (folder / "study.json").is_file():
        return folder
    if RunFolder.read(folder).takes(plan.study.canonical()):
        return folder
    return base / f"{plan.study.name}-{plan.hash[:8]}"


def open_run(folder: Path) -> tuple[RunFolder, Plan, bool]:
    """A run for reading: its folder, the trials it holds, and whether it is complete.

    Trials come from what is stored of them, in the order of the summary, so that a run can be read
    after the subjects it was made with have moved or changed; those that had no prompt are last.
    Raises StoreError where there is no run, ManifestError where its tables contradict each other.
    """
    store = RunFolder.read(folder)
    try:
        study = Study.model_validate(store.study)
        stored = [*store.records(), *store.empties()]
        trials = [Trial.model_validate(each["trial"]) for each in stored]
    except ValueError as error:
        raise StudyError(f"{folder}: written by another version of holdfast: {error}") from None
    summary = store.summary() or {"complete": False, "trials": []}
    rows = [row for listed in LISTS for row in summary.get(listed, [])]
    order = {row["id"]: index for index, row in enumerate(rows)}
    # Records of subjects that have changed since may lie beside them; the summary names the run's.
    trials = sorted((t for t in trials if t.id in order), key=lambda trial: order[trial.id])
    points = {row["id"]: row["point"] for row in rows}
    check_run(store, [trial for trial in trials if store.has(trial.id)])
    return store, Plan(study, tuple(trials), {}, points), bool(summary["complete"])
