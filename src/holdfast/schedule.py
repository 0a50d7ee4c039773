"""A search of fixed stages, as published ones are: so many steps of Adam, whatever they find."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.config import Config
from holdfast.objectives import Objective


class Stage(Config):
    """Some steps of a search.

    steps; lr: Adam's own rate, in residual units a coordinate and step; at: which of the perturbed
    positions are searched, those of the prompt or of the answer, while the others stay as stages
    before have left them; objective: what is climbed, the search's own where none is named. The
    budget is that of the positions a stage searches.
    """

    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    at: Literal["all", "prompt", "answer"] = "all"
    objective: Objective | None = None


class Checkpoint(Config):
    """Which iterate of a stage is kept (METHODS D.7): of the first, the last and every `every`-th,
    the one with the highest objective among those whose relative drift is at most `drift`; if there
    is none, the one with the highest objective − weight · relative drift.

    Drift is ‖Δz_S‖ / ‖z_S‖ over everything monitored, which here takes in the last prompt token.
    """

    every: int = Field(10, ge=1)
    drift: float = Field(0.03, gt=0)
    weight: float = Field(80.0, ge=0)


class Schedule(Config):
    """What a published search does (METHODS C.2, D.4): stages one after the other, each with an
    Adam of its own. No step is left out when a goal is reached, no smallest norm is looked for, and
    a failure is not searched again: outcomes are `recovered` or `undecided`.

    checkpoint: which iterate a stage leaves, its last one if None.
    """

    stages: tuple[Stage, ...] = Field(min_length=1)
    checkpoint: Checkpoint | None = None

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)
