"""What a search can end with, row by row, and the best it has found so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Outcome = Literal["recovered", "not_recovered", "undecided", "infeasible", "diverged"]

SENTENCES: dict[Outcome, str] = {
    "recovered": "the behavior came back inside the constraint and the budget",
    "not_recovered": (
        "nothing found over 3 learning rates x 3 seeds, nor warm from the looser constraint where "
        "there is one, and twice the steps from where these came furthest changed nothing"
    ),
    "undecided": (
        "nothing found, but longer searches were still finding more when they stopped, or the "
        "search was one of fixed steps, which is not made again from elsewhere"
    ),
    "infeasible": "the held features leave no direction to search in",
    "diverged": "the search met NaN or infinite values",
}


@dataclass
class Best:
    """The best of every row so far; the one thing the stages of a search write to.

    delta [n q d_model]; margin [n], NaN before the first iterate; steps [n] of the attempt that
    decided; lane_steps [n]: how often a lane of the row was in a batch that was run.
    """

    delta: Tensor
    margin: Tensor
    steps: Tensor
    lane_steps: Tensor
    outcomes: list[Outcome]

    @classmethod
    def none(cls, shape: tuple[int, int, int], device: torch.device) -> Best:
        """Before any attempt: what is never searched is infeasible."""
        n = shape[0]
        count = torch.zeros(n, dtype=torch.long, device=device)
        margin = torch.full((n,), torch.nan, device=device)
        delta = torch.zeros(shape, device=device)
        return cls(delta, margin, count, count.clone(), ["infeasible"] * n)

    def keep(self, rows: Tensor, delta: Tensor, margin: Tensor) -> None:
        """Take new iterates of some rows where their margin is higher, or the first one."""
        better = ~(margin <= self.margin[rows])
        self.delta[rows[better]] = delta[better]
        self.margin[rows[better]] = margin[better]

    def count(self, rows: Tensor, passes: Tensor) -> None:
        """Lanes of these rows were run so often."""
        self.lane_steps.index_add_(0, rows, passes)

    def rows_with(self, outcome: Outcome) -> Tensor:
        rows = [row for row, name in enumerate(self.outcomes) if name == outcome]
        return torch.as_tensor(rows, dtype=torch.long, device=self.margin.device)


def summary_of(outcomes: tuple[Outcome, ...]) -> dict[str, Any]:
    """Counts of each outcome with its sentence, and the outcome of the whole trial.

    The whole is what was found for most rows that could be searched, except that a trial with any
    recovered row is `recovered`, and a trial with undecided rows and no recovered one `undecided`.
    """
    counts = {name: outcomes.count(name) for name in SENTENCES}
    order: tuple[Outcome, ...] = (
        "recovered", "undecided", "diverged", "not_recovered", "infeasible",
    )  # fmt: skip
    whole = next(name for name in order if counts[name])
    return {"outcome": whole, "sentence": SENTENCES[whole], "counts": counts}
