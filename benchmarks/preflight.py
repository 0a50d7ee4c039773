"""Preflight of the whole bundled study takes at most 5 seconds on the organism.

Every audit and every ignorant twin, as before each run; subjects are loaded, models of this size
run on one thread. A run of one audit checks that one alone.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import BenchmarkError, Bound, Options, Result, timings
from holdfast.executor import Runtime, load_lab, threads_for
from holdfast.finding import Finding
from holdfast.planning import plan
from holdfast.preflight import preflight
from holdfast.study import bundled, parse

SECONDS = 5.0
WHOLE = "whole study"


def run(options: Options) -> Result:
    planned, runtime = plan(parse(bundled("demo"))), Runtime()
    lab = load_lab(planned, planned.trials, runtime)
    first = planned.trials[0].audit
    chosen = {
        WHOLE: planned.trials,
        f"one audit ({first}), its controls": [t for t in planned.trials if t.audit == first],
        f"one audit ({first}) alone": planned.trials[:1],
    }
    repeats = 2 if options.quick else 5
    calls = {name: partial(preflight, planned, lab, trials) for name, trials in chosen.items()}
    with threads_for(lab, runtime):
        found = timings(calls, repeats)
        findings = {name: _distinct(call()) for name, call in calls.items()}
    failed = [finding.sentence for finding in findings[WHOLE] if not finding.passed]
    if failed:
        raise BenchmarkError("a false alarm:\n" + "\n".join(failed))
    return Result(
        columns=("checked", "trials", "checks", "median seconds", "range"),
        rows=tuple(
            (name, len(chosen[name]), len(findings[name]), timing.median, timing.spread)
            for name, timing in found.items()
        ),
        bounds=(Bound(f"{WHOLE}, median", found[WHOLE].median, SECONDS, False, "s"),),
        settings={"repeats": repeats},
    )


def _distinct(made: dict[str, list[Finding]]) -> set[Finding]:
    return {finding for found in made.values() for finding in found}
