"""What the benchmarks share: what a result is, how it is timed, shown and stored."""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NAMES = (
    "search_quality", "replay", "refusal_step", "several_layers", "step_cost", "matmul_share",
    "sae_loading", "wide_sae", "preflight", "startup", "demo",
)  # fmt: skip
PACKAGES = ("holdfast", "torch", "transformers", "numpy", "scipy", "pydantic", "typer")

Cell = str | int | float | None

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
progress = Console(stderr=True, highlight=False, style="dim")


@dataclass(frozen=True)
class Options:
    """quick: small sizes, to see that it runs. limit: prompts of an audit, where that applies."""

    quick: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Bound:
    """A figure that the claim stands or falls with."""

    what: str
    value: float
    limit: float
    at_least: bool
    unit: str = ""

    @property
    def held(self) -> bool:
        """Whether the figure is on the right side of its limit; NaN never is."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        side = "at least" if self.at_least else "at most"
        return f"{self.what}: {shown(self.value)}{unit} (claimed: {side} {shown(self.limit)}{unit})"


@dataclass(frozen=True)
class Result:
    """What a benchmark measured: a table, the bounds of its claim, and under which settings."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    bounds: tuple[Bound, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        return all(bound.held for bound in self.bounds)


class BenchmarkError(Exception):
    """A benchmark could not measure what it is there for."""


def claim(name: str) -> str:
    """The claim of a benchmark: its docstring up to the first empty line. Imports nothing."""
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text()))
    assert docstring is not None, f"{name} has no docstring"
    return " ".join(docstring.split("\n\n")[0].split())


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the repeats."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        return f"{shown(min(self.seconds))} to {shown(max(self.seconds))}"


def timings(
    calls: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time several calls in turn, so that whatever slows the machine down slows them all."""
    for _ in range(warm_up):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def shown(value: Cell) -> str:
    """A table cell: three significant digits, and a dash where there is nothing to say."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def environment() -> dict[str, Any]:
    """Versions and kind of machine, without anything that names this one or its owner."""
    import torch

    from holdfast.capacity import machine_bytes

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_GB": round(machine_bytes() / 1e9),
        "torch_threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """What the processor calls itself; Linux says it in a file, where `platform` says nothing."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def show(name: str, result: Result) -> None:
    """Print the table, and each bound with its figure."""
    table = Table(title=name, title_justify="left", title_style="bold")
    for column, cell in zip(result.columns, result.rows[0], strict=True):
        table.add_column(column, justify="left" if isinstance(cell, str) else "right")
    for row in result.rows:
        table.add_row(*(shown(cell) for cell in row))
    console.print(claim(name), soft_wrap=True)
    console.print(table)
    for bound in result.bounds:
        mark, style = ("holds", "green") if bound.held else ("MISSED", "bold red")
        console.print(f"  {mark}  {bound}", style=style, soft_wrap=True)
    console.print()


def write(name: str, result: Result) -> Path:
    """Store a result as results/<name>.json; NaN becomes null."""
    RESULTS.mkdir(exist_ok=True)
    data = {
        "benchmark": name,
        "claim": claim(name),
        "held": result.held,
        "bounds": [asdict(bound) | {"held": bound.held} for bound in result.bounds],
        "columns": result.columns,
        "rows": result.rows,
        "settings": result.settings,
        "environment": environment(),
    }
    path = RESULTS / f"{name}.json"
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.6g}") if isinstance(value, float) else value
