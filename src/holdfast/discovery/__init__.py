"""Discovery: which features carry a behavior. It sees the fit split and nothing else."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BeforeValidator, SerializeAsAny

from holdfast.batch import Batch
from holdfast.config import Kind
from holdfast.edits import Capture
from holdfast.features import EVERY_GROUP, FeatureSet
from holdfast.registry import Registry
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
    """The same features with the median of their active values on the fit split, BOS left out.

    The scale that relative drift is measured against where a reference is near zero.
    """
    captures = [Capture(site) for site in features.sites]
    subject.outputs(fit, captures)
    entries = []
    for capture in captures:
        sae = subject.sae(capture.site)
        for entry in features.at(capture.site):
            active = []
            for frame, x in capture.seen:
                own = torch.as_tensor([entry.group in (EVERY_GROUP, g) for g in frame.groups])
                token = (frame.positions >= 0) & own.to(x.device)[:, None]
                token &= ~((frame.positions == 0) & frame.bos[:, None])
                z = sae.encode(x[token], entry.ids)
                active.append(z[z > 0])
            values = torch.cat(active)
            median = float(values.median()) if len(values) else None
            entries.append(entry.model_copy(update={"median_active": median}))
    return FeatureSet(entries=tuple(entries), source=features.source)
