"""Several interventions at once, on the same site or on others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from holdfast.batch import Batch
from holdfast.edits import Edit
from holdfast.errors import FeatureError
from holdfast.features import FeatureSet
from holdfast.interventions import Intervention, InterventionKind
from holdfast.subject import Subject


class Several(InterventionKind):
    """Interventions that act together; at one site in the order given, each on what the last left.

    Each acts on features of its own, those it names or those that were found, as it would alone; a
    recovery has to leave all of them where they are. Where some have several strengths to choose
    from, every combination is tried on the tune split.
    """

    kind: Literal["several"] = "several"
    of: Annotated[tuple[Intervention, ...], Field(min_length=1)]

    @property
    def formulas(self) -> tuple[str, ...]:
        return tuple(line for member in self.of for line in member.formulas)

    @property
    def runs_whole(self) -> bool:
        return any(member.runs_whole for member in self.of)

    @property
    def conditional(self) -> bool:
        return any(member.conditional for member in self.of)

    @property
    def decides_on_prompt(self) -> bool:
        return any(member.decides_on_prompt for member in self.of)

    @property
    def learns(self) -> int:
        return sum(member.learns for member in self.of)

    def candidates(self) -> tuple[Several, ...]:
        combinations = itertools.product(*(member.candidates() for member in self.of))
        return tuple(self.model_copy(update={"of": members}) for members in combinations)

    def clamped(self, found: FeatureSet) -> FeatureSet:
        return FeatureSet.union([member.clamped(found) for member in self.of])

    def onto(self, features: FeatureSet) -> Several:
        own = zip(self.of, features.parts, strict=True)
        return self.model_copy(update={"of": tuple(member.onto(part) for member, part in own)})

    def fitted(
        self, subject: Subject, features: FeatureSet, retain: Sequence[Batch]
    ) -> InterventionKind:
        own = zip(self.of, features.parts, strict=True)
        members = tuple(member.fitted(subject, part, retain) for member, part in own)
        return self.model_copy(update={"of": members})

    def bare_edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        own = zip(self.of, features.parts, strict=True)
        return tuple(edit for member, part in own for edit in member.bare_edits(subject, part))

    def edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        if len(features.parts) != len(self.of):
            raise FeatureError(
                f"{len(self.of)} interventions need a part of the features each, and these have "
                f"{len(features.parts)} parts; give what `clamped` returns"
            )
        own = zip(self.of, features.parts, strict=True)
        return tuple(edit for member, part in own for edit in member.edits(subject, part))
