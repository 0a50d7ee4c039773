"""Checks of one SAE: does it belong to this model, and what do its features do on these prompts?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from holdfast.finding import Finding
from holdfast.organism.assets import SHIPPED
from holdfast.preflight.readings import MIN_EXPLAINED, Readings, readings
from holdfast.preflight.scene import Scene, share
from holdfast.saes.sae import SAE
from holdfast.sites import Site

L0_FACTOR = 4.0
"""How far measured L0 may be from the published one: prompts are not the training data."""

MIN_SPECIAL = 8
"""Fewer special tokens than this say nothing about an average."""

MAX_FLIPS = 0.01
"""Share of firings that rounding may change."""


def origin(scene: Scene, sae: SAE) -> Iterator[Finding]:
    """What the files say of the model they were trained on, against the model that is audited."""
    name, trained = scene.subject.name, sae.facts.model
    if not trained or name in SHIPPED or Path(name).expanduser().exists():
        return  # a folder's name says nothing
    yield Finding(
        check=f"base model of the SAE at {sae.site}",
        passed=_short(name) == _short(trained),
        level="caution",
        expected=f"an SAE trained on {name}",
        measured=f"trained on {trained}, as its files say",
        remedy="SAEs of a base model often serve its instruction-tuned version, others do not: "
        "read how much it explains of these prompts",
    )


def _short(name: str) -> str:
    """A model's name without its owner, as Hugging Face spells it."""
    short = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return {"gpt2-small": "gpt2"}.get(short, short)


def reading(scene: Scene, sae: SAE) -> Iterator[Finding]:
    """How much the SAE explains, and whether it would explain more if it were read otherwise."""
    tried = readings(scene, sae)
    yield Finding(
        check=f"reconstruction at {sae.site}",
        passed=tried.own.explained >= MIN_EXPLAINED,
        expected=f"the SAE explains at least {MIN_EXPLAINED:g} of these prompts' variance",
        measured=share(tried.own.explained),
        remedy=_elsewhere(tried),
    )
    yield from tried.findings()


def _elsewhere(tried: Readings) -> str:
    if tried.right is not None:
        return f"read {tried.right.how} it explains {share(tried.right.fit.explained)}: see below"
    best = max(tried.others, key=lambda other: other.fit.explained)
    return (
        "neither another site, centering, scale nor activation function helps (at best "
        f"{share(best.fit.explained)}, {best.how}): most likely it was trained on another model "
        "or on text unlike these prompts; look at what its files say of model and revision"
    )


def active(scene: Scene, sae: SAE) -> Iterator[Finding]:
    """How many features fire on a token (L0)."""
    measured, published = float(scene.fired(sae.site).sum()), sae.facts.l0
    low, high = 0.0, float(sae.d_model)
    expected = f"more than none and at most {sae.d_model} (d_model) features fire on a token"
    if published:
        low, high = published / L0_FACTOR, published * L0_FACTOR
        expected = f"about {published:g} features fire on a token, as published"
    yield Finding(
        check=f"active features at {sae.site}",
        passed=low < measured <= high,
        expected=expected,
        measured=f"{measured:.1f}",
        remedy="far too many: a TopK or JumpReLU SAE read as ReLU, or a scale that is too large; "
        "far too few: a scale or a threshold that is off; else an SAE of another model",
    )


def special_tokens(scene: Scene, sae: SAE) -> Iterator[Finding]:
    """SAEs of base models never saw the tokens of a chat template."""
    x = scene.some(scene.residuals[sae.site], sae, special=True)
    if len(x) < MIN_SPECIAL:
        return
    # Against zero and not the mean: a few tokens that repeat have hardly any variance.
    left = float((x - sae.reconstruct(x)).square().sum())
    value = 1 - left / float(x.square().sum())
    yield Finding(
        check=f"reconstruction of template tokens at {sae.site}",
        passed=value >= MIN_EXPLAINED,
        level="caution",
        expected=f"the SAE explains at least {MIN_EXPLAINED:g} of the squared norm of special and "
        "template tokens",
        measured=share(value),
        remedy="features that fire on these tokens are no evidence; leave them out of clamps "
        "(`positions`), or use an SAE trained on chats",
    )


def gates(scene: Scene, sae: SAE) -> Iterator[Finding]:
    """Firings that depend on how the model's precision rounds."""
    x, other = (scene.some(r[sae.site], sae) for r in (scene.residuals, scene.rounded))
    flips = n = 0
    for (_, one), (_, two) in zip(sae.codes(x), sae.codes(other), strict=True):
        fires = one > 0
        n += int(fires.sum())
        flips += int((fires != (two > 0)).sum())
    dtype = str(scene.subject.model.dtype).removeprefix("torch.")
    yield Finding(
        check=f"gates at {sae.site}",
        passed=flips <= MAX_FLIPS * n,
        level="caution",
        expected=f"rounding in {dtype} changes at most {MAX_FLIPS:.0%} of the firings",
        measured=f"{flips / max(n, 1):.1%}",
        remedy="counts of gate flips and drift in codes are no finer than that; use "
        'dtype = "float32" where they matter',
    )


def every(scene: Scene, site: Site) -> Iterator[Finding]:
    """All findings about the SAE of a site, which is whole in memory only meanwhile."""
    sae = scene.subject.sae(site).full()
    for make in (origin, reading, active, special_tokens, gates):
        yield from make(scene, sae)
