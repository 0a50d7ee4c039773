"""Run a study: trials one after the other, each stored whole before the next begins.

What is here changes speed and place, never numbers. A run that was killed goes on with the trials
that are not stored yet.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from holdfast.canonical import SCHEMA, digest
from holdfast.errors import DeviceError, EmptyValidSetError, StudyError
from holdfast.store import RunFolder
from holdfast.study import Plan, Study
from holdfast.subject import Subject
from holdfast.summary import summarize
from holdfast.trial import Lab, Trial, run_trial

SMALL = 20_000_000
"""Parameters below which one CPU thread is used: operations are too short to be shared, and where
anything else runs on the machine, waiting for a second thread costs far more than it gives (18
times the seconds, measured on two busy cores; docs/log.md)."""

PACKAGES = ("holdfast", "torch", "transformers", "safetensors", "numpy", "scipy", "pydantic")


@dataclass(frozen=True)
class Runtime:
    """Where and how fast, never what. command: what repeats the run, for the record."""

    device: str = "cpu"
    batch_size: int = 512
    command: str = ""


@dataclass
class Watcher:
    """Told about progress; the default says nothing."""

    started: Callable[[Trial, int, int], None] = lambda trial, i, n: None
    finished: Callable[[Trial, bool], None] = lambda trial, reused: None


@dataclass(frozen=True)
class RunReport:
    """How a run ended. failures: audits whose valid set was empty, one message each."""

    folder: Path
    summary: dict[str, Any]
    n_run: int
    n_reused: int
    failures: tuple[str, ...] = field(default=())


def run_study(
    plan: Plan,
    out: Path,
    runtime: Runtime = Runtime(),
    text: str | None = None,
    watcher: Watcher | None = None,
) -> RunReport:
    """Run or continue a study in the folder `out`.

    An audit without a valid prompt is reported at the end and keeps nothing else from running;
    any other mistake stops the run, with everything finished so far stored.
    """
    watcher = watcher or Watcher()
    _check_device(runtime.device)
    with RunFolder.open(out, plan.study.canonical(), text) as store:
        n_run, failures, empty = 0, [], set()
        lab: Lab | None = None
        done: list[Trial] = []
        todo = [trial for trial in plan.trials if not store.has(trial.id)]
        for index, trial in enumerate(plan.trials):
            watcher.started(trial, index, len(plan.trials))
            reused = trial not in todo
            if not reused:
                lab = lab or load_lab(plan, todo, runtime)
                try:
                    _run_one(trial, lab, store, runtime)
                except EmptyValidSetError as error:
                    if trial.control.kind == "none" or trial.audit not in empty:
                        failures.append(str(error))
                    empty.add(trial.audit)
                    continue
                n_run += 1
            done.append(trial)
            store.write_summary(summarize(plan, store, done, complete=False))
            watcher.finished(trial, reused)
        summary = summarize(plan, store, done, complete=len(done) == len(plan.trials))
        store.write_summary(summary)
    return RunReport(Path(out), summary, n_run, len(done) - n_run, tuple(failures))


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise DeviceError(f"{device!r} is no device; use cpu, cuda or cuda:0") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {device!r} was asked for, and torch sees no CUDA device here; use --device "
            "cpu, or install a CUDA build of torch"
        )


def load_lab(plan: Plan, trials: Sequence[Trial], runtime: Runtime) -> Lab:
    """Load the subjects that these trials need, each once."""
    needed = {}
    for trial in trials:
        for identity in (trial.subject, trial.twin):
            if identity is not None:
                needed[digest(identity.model_dump(mode="json"))] = identity
    subjects = {
        key: Subject.load(plan.specs[key], runtime.device, runtime.batch_size) for key in needed
    }
    n_parameters = max(subject.model.num_parameters() for subject in subjects.values())
    if runtime.device == "cpu" and n_parameters < SMALL:
        torch.set_num_threads(1)
    return Lab(subjects)


def _run_one(trial: Trial, lab: Lab, store: RunFolder, runtime: Runtime) -> None:
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    found = run_trial(trial, lab)
    record = {
        "schema": SCHEMA,
        "id": trial.id,
        "trial": trial.canonical(),
        "result": found.result,
        "run": {
            "started": started,
            "seconds": round(time.perf_counter() - clock, 3),
            "device": runtime.device,
            "threads": torch.get_num_threads(),
            "batch_plan": {"batch_size": runtime.batch_size},
            "versions": {name: version(name) for name in PACKAGES} | {
                "python": platform.python_version()
            },
            "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "weights_sha256": trial.subject.weights_sha256,
            "command": runtime.command,
        },
    }  # fmt: skip
    store.write(record, found.tensors, found.examples)


def default_folder(plan: Plan, base: Path = Path("runs")) -> Path:
    """runs/<name>, unless that holds another study's run: then runs/<name>-<hash>.

    So a changed bundled study never trips over an old folder.
    """
    folder = base / plan.study.name
    if not (folder / "study.json").is_file():
        return folder
    if RunFolder.read(folder).study_hash == plan.hash:
        return folder
    return base / f"{plan.study.name}-{plan.hash[:8]}"


def open_run(folder: Path) -> tuple[RunFolder, Plan, bool]:
    """A run for reading: its folder, the trials it holds, and whether it is complete.

    Trials come from their records, in the order of the summary, so that a run can be read after
    the subjects it was made with have moved or changed. Raises StoreError where there is no run.
    """
    store = RunFolder.read(folder)
    try:
        study = Study.model_validate(store.study)
        trials = [Trial.model_validate(record["trial"]) for record in store.records()]
    except ValueError as error:
        raise StudyError(f"{folder}: written by another version of holdfast: {error}") from None
    summary = store.summary() or {"complete": False, "trials": []}
    order = {row["id"]: index for index, row in enumerate(summary["trials"])}
    trials.sort(key=lambda trial: (order.get(trial.id, len(order)), trial.id))
    return store, Plan(study, tuple(trials), {}), bool(summary["complete"])
