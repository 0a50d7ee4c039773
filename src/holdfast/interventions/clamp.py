"""Clamp features to values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from holdfast.config import Config
from holdfast.edits import Edit, FeatureEdit
from holdfast.features import FeatureSet
from holdfast.interventions import InterventionKind
from holdfast.positions import Where
from holdfast.saes.bank import FeatureBank
from holdfast.subject import Subject


class Scale(Config):
    """Pass on this share of the SAE's error: 1 keeps it, 0 drops it."""

    scale: float


class Clamp(InterventionKind):
    """Give features new values at the chosen positions (METHODS A.3).

    mode: `set` to value; `set_where_active` to value where the feature fires; `multiply` by value.
    value: a number in the SAE's activation units (a factor for `multiply`), or several, of which
    one is chosen on the tune split. error_term: what becomes of `x − D(E(x))`: keep it, drop it
    (the clamped reconstruction is passed on), or scale it.
    """

    kind: Literal["clamp"] = "clamp"
    mode: Literal["set", "set_where_active", "multiply"] = "set_where_active"
    value: float | Annotated[tuple[float, ...], Field(min_length=1)] = -5.0
    positions: Where = "all"
    include_bos: bool = False
    error_term: Literal["keep", "drop"] | Scale = "keep"

    @property
    def error_scale(self) -> float:
        if isinstance(self.error_term, Scale):
            return self.error_term.scale
        return 1.0 if self.error_term == "keep" else 0.0

    def candidates(self) -> tuple[Clamp, ...]:
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return tuple(self.model_copy(update={"value": value}) for value in values)

    def edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        assert isinstance(self.value, float), "a strength has to be chosen first"
        return tuple(
            FeatureEdit(
                bank=FeatureBank.of(subject.sae(site), features),
                mode=self.mode,
                value=self.value,
                where=self.positions,
                include_bos=self.include_bos,
                error_scale=self.error_scale,
                sae=None if self.error_scale == 1.0 else subject.sae(site),
            )
            for site in features.sites
        )
