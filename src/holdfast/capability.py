"""What SAEs in the place of a residual cost elsewhere: how well held-out texts are predicted.

A behavior's own rate is a poor measure of that: few tokens of few prompts, which were chosen
because the model does well on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.canonical import digest
from holdfast.config import IDENTITY, Config
from holdfast.datasets import Dataset
from holdfast.errors import StudyError
from holdfast.measure import Measurement, difference, mean
from holdfast.readouts.logits import Logits

if TYPE_CHECKING:
    from holdfast.edits import Edit
    from holdfast.features import FeatureSet
    from holdfast.subject import Subject

MOST_LOGITS = 2**26
"""Logits held at a time (256 MB): long texts are read a few at once."""

LOSS = "nats a token"
ACCURACY = "share of tokens"


class Texts(Config):
    """Texts whose next tokens are predicted with and without the intervention's SAEs.

    source: rows with a column `text`, and `cluster` where some of them say the same thing; n: how
    many of them, drawn by the trial's seed. They should hold no audited prompt.
    """

    source: Dataset
    n: int = Field(64, ge=2)

    def drawn(self, seed: int, group: str) -> list[Example]:
        """The n texts, or all where there are fewer. Raises StudyError for a row without text.

        group: whose features edits take at every text.
        """
        rows = self.source.rows(("text",), ("cluster",))
        kept = sorted(rows, key=lambda row: digest([seed, row.number]))[: self.n]
        for row in kept:
            if not isinstance(row.cells["text"], str) or not row.cells["text"].strip():
                raise StudyError(
                    f"{self.source.label}: row {row.number} has no text to predict; leave empty "
                    "rows out"
                )
        return [
            Example(
                f"text:{row.number}", row.cells["text"], "", (), (), group=group,
                cluster=str(row.cells.get("cluster", row.number)),
            )
            for row in kept
        ]  # fmt: skip


@dataclass(frozen=True)
class _Unasked(Logits):
    """Texts that are read for their own tokens and for no answer."""

    def answer(self, subject: Subject, text: str) -> int:
        return 0


def capability(
    subject: Subject, texts: Texts, bare: Sequence[Edit], features: FeatureSet, seed: int
) -> tuple[Measurement, ...]:
    """Mean loss and accuracy of the next token, without the SAEs, with them, and the difference.

    bare: the intervention's SAEs in place with no feature changed (`bare_edits`); where that is
    nothing, the figures without them are all there is to say.
    """
    # Features of one group or another: none of them is changed.
    batch = subject.batch(texts.drawn(seed, features.entries[0].group), _Unasked())
    key = digest(["capability", texts.model_dump(mode="json", context=dict(IDENTITY)), seed])
    if key not in subject.counted:
        subject.counted[key] = next_tokens(subject, batch)
    clean, clusters = subject.counted[key], batch.clusters
    made = [
        mean("texts.loss.clean", LOSS, clean[0], clusters, SHORT),
        mean("texts.accuracy.clean", ACCURACY, clean[1], clusters, SHORT),
    ]
    if bare:
        spliced = next_tokens(subject, batch, bare)
        made += [
            mean("texts.loss.spliced", LOSS, spliced[0], clusters, SHORT),
            mean("texts.accuracy.spliced", ACCURACY, spliced[1], clusters, SHORT),
            difference("texts.loss.difference", LOSS, spliced[0], clean[0], clusters, SHORT),
            difference(
                "texts.accuracy.difference", ACCURACY, spliced[1], clean[1], clusters, SHORT
            ),
        ]
    return tuple(made)


SHORT = "a text of one token predicts none"


def next_tokens(subject: Subject, batch: Batch, edits: Sequence[Edit] = ()) -> Tensor:
    """[2 b] float64 on the CPU: mean negative log-likelihood of a text's tokens but the first, each
    after those before it, in nats, and the share of them that the model thinks likeliest; NaN for
    a text of one token."""
    wide = batch.tokens.shape[1] * subject.model.get_output_embeddings().weight.shape[0]
    out = torch.full((2, len(batch)), torch.nan, dtype=torch.float64)
    for rows in torch.arange(len(batch)).split(max(1, MOST_LOGITS // wide)):
        own = batch.rows(rows)
        logits = subject.outputs(own, edits, own.tokens.shape[1])[:, :-1]
        told, there = own.tokens[:, 1:, None], own.positions[:, :-1] >= 0
        n = there.sum(1).double()
        nll = -torch.log_softmax(logits, -1).gather(-1, told).squeeze(-1).double()
        right = logits.argmax(-1) == told.squeeze(-1)
        out[0, rows] = (torch.where(there, nll, 0.0).sum(1) / n).cpu()
        out[1, rows] = ((right & there).sum(1) / n).cpu()
    return out
