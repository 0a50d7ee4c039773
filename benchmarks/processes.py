"""Run a command from a process of its own, so that its memory can be told apart from ours.

What a child is charged as peak memory includes its parent's pages at the moment it is started. So
this file is also a script that imports almost nothing: it starts the command, waits, and prints
wall seconds and the peak of `RUSAGE_CHILDREN`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """How a command ran, with its children.

    seconds of wall time; cpu_seconds: user and system; peak_bytes: the largest resident size of any
    one process.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int
    output: str


def measured(command: Sequence[str]) -> Process:
    """Run a command to its end; stdout and stderr together."""
    done = subprocess.run(
        [sys.executable, "-S", __file__, *command], capture_output=True, text=True, check=True
    )
    return Process(**json.loads(done.stdout))


def console_script(name: str) -> str:
    """The command that an installed package put beside this interpreter."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def _main(command: Sequence[str]) -> None:
    import resource

    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss
    figures = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak if sys.platform == "darwin" else peak * 1024,  # Linux counts in KiB
        "code": done.returncode,
        "output": done.stdout,
    }
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1:])
