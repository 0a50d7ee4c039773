"""Discovery: which features carry a behavior. It sees the fit split and nothing else."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import Tensor

from holdfast.batch import Batch
from holdfast.config import Kind
from holdfast.edits import Capture
from holdfast.features import EVERY_GROUP, FeatureSet, SiteFeatures
from holdfast.registry import Registry
from holdfast.saes.bank import FeatureBank
from holdfast.subject import Subject

DISCOVERIES = Registry(
    "discovery",
    {
        "given": "holdfast.discovery.given:Given",
        "attribution": "holdfast.discovery.attribution:Attribution",
    },
)


class DiscoveryKind(Kind):
    """A way to find features."""

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        """Features for the behavior of `fit`, at the sites of the subject's SAEs.

        neighbors: fit prompts of what should be left alone.
        """
        raise NotImplementedError


Discovery = Annotated[SerializeAsAny[DiscoveryKind], BeforeValidator(DISCOVERIES.parse)]


def with_scale(subject: Subject, fit: Batch, features: FeatureSet) -> FeatureSet:
    """The same features with what they do on the fit split: median active value, mean, maximum.

    BOS is left out; an entry of a group is measured on that group's prompts.
    """
    captures = [Capture(site) for site in features.sites]
    subject.outputs(fit, captures)
    entries = []
    for capture in captures:
        bank = FeatureBank.of(subject.sae(capture.site), features)
        codes, groups = [], []
        for frame, x in capture.seen:
            token = (frame.positions >= 0) & ~((frame.positions == 0) & frame.bos[:, None])
            z = bank.activations(x, frame)
            codes.append(z[token])
            rows = token.nonzero()[:, 0].tolist()
            groups += [frame.groups[row] for row in rows]
        z = torch.cat(codes)
        for entry in features.at(capture.site):
            if entry.group == EVERY_GROUP and len(bank.index) > 1:
                # Rows of a group with an entry of its own were encoded with that entry's features.
                own = torch.as_tensor([group not in bank.index for group in groups])
            else:
                own = torch.as_tensor([entry.group in (EVERY_GROUP, g) for g in groups])
            entries.append(_measured(entry, z[own.to(z.device)][:, : len(entry.ids)]))
    return FeatureSet(entries=tuple(entries), source=features.source)


def _measured(entry: SiteFeatures, z: Tensor) -> SiteFeatures:
    """The entry with statistics of its codes z [tokens k]."""
    if not len(z):
        return entry
    active = z[z > 0]
    return entry.model_copy(
        update={
            "median_active": float(active.median()) if len(active) else None,
            "mean": tuple(z.mean(0).tolist()),
            "max": tuple(z.amax(0).tolist()),
        }
    )
