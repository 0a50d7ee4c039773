"""`holdfast audit`: sheets for people to label, and what they said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.options import BatchSize, Device, Limit, Of, Reveal, RunArgument, Sets

app = typer.Typer(help="What people say of a run's replies.", no_args_is_help=True)


@app.command()
def sheet(
    folder: RunArgument,
    out: Annotated[Path, typer.Option("--out", help="the sheet, a CSV that is not there yet")],
    of: Of = None,
    seed: Annotated[int, typer.Option(help="seed of the draw and the order of rows")] = 0,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="at most so many replies a condition")
    ] = None,
    reveal: Reveal = False,
    set_: Sets = None,
    limit: Limit = None,
    device: Device = "cpu",
    batch_size: BatchSize = "auto",  # type: ignore[assignment]
) -> None:
    """Write a blinded sheet for people to label a run's replies on."""
    from holdfast.executor import Runtime
    from holdfast.manual_audit import make_sheet
    from holdfast.terminal import note, working

    runtime = Runtime(device, batch_size)
    with working("generating the replies again"):
        made = make_sheet(folder, out, of, seed, rows, reveal, set_ or (), limit, runtime)
    note(made.sentences())


@app.command()
def read(
    folder: RunArgument,
    sheet: Annotated[Path, typer.Argument(help="the sheet with labels")],
    second: Annotated[
        Path | None, typer.Argument(help="a copy that another annotator filled in")
    ] = None,
) -> None:
    """Read a labelled sheet: agreement, confusions, corrected rates; the report then has them."""
    from holdfast.manual_audit import read_labels
    from holdfast.tables.labels import labels_table

    labels_table(read_labels(folder, sheet, second))
