"""Reading a residual without keeping it: what is wanted of every token is worked out as passes go.

A capture holds what it read of all prompts at all tokens until somebody looks. Here each pass over
some rows leaves what is made of it, so that residuals are there for these rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.edits import EveryToken
from holdfast.sites import Site

T = TypeVar("T")


@dataclass
class Running(EveryToken, Generic[T]):
    """What is made of the residual at one site, pass after pass.

    state: what has been made so far; step(state, frame, x): what it is with the rows of the frame
    too, x [b s d_model] being theirs. It gives a new one and leaves the old as it was: a pass that
    runs out of memory is done again from there.
    """

    site: Site
    state: T
    step: Callable[[T, Frame, Tensor], T]

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.state = self.step(self.state, frame, x.detach())
        return x


def by_row(site: Site, made: Callable[[Frame, Tensor], Tensor]) -> Running[tuple[Tensor, ...]]:
    """A tensor [b ...] of the rows of every pass, in their order: `joined` is that of all rows."""
    return Running(site, (), lambda before, frame, x: (*before, made(frame, x)))


def joined(read: Running[tuple[Tensor, ...]], device: torch.device | str) -> Tensor:
    """[n ...] what `by_row` made of all rows."""
    return torch.cat(read.state).to(device)


@dataclass(frozen=True)
class Moments:
    """Of n vectors in float64: mean [d], and squares, Σ‖x − mean‖², or, if `whole`, scatter [d d],
    Σ (x − mean)(x − mean)ᵀ. Sets are joined by the rule of Chan, Golub and LeVeque (1983), which
    takes no difference of large numbers."""

    n: int
    mean: Tensor
    spread: Tensor
    whole: bool

    @classmethod
    def none(cls, whole: bool = False) -> Moments:
        zero = torch.zeros((), dtype=torch.float64)
        return cls(0, zero, zero, whole)

    def with_more(self, x: Tensor) -> Moments:
        """Of vectors x [m d] too."""
        m = len(x)
        if not m:
            return self
        x = x.double()
        mean = x.mean(0)
        spread = self._spread(x - mean)
        if not self.n:
            return Moments(m, mean, spread, self.whole)
        n, apart = self.n + m, mean - self.mean
        between = self._spread(apart[None]) * (self.n * m / n)
        return Moments(n, self.mean + apart * (m / n), self.spread + spread + between, self.whole)

    def _spread(self, x: Tensor) -> Tensor:
        return x.T @ x if self.whole else x.square().sum()
