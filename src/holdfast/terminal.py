"""The terminal: how wide it is, progress, and notes. Tables are in `tables/`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from holdfast.finding import Finding, tally

if TYPE_CHECKING:
    from holdfast.planning import Plan
    from holdfast.run import Watcher
    from holdfast.trial import Trial

LEVEL = {"error": "bold red", "fault": "bold red", "caution": "yellow"}


def console(width: int = 132, stderr: bool = False) -> Console:
    """width: in a log, where there is no terminal to ask, and 80 columns would fold every table."""
    out = Console(highlight=False, stderr=stderr)
    return out if out.is_terminal else Console(highlight=False, stderr=stderr, width=width)


@contextmanager
def progress(plan: Plan, despite_faults: bool = False) -> Iterator[Watcher]:
    """What preflight found, then a bar over the study's trials that names the one stored last.

    Faults end a run with a message that says all of them; they are listed here where they do not.
    """
    from holdfast.run import Watcher

    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("loading", total=len(plan.trials))

        def stored(n_stored: int, n_all: int, trial: Trial | None) -> None:
            name = "loading" if trial is None else f"{trial.audit}: {trial.label}"
            if trial is not None and trial.control.kind != "none":
                name += f", {trial.control.kind}"
            bar.update(task, description=name, completed=n_stored)

        def checked(findings: Sequence[Finding], seconds: float) -> None:
            bar.console.print(f"preflight: {tally(findings)} in {seconds:.1f} s", style="dim")
            for finding in findings:
                if not finding.passed and (despite_faults or not finding.stops):
                    said = f"  {finding.level}: {finding.sentence}"
                    bar.console.print(
                        said, style=LEVEL[finding.level], markup=False, soft_wrap=True
                    )

        def noted(sentence: str) -> None:
            bar.console.print(f"batch size: {sentence}", style="dim", markup=False)

        yield Watcher(stored, checked, noted)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Something that takes a while and has no steps to count."""
    with console().status(what):
        yield


def note(lines: Sequence[str], stderr: bool = False) -> None:
    """stderr: beside an output that programs read."""
    for line in lines:
        console(stderr=stderr).print(line, style="dim", markup=False, soft_wrap=True)


def say_where(path: Path) -> None:
    console().print(f"report: {path}", soft_wrap=True)
