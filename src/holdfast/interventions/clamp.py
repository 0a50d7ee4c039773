"""Clamp features to values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.config import Config
from holdfast.edits import Edit, FeatureEdit
from holdfast.errors import FeatureError, StudyError
from holdfast.features import FeatureSet, SiteFeatures, ids_of
from holdfast.gates import DirectionGate, Gate, PromptGate, Sensor
from holdfast.interventions import InterventionKind
from holdfast.positions import Where, selected
from holdfast.running import Running, by_row, joined
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject


class Scale(Config):
    """Pass on this share of the SAE's error: 1 keeps it, 0 drops it."""

    scale: float


class Condition(Config):
    """Act only on tokens where a feature of the clamped site exceeds a value, before the clamp."""

    feature: int = Field(ge=0)
    above: float = Field(0.0, ge=0)

    @property
    def words(self) -> str:
        return f"where feature {self.feature} exceeds {self.above:g}"

    def gate(self, subject: Subject, clamped: FeatureBank, include_bos: bool) -> Gate:
        return Gate(_bank(subject, clamped.site, (self.feature,)), self.above)


class Learnt(Config):
    """A threshold that is learnt from prompts to be left alone: this percentile of what it is on
    there, from 0 to 100."""

    percentile: float = Field(ge=0, le=100)

    def __str__(self) -> str:
        return f"percentile {self.percentile:g} of the neighbors"

    def of(self, values: Sequence[float]) -> float:
        return float(np.percentile(values, self.percentile))


class PromptCondition(Config):
    """Act on a whole prompt and its answer, or not at all: if on more than `share` of the prompt's
    tokens a feature of the clamped site exceeds `above`, before the clamp (METHODS A.6).

    Either can be learnt from the neighbors' fit prompts without the clamp, as a dynamic guardrail
    does: `above` as a percentile, over their tokens, of the largest value of these features;
    `share` as a percentile, over their prompts, of the share of tokens above it. features: any of
    these counts; left out, any of the clamped ones. BOS counts where it is clamped.
    """

    share: Annotated[float, Field(ge=0, lt=1)] | Learnt
    above: Annotated[float, Field(ge=0)] | Learnt = 0.0
    features: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @property
    def learns(self) -> bool:
        return isinstance(self.above, Learnt) or isinstance(self.share, Learnt)

    @property
    def words(self) -> str:
        named = f"of {list(self.features)}" if self.features else "clamped feature"
        above, share = (
            f"{value:g}" if isinstance(value, float) else str(value)
            for value in (self.above, self.share)
        )
        return f"on prompts where any {named} exceeds {above} on more than {share} of the tokens"

    def gate(self, subject: Subject, clamped: FeatureBank, include_bos: bool) -> PromptGate:
        if isinstance(self.above, Learnt) or isinstance(self.share, Learnt):
            raise StudyError(
                "the clamp's condition has thresholds to learn; give what `fitted` returns"
            )
        return PromptGate(self._bank(subject, clamped), self.above, self.share, include_bos)

    def learnt(
        self, subject: Subject, clamped: FeatureBank, include_bos: bool, retain: Sequence[Batch]
    ) -> PromptCondition:
        """The same condition with its thresholds as numbers.

        retain: prompts to be left alone. Raises StudyError where there are none. A share of 1 comes
        of prompts whose every token is above, and then the clamp never acts: its trigger rates say
        so.
        """
        bank = self._bank(subject, clamped)
        largest: list[list[float]] = []

        def with_rows(before: list[list[float]], frame: Frame, x: Tensor) -> list[list[float]]:
            values = bank.activations(x, frame).amax(-1)
            there = selected("prompt", include_bos, frame)
            return before + [own[mask].tolist() for own, mask in zip(values, there, strict=True)]

        for batch in retain:
            read = Running(bank.site, largest, with_rows)
            subject.outputs(batch, (read,))
            largest = read.state
        if not any(largest):
            raise StudyError(
                "the clamp's condition is learnt from the neighbors' fit prompts, and this "
                "behavior has none; write its thresholds as numbers"
            )
        above, share = self.above, self.share
        if isinstance(above, Learnt):
            above = above.of([value for own in largest for value in own])
        if isinstance(share, Learnt):
            share = share.of([sum(v > above for v in own) / len(own) for own in largest if own])
        return self.model_copy(update={"above": above, "share": share})

    def _bank(self, subject: Subject, clamped: FeatureBank) -> FeatureBank:
        return _bank(subject, clamped.site, self.features) if self.features else clamped


class DirectionCondition(Config):
    """Act on a whole prompt and its answer, or not at all: if at the prompt's last token the cosine
    of the residual with a direction is over `above` (CAST; METHODS A.6).

    cosine_with: a feature, whose decoder row is the direction, of the SAE at `site`, the clamped
    one if left out and none after it. `holdfast direction` writes a direction that was found
    otherwise as an SAE whose feature 0 it is. above: a number, or a percentile of the cosines of
    the neighbors' fit prompts without the clamp.
    """

    cosine_with: int = Field(ge=0)
    site: str | None = None
    above: Annotated[float, Field(ge=-1, lt=1)] | Learnt

    @property
    def learns(self) -> bool:
        return isinstance(self.above, Learnt)

    @property
    def words(self) -> str:
        above = f"{self.above:g}" if isinstance(self.above, float) else str(self.above)
        return (
            f"on prompts whose last token's cosine with feature {self.cosine_with} at "
            f"{self.site or 'the clamped site'} exceeds {above}"
        )

    def gate(self, subject: Subject, clamped: FeatureBank, include_bos: bool) -> DirectionGate:
        if isinstance(self.above, Learnt):
            raise StudyError(
                "the clamp's condition has a threshold to learn; give what `fitted` returns"
            )
        return self._gate(subject, clamped, self.above)

    def learnt(
        self, subject: Subject, clamped: FeatureBank, include_bos: bool, retain: Sequence[Batch]
    ) -> DirectionCondition:
        """The same condition with its threshold as a number. Raises StudyError without prompts to
        be left alone."""
        assert isinstance(self.above, Learnt)
        gate, cosines = self._gate(subject, clamped, 0.0), []
        for batch in retain:
            read = by_row(gate.site, lambda frame, x: gate.cosines(x, frame))
            subject.outputs(batch, (read,))
            cosines += joined(read, "cpu").tolist()
        if not cosines:
            raise StudyError(
                "the clamp's condition is learnt from the neighbors' fit prompts, and this "
                "behavior has none; write its threshold as a number"
            )
        return self.model_copy(update={"above": self.above.of(cosines)})

    def _gate(self, subject: Subject, clamped: FeatureBank, above: float) -> DirectionGate:
        site = clamped.site if self.site is None else Site.parse(self.site)
        if site > clamped.site:
            raise StudyError(
                f"the clamp at {clamped.site} has a condition at {site}, which comes after it; "
                "read the clamped site or one before it"
            )
        (row,) = _bank(subject, site, (self.cosine_with,)).W_dec[0]
        return DirectionGate(site, row, above)


class Clamp(InterventionKind):
    """Give features new values at the chosen positions (METHODS A.3).

    mode: `set` to value; `set_where_active` to value where the feature fires; `multiply` by value;
    `add` value; `floor` and `ceiling`: at least, at most value; `mean`: set to the feature's mean
    on the fit split; `max_scaled`: set to value times its maximum there. value: a number in the
    SAE's activation units (a factor for `multiply` and `max_scaled`, unused by `mean`), or several,
    of which one is chosen on the tune split. units: what value is
    in, the SAE's own activations, or those it had if its decoder rows had norm 1, which dashboards
    show. features: those to clamp, instead of what discovery
    finds. condition: act only where a feature is on, or only on prompts in which features are on
    often or whose last token points in a direction. error_term: what becomes of `x − D(E(x))`:
    keep it, drop it (the clamped reconstruction is passed on), or scale it.
    """

    kind: Literal["clamp"] = "clamp"
    mode: Literal[
        "set", "set_where_active", "multiply", "add", "floor", "ceiling", "mean", "max_scaled"
    ] = "set_where_active"
    value: float | Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    positions: Where = "all"
    include_bos: bool = False
    units: Literal["activation", "unit_decoder"] = "activation"
    features: tuple[SiteFeatures, ...] = ()
    condition: Condition | PromptCondition | DirectionCondition | None = None
    error_term: Literal["keep", "drop"] | Scale = "keep"

    @model_validator(mode="after")
    def _value_fits_mode(self) -> Clamp:
        if (self.value is None) != (self.mode == "mean"):
            raise ValueError(
                "mode 'mean' takes its values from the fit split, so leave `value` out"
                if self.mode == "mean"
                else f"mode {self.mode!r} needs a `value`"
            )
        if self.units == "unit_decoder" and self.mode in ("multiply", "mean", "max_scaled"):
            raise ValueError(
                f"mode {self.mode!r} has no units: its values are multiples of what features do"
            )
        sites = {feature.site for feature in self.features}
        if self.condition is not None and len(sites) > 1:
            raise ValueError(
                "a condition reads a feature of the clamped site; clamp one site with it, and put "
                "clamps of other sites beside it in an intervention of kind 'several'"
            )
        return self

    @property
    def error_scale(self) -> float:
        if isinstance(self.error_term, Scale):
            return self.error_term.scale
        return 1.0 if self.error_term == "keep" else 0.0

    @property
    def runs_whole(self) -> bool:
        return self.error_scale != 1.0

    @property
    def conditional(self) -> bool:
        return self.condition is not None

    @property
    def decides_on_prompt(self) -> bool:
        return isinstance(self.condition, PromptCondition | DirectionCondition)

    @property
    def learns(self) -> int:
        if not isinstance(self.condition, PromptCondition | DirectionCondition):
            return 0
        return int(self.condition.learns)

    @property
    def formulas(self) -> tuple[str, ...]:
        value = "c" if isinstance(self.value, tuple) else f"{self.value}"
        rule = {
            "set": f"z ← {value}",
            "set_where_active": f"z ← {value} where z > 0",
            "multiply": f"z ← {value} · z",
            "add": f"z ← z + {value}",
            "floor": f"z ← max(z, {value})",
            "ceiling": f"z ← min(z, {value})",
            "mean": "z ← the feature's mean on the fit split",
            "max_scaled": f"z ← {value} · the feature's maximum on the fit split",
        }[self.mode]
        bos = "BOS included" if self.include_bos else "BOS left alone"
        gate = f", {self.condition.words}" if self.condition else ""
        error = {1.0: "error term kept", 0.0: "error term dropped"}.get(
            self.error_scale, f"error term times {self.error_scale:g}"
        )
        return (f"{rule} at {self.positions} positions, {bos}{gate}; {error}",)

    def candidates(self) -> tuple[Clamp, ...]:
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return tuple(self.model_copy(update={"value": value}) for value in values)

    def clamped(self, found: FeatureSet) -> FeatureSet:
        return FeatureSet(entries=self.features, source="given") if self.features else found

    def onto(self, features: FeatureSet) -> Clamp:
        return self.model_copy(update={"features": features.entries}) if self.features else self

    def fitted(
        self, subject: Subject, features: FeatureSet, retain: Sequence[Batch]
    ) -> InterventionKind:
        if not isinstance(self.condition, PromptCondition | DirectionCondition):
            return self
        if not self.learns:
            return self
        if len(features.sites) > 1:
            return self  # which `edits` refuses
        (site,) = features.sites
        bank = FeatureBank.of(subject.sae(site), features)
        condition = self.condition.learnt(subject, bank, self.include_bos, retain)
        return self.model_copy(update={"condition": condition})

    def edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        if isinstance(self.value, tuple):
            raise StudyError(
                f"the clamp lists the values {list(self.value)} to choose from; take one of its "
                "`candidates()`"
            )
        if self.features and ids_of(self.features) != ids_of(features.entries):
            raise FeatureError(
                f"the clamp names its own features, {ids_of(self.features)}, and was given "
                f"{ids_of(features.entries)}; give what `clamped` returns"
            )
        if self.condition is not None and len(features.sites) > 1:
            raise StudyError(
                f"a condition reads a feature of the clamped site, but the features are at "
                f"{', '.join(map(str, features.sites))}; clamp one site with it"
            )
        made = tuple(self._edit(subject, features, site) for site in features.sites)
        gates = [edit.gate for edit in made]
        return (*(Sensor(gate) for gate in gates if isinstance(gate, DirectionGate)), *made)

    def bare_edits(self, subject: Subject, features: FeatureSet) -> tuple[Edit, ...]:
        if self.error_scale == 1.0:
            return ()
        untouched = {"mode": "multiply", "value": 1.0, "units": "activation"}
        return self.model_copy(update=untouched).edits(subject, features)

    def _edit(self, subject: Subject, features: FeatureSet, site: Site) -> FeatureEdit:
        sae = subject.sae(site)
        # Before the bank, which shares the encoder of a TopK that is in memory.
        whole = None if self.error_scale == 1.0 else sae.full()
        bank = FeatureBank.of(sae, features)
        given = self.condition
        return FeatureEdit(
            bank=bank,
            mode="set" if self.mode in ("mean", "max_scaled") else self.mode,
            value=self._values(features, bank),
            where=self.positions,
            include_bos=self.include_bos,
            error_scale=self.error_scale,
            sae=whole,
            gate=None if given is None else given.gate(subject, bank, self.include_bos),
        )

    def _values(self, features: FeatureSet, bank: FeatureBank) -> float | Tensor:
        """One value for all features, or [g k] where the fit split gives each its own."""
        if self.mode not in ("mean", "max_scaled"):
            assert isinstance(self.value, float)
            if self.units == "activation":
                return self.value
            # A dashboard shows z·‖W_dec[i]‖: what SAELens calls the SAE with its norms folded.
            length = bank.W_dec.norm(dim=2)
            return torch.where(bank.valid, self.value / length.clamp_min(1e-30), 0.0)
        factor = 1.0 if self.mode == "mean" else self.value
        assert isinstance(factor, float)
        values = torch.zeros_like(bank.b_enc)
        for row, entry in enumerate(features.at(bank.site)):
            measured = entry.mean if self.mode == "mean" else entry.max
            if not measured:
                raise StudyError(
                    f"mode {self.mode!r} needs what each feature does on the fit split, and none "
                    f"was measured at {bank.site} for group {entry.group!r}; give the fit split "
                    "prompts of every group"
                )
            values[row, : len(measured)] = factor * torch.as_tensor(measured)
        return values


def _bank(subject: Subject, site: Site, ids: tuple[int, ...]) -> FeatureBank:
    """A bank of some features, for prompts of every group."""
    only = SiteFeatures(site=str(site), ids=ids)
    return FeatureBank.of(subject.sae(site), FeatureSet(entries=(only,), source="given"))
