"""What several commands take: options that are fields of a study or of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[Path, typer.Argument(help="a run's folder")]
Of = Annotated[
    str | None, typer.Option("--of", help="an audit, or a trial's id; not needed if there is one")
]
Reveal = Annotated[bool, typer.Option("--reveal", help="show prompts and replies, here only")]
StudyArgument = Annotated[Path, typer.Argument(help="a study file (TOML)")]
Out = Annotated[Path | None, typer.Option("--out", help="the run's folder [runs/<study>]")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="path=value, the value as TOML; repeatable")
]
Limit = Annotated[int | None, typer.Option("--limit", help="audit at most this many prompts")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:0; auto spreads over all")]


def _rows(text: str) -> int:
    """How many rows `--batch-size` says, 0 for those found from memory."""
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"expected auto or a whole number from 1, got {text!r}")
    return int(text)


BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", parser=_rows, metavar="auto|N",
        help="most rows in one pass or step; auto finds it from memory",
    ),
]  # fmt: skip
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="trials side by side; 0 chooses by model and device")
]
DespiteFaults = Annotated[
    bool, typer.Option("--despite-faults", help="go on where preflight finds results to be wrong")
]
