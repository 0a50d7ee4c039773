"""What each block of a model was called with, kept so that it can be called again for some rows.

Masks, rotary embeddings and whatever else a family passes are taken as they were: no family needs
code of its own. A tensor is taken to have a row for every row of the batch if its first dimension
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import EditError
from holdfast.prefix import PrefixCache

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one block, without the residual."""


def called(block: nn.Module, x: Tensor, call: Call) -> Tensor:
    """The residual after a block, from the one before it; some families return it in a tuple."""
    args, kwargs = call
    made = block(x, *args, **kwargs)
    residual: Tensor = made[0] if isinstance(made, tuple) else made
    return residual


def mapped(change: Callable[..., Any], first: Any, *others: Any) -> Any:
    """`first` with `change` made to every leaf of its tuples, lists and dicts; of several values of
    one shape, to the leaves that stand at one place."""
    if isinstance(first, tuple | list):
        return type(first)([mapped(change, *items) for items in zip(first, *others, strict=True)])
    if isinstance(first, dict):
        return {k: mapped(change, v, *(other[k] for other in others)) for k, v in first.items()}
    return change(first, *others)


def reading(calls: Sequence[Call], cache: PrefixCache) -> tuple[Call, ...]:
    """Recorded calls that read `cache` instead of the cache they were made with."""
    return tuple(with_cache(call, cache, layer) for layer, call in enumerate(calls))


def with_cache(call: Call, cache: PrefixCache, layer: int) -> Call:
    """One of them. Families name that argument differently, or give it no name: it is known by its
    type. Raises EditError if there is not exactly one."""
    from transformers import Cache

    n_caches = 0

    def change(value: Any) -> Any:
        nonlocal n_caches
        is_cache = isinstance(value, Cache | PrefixCache)
        n_caches += is_cache
        return cache if is_cache else value

    changed: Call = mapped(change, call)
    if n_caches != 1:
        raise EditError(
            f"block {layer} was called with {n_caches} key-value caches, expected one: without it "
            "a replay would not see the prefix"
        )
    return changed


def joined(pieces: Sequence[tuple[int, Sequence[Call]]]) -> tuple[Call, ...]:
    """Calls for the rows of all pieces, from (rows, calls) of each; with one row more than it is
    for, the last, where there are several."""
    sizes, recorded = [n + 1 for n, _ in pieces], [calls for _, calls in pieces]
    if len(pieces) == 1:
        return tuple(recorded[0])
    made: dict[int, Any] = {}

    def join(*values: Any) -> Any:
        if id(values[0]) not in made:
            by_row = [_has_rows(value, size) for value, size in zip(values, sizes, strict=True)]
            if any(by_row) != all(by_row):
                raise EditError("a block was called differently for some rows than for others")
            made[id(values[0])] = torch.cat([v[:-1] for v in values]) if by_row[0] else values[0]
        return made[id(values[0])]

    return tuple(mapped(join, *calls) for calls in zip(*recorded, strict=True))


def picked(calls: Sequence[Call], rows: Tensor, n: int) -> tuple[Call, ...]:
    """Calls for some of n rows, in the order given; rows may be repeated."""
    made: dict[int, Any] = {}

    def pick(value: Any) -> Any:
        if not _has_rows(value, n):
            return value
        if id(value) not in made:  # most blocks are called with the same mask
            one = n == 1
            made[id(value)] = (
                value.expand(len(rows), *value.shape[1:]) if one else value[rows.to(value.device)]
            )
        return made[id(value)]

    return tuple(mapped(pick, call) for call in calls)


def _has_rows(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == n
