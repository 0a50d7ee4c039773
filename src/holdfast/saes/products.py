"""Products with matrices that are kept in a lower precision than they are computed in.

A file of half-precision weights says exactly what they are, and every one of them is a float32
number too. So a whole SAE is kept as its file has it, and cast where it is used: a block at a time,
and never once more for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ENTRIES = 2**24
"""Numbers of a matrix that are cast at a time: 64 MB in float32."""


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
            blocks = W.split(max(1, ENTRIES // max(1, d)), 1)
            return torch.cat([x @ block.to(x.dtype) for block in blocks], -1)
        height = max(1, ENTRIES // max(1, n))
        pairs = zip(x.split(height, -1), W.split(height), strict=True)
        parts = (own @ block.to(x.dtype) for own, block in pairs)
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.W = inputs[1]  # a weight, without a gradient of its own

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return product(gradient, ctx.W.T), None
