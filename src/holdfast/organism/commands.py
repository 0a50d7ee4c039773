"""`holdfast organism`: train the shipped model organism anew, and check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The shipped model organism.", no_args_is_help=True)


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    seed: Annotated[int, typer.Option(help="seed of weights and corpus order")] = 0,
) -> None:
    """Train the organism, its ignorant twin, their SAEs and the known-answer pair anew."""
    from holdfast.organism.build import build

    build(out, seed)


@app.command()
def check(
    folder: Annotated[
        Path | None, typer.Argument(help="what `organism train` wrote; the shipped one if left out")
    ] = None,
) -> None:
    """Measure every behavior on held-out prompts and every SAE; fail below what is promised."""
    from holdfast.organism.check import check_organism
    from holdfast.tables.findings import findings_table
    from holdfast.terminal import working

    with working("measuring every behavior and every SAE"):
        findings = check_organism(folder)
    findings_table(findings)
    if any(finding.stops for finding in findings):
        raise typer.Exit(1)
