"""By what route a recovery's vector reaches the answer: straight, or through later blocks.

While the vector is added, what later attention and MLPs add is kept as it is under the intervention
alone. What still happens goes along the residual stream itself (METHODS F.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.batch import Batch
from holdfast.direct import Spot, eager
from holdfast.edits import Capture, Edit
from holdfast.errors import SubjectError
from holdfast.frozen import Frozen
from holdfast.hooks import See, tapped
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.variants import Recovered

FROZEN: Mapping[str, tuple[str, ...]] = {
    "direct": ("attends", "mlp"),
    "no attention": ("attends",),
    "no mlps": ("mlp",),
    "no patterns": ("patterns",),
}
"""Route → what is kept as it was: what attention adds, what MLPs add, or where attention looks,
while what it finds there may change. direct: nothing answers the vector but the final norm."""

ADDS = ("attends", "mlp")
"""What of a block adds to the residual, as the families' table names it."""

_ENTRIES = 2**27
"""Numbers kept at a time: 512 MB in float32."""

IMPLEMENTATION = "holdfast_patterns"
"""The name under which transformers knows `attend`."""


def routes(found: Recovered) -> dict[str, Tensor]:
    """Of `FROZEN` → [n] margin with the vector added and everything else kept, in logits."""
    case, push = found.case, found.perturbation(found.delta)
    subject = case.subject

    def margins(rows: Tensor) -> dict[str, Tensor]:
        batch, made = case.batch.rows(rows), {}
        kept = _Kept.of(subject, batch, case.edits)
        for name, what in FROZEN.items():
            with kept.on(subject, what):
                scores = subject.read(batch, found.edits(push))
            made[name] = batch.margin(scores).double()
        return made

    everyone = torch.arange(len(found), device=found.delta.device)
    most = _rows_at_once(subject, case.batch)
    pieces = subject.batching.over("passes", everyone, margins, most=most)
    return {name: torch.cat([piece[name] for piece in pieces]) for name in FROZEN}


def _rows_at_once(subject: Subject, batch: Batch) -> int:
    """As many as what is kept of them leaves room for."""
    width = batch.tokens.shape[1]
    n_heads = subject.model.config.get_text_config().num_attention_heads
    one = subject.n_blocks * width * (len(ADDS) * subject.d_model + n_heads * width)
    return max(1, _ENTRIES // one)


@dataclass(frozen=True)
class _Kept:
    """Layer → what attention and MLP added in one pass, as they returned it, and its weights."""

    attends: dict[int, Any]
    mlp: dict[int, Any]
    weights: dict[int, Tensor]

    @classmethod
    def of(cls, subject: Subject, batch: Batch, edits: tuple[Edit, ...]) -> _Kept:
        kept, looked = cls({}, {}, {}), _attention(subject)

        def weigh(layer: int, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, tuple) or output[1] is None:
                raise SubjectError(f"attention of block {layer} gave no weights when eager")
            kept.weights[layer] = output[1]

        taps = [(_modules(subject, name), _store(getattr(kept, name))) for name in ADDS]
        with tapped(*taps):
            subject.read(batch, edits)
        with eager(subject), tapped((looked, weigh)):
            subject.read(batch, edits)
        return kept

    @contextmanager
    def on(self, subject: Subject, what: tuple[str, ...]) -> Iterator[None]:
        """Passes inside the block get what was kept."""
        if "patterns" in what:
            with _looking(subject, self.weights):
                yield
            return

        with tapped(*((_modules(subject, name), _give(getattr(self, name))) for name in what)):
            yield


def _store(own: dict[int, Any]) -> See:
    def see(layer: int, args: tuple[Any, ...], output: Any) -> None:
        own[layer] = output

    return see


def _give(own: dict[int, Any]) -> See:
    def see(layer: int, args: tuple[Any, ...], output: Any) -> Any:
        return own[layer]

    return see


def _modules(subject: Subject, name: str) -> list[nn.Module]:
    return subject.family.inside(subject.model, getattr(subject.family, name))


def _attention(subject: Subject) -> list[nn.Module]:
    return subject.family.inside(subject.model, subject.family.heads.rpartition(".")[0])


_weights: ContextVar[Mapping[int, Tensor]] = ContextVar("where attention of this pass looks")


@contextmanager
def _looking(subject: Subject, weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Attention looks where `weights` say, and reads what is there now."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    config = subject.model.config.get_text_config()
    usual = config._attn_implementation
    token = _weights.set(weights)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = usual
        _weights.reset(token)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention [n s h d_head] with weights that are given, over values [n g s d_head], g of them
    shared by the h heads."""
    weights = _weights.get()[int(module.layer_idx)].to(value.dtype)  # type: ignore[arg-type]
    n, h, s, _ = query.shape
    read = weights.reshape(n, value.shape[1], -1, value.shape[2]) @ value
    return read.view(n, h, s, -1).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Lens:
    """The logit lens: what a vector at the token that is read does to a lead by itself, the final
    norm's scale as it is under the intervention. at [n q]: which slots are read."""

    frozen: Frozen
    toward: Tensor
    at: Tensor

    @classmethod
    def of(cls, found: Recovered) -> Lens:
        """For the rival that is strongest under the intervention. Needs logits (`unreadable`)."""
        case, last = found.case, Capture(Site(found.case.subject.n_blocks))
        subject, batch = case.subject, case.batch
        spot = Spot.of(batch, subject.read(batch, (*case.edits, last)))
        read = spot.cut(batch.positions)
        final = last.at(batch.ids, read[:, None])[:, 0]
        norm = subject.family.final_norm_of(subject.model)
        W = subject.model.get_output_embeddings().weight
        toward = W[spot.target].double() - W[spot.rival].double()
        at = (found.positions == read[:, None]).repeat(1, len(found.problem.sites))
        return cls(Frozen.of(norm, final.to(W.dtype)), toward, at)

    def __call__(self, delta: Tensor) -> Tensor:
        """[n] change of the lead, in logits before any soft-cap, by vectors [n q d_model]."""
        there = (delta.double() * self.at[..., None]).sum(1)
        return (self.frozen(there) * self.toward).sum(-1)
