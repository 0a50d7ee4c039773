"""A judge that is a text classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.config import nearest
from holdfast.judges import JudgeError, Opinion
from holdfast.judges.pretrained import PretrainedJudge
from holdfast.reply import Reply


class Classifier(PretrainedJudge):
    """A model for sequence classification; the class of the largest logit decides.

    opinions_of: each of the model's own labels → what a reply of it is. All of them, so that no
    class is forgotten.
    """

    kind: Literal["classifier"] = "classifier"
    opinions_of: dict[str, Opinion] = Field(min_length=2)

    def opinions(self, replies: Sequence[Reply], device: str) -> list[Opinion]:
        model, tokenizer = self.loaded("AutoModelForSequenceClassification", device)
        meant = self._meant({int(i): str(name) for i, name in model.config.id2label.items()})
        rows = [tokenizer.encode(self.asked(reply)) for reply in replies]
        for reply, row in zip(replies, rows, strict=True):
            self.check_room(reply, len(row), model)
        # Decoders classify at the last token that is no padding and refuse to guess which it is.
        size = {} if model.config.get_text_config().pad_token_id is not None else {"size": 1}

        def scores(ids: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            return logits

        return [meant[c] for c in self.chosen(replies, rows, scores, model, **size)]

    def _meant(self, classes: dict[int, str]) -> dict[int, Opinion]:
        for name in self.opinions_of:
            if name not in classes.values():
                raise JudgeError(
                    f"{self.label}: has no label {name!r}: {nearest(name, classes.values())}"
                )
        missing = [name for name in classes.values() if name not in self.opinions_of]
        if missing:
            raise JudgeError(
                f"{self.label}: opinions_of does not say what {', '.join(map(repr, missing))} "
                "means: give every label of the model one of ours"
            )
        return {i: self.opinions_of[name] for i, name in classes.items()}
