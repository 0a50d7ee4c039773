"""How the host learns what a device has computed: the one place where that is decided.

To read a value the host waits until the device has done all that it was given, and meanwhile the
device is given nothing. On the CPU nobody waits, so loops end as early as they can. Elsewhere it
depends on what a round of a loop costs:

- Cheap rounds are a fixed few, and nobody asks whether they are needed (`perhaps`).
- Rounds that run the model are asked about, and answered a round later (`Behind`): the device has a
  round to do while the host reads of the last.

What has ended stays in a loop, masked and left as it is, until that is known: its results are the
same, and nothing depends on how fast a device is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def waits(device: torch.device) -> bool:
    """Whether the host has to wait to read what is on a device: not on the CPU."""
    return device.type != "cpu"


def perhaps(some: Tensor) -> bool:
    """Whether `some` [...] bool may hold somewhere: True where the device is not asked."""
    return waits(some.device) or bool(some.any())


class Behind:
    """What a loop asks in every round, answered a round later where the host would have to wait."""

    def __init__(self) -> None:
        self._asked: _Asked | None = None

    def read(self, values: Tensor) -> NDArray[Any] | None:
        """[...] as they are on the CPU; elsewhere as they were when this was last asked, None for
        the first time."""
        if not waits(values.device):
            return values.numpy()
        before, self._asked = self._asked, _Asked.of(values)
        return None if before is None else before.answer()

    def none(self, some: Tensor) -> bool:
        """Whether it is known that `some` [...] bool holds nowhere any more."""
        known = self.read(some)
        return known is not None and not known.any()

    def forget(self) -> None:
        """What was asked last is of rows that are gone: the next answer is as of a first."""
        self._asked = None


@dataclass(frozen=True)
class _Asked:
    """Values on their way to the host; event: that they are there."""

    values: Tensor
    event: torch.Event | None

    @classmethod
    def of(cls, values: Tensor) -> _Asked:
        if values.device.type == "cpu" or not torch.accelerator.is_available():  # pretended
            return cls(values.to("cpu", copy=True), None)
        # Only into pinned memory is a copy made beside what both sides do.
        copy = torch.empty_like(values, device="cpu", pin_memory=True)
        copy.copy_(values, non_blocking=True)
        event = torch.Event(values.device)
        event.record(torch.accelerator.current_stream(values.device))
        return cls(copy, event)

    def answer(self) -> NDArray[Any]:
        if self.event is not None:
            self.event.synchronize()
        return np.asarray(self.values)
