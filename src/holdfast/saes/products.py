"""Products with matrices that are kept in a lower precision than they are computed in.

A file of half-precision weights says exactly what they are, and every one of them is a float32
number too. So a whole SAE is kept as its file has it, and cast where it is used: a block at a time,
and never once more for the backward pass. Where residuals are float64, so is a float32 matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from holdfast.chunks import per_chunk

CACHED = 2**20
"""Numbers of a matrix that are cast at a time on a processor, in place of a chunk: 4 MB in float32,
which are in its caches still when they are multiplied. Fetched again from memory they take longer
than the product with a few tokens."""


def product(x: Tensor, W: Tensor) -> Tensor:
    """x [... d] times W [d n], in the precision of x. Gradients, of any order, are those of x."""
    assert x.dtype in (torch.float32, torch.float64), f"computed in {x.dtype}"
    if W.dtype == x.dtype:
        return x @ W
    made: Tensor = _Cast.apply(x, W)
    return made


class _Cast(torch.autograd.Function):
    """`x @ W.to(x.dtype)`, of which autograd would keep the cast matrix."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, W: Tensor) -> Tensor:
        d, n = W.shape
        if n >= d:
            return torch.cat([x @ block for block in _blocks(W, 1, x.dtype)], -1)
        total = x.new_zeros(())
        for own, block in zip(x.split(_size(W, 0), -1), _blocks(W, 0, x.dtype), strict=True):
            total = total + own @ block
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.W = inputs[1]  # a weight, without a gradient of its own

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return product(gradient, ctx.W.T), None


def _size(W: Tensor, axis: int) -> int:
    """How many of a matrix's columns (axis 1) or rows (axis 0) are cast at a time."""
    numbers = W.shape[1 - axis]
    return max(1, CACHED // max(1, numbers)) if W.device.type == "cpu" else per_chunk(numbers)


def _blocks(W: Tensor, axis: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The matrix in blocks along an axis, cast: each in the place of the one before, for memory
    that the system has to give anew takes several times as long as the cast."""
    room: Tensor | None = None
    for block in W.split(_size(W, axis), axis):
        if room is None:
            room = torch.empty_like(block, dtype=dtype)
        yield room.narrow(axis, 0, block.shape[axis]).copy_(block)
