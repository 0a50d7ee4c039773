"""Features that the user names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from holdfast.batch import Batch
from holdfast.discovery import DiscoveryKind
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.organism.assets import resolve
from holdfast.sites import Site
from holdfast.subject import Subject


class Given(DiscoveryKind):
    """The features listed in the study: `features = [{site = …, ids = […], group = …}]`.

    `file` names a JSON file with such a list instead. Its content, not its path, is what counts:
    it is read when the study is.
    """

    kind: Literal["given"] = "given"
    features: tuple[SiteFeatures, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "file" not in data:
            return data
        if "features" in data:
            raise ValueError("give either `features` or `file`, not both")
        path = resolve(str(data["file"]))
        try:
            listed = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"file {data['file']!r} is no readable JSON: {error}") from None
        return {key: value for key, value in data.items() if key != "file"} | {"features": listed}

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        for entry in self.features:
            subject.sae(Site.parse(entry.site)).check_features(entry.ids)
        return FeatureSet(entries=self.features, source="given")

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys(Site.parse(entry.site) for entry in self.features))

    @property
    def by_prompts(self) -> bool:
        return False

    @property
    def reads_whole(self) -> bool:
        return False

    def expected(self, sites: Sequence[Site]) -> FeatureSet:
        return FeatureSet(entries=self.features, source="given")
