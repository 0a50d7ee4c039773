"""Discovery: which features carry a behavior. It sees the fit split and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.config import Kind
from holdfast.features import EVERY_GROUP, FeatureSet, SiteFeatures
from holdfast.positions import selected
from holdfast.registry import Registry
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject

DISCOVERIES = Registry(
    "discovery",
    {
        "given": "holdfast.discovery.given:Given",
        "attribution": "holdfast.discovery.attribution:Attribution",
        "forget_retain": "holdfast.discovery.forget_retain:ForgetRetain",
        "tpp_effect": "holdfast.discovery.tpp_effect:TPPEffect",
        "minimal": "holdfast.discovery.minimal:Minimal",
        "factorization": "holdfast.discovery.factorization:Factorization",
    },
)


class DiscoveryKind(Kind):
    """A way to find features."""

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        """Features for the behavior of `fit`, at the sites of the subject's SAEs.

        neighbors: fit prompts of what should be left alone.
        """
        raise NotImplementedError

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it is sure to find features at; empty for those of the subject's SAEs."""
        return ()

    @property
    def by_prompts(self) -> bool:
        """Whether what it finds depends on the prompts that it is given."""
        return True

    @property
    def reads_whole(self) -> bool:
        """Whether it runs the whole SAE, with gradients, on the fit split: what a forecast counts
        on unless a kind says that it does not."""
        return True

    def passes(self, sites: Sequence[Site]) -> int:
        """About how many more times it runs the fit prompts through the model, for a forecast."""
        return 0

    @property
    def corpora(self) -> tuple[int, int]:
        """Texts of other data that it reads up to its sites, with the whole SAE and without
        gradients, and the most tokens of one."""
        return 0, 0

    def expected(self, sites: Sequence[Site]) -> FeatureSet:
        """A set of the size it may find at most, for a forecast; the ids mean nothing."""
        n = getattr(self, "n_features", 16)
        entries = tuple(SiteFeatures(site=str(site), ids=tuple(range(n))) for site in sites)
        return FeatureSet(entries=entries, source="expected")


Discovery = Annotated[SerializeAsAny[DiscoveryKind], BeforeValidator(DISCOVERIES.parse)]


@dataclass
class Codes:
    """Reads the codes of one entry's features, without BOS, on the prompts of some groups.

    seen: [tokens k] of every pass.
    """

    bank: FeatureBank
    groups: frozenset[str]
    seen: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, subject: Subject, fit: Batch, features: FeatureSet, entry: SiteFeatures) -> Codes:
        """A reader of the prompts that the entry serves among its set's others.

        That is its group. An entry for all serves groups without one of their own, and is measured
        on every prompt where there are none such.
        """
        site = Site.parse(entry.site)
        groups = {entry.group}
        if entry.group == EVERY_GROUP:
            groups = set(fit.groups) - {e.group for e in features.at(site)} or set(fit.groups)
        only = entry.model_copy(update={"group": EVERY_GROUP})
        alone = FeatureSet(entries=(only,), source=features.source)
        return cls(FeatureBank.of(subject.sae(site), alone), frozenset(groups))

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.bank.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        served = [group in self.groups for group in frame.groups]
        rows = torch.as_tensor(served, device=frame.positions.device)
        return selected("all", False, frame) & rows[:, None]

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        mask = self.selects(site, frame)
        rows = mask.any(1).nonzero().flatten()
        self.seen.append(self.bank.activations(x[rows], frame.rows(rows))[mask[rows]])
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        """A group may have no prompt here: then its features are not measured."""


def with_scale(subject: Subject, fit: Batch, features: FeatureSet) -> FeatureSet:
    """The same features with what they do on the fit split: median active value, mean, maximum.

    BOS is left out; an entry of a group is measured on that group's prompts. Parts are measured
    each by itself.
    """
    readers = [Codes.of(subject, fit, features, entry) for entry in features.entries]
    subject.outputs(fit, readers)
    entries = tuple(_measured(r.seen, e) for e, r in zip(features.entries, readers, strict=True))
    parts = tuple(with_scale(subject, fit, part) for part in features.parts)
    return features.model_copy(update={"entries": entries, "parts": parts})


def _measured(seen: list[Tensor], entry: SiteFeatures) -> SiteFeatures:
    """The entry with statistics of its codes, each [tokens k]; as it was if there are none."""
    if not any(len(z) for z in seen):
        return entry
    z = torch.cat(seen)
    active = z[z > 0]
    return entry.model_copy(
        update={
            "median_active": float(active.median()) if len(active) else None,
            "mean": tuple(z.mean(0).tolist()),
            "max": tuple(z.amax(0).tolist()),
        }
    )
