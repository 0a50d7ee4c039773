"""Wrong target: can the search force an answer that was never there as cheaply as the right one?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from holdfast.controls import (
    Case,
    ControlKind,
    aim_elsewhere,
    aimed_among,
    already_there,
    what_is_forced,
)
from holdfast.setting import Setting


class WrongTarget(ControlKind):
    """The valid prompts with the clamp on, aimed at a third name or another letter.

    The target is neither the right answer nor the one given under the clamp, so that it takes a
    push like the right one does; the goal is the right answer's.
    """

    kind: Literal["wrong_target"] = "wrong_target"

    @property
    def alongside(self) -> bool:
        return True

    def case(self, setting: Setting, twin: Callable[[], Setting]) -> Case:
        rows = setting.valid
        asked = setting.test.rows(rows)
        batch = aim_elsewhere(asked, setting.suppressed_answer[rows])
        aimed, dropped = aimed_among(asked, batch)
        rows = rows[aimed]
        given = setting.suppressed_answer[rows]
        # A forced answer of several tokens is never the one given: it is longer than a token.
        shown = (batch.targets == given) & torch.as_tensor(batch.forced is None)
        shown = shown | already_there(setting.subject, batch, setting.edits)
        kept = (~shown).nonzero().flatten()
        return Case(
            subject=setting.subject,
            edits=setting.edits,
            features=setting.features,
            rows=rows[kept],
            batch=batch.rows(kept),
            clean_margin=setting.clean_margin[rows[kept]],
            dropped=dropped
            | {
                batch.ids[row]: "the only wrong target is the answer given under the clamp"
                for row in shown.nonzero().flatten().tolist()
            },
            own=False,
            measured=what_is_forced(asked, {batch.ids[row] for row in kept.tolist()}),
        )
