"""Verification goes by pieces of rows: what it holds is bounded, what it says is the same."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.batching import Batching
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.errors import EditNeverFiredError
from holdfast.saes.bank import FeatureBank
from holdfast.saes.rivals import Rivals
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import WORDS, random_sae
from holdfast.verify import Checks, Effect, effects, verify
from tests.unit.recovered import features_at
from tests.unit.test_forecast import Live

SITE = Site(2)
SCALE: dict[Site, dict[str, float | None]] = {SITE: {"*": 1.0}}


def push_of(batch: Batch, none_for: int = 0) -> Perturbation:
    """Random vectors at the last token, none for the first few prompts."""
    positions = batch.positions[:, -1:].clone()
    positions[:none_for] = -1
    generator = torch.Generator().manual_seed(1)
    return Perturbation(
        batch.ids, positions, {SITE: torch.randn(len(batch), 1, 32, generator=generator)}
    )


def test_pieces_say_what_the_whole_says(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit
) -> None:
    """Also where the vectors touch no token of one of the pieces."""
    push = push_of(batch, none_for=3)
    made: list[tuple[Checks, Tensor]] = []
    for size in (100, 3):
        own = replace(subject, batching=Batching(size))
        checks = verify(own, batch, (clamp,), push, {SITE: bank}, SCALE, True)
        (effect,) = effects(own, batch, (clamp,), [push], {SITE: bank}, SCALE, True)
        torch.testing.assert_close(effect.margin, checks.margin)
        made.append((checks, effect.preactivation_drift))
    (whole, drift), (pieces, same) = made
    torch.testing.assert_close(same, drift, rtol=1e-4, atol=1e-6)
    for field in fields(Checks):
        one, two = getattr(whole, field.name), getattr(pieces, field.name)
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_vectors_that_touch_no_token_at_all_are_an_error(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    own = replace(subject, batching=Batching(3))
    push = push_of(batch, none_for=len(batch))
    with pytest.raises(EditNeverFiredError, match="Perturbation"):
        verify(own, batch, (), push, {SITE: bank}, SCALE, True)


def test_what_is_held_does_not_grow_with_the_rows(subject: Subject, bank: FeatureBank) -> None:
    own = replace(subject, batching=Batching(4))
    peaks = []
    for n in (8, 32):
        batch = own.batch(
            [
                Example(f"p{i}", " ".join(WORDS[(i + j) % 40] for j in range(60)), "w1", ("w2",),
                        ("w3",), f"p{i}")
                for i in range(n)
            ]
        )  # fmt: skip
        push = push_of(batch)
        with Live(list(subject.model.parameters())) as live:
            verify(own, batch, (), push, {SITE: bank}, SCALE, True)
        peaks.append(live.peak)
    assert peaks[1] < 1.3 * peaks[0]


def test_comparing_perturbations_looks_for_each_limit_once(
    subject: Subject, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a TopK: once for the pass without any, and once for each."""
    sae = replace(random_sae(SITE, jump=False), k=8)
    own = replace(subject, saes={SITE: sae})
    features = features_at((SITE,))
    bank = FeatureBank.of(sae, features)
    looked, limit = [], Rivals.limit

    def counting(rivals: Rivals, x: Tensor) -> Tensor:
        looked.append(x.shape[:2])
        return limit(rivals, x)

    pushes = [push_of(batch), push_of(batch, none_for=2)]
    checks = [verify(own, batch, (), push, {SITE: bank}, SCALE, True) for push in pushes]
    monkeypatch.setattr(Rivals, "limit", counting)
    made = effects(own, batch, (), pushes, {SITE: bank}, SCALE, True)
    assert looked == [(len(batch), 1)] * (1 + len(pushes))
    for effect, check in zip(made, checks, strict=True):
        for field in fields(Effect):
            torch.testing.assert_close(getattr(effect, field.name), getattr(check, field.name),
                                       equal_nan=True)  # fmt: skip
    assert made[0].overtaken.sum() > 0
