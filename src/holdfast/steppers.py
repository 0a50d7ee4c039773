"""Step rules of the search: which way a row moves, given its gradient.

A stepper keeps its state as a tuple of tensors whose first axis is rows, and answers with moves of
about unit norm, which the search scales by rate × radius.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Stepper(Protocol):
    """A step rule."""

    def rows(self, rows: Tensor) -> Stepper:
        """The rule of some rows, in the order given; repeats are allowed."""
        ...

    def start(self, delta: Tensor) -> State:
        """The state before the first step of iterates [n p d]."""
        ...

    def move(self, state: State, gradient: Tensor) -> tuple[Tensor, State]:
        """A move [n p d] of norm about 1 along the gradient [n p d], and the next state."""
        ...


@dataclass(frozen=True)
class Steepest:
    """Normalized gradient ascent with momentum: steepest in the norm that the budget is stated in.

    It commutes with rotations, so it never leaves a subspace its gradients lie in, and on a ball
    its fixed point is where the iterate is parallel to the gradient, the optimality condition of
    the largest margin at a given norm. Adam's fixed point is not: on a linear margin it ends along
    sign(gradient), at √(π/2) = 1.25 times the smallest norm on average.
    """

    momentum: float = 0.5

    def rows(self, rows: Tensor) -> Steepest:
        return self

    def start(self, delta: Tensor) -> State:
        return (torch.zeros_like(delta),)

    def move(self, state: State, gradient: Tensor) -> tuple[Tensor, State]:
        velocity = self.momentum * state[0] + unit(gradient)
        return unit(velocity), (velocity,)


@dataclass(frozen=True)
class Adam:
    """Adam (the published optimizer), its moves divided by √(p·d), the norm of its first step."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def rows(self, rows: Tensor) -> Adam:
        return self

    def start(self, delta: Tensor) -> State:
        zero = torch.zeros_like(delta)
        return zero, zero, delta.new_zeros(len(delta), 1, 1)

    def move(self, state: State, gradient: Tensor) -> tuple[Tensor, State]:
        first, second, t = state
        t = t + 1
        first = self.beta1 * first + (1 - self.beta1) * gradient
        second = self.beta2 * second + (1 - self.beta2) * gradient.square()
        scale = (second / (1 - self.beta2**t)).sqrt() + self.eps
        direction = (first / (1 - self.beta1**t)) / scale
        return direction / (gradient.shape[1] * gradient.shape[2]) ** 0.5, (first, second, t)


def unit(x: Tensor) -> Tensor:
    """Rows of [n p d] scaled to Frobenius norm 1; a row of zeros stays zero."""
    return x / x.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
