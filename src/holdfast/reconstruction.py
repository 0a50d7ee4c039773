"""How well SAEs reconstruct the residuals of some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.positions import selected
from holdfast.running import Moments, Running
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject


def explained(subject: Subject, batch: Batch, sites: Sequence[Site]) -> dict[str, float]:
    """Site → share of explained variance, 1 − Σ‖h − D(E(h))‖² / Σ‖h − mean‖², over the tokens of a
    batch of clean prompts, BOS left out. One less it is the fraction of variance unexplained."""
    return {str(site): _explained(subject, batch, subject.sae(site).full()) for site in sites}


def _explained(subject: Subject, batch: Batch, sae: SAE) -> float:
    """One pass a site, so that no two SAEs are whole in memory at a time."""

    def with_rows(before: _Sums, frame: Frame, x: Tensor) -> _Sums:
        x = x[selected("all", False, frame)].float()
        error = float((x - sae.reconstruct(x)).double().square().sum())
        return _Sums(before.error + error, before.residuals.with_more(x))

    read = Running(sae.site, _Sums(0.0, Moments.none()), with_rows)
    subject.outputs(batch, (read,), work="discovery")
    return 1 - read.state.error / float(read.state.residuals.spread)


@dataclass(frozen=True)
class _Sums:
    """error: Σ‖h − D(E(h))‖² over tokens; residuals: of the same."""

    error: float
    residuals: Moments
