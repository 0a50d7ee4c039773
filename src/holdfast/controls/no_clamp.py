"""No clamp: what forcing a wrong answer costs in the untouched model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from holdfast.controls import (
    Case,
    ControlKind,
    aim_elsewhere,
    aimed_among,
    already_there,
    what_is_forced,
)
from holdfast.setting import Setting


class NoClamp(ControlKind):
    """The valid prompts without the intervention, aimed at a wrong answer.

    The same features are held still, but nothing is clamped. It says what an answer costs that
    neither the prompt nor an intervention prepared.
    """

    kind: Literal["no_clamp"] = "no_clamp"

    def case(self, setting: Setting, twin: Callable[[], Setting]) -> Case:
        rows = setting.valid
        asked = setting.test.rows(rows)
        batch = aim_elsewhere(asked, asked.targets)
        aimed, dropped = aimed_among(asked, batch)
        rows = rows[aimed]
        shown = already_there(setting.subject, batch, ())
        kept = (~shown).nonzero().flatten()
        return Case(
            subject=setting.subject,
            edits=(),
            features=setting.features,
            rows=rows[kept],
            batch=batch.rows(kept),
            clean_margin=setting.clean_margin[rows[kept]],
            dropped=dropped
            | {
                batch.ids[row]: "the wrong target is there without the clamp"
                for row in shown.nonzero().flatten().tolist()
            },
            own=False,
            measured=what_is_forced(asked, {batch.ids[row] for row in kept.tolist()}),
        )
