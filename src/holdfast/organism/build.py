"""Train everything the package ships: organism, twin, their SAEs, and the known-answer pair."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from holdfast.errors import StudyError
from holdfast.organism.known import train_pair
from holdfast.organism.train import train_all


def build(out: Path, seed: int) -> None:
    """Write out/{organism,ignorant,bottleneck,second_route}.

    Raises StudyError if `out` exists and is not empty: nothing is overwritten.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out} exists and is not empty; name a folder that does not exist yet")
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns) as progress:
        train_all(out, seed, progress)
        train_pair(out / "organism", out, seed, progress=progress)
    Console().print(
        f"{out}: trained in {time.perf_counter() - started:.0f} s; "
        f"`holdfast organism check {out}` measures it",
        soft_wrap=True,
    )
