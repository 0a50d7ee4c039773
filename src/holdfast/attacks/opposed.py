"""Prompts on which the model by itself does what the intervention makes it do.

What turns these without any intervention gets round the behavior's opposite as such.
"""

from __future__ import annotations

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind
from holdfast.setting import Setting

NONE_OPPOSED = "the study names no prompts on which the model by itself does the opposite"


def opposed_of(setting: Setting, behavior: BehaviorKind) -> list[Example]:
    """The opposed prompts that, asked as they are, do show the opposite."""
    if not setting.opposed:
        return []
    seen = behavior.observe(setting.subject, setting.subject.batch(setting.opposed))
    kept = zip(setting.opposed, seen.opposite.tolist(), strict=True)
    return [example for example, opposite in kept if opposite]
