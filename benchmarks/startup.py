"""`holdfast --help` answers within half a second.

Imports stay inside the commands, so that help or a wrong option never loads a model library. Every
call is a process of its own; after the warm-up its files are in the page cache.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.harness import BenchmarkError, Bound, Options, Result, timings
from benchmarks.processes import console_script

HELP = "holdfast --help"
HELP_SECONDS = 0.5


def run(options: Options) -> Result:
    commands = {
        "bare interpreter": [sys.executable, "-c", "pass"],
        "import holdfast": [sys.executable, "-c", "import holdfast"],
        HELP: [console_script("holdfast"), "--help"],
    }
    repeats = 3 if options.quick else 5
    calls = {name: partial(_start, command) for name, command in commands.items()}
    found = timings(calls, repeats)
    return Result(
        columns=("process", "median seconds", "range"),
        rows=tuple((name, timing.median, timing.spread) for name, timing in found.items()),
        bounds=(Bound(f"{HELP}, median", found[HELP].median, HELP_SECONDS, False, "s"),),
        settings={"repeats": repeats},
    )


def _start(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
