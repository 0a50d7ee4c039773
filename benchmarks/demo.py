"""`holdfast demo` audits the shipped organism within five minutes and 3 GB of memory, and refusal
in both directions under all of its constraints within two of them.

The whole command in a new folder, from start to report; then the same command again, which finds
every trial stored and only prints and writes the report anew.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from benchmarks.harness import BenchmarkError, Bound, Options, Result
from benchmarks.processes import Process, console_script, measured

SECONDS = 300.0
GIGABYTES = 3.0
REFUSAL = ("induced_refusal", "removed_refusal")
REFUSAL_SECONDS = 120.0
"""Of both audits with all constraints, controls and comparisons: the seconds that their trials
took, over the trials that ran side by side."""
WORKERS = min(os.cpu_count() or 1, 4)


def run(options: Options) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        first, again = _demo(out), _demo(out)
        summary = json.loads((out / "summary.json").read_text())
        stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        refusal = sum(
            _seconds(out, row["id"]) for row in summary["trials"] if row["audit"] in REFUSAL
        )
    peak = first.peak_bytes / 1e9
    return Result(
        columns=("run", "wall seconds", "CPU seconds", "peak memory (GB)"),
        rows=(
            ("new folder", first.seconds, first.cpu_seconds, peak),
            ("same folder again", again.seconds, again.cpu_seconds, again.peak_bytes / 1e9),
        ),
        bounds=(
            Bound("whole demo", first.seconds, SECONDS, False, "s"),
            Bound("peak resident memory", peak, GIGABYTES, False, "GB"),
            Bound("refusal in both directions", refusal / WORKERS, REFUSAL_SECONDS, False, "s"),
        ),
        settings={"trials": len(summary["trials"]), "stored_MB": stored / 1e6},
    )


def _demo(out: Path) -> Process:
    done = measured([console_script("holdfast"), "demo", "--out", str(out)])
    if done.code != 0:
        raise BenchmarkError(f"holdfast demo ended with {done.code}:\n{done.output[-3000:]}")
    return done


def _seconds(out: Path, trial: str) -> float:
    record = json.loads((out / "trials" / trial / "record.json").read_text())
    return float(record["run"]["seconds"])
