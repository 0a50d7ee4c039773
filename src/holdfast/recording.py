"""Recording a replay: the prefix runs once, and what the suffix needs of it is kept.

The passes go by pieces of rows (`batching.py`), so that what they hold on the way is
bounded by that. What is kept of all rows is the residual of the lowest site in the suffix columns,
and keys and values of the prefix in the blocks above it, in the model's precision. Where there are
more rows than one pass takes, these wait in the host's memory, and the rows of a step are brought
to the device when its blocks ask for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast import slots
from holdfast.batch import Batch, Frame
from holdfast.block_calls import Call, joined, reading
from holdfast.edits import Capture, Edit, decided_on_whole
from holdfast.hooks import AttachedEdits, record_calls
from holdfast.prefix import PrefixCache
from holdfast.recorded import Recorded
from holdfast.sites import Site
from holdfast.subject import Subject


@dataclass(frozen=True)
class _Piece:
    """What the passes over n rows left: calls by block, base [n s d_model] in the suffix columns,
    and what captures read at the perturbed positions, [n p d_model] each: what they read at other
    tokens is let go of with the piece. decided: what edits decided on these prompts."""

    n: int
    calls: Sequence[Call]
    base: Tensor
    cut: Sequence[Tensor]
    decided: Mapping[int, tuple[object, Tensor]]


def record(
    subject: Subject,
    batch: Batch,
    sites: tuple[Site, ...],
    positions: Tensor,
    before: Sequence[Edit],
    after: Sequence[Edit],
    watch: Sequence[Site],
) -> Recorded:
    """Run the prefix, then the suffix, with the edits on; arguments as in `Replay.record`, sites in
    forward order."""
    whole = decided_on_whole((*before, *after))
    start = 0 if whole else first_column(batch, positions)
    raw = {site: Capture(site) for site in sites}
    base = Capture(sites[0])
    seen = {site: Capture(site) for site in dict.fromkeys((*sites, *watch))}
    cuts = (*raw.values(), *seen.values())
    edits = (*raw.values(), *before, base, *after, *seen.values())
    blocks = subject.family.blocks_of(subject.model)
    kept = _Kept(len(batch))
    frame = batch.frame().columns(slice(start, None))
    columns = slots.find(positions, frame.positions)
    # One `with` for all pieces: an edit need not fire in each.
    with torch.no_grad(), AttachedEdits(blocks, edits) as attached:
        pieces = subject.batching.over(
            "passes", torch.arange(len(batch), device=batch.tokens.device),
            lambda rows: _piece(
                subject, batch, rows, start, sites[0], attached, base, cuts, columns, kept
            ),
            attached.mark,
        )  # fmt: skip
    # Of edits below the lowest site, and before it, nothing is run again: what they decided stays.
    decided = {
        key: (owner, _cat([piece.decided[key][1] for piece in pieces]))
        for key, (owner, _) in pieces[0].decided.items()
    }
    frame = replace(frame, decided=decided)
    read = dict(zip(map(id, cuts), map(_cat, zip(*(p.cut for p in pieces), strict=True)),
                    strict=True))  # fmt: skip
    cache = kept.cache()
    above = [Site(depth) for depth in range(sites[0].depth + 1, subject.n_blocks + 1)]
    return Recorded(
        subject=subject,
        sites=sites,
        batch=batch,
        frame=frame,
        base=_cat([p.base for p in pieces]),
        columns=columns,
        before=_again(before, above, frame),
        after=_again(after, [sites[0], *above], frame),
        reference={site: read[id(own)] for site, own in seen.items()},
        unclamped={site: read[id(own)] for site, own in raw.items()},
        cache=cache,
        calls=reading(joined([(p.n, p.calls) for p in pieces]), cache),
        whole=whole,
    )


def _again(edits: Sequence[Edit], sites: Sequence[Site], frame: Frame) -> tuple[Edit, ...]:
    """Edits that have something to do in a replay, which does not ask them at every step."""

    def acts(edit: Edit) -> bool:
        return any(bool(edit.selects(s, frame).any()) for s in edit.sites if s in sites)

    return tuple(filter(acts, edits))


def first_column(batch: Batch, positions: Tensor) -> int:
    """The first column that has to be replayed: that of a perturbed position [b p], or of one that
    is read, which has to be replayed too though it may lie before a perturbation."""
    read_from = batch.readout.begins(batch)
    first = torch.where(positions >= 0, positions, read_from[:, None]).amin(1)
    first = torch.minimum(first, read_from).clamp_min(0)
    return int((batch.positions == first[:, None]).int().argmax(1).min())


def _piece(
    subject: Subject,
    batch: Batch,
    rows: Tensor,
    start: int,
    lowest: Site,
    attached: AttachedEdits,
    base: Capture,
    cuts: Sequence[Capture],
    columns: Tensor,
    kept: _Kept,
) -> _Piece:
    """The passes over some rows, of which `cuts` are kept at the columns [n p] of all rows. Their
    prefix goes to `kept`."""
    from transformers import DynamicCache

    n, own = len(rows), columns[rows.to(columns.device)]
    if n < len(batch):
        # What blocks are called with depends on whether any row of a pass is padded: the shortest
        # prompt of all goes with every piece.
        rows = torch.cat([rows, batch.positions[:, -1].argmin()[None]])
    frame, tokens, mask = batch.frame().rows(rows), batch.tokens[rows], batch.mask[rows]
    cache = DynamicCache(config=subject.model.config)

    def run(columns: slice) -> None:
        attached.frame = frame.columns(columns)
        subject.model(
            input_ids=tokens[:, columns],
            attention_mask=mask[:, : columns.stop],
            position_ids=frame.positions[:, columns].clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    if start:
        run(slice(0, start))
    # The pass over the suffix appends to the cache by making new tensors; these stay the prefix.
    # Blocks below the lowest site never run again.
    above = [
        (layer.keys, layer.values) if index >= lowest.depth else None
        for index, layer in enumerate(cache.layers)
    ]
    for capture in (base, *cuts):
        capture.seen.clear()
    blocks = subject.family.blocks_of(subject.model)
    recorded = record_calls(blocks, lambda: run(slice(start, tokens.shape[1])))
    # A replay gives its own residual; the piece's cache must not be held by its calls.
    calls = reading([(args[1:], kwargs) for args, kwargs in recorded], PrefixCache(()))
    kept.add(above if start else [], n)  # last: a piece that runs out of memory can be done again
    cut = [slots.cut(capture.seen.pop()[1][:n], own) for capture in cuts]
    decided = {key: (owner, made[:n]) for key, (owner, made) in frame.decided.items()}
    return _Piece(n, calls, base.seen.pop()[1][:n], cut, decided)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _Kept:
    """The prefix of n rows, filled piece by piece, so that nothing of it is there twice."""

    def __init__(self, n: int):
        self.n, self.n_filled = n, 0
        self.layers: list[tuple[Tensor, Tensor] | None] = []
        self.homes: list[torch.device | None] = []

    def add(self, piece: Sequence[tuple[Tensor, Tensor] | None], n: int) -> None:
        """Keys and values of the next n rows; rows beyond these are left out."""
        if n == self.n:
            self.layers = list(piece)
            return
        for layer, own in enumerate(piece):
            if layer == len(self.layers):
                self.layers.append(own and (self._room(own[0]), self._room(own[1])))
                self.homes.append(own[0].device if own else None)
            for kept, new in zip(self.layers[layer] or (), own or (), strict=True):
                kept[self.n_filled : self.n_filled + n] = new[:n]
        self.n_filled += n

    def _room(self, like: Tensor) -> Tensor:
        return torch.empty(self.n, *like.shape[1:], dtype=like.dtype)

    def cache(self) -> PrefixCache:
        return PrefixCache(tuple(self.layers), self.homes)
