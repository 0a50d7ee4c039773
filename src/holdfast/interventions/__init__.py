"""Interventions: what the defender does with the features. One file a kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from holdfast.batch import Batch
from holdfast.config import Kind
from holdfast.edits import Edit
from holdfast.features import FeatureSet
from holdfast.registry import Registry
from holdfast.subject import Subject

INTERVENTIONS = Registry(
    "interventions",
    {
        "clamp": "holdfast.interventions.clamp:Clamp",
        "several": "holdfast.interventions.several:Several",
    },
)


class InterventionKind(Kind):
    """An intervention: edits made from features."""

    def clamped(self, found: FeatureSet) -> FeatureSet:
        """The features it clamps, which a recovery has to leave alone: those that were found."""
        return found

    def onto(self, features: FeatureSet) -> InterventionKind:
        """The same intervention on other features: itself, unless it names its own."""
        return self

    def fitted(
        self, subject: Subject, features: FeatureSet, retain: Sequence[Batch]
    ) -> InterventionKind:
        """The same intervention with what it learns from fit prompts to be left alone; itself if it
        learns nothing. features: as `edits` takes them."""
        return self

    def edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        """The edits. features: what `clamped` named, with its statistics on the fit split."""
        raise NotImplementedError

    def bare_edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        """What it does to the residual while it leaves every feature as it is: the error of its
        SAEs scaled or dropped. Empty where that is nothing."""
        return ()

    @property
    def formulas(self) -> tuple[str, ...]:
        """What it does to a feature's value z, a line each, for people to read."""
        return ()

    @property
    def runs_whole(self) -> bool:
        """Whether it needs the SAE's whole reconstruction at every token, and not only a slice."""
        return False

    @property
    def conditional(self) -> bool:
        """Whether it acts only where something is there that it looks for."""
        return False

    @property
    def decides_on_prompt(self) -> bool:
        """Whether it decides on a whole prompt at once, so that any token of it can change what it
        does at every other."""
        return False

    @property
    def learns(self) -> int:
        """How often `fitted` runs the fit prompts to be left alone."""
        return 0

    def candidates(self) -> tuple[InterventionKind, ...]:
        """The strengths to choose from on the tune split; itself if there is nothing to choose."""
        return (self,)


Intervention = Annotated[SerializeAsAny[InterventionKind], BeforeValidator(INTERVENTIONS.parse)]
