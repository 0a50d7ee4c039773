"""Where SAEs are loaded from: a folder, or a published release. Both yield the same record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from holdfast.canonical import digest, sha256_tree
from holdfast.config import Config, Kind
from holdfast.errors import SAEError, StudyError
from holdfast.organism.assets import resolve
from holdfast.registry import Registry
from holdfast.saes.formats import FormatName, layout_of
from holdfast.saes.inputs import Inputs
from holdfast.sites import Site

if TYPE_CHECKING:
    from holdfast.saes.layout import Layout
    from holdfast.saes.stored import StoredSAE

SOURCES = Registry(
    "sae_sources",
    {
        "folder": "holdfast.saes.sources:Folder",
        "release": "holdfast.saes.release:Release",
        "outline": "holdfast.forecast.outline:Outline",
    },
)


@dataclass(frozen=True)
class Shape:
    """What a forecast has to know of an SAE. k: of a TopK, whose limit every feature decides;
    stored: bytes of a number of its matrices in the file, and scaled: whether they are scaled when
    the whole is read, which then is in float32."""

    n_features: int
    k: int | None = None
    stored: int = 4
    scaled: bool = False

    @classmethod
    def of(cls, layout: Layout) -> Shape:
        """Of what lies on disk. Raises SAEError."""
        n = layout.shape()[1]
        stored = min(4, layout.tensors[layout.W_enc].dtype.itemsize)
        return cls(n, layout.k, stored, layout.rescale or layout.feature_scale is not None)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the matrices of the whole in memory."""
        return 4 if self.scaled else self.stored


class SAESource(Kind):
    """A place an SAE can be read from.

    center, scale: how the residual enters the SAE, where its files do not say or say it wrongly:
    subtract the mean over d_model; multiply by a constant (`√d_model / mean norm`). n_features: the
    first so many features alone, which of a Matryoshka SAE are an SAE of their own (Bussmann et al.
    2503.17547) and of another one a worse one.
    """

    center: bool | None = None
    scale: float | None = Field(None, gt=0)
    n_features: int | None = Field(None, ge=1)

    @property
    def label(self) -> str:
        """What messages call it."""
        raise NotImplementedError

    def layout(self) -> Layout:
        """What lies on disk, downloaded first if it is a release. Raises SAEError."""
        raise NotImplementedError

    def shape(self) -> Shape | None:
        """Its shape as far as it is known without reading weights or reaching for the network."""
        return None

    def sha256(self) -> str:
        """Hash over the files that make the SAE, and over how residuals enter it.

        The latter can stand in the source, in a registry or in a path, beside the files.
        """
        layout = self._completed()
        files = sha256_tree(layout.folder, layout.hashed)
        if layout.first is not None:
            files = digest([files, layout.first])
        return files if layout.inputs == Inputs() else digest([files, asdict(layout.inputs)])

    def load(self, site: Site) -> StoredSAE:
        """Open it for `site`. Raises SAEError if it was trained for another site."""
        from holdfast.saes.stored import StoredSAE

        layout = self._completed()
        if layout.site is not None:
            try:
                trained = Site.parse(layout.site)
            except StudyError:
                raise SAEError(
                    f"{self.label}: trained at {layout.site!r}, which is no point of the residual "
                    "stream; only residual SAEs are supported"
                ) from None
            if trained != site:
                raise SAEError(
                    f"{self.label}: trained at {trained}, asked for at {site}; an SAE of another "
                    "site reads the wrong residual"
                )
        opened = StoredSAE(site, layout, self.label)
        _ = opened.d_model  # a file that is not what its name says is found now
        return opened

    def _completed(self) -> Layout:
        try:
            layout = self.layout()
        except SAEError as error:
            raise SAEError(f"{self.label}: {error}") from None
        inputs = layout.inputs
        if self.center is not None:
            inputs = replace(inputs, center=self.center)
        if self.scale is not None:
            inputs = replace(inputs, scale=self.scale)
        if math.isnan(inputs.scale):
            raise SAEError(
                f"{self.label}: its inputs are scaled by a constant that its files do not hold; "
                "give it as `scale` in the source: √d_model / mean residual norm in training"
            )
        return replace(layout, inputs=inputs, first=self.n_features)


class Folder(SAESource):
    """A folder as SAELens, Gemma Scope, Llama Scope, dictionary_learning or sparsify write it.

    The layout is recognized by the files, unless `format` names it. `path` may begin with the name
    of a shipped subject (`organism:saes/1`).
    """

    kind: Literal["folder"] = "folder"
    path: str
    format: FormatName | None = None

    @property
    def label(self) -> str:
        return self.path

    def folder(self) -> Path:
        """Where it lies."""
        return resolve(self.path)

    def layout(self) -> Layout:
        return layout_of(self.folder(), self.format)

    def shape(self) -> Shape | None:
        layout = replace(self.layout(), first=self.n_features)
        return Shape.of(layout)


class SAESpec(Config):
    """An SAE and the site it belongs to."""

    site: str
    source: Annotated[SerializeAsAny[SAESource], BeforeValidator(SOURCES.parse)]

    @field_validator("site")
    @classmethod
    def _canonical(cls, site: str) -> str:
        return str(Site.parse(site))
