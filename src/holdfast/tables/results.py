"""A run's results: a row an audit and grid point, and why each verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from holdfast.grid import describe
from holdfast.summary import headline
from holdfast.tables.beside import answers_table, attempts_table, suffixes_table
from holdfast.terminal import console
from holdfast.wording import cost, percent_range, power

_STYLE = {"held": "green", "breached": "bold red", "forcible": "yellow", "undecided": "dim"}


def results_table(summary: dict[str, Any]) -> None:
    """One row an audit and grid point, the right answer's norm beside the wrong target's."""
    out = console()
    wide = out.width >= 120  # room for intervals
    table = Table(
        title=f"{summary['study']}: does the clamp hold?", title_justify="left", box=SIMPLE_HEAD
    )
    for name in ("audit", "constraint", "verdict"):
        # A point of a grid can have a long name: it is what gives way.
        table.add_column(name, no_wrap=name != "constraint", overflow="fold")
    for name in ("recovered", "right answer", "wrong target", "drift, max"):
        table.add_column(name, justify="right", no_wrap=wide)
    rows = summary["trials"]
    by_point = {(r["audit"], _at(r), r["control"]): r for r in rows}
    previous = ""
    for row in rows:
        if row["control"] != "none":
            continue
        if previous not in ("", row["audit"]):
            table.add_section()
        wrong = by_point.get((row["audit"], _at(row), "wrong_target"))
        style = _STYLE[row["verdict"]]
        table.add_row(
            row["audit"] if row["audit"] != previous else "",
            _at(row),
            f"[{style}]{row['verdict']}[/]",
            _recovered(row, wide),
            _cost(row, wide),
            _cost(wrong, wide) if wrong else "not tried",
            power(row["preactivation_drift_max"]),
        )
        previous = row["audit"]
    out.print(table)
    attempts_table(summary, out)
    answers_table(summary, out)
    suffixes_table(summary, out)
    for audit, own in groupby(headline(rows), key=itemgetter("audit")):
        said = list(own)
        out.print(_verdict_line(audit, said), markup=False)
        for row in said:
            if row["judges"]:
                out.print(f"  by judge: {_by_judge(row['judges'])}", markup=False)
    out.print(
        "\nright answer, wrong target: median smallest norm that reaches the goal, relative to the "
        "residual; not by half: half of the prompts or more were never reached inside the budget, "
        "and a goal never reached counts as infinite. drift: how far a clamped feature's "
        "pre-activation moved, relative to encoder norm × residual norm; 10⁻⁸ is rounding.",
        style="dim",
    )


def _by_judge(judges: dict[str, Any]) -> str:
    """Recovered under each judge, of the prompts that are valid by it too."""
    said = []
    for name, found in judges.items():
        rate, n = found["recovery_rate"], found["n"]
        share = "none valid" if rate is None else f"{round(rate * n)}/{n}"
        said.append(f"{name.replace('_', ' ')} {share}")
    return ", ".join(said)


def _verdict_line(audit: str, rows: Sequence[dict[str, Any]]) -> str:
    """The verdict and why; of a sweep, how many points came to which."""
    if len(rows) == 1:
        return f"{audit}: {rows[0]['verdict']}. {rows[0]['sentence'].capitalize()}."
    counts = Counter(row["verdict"] for row in rows)
    found = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    return f"{audit}: {len(rows)} points under {rows[0]['constraint']}: {found}. Curves: report."


def _at(row: dict[str, Any]) -> str:
    """The row's constraint, with its other coordinates on the grid."""
    return ", ".join([row["constraint"], *describe(row["point"])])


def _recovered(row: dict[str, Any], wide: bool) -> str:
    count = f"{row['n_recovered']}/{row['n_valid']}"
    return f"{count} {percent_range(row['ci_low'], row['ci_high'])}".strip() if wide else count


def _cost(row: dict[str, Any], wide: bool) -> str:
    """Without the interval where there is no room."""
    return cost(row) if wide else cost(row | {"norm_relative_low": None})
