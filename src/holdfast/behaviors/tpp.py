"""What a linear probe reads in the residual: the setting of targeted probe perturbation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.behaviors.cutting import readable
from holdfast.behaviors.tpp_score import tpp_score
from holdfast.config import IDENTITY, nearest
from holdfast.datasets import DATASETS, DatasetKind
from holdfast.datasets.labelled import (
    PRESETS,
    SHARES,
    LabelledText,
    labelled_texts,
    of_others,
    split_texts,
    stretch,
)
from holdfast.datasets.unread import left_unread
from holdfast.errors import StudyError
from holdfast.measure import Measurement
from holdfast.organism.corpus import PROFESSIONS, balanced_biographies
from holdfast.probes import fit_probes
from holdfast.readouts.probes import NONE, Probes
from holdfast.sites import Site

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from holdfast.setting import Setting
    from holdfast.subject import Subject

REST = "rest"
"""The neighbor that holds texts of the other classes, which the target's probe should not name."""


def _source(value: Any) -> Any:
    return value if value == "organism" else DATASETS.parse(value)


class TPP(BehaviorKind):
    """A probe names the class of a text from the residual at the SAE's own site (METHODS I).

    One probe a class, one against the rest, on the mean residual over a text's tokens without BOS:
    logistic regression on the fit split, its regularization chosen from `penalties` on the tune
    split, the test split untouched. A text of the class `target` is valid if its probe's logit is
    above 0, and at most 0 under the clamp. `data` counts texts of a class. The neighbors are the
    other probes' accuracies, on texts half of which are of their class, and the target's probe on
    texts of other classes.

    source: the organism's biographies, or a dataset with the columns text, label, and maybe a
    second attribute that every class is balanced over. preset: the columns and classes of a
    published set. classes: name → value of the label's column. site: where the probes read; the
    subject's only SAE if left out. max_tokens: where texts are cut, with what the tokenizer puts
    around them.
    """

    kind: Literal["tpp"] = "tpp"
    source: Annotated[
        Literal["organism"] | SerializeAsAny[DatasetKind], BeforeValidator(_source)
    ] = "organism"
    preset: str | None = None
    classes: dict[str, str] = Field(default_factory=dict)
    target: str
    site: str | None = None
    max_tokens: int = Field(128, ge=2)
    penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        """The preset's columns and classes, filled in where the study names none of its own."""
        if not isinstance(data, dict):
            return data
        name = data.get("preset")
        if name is None:
            if data.get("source", "organism") == "organism" and not data.get("classes"):
                return data | {"classes": {each: each for each in PROFESSIONS}}
            return data
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: {nearest(str(name), PRESETS)}")
        preset, source = PRESETS[name], data.get("source")
        if isinstance(source, dict) and not source.get("columns"):
            source = source | {"columns": dict(preset.columns)}
        elif source is None or source == "organism":
            raise ValueError(
                f'preset {name!r} needs a source: {{ kind = "hub", id = "{preset.hub}", split = '
                '"train" }, or a file with the same columns'
            )
        classes = data.get("classes") or dict(preset.classes)
        for own, value in classes.items() if isinstance(classes, dict) else ():
            if preset.classes.get(own) != str(value):
                raise ValueError(
                    f"classes: {own!r} with the label {value!r} is none of preset {name!r}: "
                    f"{nearest(str(own), preset.classes)}; a study of several presets needs an "
                    "audit for each"
                )
        return data | {"source": source, "classes": classes}

    @field_validator("classes", mode="before")
    @classmethod
    def _as_text(cls, classes: Any) -> Any:
        if not isinstance(classes, dict):
            return classes
        # Sorted, as a record has them: texts of other classes are drawn in this order.
        return {str(name): str(value) for name, value in sorted(classes.items())}

    @field_validator("site")
    @classmethod
    def _canonical(cls, site: str | None) -> str | None:
        return None if site is None else str(Site.parse(site))

    @model_validator(mode="after")
    def _possible(self) -> TPP:
        if len(self.classes) < 3:
            raise ValueError(
                "classes: expected three or more, name = value of the label's column, so that "
                "there is another class to force and one it is not; got "
                f"{sorted(self.classes) or 'none'}"
            )
        if reserved := {NONE, REST} & set(self.classes):
            raise ValueError(f"a class cannot be called {sorted(reserved)[0]!r}")
        if self.source == "organism" and not set(self.classes) <= set(PROFESSIONS):
            unknown = sorted(set(self.classes) - set(PROFESSIONS))[0]
            raise ValueError(f"the organism has no profession {unknown!r}: "
                             f"{nearest(unknown, PROFESSIONS)}")  # fmt: skip
        if self.target not in self.classes:
            raise ValueError(f"unknown target {self.target!r}: "
                             f"{nearest(self.target, self.classes)}")  # fmt: skip
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _readable(cls, data: Any, handler: ModelWrapValidatorHandler[TPP]) -> TPP:
        """What a study names is read with it, before any model is loaded. A record's data, known
        by hash, need not be there."""
        self = handler(data)
        source = data.get("source") if isinstance(data, dict) else None
        if isinstance(source, dict) and not source.get("sha256") and not left_unread():
            try:
                self._every_text()
            except StudyError as error:
                raise ValueError(str(error)) from None
        return self

    # ------------------------------------------------------------------ what is said of it

    @property
    def caveat(self) -> str:
        return (
            "but a probe's logit is linear in what is added, so that some vector brings it back is "
            "geometry: it says how much of the probe's direction the clamp leaves free, not that "
            "the model still uses it"
        )

    @property
    def meaningless_controls(self) -> Mapping[str, str]:
        return {
            "ignorant": "a twin's probes are fitted to what the twin reads in the same texts, so "
            "no twin is ignorant of their class; use wrong_target and no_clamp"
        }

    # ------------------------------------------------------------------ texts

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        return [self._named(text, self.target) for text in self._texts(tokenizer, split, n, seed)[
            self.target]]  # fmt: skip

    def neighbors(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> dict[str, list[Example]]:
        texts = self._texts(tokenizer, split, n, seed)
        found = {REST: [self._denied(t, self.target) for t in of_others(texts, self.target, n)]}
        for name in self.classes:
            if name != self.target:
                half = [self._named(text, name) for text in texts[name][: (n + 1) // 2]]
                denied = [self._denied(text, name) for text in of_others(texts, name, len(half))]
                found[name] = half + denied
        return found

    def _named(self, text: LabelledText, name: str) -> Example:
        """A text that the probe of its class has to name."""
        return Example(text.id, text.text, name, (NONE,), self._without(name), cluster=text.id)

    def _denied(self, text: LabelledText, name: str) -> Example:
        """A text that the probe of another class must not name."""
        return Example(text.id, text.text, NONE, (name,), self._without(name), cluster=text.id)

    def _without(self, name: str) -> tuple[str, ...]:
        return tuple(other for other in self.classes if other != name)

    def _texts(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> dict[str, list[LabelledText]]:
        """Class → at most n texts of a split, cut to what is read."""
        if self.source == "organism":
            return {
                name: [LabelledText(b.id, b.text, name, b.gender) for b in own]
                for name, own in balanced_biographies(tuple(self.classes), split, n, seed).items()
            }
        assert isinstance(self.source, DatasetKind)
        out = {}
        for name, texts in self._every_text().items():
            ordered = split_texts(texts, split, seed)
            out[name] = readable(tokenizer, ordered, n, self.max_tokens)
            if not out[name]:
                raise StudyError(
                    f"{self.source.label}: no text of class {name!r} is left for the split "
                    f"{split!r}, all {len(ordered)} have special tokens other than BOS in front: "
                    "if the tokenizer ends every text with one, it must not (add_eos_token)"
                )
        return out

    def _every_text(self) -> dict[str, tuple[LabelledText, ...]]:
        """Raises StudyError for data that cannot be read, or a class without texts for a split."""
        assert isinstance(self.source, DatasetKind)
        every = labelled_texts(self.source, tuple(self.classes.items()))
        for name, texts in every.items():
            counts = Counter(text.attribute for text in texts)
            for split in SHARES:
                if any(
                    first == last for first, last in (stretch(split, n) for n in counts.values())
                ):
                    raise StudyError(
                        f"{self.source.label}: too few texts of class {name!r} for the split "
                        f"{split!r}: each value of the attribute needs some in every split, and "
                        f"there are {', '.join(f'{n} of {a!r}' for a, n in counts.items())}"
                    )
        return every

    # ------------------------------------------------------------------ probes

    @property
    def pools_tokens(self) -> bool:
        return True

    def readout(self, subject: Subject) -> Probes:
        return Probes.unfitted(self._site(subject), tuple(self.classes), subject.d_model)

    @property
    def fitted_by(self) -> dict[str, Any]:
        # Every class has its probe, whichever is the target.
        return self.model_dump(mode="json", context=dict(IDENTITY), exclude={"target"})

    def fitted(self, subject: Subject, sizes: Mapping[Split, int], seed: int) -> Probes:
        unfitted = self.readout(subject)
        pooled = {
            split: self._pooled(subject, unfitted, split, sizes[split], seed)
            for split in ("fit", "tune")
        }
        probes = fit_probes(pooled["fit"], pooled["tune"], self.penalties)
        return Probes(
            unfitted.site,
            unfitted.classes,
            torch.stack([probe.weight for probe in probes]),
            torch.tensor([probe.bias for probe in probes]),
            tuple(probe.penalty for probe in probes),
            tuple(probe.validation for probe in probes),
        )

    def read_at(self, sites: Sequence[Site]) -> Site:
        if self.site is not None:
            return Site.parse(self.site)
        if len(sites) != 1:
            raise StudyError(
                f"tpp: expected one SAE, whose site the probes read, got {len(sites)} "
                f"({', '.join(map(str, sorted(sites))) or 'none'}); say which with behavior.site"
            )
        return sites[0]

    def _site(self, subject: Subject) -> Site:
        site = self.read_at(tuple(subject.saes))
        if site.depth > subject.n_blocks:
            raise StudyError(f"tpp: {subject.name} has {subject.n_blocks} blocks, no site {site}")
        return site

    def _pooled(
        self, subject: Subject, probes: Probes, split: Split, n: int, seed: int
    ) -> dict[str, Tensor]:
        """Class → the pooled residuals [n d_model] of its texts in a split."""
        texts = self._texts(subject.tokenizer, split, n, seed)
        return {
            name: probes.pooled(
                subject.outputs, subject.batch([self._named(t, name) for t in own], probes)
            )
            for name, own in texts.items()
        }

    def scores(self, setting: Setting) -> tuple[Measurement, ...]:
        return tpp_score(setting, REST)
