"""When the host asks a device something: the one place where that is decided.

To read a value the host waits until the device has done all that it was given, and gives it nothing
meanwhile. On the CPU nobody waits, so loops end as early as they can. Elsewhere a loop asks seldom,
and what has ended stays in it, masked and left as it is, until then: its results are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOOK = 8
"""Rounds of a loop between two looks at what has ended, on a device that has to be waited for."""

PASSES = 2
"""The same where a round runs blocks of the model, which costs more than a wait."""


def looks(device: torch.device) -> int:
    """Rounds between two looks: on the CPU nobody waits."""
    return 1 if device.type == "cpu" else LOOK


def due(rounds: int, device: torch.device, most: int = LOOK) -> bool:
    """Whether a loop asks the device after so many rounds. On the CPU it always does; elsewhere
    not before its first round, where there is hardly ever an end to find.

    most: rounds between two looks at most, for loops whose rounds cost more than a wait.
    """
    every = min(looks(device), most)
    return every == 1 or (rounds > 0 and rounds % every == 0)


def perhaps(some: Tensor, rounds: int = 0, most: int = LOOK) -> bool:
    """Whether `some` [...] bool may hold somewhere, as far as is known after so many rounds: True
    where the device is not asked. With no rounds: what only the CPU asks."""
    return not due(rounds, some.device, most) or bool(some.any())
