"""Ignorant twin: what it costs to force the right answer into a model that never knew it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from holdfast.controls import Case, ControlKind
from holdfast.errors import StudyError
from holdfast.setting import Setting


class Ignorant(ControlKind):
    """The audit's valid prompts and goals, searched in a twin trained without the knowledge.

    The twin has features and clamp of its own, found the same way with its own SAEs. Prompts that
    it happens to answer right under its clamp are dropped.
    """

    kind: Literal["ignorant"] = "ignorant"

    def case(self, setting: Setting, twin: Callable[[], Setting]) -> Case:
        other = twin()
        if not torch.equal(other.test.tokens, setting.test.tokens):
            raise StudyError(
                "the ignorant twin tokenizes the prompts differently; it must share the subject's "
                "tokenizer, so that prompts can be paired"
            )
        rows = setting.valid
        lucky = other.suppressed_margin[rows] > 0
        dropped = {
            setting.test.ids[row]: "the twin gives this answer without a perturbation"
            for row in rows[lucky].tolist()
        }
        rows = rows[~lucky]
        return Case(
            subject=other.subject,
            edits=other.edits,
            features=other.features,
            rows=rows,
            batch=other.test.rows(rows),
            clean_margin=setting.clean_margin[rows],
            dropped=dropped,
        )
