"""Controls: the same search asked something that should be hard if "recovered" means anything.

A control is an ordinary trial on the same prompts, paired by example id. One file a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, SerializeAsAny, field_validator
from torch import Tensor

from holdfast.batch import Batch
from holdfast.canonical import digest
from holdfast.config import Kind
from holdfast.constraints import CONSTRAINTS
from holdfast.edits import Edit
from holdfast.errors import EmptyValidSetError
from holdfast.features import FeatureSet
from holdfast.registry import Registry
from holdfast.setting import Setting
from holdfast.subject import Subject

CONTROLS = Registry(
    "controls",
    {
        "none": "holdfast.controls.none:NoControl",
        "wrong_target": "holdfast.controls.wrong_target:WrongTarget",
        "no_clamp": "holdfast.controls.no_clamp:NoClamp",
        "ignorant": "holdfast.controls.ignorant:Ignorant",
        "random_features": "holdfast.controls.random_features:RandomFeatures",
    },
)


@dataclass(frozen=True)
class Case:
    """What is searched: n audited rows of the test batch, and what is asked of them.

    rows [n] of the test batch; batch: these rows, aimed at the answer that is searched for;
    clean_margin [n]: of the right answer in the audited subject, which sets the goal; dropped:
    example id → why a valid row is not searched; own: whether what is searched is the behavior
    itself and not an answer that is forced in its place. setting: what the rows are the valid set
    of, if not of the audit's own setting; if_empty: what it says if there are none, for a control
    whose finding that is.
    """

    subject: Subject
    edits: tuple[Edit, ...]
    features: FeatureSet
    rows: Tensor
    batch: Batch
    clean_margin: Tensor
    dropped: dict[str, str]
    own: bool = True
    setting: Setting | None = None
    if_empty: str = ""


class ControlKind(Kind):
    """A control. only_with: constraints it is run beside; empty for every one."""

    only_with: tuple[str, ...] = ()

    @field_validator("only_with")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            CONSTRAINTS.get(name)
        return names

    @property
    def clamps_others(self) -> bool:
        """Whether it measures the intervention anew, on other features than the audit's."""
        return False

    @property
    def alongside(self) -> bool:
        """Whether it searches prompts of the audit under the audit's own clamp, so that its rows
        can be searched in one batch with the audit's."""
        return False

    def case(self, setting: Setting, twin: Callable[[], Setting]) -> Case:
        """What to search, from the audit's setting and, if it is needed, its ignorant twin's."""
        raise NotImplementedError


def aim_elsewhere(batch: Batch, predicted: Tensor) -> Batch:
    """The same prompts, aimed at an alternative that the model does not give now.

    predicted [b]: the token each prompt is answered with at present. Among the alternatives that
    are neither that nor the right answer one is drawn by example id, so that it is neither the
    easiest nor the hardest. It must beat the right answer and all others; where answers do not rule
    each other out, what the right answer has to beat, and no more. Where answers of several
    tokens are read, it is another prompt's answer of the same length, drawn likewise.
    """
    if batch.forced is not None:
        return batch.forcing(_unrelated(batch))
    targets, rivals = [], []
    answers = batch.answers()
    for row in range(len(batch)):
        right = int(batch.targets[row])
        free = [
            token
            for token in dict.fromkeys(batch.alternatives[row].tolist())
            if token not in (right, int(predicted[row]))
        ]
        # A single alternative that is given already leaves nothing else to aim at: callers drop
        # such rows, which show the wrong target before any search.
        free = free or [int(batch.alternatives[row, 0])]
        target = free[int(digest(batch.ids[row])[:8], 16) % len(free)]
        rivals_of = answers if batch.readout.exclusive else batch.rivals
        others = [t for t in dict.fromkeys(rivals_of[row].tolist()) if t != target]
        targets.append(target)
        rivals.append(others)
    width = max((len(others) for others in rivals), default=1)
    padded = [others + others[:1] * (width - len(others)) for others in rivals]
    device = batch.tokens.device
    return batch.aimed(
        torch.as_tensor(targets, dtype=torch.long, device=device),
        torch.as_tensor(padded, dtype=torch.long, device=device).reshape(len(batch), width),
    )


def already_there(subject: Subject, batch: Batch, edits: Sequence[Edit]) -> Tensor:
    """[b] bool: a wrong answer shows before any search.

    Where one answer rules out the others it is the one given, which callers know.
    """
    if batch.readout.exclusive or not len(batch):
        return torch.zeros(len(batch), dtype=torch.bool, device=batch.targets.device)
    return batch.margin(subject.read(batch, edits)) > 0


def _unrelated(batch: Batch) -> list[list[int]]:
    """For each prompt the first tokens of another's answer, as many as its own has.

    Where all answers begin alike, the end of another prompt's instruction takes their place: text
    of the same language and length that answers nothing. Raises EmptyValidSetError if there is no
    other prompt that long.
    """
    assert batch.forced is not None
    answers = [[token for token in row if token >= 0] for row in batch.forced.tolist()]
    asked = batch.unforced()
    instructions = [
        asked.tokens[row, (asked.positions[row] >= 0)][: int(asked.template[row])].tolist()
        for row in range(len(batch))
    ]
    found = []
    for row, own in enumerate(answers):
        n = len(own)
        others = [a[:n] for a in answers if len(a) >= n and a[:n] != own] or [
            text[-n:] for i, text in enumerate(instructions) if i != row and len(text) > n
        ]
        if not others:
            raise EmptyValidSetError(
                f"prompt {batch.ids[row]}: neither another prompt's clean answer nor its "
                f"instruction gives {n} other tokens to force; read fewer tokens (n_forced), or "
                "audit more prompts",
                {"valid": len(batch)},
            )
        found.append(others[int(digest(batch.ids[row])[:8], 16) % len(others)])
    return found


def as_kind(value: Any) -> Any:
    """`"wrong_target"` is short for `{kind = "wrong_target"}`."""
    return CONTROLS.parse({"kind": value} if isinstance(value, str) else value)


Control = Annotated[SerializeAsAny[ControlKind], BeforeValidator(as_kind)]
