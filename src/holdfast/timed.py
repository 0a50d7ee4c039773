"""What a constraint costs beside the passes that all rows of a batch share: its own seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from holdfast.recorded import Hold
from holdfast.subspace import Charted, FeasibleSet, Iterate


@dataclass(eq=False)
class Stopwatch:
    """Seconds that the host spent: on a device that is not waited for, in giving it its work.

    outer: a clock that stands still while this one runs.
    """

    outer: Stopwatch | None = None
    seconds: float = 0.0
    _runs: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        begin, self._runs = time.perf_counter(), True
        try:
            yield
        finally:
            took, self._runs = time.perf_counter() - begin, False
            self.seconds += took
            if self.outer is not None and self.outer._runs:
                self.outer.seconds -= took


@dataclass(frozen=True)
class TimedSet:
    """A feasible set, with a clock for everything that is asked of it and of its rows."""

    feasible: FeasibleSet
    clock: Stopwatch

    @property
    def dimension(self) -> Tensor:
        return self.feasible.dimension

    def rows(self, rows: Tensor) -> TimedSet:
        with self.clock.running():
            return TimedSet(self.feasible.rows(rows), self.clock)

    def asking(self, delta: Tensor) -> TimedSet:
        if not isinstance(self.feasible, Charted):
            return self
        with self.clock.running():
            return TimedSet(self.feasible.asking(delta), self.clock)

    def around(self, at: Iterate) -> TimedSet:
        if not isinstance(self.feasible, Charted):
            return self
        with self.clock.running():
            return TimedSet(self.feasible.around(at), self.clock)

    def tangent(self, gradient: Tensor, at: Iterate) -> Tensor:
        with self.clock.running():
            return self.feasible.tangent(gradient, at)

    def retract(self, delta: Tensor) -> Tensor:
        with self.clock.running():
            return self.feasible.retract(delta)

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        with self.clock.running():
            return self.feasible.inside(delta, radius, last)


@dataclass(frozen=True)
class TimedHold:
    """What a constraint does to a residual in the forward pass, with a clock."""

    hold: Hold
    clock: Stopwatch

    def rows(self, rows: Tensor) -> TimedHold:
        return TimedHold(self.hold.rows(rows), self.clock)

    def __call__(self, x: Tensor) -> Tensor:
        with self.clock.running():
            return self.hold(x)


def shares(clocks: Sequence[Sequence[Stopwatch]], lanes: Sequence[int]) -> list[float]:
    """Seconds of each of several searches, given its clocks and how many lanes were run for it: of
    a clock that several of them have each has its part by the lanes."""
    run: dict[Stopwatch, int] = {}
    for own, n in zip(clocks, lanes, strict=True):
        for clock in own:
            run[clock] = run.get(clock, 0) + n
    return [
        sum(clock.seconds * n / run[clock] for clock in own if run[clock])
        for own, n in zip(clocks, lanes, strict=True)
    ]
