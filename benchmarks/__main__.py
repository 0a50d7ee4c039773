"""`python -m benchmarks [name ...]`: run benchmarks; exit code 1 if a claim's bound is missed."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from benchmarks.docs import write_docs
from benchmarks.harness import (
    HERE,
    NAMES,
    BenchmarkError,
    Options,
    claim,
    console,
    progress,
    show,
    write,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="which ones; all if left out")
    parser.add_argument("--list", action="store_true", help="say what each checks, run none")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to see that it runs; writes no result"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="prompts of an audit")
    parser.add_argument(
        "--docs", action="store_true", help="write stored results into docs/benchmarks.md, run none"
    )
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    if given.limit is not None and given.limit < 1:
        parser.error(f"--limit takes 1 or more, got {given.limit}")
    return given


def main() -> int:
    given = arguments()
    if given.list:
        for name in NAMES:
            console.print(f"[bold]{name:<16}[/]{claim(name)}", soft_wrap=True)
        return 0
    if given.docs:
        console.print(f"wrote {write_docs().relative_to(HERE.parent)}")
        return 0
    missed = []
    for name in given.names or NAMES:
        progress.print(f"{name} …")
        try:
            result = import_module(f"benchmarks.{name}").run(Options(given.quick, given.limit))
        except BenchmarkError as error:
            missed.append(f"{name}: {error}")
            progress.print(f"{name}: {error}", style="bold red", markup=False)
            continue
        show(name, result)
        if not given.quick:
            write(name, result)
        missed += [f"{name}: {bound}" for bound in result.bounds if not bound.held]
    for line in missed:
        console.print(f"MISSED  {line}", style="bold red", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
