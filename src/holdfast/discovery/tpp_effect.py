"""Effect on a probe: how much a class's features push the logit of its own probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.discovery import DiscoveryKind
from holdfast.edits import never_fired
from holdfast.errors import FeatureError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.readouts.probes import Probes, pool
from holdfast.saes.products import product
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject


class TPPEffect(DiscoveryKind):
    """The n features with the largest effect on the probe (SAEBench, METHODS I.3).

    effect_i = relu(mean z_i on texts of the class − mean on texts of others) · (w · W_dec[i]), each
    text's mean over its tokens without BOS. Only positive effects count: taking out a feature with
    a negative one would raise the logit. The probe's own site has to have an SAE.
    """

    kind: Literal["tpp_effect"] = "tpp_effect"
    n_features: int = Field(500, ge=1)

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        probes = fit.readout
        if not isinstance(probes, Probes):
            raise FeatureError(
                "tpp_effect reads the weights of a probe, and this behavior is read from logits; "
                "use attribution"
            )
        (target,) = fit.targets.unique().tolist()
        sae = subject.sae(probes.site).full()
        w = probes.weight[target].to(sae.b_dec)
        effects = self.effects(
            mean_codes(subject, fit, sae), _mean_of_others(subject, target, neighbors, sae), w, sae
        )
        best = effects.topk(min(self.n_features, len(effects)))
        positive = best.values > 0
        if not positive.any():
            raise FeatureError(
                f"no feature at {probes.site} has a positive effect on the probe of "
                f"{probes.classes[target]!r}: the SAE does not read this class here"
            )
        entry = SiteFeatures(
            site=str(probes.site),
            ids=tuple(best.indices[positive].tolist()),
            scores=tuple(best.values[positive].tolist()),
        )
        return FeatureSet(entries=(entry,), source=self.kind)

    @staticmethod
    def effects(own: Tensor, others: Tensor, w: Tensor, sae: SAE) -> Tensor:
        """[n_features] in logits, from mean codes [n_features] and a probe w [d_model]."""
        return (own - others).relu() * product(w, sae.W_dec.T)


def _mean_of_others(subject: Subject, target: int, neighbors: dict[str, Batch], sae: SAE) -> Tensor:
    """Mean codes on the texts of which the same probe has to say no."""
    for batch in neighbors.values():
        if bool((batch.rivals == target).all()):
            return mean_codes(subject, batch, sae)
    raise FeatureError(
        "tpp_effect compares with texts of other classes, and the behavior names none as a neighbor"
    )


def mean_codes(subject: Subject, batch: Batch, sae: SAE) -> Tensor:
    """[n_features] mean over texts of each text's mean code, without edits, in units that W_dec
    turns into residual units."""
    reader = PooledCodes(sae)
    subject.outputs(batch, (reader,), work="discovery")
    assert isinstance(reader.total, Tensor)
    return reader.total / len(batch)


@dataclass
class PooledCodes:
    """Adds up each prompt's mean codes. total [n_features]."""

    sae: SAE
    total: Tensor | float = 0.0

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.sae.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return frame.positions >= 0

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        h = x.float()
        scale = self.sae.inputs.magnify(h)
        pooled = [pool(z * scale, frame).sum(0) for _, z in self.sae.codes(h)]
        self.total = self.total + torch.cat(pooled)
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        if n_fired == 0:
            raise never_fired(self, site)
