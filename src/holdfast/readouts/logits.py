"""The model's own logits: at the last prompt token, or along an answer that is forced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from holdfast.batch import Batch
    from holdfast.edits import Edit
    from holdfast.readouts import Run
    from holdfast.replay import Replay
    from holdfast.subject import Subject


@dataclass(frozen=True)
class Logits:
    """A score for every token of the vocabulary, of which one is given."""

    exclusive = True
    unembeds = True

    @property
    def facts(self) -> dict[str, Any]:
        return {"kind": "logits"}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {}

    def answer(self, subject: Subject, text: str) -> int:
        return subject.token_id(text)

    def begins(self, batch: Batch) -> Tensor:
        return batch.positions[:, -1] + 1 - batch.n_read

    def read(self, run: Run, batch: Batch, edits: Sequence[Edit]) -> Tensor:
        logits = run(batch, edits, batch.n_read)
        return logits[:, -1] if batch.forced is None else logits

    def replayed(self, replay: Replay, delta: Tensor, answers: Tensor | None = None) -> Tensor:
        return replay.logits(delta, answers)

    def affine(self, replay: Replay) -> bool:
        return False


LOGITS = Logits()
