"""Feature sets: which features of which SAE an intervention clamps, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field, field_validator, model_validator

from holdfast.config import Config
from holdfast.errors import FeatureError
from holdfast.sites import Site

EVERY_GROUP = "*"


class SiteFeatures(Config):
    """The features of one site for one group of prompts.

    scores: one per id, in the units of the discovery that made them. Measured on the fit split,
    BOS left out: median_active, the median value of these features where they fire (the scale that
    relative drift is measured against), None if none fired; mean and max of each feature over the
    tokens, zeros included.
    """

    site: str
    group: str = EVERY_GROUP
    ids: tuple[int, ...] = Field(min_length=1)
    scores: tuple[float, ...] = ()
    median_active: float | None = None
    mean: tuple[float, ...] = ()
    max: tuple[float, ...] = ()

    @field_validator("site")
    @classmethod
    def _canonical(cls, site: str) -> str:
        return str(Site.parse(site))

    @model_validator(mode="after")
    def _one_score_each(self) -> SiteFeatures:
        for name in ("scores", "mean", "max"):
            given = getattr(self, name)
            if given and len(given) != len(self.ids):
                raise ValueError(f"{len(self.ids)} ids but {len(given)} {name}")
        return self


class FeatureSet(Config):
    """Features by site and group. A group `*` serves every prompt without features of its own.

    parts: the sets it is the union of, where each has a clamp of its own.
    """

    entries: tuple[SiteFeatures, ...]
    source: str
    parts: tuple[FeatureSet, ...] = Field((), exclude=True)

    @model_validator(mode="after")
    def _no_entry_twice(self) -> FeatureSet:
        keys = [(entry.site, entry.group) for entry in self.entries]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise FeatureError(f"features are given twice for {twice}")
        return self

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(sorted({Site.parse(entry.site) for entry in self.entries}))

    @property
    def ids(self) -> Mapping[tuple[str, str], tuple[int, ...]]:
        return ids_of(self.entries)

    def at(self, site: Site) -> tuple[SiteFeatures, ...]:
        """The entries of one site, by group."""
        return tuple(entry for entry in self.entries if Site.parse(entry.site) == site)

    @classmethod
    def union(cls, sets: Sequence[FeatureSet]) -> FeatureSet:
        """Every feature of any set, once; a group has those of its own and those for all.

        The sets are kept as its parts.
        """
        entries = []
        for site in sorted({site for features in sets for site in features.sites}):
            at = [{entry.group: entry.ids for entry in f.at(site)} for f in sets]
            for group in dict.fromkeys(group for ids in at for group in ids):
                merged = (ids.get(group, ids.get(EVERY_GROUP, ())) for ids in at)
                unique = tuple(dict.fromkeys(i for own in merged for i in own))
                entries.append(SiteFeatures(site=str(site), group=group, ids=unique))
        source = ", ".join(dict.fromkeys(features.source for features in sets))
        return cls(entries=tuple(entries), source=source, parts=tuple(sets))

    def median_active(self, site: Site) -> Mapping[str, float | None]:
        """Group → median active value on the fit split."""
        return {entry.group: entry.median_active for entry in self.at(site)}


def ids_of(entries: Sequence[SiteFeatures]) -> Mapping[tuple[str, str], tuple[int, ...]]:
    """(site, group) → feature ids."""
    return {(entry.site, entry.group): entry.ids for entry in entries}
