"""Attacks: ways to bring a behavior back while the intervention is on. One file a kind.

The residual search, which sees activations, is every audit's own. The others are beside it and
judged alike: attempts in the prompt, by somebody who can only write to the model, the weaker threat
model; answers that are begun for the model, or drawn many times, which search nothing either; and a
soft suffix, which sees activations and moves only the prompt's side.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from holdfast.behaviors import BehaviorKind
from holdfast.config import Kind
from holdfast.controls import Case
from holdfast.errors import StudyError
from holdfast.recovery import RecoverySpec
from holdfast.registry import Registry
from holdfast.setting import Setting
from holdfast.variants import PathSpec

ATTACKS = Registry(
    "attacks",
    {
        "residual": "holdfast.attacks.residual:Residual",
        "role_play": "holdfast.attacks.role_play:RolePlay",
        "nested": "holdfast.attacks.nested:Nested",
        "multi_turn": "holdfast.attacks.multi_turn:MultiTurn",
        "prefill": "holdfast.attacks.prefill:Prefill",
        "sampling": "holdfast.attacks.sampling:Sampling",
        "soft_suffix": "holdfast.attacks.soft_suffix:SoftSuffix",
    },
)


Listed = Literal["trials", "attempts", "answers", "suffixes"]
"""The lists of a run's summary."""


@dataclass(frozen=True)
class Attacked:
    """What an attack is given: the intervention on a subject, and the prompts it flips.

    recovery: what a search is bound to; None for attacks that search nothing. paths: what a
    recovery is compared with, None for nothing. name: of the trial, "" for none. ballast: whether
    it is searched only because others were to be searched beside it; its result is wanted no more.
    """

    setting: Setting
    case: Case
    recovery: RecoverySpec | None
    seed: int
    paths: PathSpec | None = None
    name: str = ""
    ballast: bool = False

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around what is done for it alone, so that it is split as it was if it is done again."""
        with self.case.subject.batching.part(self.name) if self.name else nullcontext():
            yield


@dataclass(frozen=True)
class TrialResult:
    """What a trial found: `result` of the record, the saved tensors, and rows for every prompt.

    seconds: what the attack took; of what was done for several at once its share, by the lanes that
    were run. NaN where nobody looked.
    """

    result: dict[str, Any]
    tensors: dict[str, Tensor]
    examples: list[dict[str, Any]]
    seconds: float = float("nan")


class OwnSearch(NamedTuple):
    """What an attack searches by itself, through the whole model: in how many steps, with how many
    tokens put into every prompt, and whether a monitor of the held features is read beside it."""

    steps: int = 0
    added: int = 0
    monitored: bool = False


class AttackKind(Kind):
    """An attack. searches: whether it searches as the study's `recovery` says.

    Such an attack is an audit's own, with controls and a verdict; the others are run beside it.
    reads_likelihood: whether it also reads how likely the answers are that it judges.
    listed: in which list of a run's summary its trials stand, by what there is to say of them.
    """

    searches: ClassVar[bool] = False
    reads_likelihood: ClassVar[bool] = False
    listed: ClassVar[Listed] = "attempts"

    @property
    def label(self) -> str:
        """What it is called beside other attacks of its audit."""
        return self.kind

    @property
    def turns(self) -> tuple[int, ...]:
        """What it says to every prompt: turns of the user's, script by script; none of a search."""
        return ()

    @property
    def own_search(self) -> OwnSearch:
        """What it searches by itself; nothing of an attempt in words."""
        return OwnSearch()

    @property
    def answers(self) -> tuple[int, int, int]:
        """Answers to every prompt that it judges beside those: with the intervention, without it,
        and to every opposed prompt without it."""
        return 0, 0, 0

    def check(self, behavior: BehaviorKind) -> None:
        """Raise StudyError where it cannot be made on a behavior. Called when a study is planned,
        before anything is loaded."""

    def behavior_of(self, attacked: Attacked) -> BehaviorKind:
        """The behavior under attack, for attacks that are made on the audited one alone. Raises
        StudyError where a control asks for something else, or what `check` does."""
        behavior = attacked.setting.behavior
        if not attacked.case.own or behavior is None:
            raise StudyError(
                f"the attack {self.kind!r} is made on the behavior itself: run it with the control "
                "'none' and a behavior"
            )
        self.check(behavior)
        return behavior

    def run(self, attacked: Attacked) -> TrialResult:
        """Attack every audited prompt with the intervention on, and say what came back."""
        raise NotImplementedError

    def run_together(self, attacked: Sequence[Attacked]) -> Iterator[tuple[int, TrialResult]]:
        """Attack several times, and yield each result as it is made, with its place in the order;
        of ballast nothing.

        One after the other, unless the attack knows how to do what they have in common once.
        """
        for index, each in enumerate(attacked):
            if each.ballast:
                continue
            clock = time.perf_counter()
            with each.part():
                result = self.run(each)
            yield index, replace(result, seconds=time.perf_counter() - clock)


def as_kind(value: Any) -> Any:
    """`"role_play"` is short for `{kind = "role_play"}`."""
    return ATTACKS.parse({"kind": value} if isinstance(value, str) else value)


Attack = Annotated[SerializeAsAny[AttackKind], BeforeValidator(as_kind)]
