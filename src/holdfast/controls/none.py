"""No control: the audit itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from holdfast.controls import Case, ControlKind
from holdfast.setting import Setting


class NoControl(ControlKind):
    """The valid prompts, the right answer, the clamp on."""

    kind: Literal["none"] = "none"

    @property
    def alongside(self) -> bool:
        return True

    def case(self, setting: Setting, twin: Callable[[], Setting]) -> Case:
        rows = setting.valid
        return Case(
            subject=setting.subject,
            edits=setting.edits,
            features=setting.features,
            rows=rows,
            batch=setting.test.rows(rows),
            clean_margin=setting.clean_margin[rows],
            dropped={},
        )
