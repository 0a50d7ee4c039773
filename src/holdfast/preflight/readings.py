"""Is an SAE read as it was trained? Asked by reading it in other ways.

Another reading is the right one if it explains more of the residuals and its mean error is smaller.
The mean error tells the truth: training drives it to zero, since it is the gradient of the
decoder's bias whatever the penalty on the codes, while any other site, shift, scale or activation
function brings it back. Explained variance alone is fooled by a residual that is simpler one block
earlier, and by a penalty that shrinks codes.

Measured on 16 SAEs of five kinds and nine sets of prompts of the organism, narrow ones and chats
among them: in 144 of 144 cases no reading was preferred to the right one, nor with 32 tokens each.
An SAE one site too high, or read at a sixteenth or a quarter of its scale, was found out in all (4
by its reconstruction alone), at half of it in 141. What is missed is what hardly matters: centering
where residuals have no mean, b_dec in a TopK encoder, the scale of SAEs that are not sparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from holdfast.finding import Finding
from holdfast.preflight.scene import Scene, share
from holdfast.saes.sae import SAE
from holdfast.sites import Site

MIN_EXPLAINED = 0.5
"""Published SAEs explain .7 and more of their own training data (METHODS 0.1)."""

GAIN = 0.005
"""Variance that another reading must explain beyond this one: less changes no conclusion."""

LESS_BIASED = 2 / 3
"""Most mean error of another reading, as a share of this one's."""

UNBIASED = 0.05
"""Most mean error of a reading that is the right one; beyond it the prompts are unlike anything the
SAE was trained on, whatever the reading."""

SCALES = tuple(2.0**k for k in range(-6, 7) if k)

What = Literal["site", "centering", "scale", "decoder bias", "activation function"]


@dataclass(frozen=True)
class Fit:
    """How well residuals x are reconstructed, both as shares of their variance Σ‖x − mean‖².

    explained: 1 − Σ‖x − D(E(x))‖² / variance, negative where it is worse than the mean;
    mean_error: n·‖mean of x − D(E(x))‖² / variance.
    """

    explained: float
    mean_error: float

    def beaten_by(self, other: Fit) -> bool:
        """Whether the other reading is the one the SAE was trained for, rather than this."""
        explains = other.explained >= max(MIN_EXPLAINED, self.explained + GAIN)
        return explains and other.mean_error <= min(UNBIASED, LESS_BIASED * self.mean_error)


def fit(sae: SAE, x: Tensor) -> Fit:
    """How well the SAE reconstructs residuals x [tokens d_model]."""
    error = (x - sae.reconstruct(x)).double()
    squares, total = float(error.square().sum()), error.sum(0)
    variance = float((x - x.mean(0)).double().square().sum())
    if variance == 0:
        return Fit(float("nan"), float("nan"))
    return Fit(1 - squares / variance, float(total.square().sum()) / len(x) / variance)


@dataclass(frozen=True)
class Reading:
    """One way to read an SAE: what is different about it, and what to do if it is right."""

    what: What
    how: str
    sae: SAE
    x: Tensor
    remedy: str

    @cached_property
    def fit(self) -> Fit:
        return fit(self.sae, self.x)


@dataclass(frozen=True)
class Readings:
    """An SAE as the study reads it, and every other way that is tried."""

    sae: SAE
    own: Fit
    others: tuple[Reading, ...]

    @cached_property
    def right(self) -> Reading | None:
        """The other reading that is the right one; None if none beats the study's own."""
        better = [other for other in self.others if self.own.beaten_by(other.fit)]
        return min(better, key=lambda other: other.fit.mean_error, default=None)

    def findings(self) -> Iterator[Finding]:
        """One for each way an SAE can be misread; only the best explanation is blamed."""
        for what in dict.fromkeys(other.what for other in self.others):
            tried = [other for other in self.others if other.what == what]
            best = max(tried, key=lambda other: other.fit.explained)
            blamed = self.right is not None and self.right.what == what
            shown = self.right if blamed and self.right is not None else best
            yield Finding(
                check=f"{what} of the SAE at {self.sae.site}",
                passed=not blamed,
                expected=f"explains {_shown(self.own)}; no other reading explains more with less "
                "mean error",
                measured=f"{shown.how}: {_shown(shown.fit)}",
                remedy=shown.remedy if blamed else "",
            )


def readings(scene: Scene, sae: SAE) -> Readings:
    """Every way this SAE is tried on the scene's residuals."""
    x = scene.some(scene.residuals[sae.site], sae)
    others = (
        *_sites(scene, sae),
        _centering(sae, x),
        *_scales(sae, x),
        _bias(sae, x),
        *_activations(sae, x, l0=float(scene.fired(sae.site).sum())),
    )
    return Readings(sae, fit(sae, x), others)


def _sites(scene: Scene, sae: SAE) -> Iterator[Reading]:
    """The blocks beside: their residuals are nearly the right ones."""
    for depth in (sae.site.depth - 1, sae.site.depth + 1):
        if not 0 <= depth <= scene.subject.n_blocks:
            continue
        there = Site(depth)
        yield Reading(
            "site",
            f"at {there}",
            sae,
            scene.some(scene.residuals[there], sae),
            f"it was trained at {there}: give it that site (resid_post of a block is resid_pre of "
            "the next; hidden_states[i] is what goes into block i)",
        )


def _centering(sae: SAE, x: Tensor) -> Reading:
    """Weights centered before training (TransformerLens' center_writing_weights, for GPT-2)."""
    center = not sae.inputs.center
    return Reading(
        "centering",
        "with the mean over d_model taken out" if center else "with residuals as they are",
        _changed(sae, inputs=replace(sae.inputs, center=center)),
        x,
        f"set center = {str(center).lower()} in the SAE's source"
        + (": the model it was trained on had its writing weights centered" if center else ""),
    )


def _scales(sae: SAE, x: Tensor) -> Iterator[Reading]:
    """A norm factor that was left out, forgotten, or folded twice."""
    if not sae.inputs.affine:
        return  # a token's own norm is divided out
    # What SAELens' expected_average_only_in would have used, had it been trained on these tokens.
    usual = float(x.shape[1] ** 0.5 / x.norm(dim=1).mean())
    for scale in (usual, *(factor * sae.inputs.scale for factor in SCALES)):
        yield Reading(
            "scale",
            f"with scale = {scale:.3g}",
            _changed(sae, inputs=replace(sae.inputs, scale=scale)),
            x,
            f"set scale in the SAE's source; {scale:.3g} is the best of those tried, the exact one "
            "is in its config or known to its authors (√d_model / mean residual norm, on these "
            f"prompts {usual:.3g})",
        )


def _bias(sae: SAE, x: Tensor) -> Reading:
    """Libraries disagree whether the encoder reads x − b_dec."""
    subtract = not sae.subtract_b_dec
    return Reading(
        "decoder bias",
        "with b_dec subtracted before encoding" if subtract else "with b_dec left in",
        _changed(sae, subtract_b_dec=subtract),
        x,
        f"its files should say apply_b_dec_to_input = {str(subtract).lower()}: a conversion got it "
        "wrong, or folded b_dec into b_enc as well",
    )


def _activations(sae: SAE, x: Tensor, l0: float) -> Iterator[Reading]:
    """A TopK or a threshold that was lost: then the weakest codes are noise."""
    k = 1
    while k <= l0 / 2 and k < sae.n_features:
        yield Reading(
            "activation function",
            f"with the {k} largest codes alone",
            _changed(sae, k=k),
            x,
            f"about {k} features should fire on a token, not {l0:.0f}: a TopK or JumpReLU SAE read "
            "as ReLU, or thresholds that were lost or rounded; look at the architecture, k and "
            "threshold in its files",
        )
        k *= 2


def _changed(sae: SAE, **changes: object) -> SAE:
    """The same weights, read otherwise. `replace` would look through all of them again for NaN,
    which takes as long as a reading of a wide SAE does."""
    other = copy(sae)
    for name, value in changes.items():
        object.__setattr__(other, name, value)
    return other


def _shown(fit: Fit) -> str:
    return f"{share(fit.explained)}, mean error {fit.mean_error:.1e}"
