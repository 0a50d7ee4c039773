"""Figures that others have published, each with its source: one small JSON file a set.

They are of other models, prompts and searches than a run's; `compare` says so beside every one.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from holdfast.config import Config, nearest
from holdfast.errors import UnknownNameError
from holdfast.statistics import Interval, wilson

PREFIX = "published:"


class PublishedPoint(Config):
    """One figure.

    label: what its source calls it. where: its coordinates, a trial's dotted paths in this
    project's names, or those of `beside.COORDINATES`, or what no study says (`beside.UNSAID`).
    measure: what it is, by the name this project has for it where it has one. low, high: the
    published interval; k of n for a share. pooled: the figure is a mean over several of a run's
    trials, which count alike (`trials`) or by their valid prompts (`prompts`). note: what a reader
    must know before using it. reason: why no run of this tool has such a figure, for those that
    none can have.
    """

    label: str = Field(min_length=1)
    where: dict[str, Any] = Field(default_factory=dict)
    measure: str = Field(min_length=1)
    estimate: float
    low: float | None = None
    high: float | None = None
    k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=0)
    pooled: Literal["", "trials", "prompts"] = ""
    note: str = ""
    reason: str = ""

    @model_validator(mode="after")
    def _fits_together(self) -> PublishedPoint:
        if self.k is not None and self.n and abs(self.k / self.n - self.estimate) > 0.005:
            raise ValueError(f"{self.label}: {self.k} of {self.n} is not {self.estimate}")
        if self.k is not None and self.k > (self.n or 0):
            raise ValueError(f"{self.label}: {self.k} of {self.n}")
        low, high = self.low, self.high
        if low is not None and high is not None and not low <= self.estimate <= high:
            raise ValueError(f"{self.label}: {self.estimate} outside its own interval")
        return self

    @property
    def interval(self) -> Interval | None:
        """The published interval, else Wilson's of k of n, else None."""
        if self.low is not None and self.high is not None:
            n = self.n or 0
            return Interval(self.estimate, self.low, self.high, 0.95, "as published", n, n)
        return wilson(self.k, self.n) if self.k is not None and self.n else None


class Published(Config):
    """A set of figures from one source, about one subject and one kind of behavior."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    source: str = Field(min_length=1)
    subject: str = Field(min_length=1)
    behavior: str
    points: tuple[PublishedPoint, ...] = Field(min_length=1)


def published_names() -> list[str]:
    """The sets that are shipped, by name."""
    folder = files("holdfast") / "published"
    return sorted(
        entry.name.removesuffix(".json")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    )


def read_published(name: str) -> Published:
    """The set of that name, with or without `published:` in front.

    Raises UnknownNameError with the nearest names.
    """
    name = name.removeprefix(PREFIX)
    if name not in published_names():
        raise UnknownNameError(f"no published figures {name!r}: {nearest(name, published_names())}")
    text = (files("holdfast") / "published" / f"{name}.json").read_text()
    try:
        return Published.model_validate_json(text)
    except ValidationError as error:  # a shipped file: ours to get right
        raise AssertionError(f"published/{name}.json: {error}") from error
