"""Linear probes on the pooled residual of one site: what the stream can be read for there.

Pooled is the mean over a prompt's tokens, BOS and padding left out (METHODS I.2). A vector of
Frobenius norm ε over T pooled tokens moves that mean by at most ε/√T, by that much if every token
gets the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from holdfast.config import nearest
from holdfast.edits import EveryToken
from holdfast.errors import StudyError, SubjectError
from holdfast.positions import selected
from holdfast.sites import Site

if TYPE_CHECKING:
    from holdfast.batch import Batch, Frame
    from holdfast.edits import Edit
    from holdfast.readouts import Run
    from holdfast.replay import Replay
    from holdfast.subject import Subject

NONE = "none"
"""The answer no probe gives: its score is always 0, the threshold of every probe."""


def pool(x: Tensor, frame: Frame) -> Tensor:
    """[n d_model] float32: the mean of x [n s d_model] over prompt tokens without BOS."""
    mask = selected("prompt", False, frame).to(x.device, torch.float32)
    weight = mask / mask.sum(1, keepdim=True).clamp_min(1)
    return torch.bmm(weight[:, None], x.float()).squeeze(1)


@dataclass
class Pooling(EveryToken):
    """Reads the pooled residual of a site as the edits before it left it; keeps gradients.

    seen: [b d_model] of every pass, in the order of the rows.
    """

    site: Site
    seen: list[Tensor] = field(default_factory=list)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return selected("prompt", False, frame)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.seen.append(pool(x, frame))
        return x


@dataclass(frozen=True)
class Probes:
    """One linear probe a class on the pooled residual of `site`, each for itself: w·h̄ + b.

    classes: c names; weight [c d_model], bias [c], in logits, as read from the residual itself;
    penalty, validation [c]: the inverse regularization C each was fitted with, and its accuracy on
    the texts that C was chosen on; empty for probes that are not fitted. A text is of a class if
    that probe's logit exceeds 0, the score of the answer `none`; it may be of several.
    """

    site: Site
    classes: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    penalty: tuple[float, ...] = ()
    validation: tuple[float, ...] = ()
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    exclusive = False
    unembeds = False

    @classmethod
    def unfitted(cls, site: Site, classes: Sequence[str], d_model: int) -> Probes:
        """Probes that know the names of their classes and nothing else."""
        return cls(site, tuple(classes), torch.zeros(len(classes), d_model),
                   torch.zeros(len(classes)))  # fmt: skip

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "kind": "probes",
            "site": str(self.site),
            "classes": list(self.classes),
            "penalty": list(self.penalty),
            "validation_accuracy": list(self.validation),
        }

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"probes.weight": self.weight, "probes.bias": self.bias}

    def answer(self, subject: Subject, text: str) -> int:
        answers = (*self.classes, NONE)
        if text not in answers:
            raise SubjectError(f"no probe for the class {text!r}: {nearest(text, answers)}")
        return answers.index(text)

    def begins(self, batch: Batch) -> Tensor:
        # A prompt that is nothing but BOS has nothing to pool; what is read of it is 0.
        return torch.where(batch.bos, 1, 0).minimum(batch.prompt_length - 1)

    def scores(self, pooled: Tensor) -> Tensor:
        """[n c+1] logits of every class, and the 0 of none, from pooled residuals [n d_model]."""
        weight, bias = self._on(pooled.device)
        own = (pooled.double() @ weight.T + bias).float()
        return torch.cat([own, torch.zeros_like(own[:, :1])], 1)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weight and bias in float64, copied to a device once: the steps of a search ask."""
        if device not in self._copies:
            weight, bias = (t.to(device, torch.float64) for t in (self.weight, self.bias))
            self._copies[device] = weight, bias
        return self._copies[device]

    def pooled(self, run: Run, batch: Batch, edits: Sequence[Edit] = ()) -> Tensor:
        """[b d_model] float32, with the gradients that `run` keeps."""
        pooling = Pooling(self.site)
        run(batch, (*edits, pooling), 1)
        return torch.cat(pooling.seen).to(batch.tokens.device)

    def read(self, run: Run, batch: Batch, edits: Sequence[Edit]) -> Tensor:
        return self.scores(self.pooled(run, batch, edits))

    def replayed(self, replay: Replay, delta: Tensor, answers: Tensor | None = None) -> Tensor:
        if self.site < replay.sites[0]:
            raise StudyError(
                f"the probes read {self.site}, which lies before {replay.sites[0]}: nothing that "
                "is added there can reach them; perturb the probes' own site or an earlier one"
            )
        after = replay.suffix(delta, [self.site])[self.site]
        scores = self.scores(pool(after.leaving, replay.frame))
        return scores if answers is None else scores.gather(-1, answers)

    def affine(self, replay: Replay) -> bool:
        return replay.sites == (self.site,) and not replay.after and not replay.hold
