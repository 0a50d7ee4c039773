"""How often conditional clamps act: on what should be suppressed, and on what should be left alone.

A clamp that is gated (METHODS A.6) has side effects only where its gate opens; a gate that never
opens on what it is for suppresses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.edits import Edit, FeatureEdit
from holdfast.measure import Measurement, rate, share
from holdfast.positions import selected
from holdfast.sites import Site
from holdfast.subject import Subject

PREFIX = "trigger."
OWN = "test"
"""What the prompts that the clamp is for are called among the sets; neighbors have their names."""


@dataclass
class Openings:
    """Reads where a gated clamp's gate is open, as the edits before the clamp left the residual.

    opened, counted: example id → tokens that the clamp acts on, and that it would act on without
    its gate.
    """

    edit: FeatureEdit
    opened: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.edit.sites

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return frame.positions >= 0

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        assert self.edit.gate is not None
        there = selected(self.edit.where, self.edit.include_bos, frame)
        opens = self.edit.gate.opens(x, frame) & there
        self.opened |= dict(zip(frame.ids, opens.sum(1).tolist(), strict=True))
        self.counted |= dict(zip(frame.ids, there.sum(1).tolist(), strict=True))
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        """It reads what comes by."""


def triggers(
    subject: Subject, edits: Sequence[Edit], prompts: dict[str, Batch]
) -> tuple[Measurement, ...]:
    """`trigger.<set>.prompts` and `trigger.<set>.tokens` of every set of prompts under the edits.

    The share of prompts on which a gate opens at any token, and the mean share of a prompt's tokens
    on which one does; of several gated clamps that which opens most. Nothing where none is gated.
    """
    gated = [edit for edit in edits if isinstance(edit, FeatureEdit) and edit.gate is not None]
    if not gated:
        return ()
    made: list[Measurement] = []
    for name, batch in prompts.items():
        readers = {id(edit): Openings(edit) for edit in gated}
        passed: list[Any] = []
        for edit in edits:
            passed += [readers[id(edit)], edit] if id(edit) in readers else [edit]
        subject.read(batch, tuple(passed))
        opened, counted = (
            torch.tensor([[getattr(r, part)[i] for i in batch.ids] for r in readers.values()])
            for part in ("opened", "counted")
        )
        shares = (opened / counted.clamp_min(1)).amax(0)
        made.append(rate(f"{PREFIX}{name}.prompts", (opened > 0).any(0), batch.clusters))
        made.append(share(f"{PREFIX}{name}.tokens", shares, batch.clusters, unit="share of tokens"))
    return tuple(made)
