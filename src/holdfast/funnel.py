"""The funnel: how many prompts reached each stage of a trial, and why the others did not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holdfast.controls import Case
from holdfast.setting import Setting

BROKEN = ("degenerate", "empty")
"""Labels of a reply that says nothing."""


def funnel_of(setting: Setting, case: Case, recovered: Tensor | None) -> dict[str, Any]:
    """How many prompts reached each stage, and why the others did not."""
    stages = {
        "tried": len(setting.test),
        "clean": int(setting.clean.sum()),
        "suppressed": int(setting.suppressed.sum()),
        "valid": len(case.rows),
    }
    if recovered is not None:
        stages["recovered"] = int(recovered.sum())
    reasons: dict[str, int] = {}
    for reason in dropped_of(setting, case).values():
        reasons[reason] = reasons.get(reason, 0) + 1
    funnel = {"stages": stages, "dropped": reasons, "splits": setting.sizes}
    collapsed = collapsed_of(setting)
    return funnel if collapsed is None else funnel | {"collapsed": collapsed}


def collapsed_of(setting: Setting) -> int | None:
    """How many prompts the intervention only broke: the clean model shows the behavior, and the
    reply under the clamp is degenerate or empty. That is no suppression, so none of them is valid
    (METHODS B). None where nothing is read from text."""
    if setting.changed is None:
        return None
    broken = [label in BROKEN for label in setting.changed.labels]
    return int((setting.clean & torch.as_tensor(broken, device=setting.clean.device)).sum())


def dropped_of(setting: Setting, case: Case) -> dict[str, str]:
    """Example id → why it is not audited."""
    dropped = dict(case.dropped)
    for row, example in enumerate(setting.test.ids):
        if not setting.clean[row]:
            seen = "" if setting.observed is None else f": {setting.observed.labels[row]}"
            where = " on every prompt of its cluster" if setting.shown[row] else ""
            dropped[example] = f"the clean model does not show the behavior{where}{seen}"
        elif not setting.suppressed[row]:
            seen = "" if setting.changed is None else f": {setting.changed.labels[row]}"
            dropped[example] = f"the intervention does not suppress it{seen}"
    return dropped
