"""What an edit sees of the prompts it is applied to: rows, groups and absolute positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from holdfast.waiting import listed

T = TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """What an edit may know about the rows and columns it is applied to.

    ids: b example ids; groups: b group labels (feature sets can differ by group);
    positions [b s]: absolute, -1 for padding; prompt_length [b]: tokens in the prompt, BOS
    included; bos [b]: whether position 0 is a beginning-of-sequence token; template [b]: position
    of the first token of the chat template after the instruction, prompt_length without one;
    decided: what edits decided on these prompts, [b] by the id of what did. A frame of what follows
    a prompt, made by `replace`, has it from the prompt's. of_rows: what was worked out of the rows
    alone, likewise.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    positions: Tensor
    prompt_length: Tensor
    bos: Tensor
    template: Tensor
    decided: dict[int, tuple[object, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    of_rows: dict[int, tuple[object, Any]] = field(default_factory=dict, repr=False, compare=False)
    _known: dict[int, tuple[object, Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def once_for_rows(self, owner: object, work_out: Callable[[], T]) -> T:
        """`once` for what comes from ids and groups, whichever columns these are."""
        return _kept(self.of_rows, owner, work_out)

    def once(self, owner: object, work_out: Callable[[], T]) -> T:
        """What `owner` works out of the frame alone, worked out the first time it is asked for.

        The steps of a search pass one frame again and again. What comes from lists would be built
        and copied to the device each time, and the device waited for.
        """
        return _kept(self._known, owner, work_out)

    def to(self, device: torch.device) -> Frame:
        """The same frame on a device; itself if it is there."""
        if self.positions.device == device:
            return self
        names = ("positions", "prompt_length", "bos", "template")
        return replace(self, of_rows={}, **{name: getattr(self, name).to(device) for name in names})

    def rows(self, rows: Tensor) -> Frame:
        """The same columns for some rows, in the order given; repeats are allowed."""
        index = listed(rows)
        return Frame(
            tuple(self.ids[i] for i in index),
            tuple(self.groups[i] for i in index),
            self.positions[rows],
            self.prompt_length[rows],
            self.bos[rows],
            self.template[rows],
            {
                key: (owner, made[rows.to(made.device)])
                for key, (owner, made) in self.decided.items()
            },
        )

    def columns(self, columns: slice) -> Frame:
        return replace(self, positions=self.positions[:, columns])


def _kept(known: dict[int, tuple[object, Any]], owner: object, work_out: Callable[[], T]) -> T:
    if id(owner) not in known:
        known[id(owner)] = (owner, work_out())  # the owner too: ids are used again
    found: T = known[id(owner)][1]
    return found
