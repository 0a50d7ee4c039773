"""What preflight found: expected, measured, what to do."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from holdfast.finding import Finding, tally
from holdfast.terminal import LEVEL, console


def findings_table(findings: Sequence[Finding]) -> None:
    """What was expected, what was measured, what to do; under a heading for each place."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "check", "expected", "measured", "what to do"):
        table.add_column(name, overflow="fold")
    for where in dict.fromkeys(finding.where for finding in findings):
        if where:
            table.add_section()
            table.add_row("", f"[bold]{escape(where)}[/]")
        for finding in findings:
            if finding.where == where:
                style = LEVEL[finding.level]
                mark = "[green]ok[/]" if finding.passed else f"[{style}]{finding.level}[/]"
                remedy = "" if finding.passed else finding.remedy
                said = (finding.check, finding.expected, finding.measured, remedy)
                table.add_row(mark, *map(escape, said))
    console().print(table)
    console().print(tally(findings))
