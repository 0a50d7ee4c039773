"""What the command line shows: progress and tables, with rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from holdfast.finding import Finding
    from holdfast.kinds import Description
    from holdfast.run import Watcher
    from holdfast.study import Plan
    from holdfast.trial import Trial

_STYLE = {"held": "green", "breached": "bold red", "forcible": "yellow", "undecided": "dim"}


def console() -> Console:
    # In a log there is no terminal to ask for its width; 80 columns would fold every table.
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=132)


@contextmanager
def progress(plan: Plan) -> Iterator[Watcher]:
    """A bar over the study's trials that names the one stored last."""
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
            name = (
                "loading" if trial is None else f"{trial.audit}: {trial.recovery.constraint.kind}"
            )
            if trial is not None and trial.control.kind != "none":
                name += f", {trial.control.kind}"
            bar.update(task, description=name, completed=n_stored)

        yield Watcher(stored)


def results_table(summary: dict[str, Any]) -> None:
    """One row an audit and constraint, the audit's own norms beside the wrong target's."""
    table = Table(title=f"{summary['study']}: does the clamp hold?", title_justify="left")
    for name in ("audit", "constraint", "verdict"):
        table.add_column(name)
    for name in (
        "valid / tried", "recovered", "smallest norm [95%]", "wrong target", "drift, max",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    rows = summary["trials"]
    norms = {(r["audit"], r["constraint"], r["order"], r["control"]): r for r in rows}
    previous = None
    for row in rows:
        if row["control"] != "none":
            continue
        if previous not in (None, row["audit"]):
            table.add_section()
        previous = row["audit"]
        wrong = norms.get((row["audit"], row["constraint"], row["order"], "wrong_target"))
        style = _STYLE[row["verdict"]]
        table.add_row(
            row["audit"],
            row["constraint"],
            f"[{style}]{row['verdict']}[/]",
            f"{row['n_valid']} / {row['n_tried']}",
            _share(row),
            _norm(row),
            _norm(wrong) if wrong else "",
            f"{row['preactivation_drift_max']:.1e}",
        )
    out = console()
    out.print(table)
    for row in rows:
        if row["control"] == "none":
            out.print(
                f"{row['audit']}, {row['constraint']}: {row['sentence']}", style="dim", markup=False
            )
    out.print(
        "smallest norm: median over prompts of the smallest perturbation that reaches the goal, "
        "relative to the residual it is added to, never reached counting as infinite; drift: how "
        "far a clamped feature's pre-activation moved, relative to encoder norm x residual norm.",
        style="dim",
    )


def _share(row: dict[str, Any]) -> str:
    if row["recovery_rate"] is None:
        return "-"
    low, high = row["ci_low"] or 0.0, 1.0 if row["ci_high"] is None else row["ci_high"]
    return f"{row['recovery_rate']:.0%} [{low:.0%}, {high:.0%}]"


def _norm(row: dict[str, Any]) -> str:
    if row["norm_relative_median"] is None:
        return "not reached"

    def bound(value: float | None) -> str:
        return "∞" if value is None else f"{value:.3f}"

    low, high = bound(row["norm_relative_low"]), bound(row["norm_relative_high"])
    return f"{row['norm_relative_median']:.3f} [{low}, {high}]"


def findings_table(findings: Sequence[Finding]) -> None:
    """What was expected, what was measured, what to do."""
    table = Table()
    for name in ("", "check", "expected", "measured", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.passed else "[bold red]no[/]"
        table.add_row(
            mark, finding.check, finding.expected, finding.measured,
            "" if finding.passed else finding.remedy,
        )  # fmt: skip
    console().print(table)


def kinds_table(descriptions: Sequence[Description]) -> None:
    table = Table()
    for name in ("family", "kind", "what it is", "fields"):
        table.add_column(name, overflow="fold")
    for d in descriptions:
        table.add_row(d.family, d.kind, d.summary, "\n".join(d.fields))
    console().print(table)


def note(lines: Sequence[str]) -> None:
    for line in lines:
        console().print(line, style="dim", markup=False, soft_wrap=True)


def say_where(path: Path) -> None:
    console().print(f"report: {path}", soft_wrap=True)
