"""Random features: is it these features that matter, or would as many others do?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.canonical import digest
from holdfast.controls import Case, ControlKind
from holdfast.errors import FeatureError, StudyError
from holdfast.features import EVERY_GROUP, FeatureSet, SiteFeatures
from holdfast.measure import measured
from holdfast.positions import selected
from holdfast.running import Running
from holdfast.saes.sae import SAE
from holdfast.setting import Setting
from holdfast.sites import Site
from holdfast.statistics import crossed_bootstrap
from holdfast.subject import Subject


class RandomFeatures(ControlKind):
    """The same clamp, of the same strength, on as many features drawn at random (METHODS C.5).

    For every clamped feature one is drawn, without repeats, among the `among` features of its SAE
    that are clamped for no group and whose firing rate on the fit split is nearest to its own. The
    drawn features are held in the search, and its prompts are those that *they* suppress: how many
    these are, none at all included, is a finding. draw: another number, another draw. draws: so
    many of them, from that one on; the first is searched, and of all it is said how many prompts
    they suppress: of one clamp that happened to suppress nothing little can be said.
    """

    kind: Literal["random_features"] = "random_features"
    among: int = Field(10, ge=1)
    draw: int = 0
    draws: int = Field(1, ge=1)

    @property
    def n_clamps(self) -> int:
        return self.draws

    def case(self, setting: Setting, twin: Callable[[], Setting]) -> Case:
        if setting.fit is None:
            raise StudyError("random features are matched on the fit split, and there is none")
        drawn = [
            rule.features(setting.subject, setting.fit, setting.features) for rule in self._each()
        ]
        clamps = [setting.under(features) for features in drawn]
        other = clamps[0]
        rows = other.valid
        return Case(
            subject=other.subject,
            edits=other.edits,
            features=other.features,
            rows=rows,
            batch=other.test.rows(rows),
            clean_margin=other.clean_margin[rows],
            dropped={},
            setting=other,
            measured=_suppressed(clamps),
            if_empty=(
                "the same clamp on random features of like firing rates suppresses the behavior on "
                "no prompt: there is nothing to recover"
            ),
        )

    def _each(self) -> list[RandomFeatures]:
        return [self.model_copy(update={"draw": self.draw + i}) for i in range(self.draws)]

    def features(self, subject: Subject, fit: Batch, clamped: FeatureSet) -> FeatureSet:
        """One feature for every clamped one; scores are their firing rates.

        It depends on the prompts of `fit` and not on their order. Raises FeatureError if an SAE has
        not enough others.
        """
        rates = firing_rates(subject, fit, clamped)
        lots = _Lots(self, clamped)
        parts = tuple(
            FeatureSet(
                entries=tuple(lots.entry(e, rates[e.site, e.group]) for e in part.entries),
                source="random features of like firing rate",
            )
            for part in clamped.parts or (clamped,)
        )
        return FeatureSet.union(parts) if clamped.parts else parts[0]


def _suppressed(clamps: Sequence[Setting]) -> dict[str, Any]:
    """How many clean prompts each clamp suppresses, and the share over all of them, draws and
    prompts both resampled; the latter only of several."""
    rows = clamps[0].clean.nonzero().flatten().tolist()
    per_draw = [clamp.suppressed[rows].double().tolist() for clamp in clamps]
    made: dict[str, Any] = {
        "n_clean": len(rows), "n_suppressed": [int(sum(values)) for values in per_draw],
        "rate": None,
    }  # fmt: skip
    if len(clamps) > 1 and rows:
        interval = crossed_bootstrap(
            [value for values in per_draw for value in values],
            [draw for draw, values in enumerate(per_draw) for _ in values],
            [clamps[0].test.clusters[row] for row in rows] * len(clamps),
        )
        found = measured("suppressed_rate", "share of clean prompts", interval, "no clean prompt")
        made["rate"] = found.model_dump(mode="json")
    return {"random_clamps": made}


@dataclass
class _Lots:
    """What has been drawn: (site, group) → clamped feature → the one in its place."""

    rule: RandomFeatures
    clamped: FeatureSet
    drawn: dict[tuple[str, str], dict[int, int]] = field(default_factory=dict)

    def entry(self, entry: SiteFeatures, rates: Tensor) -> SiteFeatures:
        own = self.drawn.setdefault((entry.site, entry.group), {})
        taken = {i for e in self.clamped.at(Site.parse(entry.site)) for i in e.ids}
        for feature in entry.ids:
            if feature not in own:
                own[feature] = self._draw(entry, feature, rates, taken | set(own.values()))
        ids = tuple(own[feature] for feature in entry.ids)
        return SiteFeatures(
            site=entry.site, group=entry.group, ids=ids, scores=tuple(rates[list(ids)].tolist())
        )

    def _draw(self, entry: SiteFeatures, feature: int, rates: Tensor, taken: set[int]) -> int:
        free = torch.ones_like(rates, dtype=torch.bool)
        free[sorted(taken)] = False
        candidates = free.nonzero().flatten()
        if not len(candidates):
            raise FeatureError(
                f"random features: {len(entry.ids)} of the {len(rates)} features at {entry.site} "
                "are clamped, and not as many others are left to draw; clamp fewer"
            )
        away = (rates[candidates] - rates[feature]).abs()
        nearest = candidates[away.argsort(stable=True)[: self.rule.among]]  # ties: by id
        key = f"{self.rule.draw}/{entry.site}/{entry.group}/{feature}"
        return int(nearest[int(digest(key)[:8], 16) % len(nearest)])


def firing_rates(
    subject: Subject, fit: Batch, features: FeatureSet
) -> Mapping[tuple[str, str], Tensor]:
    """(site, group) → [n_features] float64: the share of tokens on which a feature fires.

    Of the fit prompts of that group, BOS left out; of all of them for an entry that serves every
    group, or a group without a prompt here. Counted, so that the order of prompts does not matter.
    """
    out: dict[tuple[str, str], Tensor] = {}
    for site in features.sites:  # a pass each, so that no two SAEs are whole in memory at a time
        entries = [e for p in (features, *features.parts) for e in p.at(site)]
        groups = list(dict.fromkeys(entry.group for entry in entries))
        rates = _Counting.of(fit, groups, subject.sae(site).full()).rates(subject, fit)
        out |= {(str(site), group): own for group, own in zip(groups, rates, strict=True)}
    return out


@dataclass(frozen=True)
class _Counts:
    """By group, n [g] tokens, and fired [g n_features] on how many of them a feature fires."""

    n: Tensor
    fired: Tensor


@dataclass(frozen=True)
class _Counting:
    """Counts of an SAE by group; a group that is in `everyone` has the tokens of all prompts."""

    groups: Sequence[str]
    everyone: frozenset[str]
    sae: SAE

    @classmethod
    def of(cls, fit: Batch, groups: Sequence[str], sae: SAE) -> _Counting:
        without = (g for g in groups if g == EVERY_GROUP or g not in fit.groups)
        return cls(groups, frozenset(without), sae)

    def rates(self, subject: Subject, fit: Batch) -> Tensor:
        """[g n_features] float64."""
        none = torch.zeros(len(self.groups), self.sae.n_features, dtype=torch.long)
        read = Running(self.sae.site, _Counts(none[:, 0], none), self.with_rows)
        subject.outputs(fit, (read,), work="discovery")
        return read.state.fired.double() / read.state.n.clamp_min(1)[:, None]

    def with_rows(self, before: _Counts, frame: Frame, x: Tensor) -> _Counts:
        mask = selected("all", False, frame)
        belongs = [[g in self.everyone or g == own for own in frame.groups] for g in self.groups]
        rows = mask.nonzero()[:, 0]
        tokens = torch.tensor(belongs, device=x.device)[:, rows].float()  # summed exactly
        made = [(tokens @ (z > 0).float()).long().cpu() for _, z in self.sae.codes(x[mask])]
        n = before.n + tokens.sum(1).long().cpu()
        return _Counts(n, before.fired + torch.cat(made, 1))
