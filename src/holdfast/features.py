"""Feature sets: which features of which SAE an intervention clamps, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, field_validator, model_validator

from holdfast.config import Config
from holdfast.errors import FeatureError
from holdfast.sites import Site

EVERY_GROUP = "*"


class SiteFeatures(Config):
    """The features of one site for one group of prompts.

    scores: one per id, in the units of the discovery that made them. median_active: median value
    of these features where they fire on the fit split (the scale that relative drift is measured
    against), or None if none fired.
    """

    site: str
    group: str = EVERY_GROUP
    ids: tuple[int, ...] = Field(min_length=1)
    scores: tuple[float, ...] = ()
    median_active: float | None = None

    @field_validator("site")
    @classmethod
    def _canonical(cls, site: str) -> str:
        return str(Site.parse(site))

    @model_validator(mode="after")
    def _one_score_each(self) -> SiteFeatures:
        if self.scores and len(self.scores) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids but {len(self.scores)} scores")
        return self


class FeatureSet(Config):
    """Features by site and group. A group `*` serves every prompt without features of its own."""

    entries: tuple[SiteFeatures, ...]
    source: str

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

    def at(self, site: Site) -> tuple[SiteFeatures, ...]:
        """The entries of one site, by group."""
        return tuple(entry for entry in self.entries if Site.parse(entry.site) == site)

    def median_active(self, site: Site) -> Mapping[str, float | None]:
        """Group → median active value on the fit split."""
        return {entry.group: entry.median_active for entry in self.at(site)}
