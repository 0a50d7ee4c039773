"""Interventions: what the defender does with the features. One file a kind."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, SerializeAsAny

from holdfast.config import Kind
from holdfast.edits import Edit
from holdfast.features import FeatureSet
from holdfast.registry import Registry
from holdfast.subject import Subject

INTERVENTIONS = Registry("interventions", {"clamp": "holdfast.interventions.clamp:Clamp"})


class InterventionKind(Kind):
    """An intervention: edits made from features."""

    def edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        """The edits, one a site."""
        raise NotImplementedError

    def candidates(self) -> tuple[InterventionKind, ...]:
        """The strengths to choose from on the tune split; itself if there is nothing to choose."""
        return (self,)


Intervention = Annotated[SerializeAsAny[InterventionKind], BeforeValidator(INTERVENTIONS.parse)]
