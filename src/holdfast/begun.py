"""Text generated with a perturbation begins where the perturbation does.

Earlier tokens are what the clamp made of them, whatever is added later: their keys and values are
computed once, and every text that is generated on the same prompts under the same clamp with
another vector goes on from there. It is the replay of generation: what a perturbation cannot change
is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING

import torch

from holdfast.batch import Batch
from holdfast.edits import Edit, FeatureEdit, Perturbation, decided_on_whole
from holdfast.hooks import AttachedEdits, Fired

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(frozen=True)
class Begun:
    """The first `start` columns of a batch, run with some edits on. cache: every block's keys and
    values; fired: on how many tokens of these columns each edit acted."""

    batch: Batch
    edits: tuple[Edit, ...]
    start: int
    cache: DynamicCache
    fired: Fired

    def goes_on_to(self, batch: Batch, edits: Sequence[Edit], start: int) -> bool:
        """Whether a pass of `batch` under `edits` would come to the same."""
        own = self.batch
        return (
            start == self.start
            and len(edits) == len(self.edits)
            and all(a is b for a, b in zip(edits, self.edits, strict=True))
            and own.ids == batch.ids
            and own.groups == batch.groups
            and own.tokens.shape == batch.tokens.shape
            and bool((own.tokens == batch.tokens).all())
            and bool((own.positions == batch.positions).all())
        )

    def again(self) -> DynamicCache:
        """For one generation, which appends to it and changes nothing here."""
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in self.cache.layers]
        return cache


def first_perturbed(batch: Batch, edits: Sequence[Edit]) -> int:
    """The column up to which no text under the edits depends on a perturbation; 0 where there is
    none, or where something decides on a whole prompt or watches it."""
    added = [edit for edit in edits if isinstance(edit, Perturbation)]
    others = [edit for edit in edits if not isinstance(edit, Perturbation)]
    if (
        not added
        or not all(type(edit) is FeatureEdit for edit in others)
        or decided_on_whole(edits)
    ):
        return 0
    frame = batch.frame()
    there = torch.stack([edit.selects(s, frame).any(0) for edit in added for s in edit.sites]).any(
        0
    )
    return int(there.int().argmax()) if bool(there.any()) else 0


class Beginnings:
    """The last beginning of each thread: texts under one clamp are generated one after another."""

    def __init__(self) -> None:
        self._of_thread = local()

    def forget(self) -> None:
        self._of_thread.last = None

    def of(
        self,
        batch: Batch,
        edits: Sequence[Edit],
        start: int,
        attached: AttachedEdits,
        run: Callable[[slice], DynamicCache],
    ) -> Begun:
        """The kept one if it is this; else made by `run`, which gives a cache of some columns."""
        clamp = tuple(edit for edit in edits if not isinstance(edit, Perturbation))
        last: Begun | None = getattr(self._of_thread, "last", None)
        if last is not None and last.goes_on_to(batch, clamp, start):
            attached.credit(last.fired)
            return last
        self.forget()  # before there are two
        before = attached.fired()
        cache = run(slice(0, start))
        fired = {key: n - before.get(key, 0) for key, n in attached.fired().items()}
        made = self._of_thread.last = Begun(batch, clamp, start, cache, fired)
        return made
