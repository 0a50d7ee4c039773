"""Readouts: how an answer is read from a pass. One file a kind; a batch carries the one it needs.

A readout turns a pass into scores, one for each possible answer: a token's logit, or a probe's. All
else follows from scores alone: the margin of a target over its rivals, the answer that is given,
the wrong one that is forced in a control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from holdfast.batch import Batch
    from holdfast.edits import Edit
    from holdfast.replay import Replay
    from holdfast.subject import Subject


class Run(Protocol):
    """A whole forward pass with edits on, with gradients or without."""

    def __call__(self, batch: Batch, edits: Sequence[Edit], keep: int) -> Tensor:
        """Logits [b keep vocab] at the last `keep` tokens."""
        ...


class Readout(Protocol):
    """Where and how the answers of a batch are read."""

    @property
    def exclusive(self) -> bool:
        """Whether one answer rules out the others: a wrong one then has to beat the right one."""
        ...

    @property
    def unembeds(self) -> bool:
        """Whether scores are logits: the final residual, normed and unembedded."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of it, as plain JSON types."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What has to be saved beside a perturbation for it to be read again."""
        ...

    def answer(self, subject: Subject, text: str) -> int:
        """Which score an answer has. Raises SubjectError if it has none."""
        ...

    def begins(self, batch: Batch) -> Tensor:
        """[b] the first absolute position that is read."""
        ...

    def read(self, run: Run, batch: Batch, edits: Sequence[Edit]) -> Tensor:
        """Scores [b answers], or [b t answers] of a forced answer, of a whole pass."""
        ...

    def replayed(self, replay: Replay, delta: Tensor, answers: Tensor | None = None) -> Tensor:
        """The same from a replay with `delta` [n q d_model] added, differentiable in it. answers
        [n m]: only their scores, [n m], where no answer is forced."""
        ...

    def affine(self, replay: Replay) -> bool:
        """Whether every score is an affine function of what is added: then the smallest norm that
        reaches a goal is known in closed form."""
        ...
