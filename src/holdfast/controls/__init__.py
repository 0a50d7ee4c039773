"""Controls: the same search asked something that should be hard if "recovered" means anything.

A control is an ordinary trial on the same prompts, paired by example id. One file a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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
from holdfast.unrelated import TEXTS, unrelated

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


NO_TEXT = "no other prompt has an answer or an instruction of so many other tokens to force"


@dataclass(frozen=True)
class Case:
    """What is searched: n audited rows of the test batch, and what is asked of them.

    rows [n] of the test batch; batch: these rows, aimed at the answer that is searched for;
    clean_margin [n]: of the right answer in the audited subject, which sets the goal; dropped:
    example id → why a valid row is not searched; own: whether what is searched is the behavior
    itself and not an answer that is forced in its place. setting: what the rows are the valid set
    of, if not of the audit's own setting; if_empty: what it says if there are none, for a control
    whose finding that is; measured: what a control found beside what is searched, plain numbers.
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
    measured: Mapping[str, Any] = field(default_factory=dict)


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
    def n_clamps(self) -> int:
        """How often it measures the intervention anew, on other features than the audit's."""
        return 0

    @property
    def clamps_others(self) -> bool:
        return self.n_clamps > 0

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
    tokens are read, it is another prompt's answer of the same length, drawn likewise; prompts for
    which there is none are left out (`aimed_among` says which). Raises EmptyValidSetError if that
    leaves no prompt.
    """
    if not len(batch):  # no prompt is valid, which the trial says
        return batch
    if batch.forced is not None:
        return _aim_at_text(batch)
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


def aimed_among(batch: Batch, aimed: Batch) -> tuple[Tensor, dict[str, str]]:
    """Rows of a batch that `aim_elsewhere` aimed, in the order of `aimed`, and example id → why of
    the others."""
    row_of = {example: row for row, example in enumerate(batch.ids)}
    rows = [row_of[example] for example in aimed.ids]
    left = set(batch.ids) - set(aimed.ids)
    index = torch.as_tensor(rows, dtype=torch.long, device=batch.tokens.device)
    return index, dict.fromkeys(sorted(left), NO_TEXT)


def already_there(subject: Subject, batch: Batch, edits: Sequence[Edit]) -> Tensor:
    """[b] bool: a wrong answer shows before any search.

    Where one answer rules out the others it is the one given, which callers know.
    """
    if batch.readout.exclusive or not len(batch):
        return torch.zeros(len(batch), dtype=torch.bool, device=batch.targets.device)
    return batch.margin(subject.read(batch, edits)) > 0


def _aim_at_text(batch: Batch) -> Batch:
    """The prompts for which there is an unrelated answer of several tokens, read for it."""
    found = unrelated(batch)
    kept = [row for row, other in enumerate(found) if other is not None]
    if not kept:
        longest = max(len(row[row >= 0]) for row in batch.forced) if batch.forced is not None else 0
        raise EmptyValidSetError(
            f"no prompt of {len(batch)} can be aimed elsewhere: neither another prompt's clean "
            f"answer nor its instruction gives as many other tokens to force (up to {longest}); "
            "read fewer tokens (n_forced), or audit more prompts",
            {"valid": len(batch)},
        )
    rows = torch.as_tensor(kept, dtype=torch.long, device=batch.tokens.device)
    return batch.rows(rows).forcing([other.tokens for other in found if other is not None])


def what_is_forced(asked: Batch, kept: Collection[str]) -> dict[str, Any]:
    """For a record: of the prompts with these ids, how many are aimed at which kind of text; empty
    where a single token is the answer. asked: the batch before it was aimed elsewhere."""
    if asked.forced is None or not len(asked):
        return {}
    kinds = [
        other.kind
        for example, other in zip(asked.ids, unrelated(asked), strict=True)
        if other is not None and example in kept
    ]
    return {"forced_text": {kind: kinds.count(kind) for kind in TEXTS}}


def as_kind(value: Any) -> Any:
    """`"wrong_target"` is short for `{kind = "wrong_target"}`."""
    return CONTROLS.parse({"kind": value} if isinstance(value, str) else value)


Control = Annotated[SerializeAsAny[ControlKind], BeforeValidator(as_kind)]
