"""What of a recovery takes the clamp back: what that does alone, and what the rest does (METHODS
C.5).

The cosine and the share that `taken_back.py` reads are geometry. Here the vectors are added, in
every trial that searches: the part that could be the clamp undone by hand, in two readings, and the
vector without it. They run as lanes of one replay for their margins alone; the same in full passes,
with what they move and with text generated and judged, is in `paths.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.measure import Measurement, median, share
from holdfast.problem import Lanes
from holdfast.replays import ALONG, ROWS, of_undo, without
from holdfast.variants import Recovered

WHOLE = "whole"
"""The vector itself, as it was verified: what the others are to be set beside."""

ARMS: Mapping[str, str] = {
    "rows.alone": ROWS,
    "rows.rest": without(ROWS),
    "clamp.alone": ALONG,
    "clamp.rest": without(ALONG),
}
"""What is replayed → which vector it is."""

COLUMNS = tuple(f"undo.{name}" for name in ARMS)
"""Margins in logits, prompt by prompt."""

NOBODY = "no prompt was recovered"
STILL = "the clamp did not move the residual where the vector is"
LEADS = "margin of the answer that was searched for"
FORCED = "margin of the forced answer; no text was generated and judged"


@dataclass(frozen=True)
class Undone:
    """The recovered prompts of a trial, `rows` [n] of its own. margins: of `WHOLE` and `ARMS`,
    [n] float64 in logits; NaN where the clamp moved nothing that could be taken back. read: what a
    margin above 0 says."""

    rows: Tensor
    clusters: tuple[str, ...]
    margins: Mapping[str, Tensor]
    read: str

    @classmethod
    def of(cls, found: Recovered, rows: Tensor, verified: Tensor) -> Undone:
        """verified [n]: the margin of the vector itself, in a full pass."""
        batch = found.case.batch
        margins = {WHOLE: verified.double(), **_replayed(found)}
        return cls(rows, batch.clusters, margins, LEADS if batch.forced is None else FORCED)

    @property
    def record(self) -> dict[str, Any]:
        """Of how many prompts the figures are, and how the behavior was read."""
        return {"n": len(self.rows), "read": self.read, "reason": "" if len(self.rows) else NOBODY}

    @property
    def measurements(self) -> Sequence[Measurement]:
        """Of each, on how many of the recovered prompts the answer leads, and by how much."""
        made = []
        for name, values in self.margins.items():
            back = torch.where(values.isnan(), values, (values > 0).double())
            why = STILL if len(self.rows) else NOBODY
            made += [
                share(f"undo.{name}.rate", back, self.clusters, why),
                median(f"undo.{name}.margin", "logits", values, self.clusters, why),
            ]
        return made

    def columns(self, n: int) -> dict[str, Tensor]:
        """`COLUMNS` over all n audited prompts; NaN where nothing was recovered."""
        laid = {}
        for name in ARMS:
            values = self.margins[name]
            column = torch.full((n,), torch.nan, dtype=torch.float64, device=values.device)
            column[self.rows] = values
            laid[f"undo.{name}"] = column
        return laid


def _replayed(found: Recovered) -> dict[str, Tensor]:
    """`ARMS` → [n] float64: all of them as lanes of one problem, in pieces that fit."""
    n, problem = len(found), found.problem
    if not n:
        return {name: found.delta.new_zeros(0, dtype=torch.float64) for name in ARMS}
    vectors = {variant.name: variant.draws[0] for variant in of_undo(found)}
    every = torch.cat([vectors[name] for name in ARMS.values()])

    def margin(lanes: Tensor) -> Tensor:
        return Lanes.of(problem, lanes % n).margin(every[lanes])

    with torch.no_grad():
        over = found.case.subject.batching.over
        margins = torch.cat(over("steps", torch.arange(len(every), device=every.device), margin))
    made = dict(zip(ARMS, margins.double().split(n), strict=True))
    moved = _moved(found)
    nan = torch.full((n,), torch.nan, dtype=torch.float64, device=every.device)
    return {
        name: torch.where(moved, values, nan) if name.startswith("clamp.") else values
        for name, values in made.items()
    }


def _moved(found: Recovered) -> Tensor:
    """[n] bool: the clamp displaces the residual at a slot of the vector."""
    replay = found.problem.replay
    changed = [replay.unclamped[site] != replay.reference[site] for site in replay.sites]
    return torch.stack([each.flatten(1).any(1) for each in changed]).any(0)
