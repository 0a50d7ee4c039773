"""How a part of a run was split into pieces, kept so that it can be split the same way again.

A row's last digits depend on how many rows stand beside it. A part that is done again (its run was
killed, a record was removed) gives the same digits only in the same pieces, also where it had run
out of memory in its middle and the device has more of it now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

Rows = Mapping[str, int]
"""Most rows of a piece, by kind of work."""


@dataclass
class Split:
    """begun_with: rows at once when the part began; halved: (how many calls that split rows came
    before in this part, the row from which on) → rows at once from there."""

    begun_with: Rows
    halved: dict[tuple[int, int], Rows] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        halved = [[call, start, dict(rows)] for (call, start), rows in self.halved.items()]
        return {"begun_with": dict(self.begun_with), "halved": halved}

    @classmethod
    def of_json(cls, kept: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError where it is none."""
        halved = {(int(call), int(start)): _rows(rows) for call, start, rows in kept["halved"]}
        return cls(_rows(kept["begun_with"]), halved)


def _rows(kept: Mapping[str, Any]) -> Rows:
    found = {work: int(n) for work, n in kept.items()}
    if not found or min(found.values()) < 1:
        raise ValueError(f"expected a number of rows from 1 for each kind of work, got {kept!r}")
    return found


class Splitting:
    """A part at work: its sizes now, following what is known of it and noting what is new.

    halvings: by kind of work, those that were met now.
    """

    def __init__(self, split: Split):
        self.rows = dict(split.begun_with)
        self.halvings: Counter[str] = Counter()
        self.depth = 0
        self._split = split
        self._calls = 0

    def call(self) -> int:
        """The number of a call that splits rows, within this part."""
        self._calls += 1
        return self._calls - 1

    def size(self, work: str, call: int, start: int) -> int:
        """Rows at once for what begins at `start`."""
        if (call, start) in self._split.halved:
            self.rows = dict(self._split.halved[call, start])
        return self.rows[work]

    def mark(self) -> tuple[int, dict[str, int], Counter[str]]:
        """Where the part stands, for `halve`."""
        return self._calls, dict(self.rows), Counter(self.halvings)

    def halve(
        self, mark: tuple[int, dict[str, int], Counter[str]], work: str, n: int, call: int,
        start: int, afresh: bool,
    ) -> None:  # fmt: skip
        """A piece of n rows did not fit: go back to where it began, with half of them.

        mark: when it began; afresh: forget that calls within it were halved, which did not help
        them: it is this piece that holds too much.
        """
        self._calls = mark[0]
        if afresh:
            self.rows, self.halvings = mark[1], mark[2]
        if n // 2 < self.rows[work]:  # else a call within it went below that
            self.rows[work] = n // 2
            self.halvings[work] += 1
        # Calls within it are numbered anew. A new table: another thread may read the old one.
        before = {key: rows for key, rows in self._split.halved.items() if key[0] < self._calls}
        self._split.halved = before | {(call, start): dict(self.rows)}
