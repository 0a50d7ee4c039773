"""Replay: the part of the forward pass that a perturbation can change, and nothing else.

A perturbation at positions ≥ p₀ and sites ≥ ℓ leaves every earlier position and every lower layer
as it was. So the prefix runs once, its keys and values are kept, the arguments of every block are
recorded for the suffix, and a step calls only the blocks above ℓ on the suffix columns. Equal to
the full forward pass in logits and gradients; a test holds it to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.edits import Capture, Edit
from holdfast.errors import EditError
from holdfast.hooks import AttachedEdits, apply_edits, record_calls
from holdfast.sites import Site
from holdfast.subject import Subject

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of one block, without the residual."""


class PrefixCache:
    """Keys and values of the prefix that are never changed: `update` returns prefix + new.

    prefix: layer → (keys, values), each [n heads s₀ d_head], or empty without a prefix. In a layer
    with a sliding window s₀ is cut to the window, as the recorded masks are.
    """

    def __init__(self, prefix: Sequence[tuple[Tensor, Tensor]]):
        self.prefix = prefix

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.prefix:
            return keys, values
        old_keys, old_values = self.prefix[layer]
        return torch.cat([old_keys, keys], -2), torch.cat([old_values, values], -2)

    def rows(self, rows: Tensor) -> PrefixCache:
        return PrefixCache(tuple((keys[rows], values[rows]) for keys, values in self.prefix))


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change` made to every leaf of its tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        return type(value)([_mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {name: _mapped(change, item) for name, item in value.items()}
    return change(value)


def _with_cache(call: Call, cache: PrefixCache, layer: int) -> Call:
    """A recorded call that reads `cache` instead of the cache it was made with.

    Families name that argument differently, or give it no name: it is known by its type.
    """
    from transformers import Cache

    n_caches = 0

    def change(value: Any) -> Any:
        nonlocal n_caches
        is_cache = isinstance(value, Cache)
        n_caches += is_cache
        return cache if is_cache else value

    changed: Call = _mapped(change, call)
    if n_caches != 1:
        raise EditError(
            f"block {layer} was called with {n_caches} key-value caches, expected one: without it "
            "a replay would not see the prefix"
        )
    return changed


@dataclass(frozen=True)
class Replay:
    """What was recorded for n rows; `rows` picks some of them, repeats allowed.

    site: the lowest perturbed one; base [n s d_model]: its residual in the suffix columns before
    the perturbation; columns [n p]: suffix column of each perturbed position, -1 for none.
    `before` and `after` act at the perturbed site, before and after the perturbation; `base`
    already contains `before`.
    """

    subject: Subject
    site: Site
    batch: Batch
    frame: Frame
    base: Tensor
    columns: Tensor
    after: tuple[Edit, ...]
    above: tuple[Edit, ...]
    cache: PrefixCache
    calls: tuple[Call, ...]

    @classmethod
    def record(
        cls,
        subject: Subject,
        batch: Batch,
        site: Site,
        positions: Tensor,
        before: Sequence[Edit] = (),
        after: Sequence[Edit] = (),
    ) -> Replay:
        """Run the prefix and the suffix once with the edits on.

        positions [b p] absolute, -1 for none. An edit stands either in `before` (it acts first,
        the perturbation has the last word) or in `after` (the edit has the last word); the
        distinction matters only at `site`.
        """
        from transformers import DynamicCache

        edits = (*before, *after)
        first_position = torch.where(positions >= 0, positions, batch.positions.amax()).amin(1)
        matches = batch.positions == first_position[:, None]
        start = int(matches.int().argmax(1).min())
        cache = DynamicCache(config=subject.model.config)
        blocks = subject.family.blocks_of(subject.model)
        capture = Capture(site)
        suffix = slice(start, batch.tokens.shape[1])
        with torch.no_grad(), AttachedEdits(blocks, (*before, capture, *after)) as attached:
            if start > 0:
                prefix_columns = slice(0, start)
                attached.frame = batch.frame().columns(prefix_columns)
                cls._pass(subject, batch, prefix_columns, cache)
            # The suffix pass appends to the cache by making new tensors; these stay the prefix.
            frozen = PrefixCache(
                tuple((layer.keys, layer.values) for layer in cache.layers) if start else ()
            )
            attached.frame = batch.frame().columns(suffix)
            calls = record_calls(blocks, lambda: cls._pass(subject, batch, suffix, cache))
        frame = batch.frame().columns(suffix)
        match = positions[:, :, None] == frame.positions[:, None, :]
        match &= (positions >= 0)[:, :, None]
        columns = torch.where(match.any(-1), match.int().argmax(-1), -1)
        return cls(
            subject=subject,
            site=site,
            batch=batch,
            frame=frame,
            base=capture.seen[-1][1],
            columns=columns,
            after=tuple(edit for edit in after if site in edit.sites),
            above=tuple(edit for edit in edits if any(s > site for s in edit.sites)),
            cache=frozen,
            calls=tuple(
                _with_cache((args[1:], kwargs), frozen, layer)
                for layer, (args, kwargs) in enumerate(calls)
            ),
        )

    @staticmethod
    def _pass(subject: Subject, batch: Batch, columns: slice, cache: Any) -> None:
        subject.model(
            input_ids=batch.tokens[:, columns],
            attention_mask=batch.mask[:, : columns.stop],
            position_ids=batch.positions[:, columns].clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def __len__(self) -> int:
        return self.base.shape[0]

    @property
    def prefix(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Layer → keys and values of the prefix; empty without a prefix."""
        return self.cache.prefix

    def rows(self, rows: Tensor) -> Replay:
        """The recording of some rows, in the order given; a row may be repeated (lanes)."""
        n = len(self)
        cache = self.cache.rows(rows)

        def pick(value: Any) -> Any:
            if isinstance(value, PrefixCache):
                return cache
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == n and n > 1:
                return value[rows]
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == n == 1:
                return value.expand(len(rows), *value.shape[1:])
            return value

        return replace(
            self,
            frame=self.frame.rows(rows),
            base=self.base[rows],
            columns=self.columns[rows],
            cache=cache,
            calls=_mapped(pick, self.calls),
        )

    def residual(self) -> Tensor:
        """[n p d_model] float32: the suppressed residual, every edit on, at the perturbed positions
        without perturbation."""
        x = apply_edits(self.after, self.site, self.base, self.frame)
        rows = torch.arange(len(self), device=x.device)[:, None]
        found = (self.columns >= 0)[..., None]
        return torch.where(found, x[rows, self.columns.clamp(min=0)].float(), 0.0)

    def logits(self, delta: Tensor) -> Tensor:
        """Logits [n vocab] at the last prompt token with `delta` [n p d_model] added; float32."""
        n, s, d = self.base.shape
        x = self.base
        placed = torch.zeros(n, s + 1, d, dtype=torch.float32, device=x.device)
        # Unused positions (-1) land in an extra column that is cut off again.
        index = torch.where(self.columns >= 0, self.columns, s)[..., None].expand(-1, -1, d)
        placed = placed.scatter_add(1, index, delta)[:, :s]
        x = (x.float() + placed).to(x.dtype)
        x = apply_edits(self.after, self.site, x, self.frame)
        blocks = self.subject.family.blocks_of(self.subject.model)
        for layer in range(self.site.depth, len(blocks)):
            args, kwargs = self.calls[layer]
            out = blocks[layer](x, *args, **kwargs)
            x = out[0] if isinstance(out, tuple) else out
            x = apply_edits(self.above, Site(layer + 1), x, self.frame)
        return self.subject.family.unembed_of(self.subject.model, x[:, -1]).float()
