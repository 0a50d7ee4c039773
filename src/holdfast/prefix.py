"""The prefix of a replay: keys and values that never change, kept apart from the new ones.

A replayed block attends to the prefix and to what is computed anew. Joined into one tensor, as a
cache does it, the prefix would be copied at every step and swept by every backward pass, which for
a perturbation of the last token is most of the work. Here the scores are joined, which are small:
softmax over both, then each part weighs its own values. No derivative enters the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = "holdfast_prefix"
"""The name under which transformers knows `attend`."""


class PrefixCache:
    """Stands in for a block's key-value cache: what a block writes is handed back as it is.

    prefix: layer → (keys, values), each [n heads s₀ d_head], or empty without a prefix. In a layer
    with a sliding window s₀ is cut to the window, as the recorded masks are. homes: layer → the
    device that `rows` brings its rows to, where the whole waits in the host's memory.

    What `rows` gives is copied layer by layer, when a block first asks for it: searches are laid
    out by constraint, and most of these layouts are never run.
    """

    def __init__(
        self,
        prefix: Sequence[tuple[Tensor, Tensor] | None],
        homes: Sequence[torch.device | None] = (),
    ):
        self._whole = prefix
        self._homes = homes or (None,) * len(prefix)
        self._rows: Tensor | None = None
        self._own: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def like(cls, other: PrefixCache) -> PrefixCache:
        """The same keys and values, read as this class reads them."""
        made = cls(other._whole, other._homes)
        made._rows, made._own = other._rows, other._own
        return made

    @property
    def empty(self) -> bool:
        return not self._whole

    @property
    def prefix(self) -> Sequence[tuple[Tensor, Tensor] | None]:
        """Layer → keys and values of these rows, all of them copied; None below the lowest site."""
        return tuple(own and self.of(layer) for layer, own in enumerate(self._whole))

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return keys, values

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        whole = self._whole[layer]
        assert whole is not None, f"block {layer} is below the lowest perturbed site"
        if self._rows is None:
            return whole
        if layer not in self._own:
            keys, values = (kept[self._rows.to(kept.device)] for kept in whole)
            home = self._homes[layer] or keys.device
            self._own[layer] = keys.to(home), values.to(home)
        return self._own[layer]

    def rows(self, rows: Tensor) -> PrefixCache:
        """Some rows, in the order given, where their blocks compute."""
        made = type(self)(self._whole, self._homes)
        made._rows = rows if self._rows is None else self._rows[rows]
        # What was brought to a device is not brought there again for fewer of the rows.
        made._own = {
            layer: (keys[rows.to(keys.device)], values[rows.to(keys.device)])
            for layer, (keys, values) in self._own.items()
        }
        return made


class ConstantCache(PrefixCache):
    """The same values, without a derivative: what a token reads of others does not answer."""

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return keys.detach(), values.detach()


_read: ContextVar[PrefixCache] = ContextVar("prefix that the blocks of this replay attend to")
_formula: ContextVar[bool] = ContextVar("attention is computed from its formula", default=False)


@contextmanager
def by_formula() -> Iterator[None]:
    """Replays inside compute attention from its formula also where there is no prefix, so that they
    can be differentiated twice: fused kernels have no derivative of their backward pass.

    torch's own switch is the whole process's: what other threads compute meanwhile would change.
    """
    token = _formula.set(True)
    try:
        yield
    finally:
        _formula.reset(token)


@contextmanager
def attending(model: Any, cache: PrefixCache) -> Iterator[None]:
    """The model's blocks attend to `cache` and to what they compute; without a prefix as ever, or
    `by_formula`."""
    if cache.empty and not _formula.get():
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    config = model.config.get_text_config()
    usual = config._attn_implementation
    token = _read.set(cache)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = usual
        _read.reset(token)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [n s h d_head] of queries [n h s d_head] over the prefix and over keys and values
    [n g s d_head], g of them shared by the h heads.

    attention_mask: None for a single query that sees everything, or where nothing is before and
    each sees those up to itself; else [n 1 s s₀+s], bool or additive. Softmax in float32, as the
    families' own formula has it.
    """
    cache, (n, h, s, d) = _read.get(), query.shape
    if cache.empty:
        keys, values = key[:, :, :0], value[:, :, :0]
        if attention_mask is None and s > 1:
            attention_mask = torch.ones(s, s, dtype=torch.bool, device=query.device).tril()
    else:
        keys, values = cache.of(int(module.layer_idx))  # type: ignore[arg-type]
        keys, values = keys.to(query.device), values.to(query.device)  # if all rows are run at once
    groups, before = key.shape[1], keys.shape[2]
    # Heads that share keys stand next to each other: their queries are rows of one product.
    folded = query.reshape(n, groups, -1, d)
    scores = torch.cat([folded @ keys.mT, folded @ key.mT], -1).view(n, h, s, before + s)
    scores = scores * (d**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is None:
        assert s == 1, "transformers gives a mask where several queries see different keys"
    elif attention_mask.dtype == torch.bool:
        # The smallest number and not -inf: a padded query that sees nothing must not become NaN.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    weight = scores.softmax(-1, dtype=torch.float32).to(value.dtype).view(n, groups, -1, before + s)
    read = weight[..., :before] @ values + weight[..., before:] @ value
    return read.view(n, h, s, d).transpose(1, 2).contiguous(), None
