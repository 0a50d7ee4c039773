"""What the corrections of one way back say of J, which was made elsewhere (Broyden's first method).

A step s was to take Φ to 0 and left Φ(x + s). J made anew along s alone, and as it was across s, is
the nearest that would have foretold it; so the next step is a better one at no further pass. With
G the inverse, `Gᵢ₊₁Φ` follows from `G₀Φ` and the steps themselves (Kelley, Iterative Methods for
Linear and Nonlinear Equations, 7.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from holdfast.problem import TINY

MOST = 0.5
"""Largest share of a step that may repeat the one before: the next is at most twice as long as the
frame alone has it."""


LATEST = 20
"""Most steps that are kept: a lane that takes more without beginning anew is given up."""


@dataclass(frozen=True)
class Learned:
    """steps: those taken so far [n q d], zeros in lanes that have begun anew."""

    steps: tuple[Tensor, ...] = ()

    def rows(self, rows: Tensor) -> Learned:
        return Learned(tuple(step[rows] for step in self.steps))

    def without(self, rows: Tensor) -> Learned:
        """Nothing is known any more in some lanes."""
        return Learned(tuple(step.index_fill(0, rows, 0.0) for step in self.steps))

    def step(self, step: Tensor) -> tuple[Tensor, Learned]:
        """The step [n q d] in place of the frame's own, and what is known after it."""
        for last, following in zip(self.steps, self.steps[1:], strict=False):
            step = step + _share(step, last) * following
        if self.steps:
            step = step / (1 - _share(step, self.steps[-1]).clamp_max(MOST))
        return step, Learned((*self.steps, step)[-LATEST:])


def _share(x: Tensor, of: Tensor) -> Tensor:
    """[n 1 1] how much of a step there is in x."""
    size = (of * of).sum((1, 2), keepdim=True).clamp_min(TINY)
    return (x * of).sum((1, 2), keepdim=True) / size
