"""Where trials run: on this machine, a few at a time where that is faster.

What is handed out are stacks: trials whose searches are rows of one batch (`stacked.py`).
Operations of a small model are too short to be shared between CPU threads, so such a study runs
several stacks side by side instead, each on one thread with subjects of its own (hooks are attached
to a subject, so two threads must never share one). The largest are begun first, or one of them
could keep a worker busy alone at the end. Numbers do not depend on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any

import torch

from holdfast.attacks import TrialResult
from holdfast.batching import MOST, Batching, Sizes
from holdfast.canonical import digest
from holdfast.capacity import peak_resident_bytes
from holdfast.errors import DeviceError, EmptyValidSetError
from holdfast.planning import Plan
from holdfast.stacked import Together
from holdfast.subject import Subject
from holdfast.trial import Lab, SubjectIdentity, Trial, run_trials, setting_key

SMALL = 20_000_000
"""Parameters below which a model counts as small. Two threads within an operation gained nothing
for the organism on two idle cores, and cost 18 times the seconds on busy ones (docs/log.md)."""

LISTEN_SECONDS = 1.0
"""How often is asked which trials of the stacks at work have ended."""


@dataclass(frozen=True)
class Runtime:
    """Where and how fast, never what.

    batch_size: most rows at once, 0 to find them from memory (`batching.py`). workers: stacks of
    trials side by side, 0 for as many as there are cores if all subjects are small and on the CPU,
    else one. command: what repeats the run, for the record, without folders of the machine
    (`command_line.py`).
    despite_faults: go on where preflight finds what makes results wrong.
    """

    device: str = "cpu"
    batch_size: int = 0
    workers: int = 0
    command: str = ""
    despite_faults: bool = False


@dataclass(frozen=True)
class Done:
    """A trial that ended. result: what it found, or that no prompt was left to search; seconds:
    what it took, of what was done for its stack at once its share; stack: whom it was run with,
    itself among them; unprepared: settings that it had to prepare first; peak_bytes: the most that
    its stack held until then on CUDA devices; on the CPU, where trials share their memory with all
    else, the most that the process has; begun_with: rows at once when its stack began; batch_plan:
    as `Batching.plan` has it, at its end, with the ids of its stack.
    """

    trial: Trial
    result: TrialResult | EmptyValidSetError
    started: str
    seconds: float
    threads: int
    stack: tuple[Trial, ...]
    unprepared: tuple[SubjectIdentity, ...] = ()
    peak_bytes: int = 0
    begun_with: Sizes = MOST
    batch_plan: Mapping[str, Any] = field(default_factory=dict)


def check_device(device: str) -> None:
    """Raise DeviceError unless `device` is the CPU, a CUDA device that is there, or `auto`."""
    if device == "auto":
        return
    try:
        named = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"{device!r} is no device; use cpu, cuda, cuda:0 or auto") from None
    if named.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r} is not supported; use cpu, cuda, cuda:0 or auto")
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {device!r} was asked for, and torch sees {torch.cuda.device_count()} CUDA "
            "devices here; use --device cpu, or install a CUDA build of torch"
        )


def load_lab(
    plan: Plan, trials: Sequence[Trial], runtime: Runtime, batching: Batching | None = None
) -> Lab:
    """Load the subjects that these trials need, each once. batching: what subjects loaded before
    have, to be shared with these."""
    if batching is None:
        batching = Batching(runtime.batch_size or MOST)
    needed = {}
    for trial in trials:
        for identity in (trial.subject, trial.twin):
            if identity is not None:
                needed[digest(identity.model_dump(mode="json"))] = identity
    return Lab(
        {key: Subject.load(plan.specs[key], runtime.device, batching) for key in needed}, batching
    )


def execute(plan: Plan, stacks: Sequence[Together], runtime: Runtime, lab: Lab) -> Iterator[Done]:
    """Run the stacks' trials and yield each as it ends. lab: their subjects, loaded.

    Any error but an empty valid set is raised here, after the trials at work have ended.
    """
    if not stacks:
        return
    n_workers = workers_for(stacks, runtime, lab)
    trials = [trial for stack in stacks for trial in stack.trials]
    if n_workers == 1:
        with threads_for(lab, runtime):
            for stack in stacks:
                yield from _run(stack, lab)
        return
    labs: SimpleQueue[Lab] = SimpleQueue()
    labs.put(lab)
    for _ in range(n_workers - 1):
        labs.put(load_lab(plan, trials, runtime, lab.batching))

    finished: SimpleQueue[Done] = SimpleQueue()

    def on_one_thread(stack: Together) -> None:
        torch.set_num_threads(1)  # of the calling thread's operations
        own = labs.get()
        try:
            for done in _run(stack, own):
                finished.put(done)
        finally:
            labs.put(own)

    error: BaseException | None = None
    largest_first = sorted(stacks, key=lambda stack: len(stack.trials), reverse=True)
    with ThreadPoolExecutor(n_workers) as pool:
        pending: set[Future[None]] = {pool.submit(on_one_thread, stack) for stack in largest_first}
        try:
            while pending:
                ended, pending = wait(pending, LISTEN_SECONDS, FIRST_COMPLETED)
                while not finished.empty():
                    yield finished.get()
                for future in ended:
                    if not future.cancelled():
                        error = error or future.exception()
                if error is not None:  # begin nothing more, and lose nothing that is at work
                    for future in pending:
                        future.cancel()
        finally:  # also where the caller stops listening: nobody would store the rest
            for future in pending:
                future.cancel()
    if error is not None:
        raise error


def workers_for(stacks: Sequence[Together], runtime: Runtime, lab: Lab) -> int:
    """How many stacks run side by side."""
    several = min(os.cpu_count() or 1, 4) if _is_small(lab, runtime) else 1
    return min(runtime.workers or several, len(stacks))


@contextmanager
def threads_for(lab: Lab, runtime: Runtime) -> Iterator[None]:
    """One thread for small subjects, also where nothing runs beside: so the last trial of a resumed
    run computes what it would have computed beside others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if _is_small(lab, runtime) else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_small(lab: Lab, runtime: Runtime) -> bool:
    """Whether every subject is small and on the CPU."""
    n_parameters = max(subject.model.num_parameters() for subject in lab.subjects.values())
    return runtime.device == "cpu" and n_parameters < SMALL


def _run(stack: Together, lab: Lab) -> Iterator[Done]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    unprepared: dict[str, tuple[SubjectIdentity, ...]] = {}
    seen: set[str] = set()
    for trial in stack.wanted:  # the first that needs a setting prepares it
        own = [each for each in (trial.subject, trial.twin) if each is not None]
        keys = {setting_key(trial, each): each for each in own if not lab.has_setting(trial, each)}
        unprepared[trial.id] = tuple(each for key, each in keys.items() if key not in seen)
        seen |= keys.keys()
    parameters = lab.subject(stack.trials[0].subject).model.parameters()
    # All that the model is spread over, and not the one that happens to be torch's present device.
    devices = {own.device for own in parameters if own.device.type == "cuda"}
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    begun_with = lab.batching.sizes
    for ended in run_trials(stack.trials, lab, stack.ballast):
        peak = (
            sum(map(torch.cuda.max_memory_allocated, devices)) if devices else peak_resident_bytes()
        )
        yield Done(
            ended.trial, ended.result, started, round(ended.seconds, 3), torch.get_num_threads(),
            stack.trials, unprepared[ended.trial.id], peak, begun_with,
            lab.batching.plan() | {"stack": stack.ids},
        )  # fmt: skip
