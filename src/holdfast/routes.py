"""By what route a recovery's vector reaches the answer: straight, or through later blocks.

While the vector is added, what later attention and MLPs add is kept as it is under the intervention
alone. What still happens goes along the residual stream itself (METHODS F.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.batch import Batch
from holdfast.direct import eager
from holdfast.edits import Edit
from holdfast.errors import SubjectError
from holdfast.hooks import See, tapped
from holdfast.measure import median, share
from holdfast.replays import gained
from holdfast.subject import Subject
from holdfast.variants import Performed, Recovered

FROZEN: Mapping[str, tuple[str, ...]] = {
    "direct": ("attends", "mlp"),
    "no attention": ("attends",),
    "no mlps": ("mlp",),
    "no patterns": ("patterns",),
}
"""Route → what is kept as it was: what attention adds, what MLPs add, or where attention looks,
while what it finds there may change. direct: nothing answers the vector but the final norm, and
clamps that read what was added."""

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


def kept_routes(
    found: Recovered, by_name: Mapping[str, Performed], clusters: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each route: what of the margin comes back by it alone."""
    unit = "share of the margin that the recovery brought back"
    return [
        {
            "name": name,
            "regained": median("regained", unit, gained(margin, by_name), clusters).plain,
            "ahead": share("ahead", (margin > 0).double(), clusters).plain,
        }
        for name, margin in routes(found).items()
    ]


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
