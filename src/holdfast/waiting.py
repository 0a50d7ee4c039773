"""How the host learns what a device has computed: the one place where that is decided.

To read a value the host waits until the device has done all that it was given, and meanwhile the
device is given nothing. On the CPU nobody waits, so loops end as early as they can. Elsewhere it
depends on what a round of a loop costs:

- Cheap rounds are a fixed few, and nobody asks whether they are needed (`perhaps`).
- Rounds that run the model are asked about, and answered a round later (`Behind`): the device has a
  round to do while the host reads of the last. So is what is asked before something else that the
  device has to do (`Question`).

What has ended or waits for an answer stays in a loop, masked and left as it is, until that is
known: its results are the same, and nothing depends on how fast a device is. Rows that the host
has chosen by an answer are sent without a wait, and not read back (`sent`, `listed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


def _apart(device: torch.device) -> bool:
    """Whether copies are made beside what the host does: there is a device, and none pretended."""
    return device.type != "cpu" and torch.accelerator.is_available()


class Behind:
    """What a loop asks in every round, answered a round later where the host would have to wait."""

    def __init__(self) -> None:
        self._asked: Question | None = None

    def read(self, values: Tensor) -> NDArray[Any] | None:
        """[...] as they are on the CPU; elsewhere as they were when this was last asked, None for
        the first time."""
        if not waits(values.device):
            return values.numpy()
        before, self._asked = self._asked, Question.of(values)
        return None if before is None else before.answer()

    def none(self, some: Tensor) -> bool:
        """Whether it is known that `some` [...] bool holds nowhere any more."""
        known = self.read(some)
        return known is not None and not known.any()

    def forget(self) -> None:
        """What was asked last is of rows that are gone: the next answer is as of a first."""
        self._asked = None


@dataclass(frozen=True)
class Question:
    """Values on their way to the host; event: that they are there; picked: those that are asked
    for, all where it is None."""

    values: Tensor
    event: torch.Event | None = None
    picked: tuple[int, ...] | None = None

    @classmethod
    def of(cls, values: Tensor) -> Question:
        """values [n …] as they are now."""
        if not _apart(values.device):
            return cls(values.to("cpu", copy=True))
        # Only into pinned memory is a copy made beside what both sides do.
        copy = torch.empty_like(values, device="cpu", pin_memory=True)
        copy.copy_(values, non_blocking=True)
        event = torch.Event(values.device)
        event.record(torch.accelerator.current_stream(values.device))
        return cls(copy, event)

    def rows(self, rows: Tensor) -> Question:
        """The same of some rows, in the order given."""
        now = range(len(self.values)) if self.picked is None else self.picked
        return replace(self, picked=tuple(now[i] for i in listed(rows)))

    def answer(self) -> NDArray[Any]:
        if self.event is not None:
            self.event.synchronize()
        values = np.asarray(self.values)
        return values if self.picked is None else values[list(self.picked)]


def carried(values: Tensor, device: torch.device) -> Tensor:
    """Values [...] that the host has, on a device that is not waited for."""
    if not _apart(device):
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def sent(rows: Sequence[int] | NDArray[Any], device: torch.device) -> Tensor:
    """Numbers [n] of rows that the host knows, on a device that is not waited for."""
    own = carried(torch.from_numpy(np.array(rows, dtype=np.int64)), device)
    own.known = tuple(rows)  # type: ignore[attr-defined]
    return own


def listed(rows: Tensor) -> list[int]:
    """Numbers [n] of rows as the host has them. It waits for those that it did not send itself."""
    known: tuple[int, ...] | None = getattr(rows, "known", None)
    return rows.tolist() if known is None else [int(i) for i in known]
