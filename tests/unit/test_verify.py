"""Verification measures what it says, from the saved perturbation and full passes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.batch import Batch
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import NullSpace
from holdfast.verify import margin_in_order, verify

SITE = Site(2)


def added(batch: Batch, delta: torch.Tensor) -> Perturbation:
    return Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {SITE: delta})


def in_null_space(batch: Batch, bank: FeatureBank, delta: torch.Tensor) -> torch.Tensor:
    null = NullSpace.of(bank.W_enc, bank.valid, bank.slices(batch.frame()))
    return null.retract(delta)


@pytest.fixture
def delta(batch: Batch) -> torch.Tensor:
    return 0.5 * torch.randn(len(batch), 1, 32)


def test_a_null_space_perturbation_moves_no_held_feature(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit, delta: torch.Tensor
) -> None:
    """METHODS Q 5: drift zero up to rounding, and no gate flips."""
    exact = added(batch, in_null_space(batch, bank, delta))
    checks = verify(
        subject, batch, (clamp,), exact, {SITE: bank}, {SITE: {"*": 1.0}}, clamp_first=True
    )
    assert checks.preactivation_drift.max() < 1e-6
    assert checks.drift_relative.max() < 1e-4 and checks.gate_flips.sum() == 0
    free = verify(
        subject, batch, (clamp,), added(batch, delta), {SITE: bank}, {SITE: {"*": 1.0}}, True
    )
    assert (free.preactivation_drift > 1e-3).all()


def test_reclamping_changes_nothing_under_an_exact_constraint(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit, delta: torch.Tensor
) -> None:
    """A.9: C(h + δ) − C(h) = δ, so the two orders are one."""
    exact = added(batch, in_null_space(batch, bank, delta))
    first, last = (
        verify(subject, batch, (clamp,), exact, {SITE: bank}, {SITE: {"*": 1.0}}, clamp_first=order)
        for order in (True, False)
    )
    torch.testing.assert_close(first.margin, last.margin, atol=1e-5, rtol=1e-5)
    leaky = added(batch, 3 * delta)
    a, b = (
        verify(
            subject,
            batch,
            (replace(clamp, mode="set"),),
            leaky,
            {SITE: bank},
            {SITE: {"*": 1.0}},
            o,
        )
        for o in (True, False)
    )
    assert (a.margin - b.margin).abs().max() > 1e-3, "they differ where the clamp has work to do"
    sets = (replace(clamp, mode="set"),)
    for clamp_first, checks in ((True, a), (False, b)):
        turned = margin_in_order(subject, batch, sets, leaky, clamp_first)
        assert torch.equal(turned, checks.margin), "the pass that verification makes in that order"


def test_drift_equals_a_direct_computation(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit, delta: torch.Tensor
) -> None:
    """Affine pre-activations: Δp = W_encᵀδ, whatever the model does."""
    checks = verify(
        subject, batch, (clamp,), added(batch, delta), {SITE: bank}, {SITE: {"*": 1.0}}, True
    )
    W = bank.W_enc[0].double()
    expected = (delta[:, 0].double() @ W).abs().amax(-1)
    torch.testing.assert_close(checks.preactivation_drift_absolute, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(checks.norm, delta.double().norm(dim=(1, 2)))


def test_relative_drift_is_undefined_without_a_scale(
    subject: Subject, batch: Batch, bank: FeatureBank, delta: torch.Tensor
) -> None:
    off = FeatureEdit(bank, "set", -50.0)  # nothing held is active after this
    perturbation = added(batch, in_null_space(batch, bank, delta))
    checks = verify(subject, batch, (off,), perturbation, {SITE: bank}, {SITE: {"*": None}}, True)
    assert checks.drift_relative.isnan().all()
    scaled = verify(subject, batch, (off,), perturbation, {SITE: bank}, {SITE: {"*": 2.0}}, True)
    assert scaled.drift_relative.isfinite().all()


def test_a_disarmed_clamp_is_seen(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit
) -> None:
    """Features pushed below threshold before a gated clamp: fewer firings, less displacement."""
    down = -30.0 * bank.W_enc[0].sum(1)
    delta = down.expand(len(batch), 1, -1).clone()
    before = verify(
        subject, batch, (clamp,), added(batch, delta), {SITE: bank}, {SITE: {"*": 1.0}}, False
    )
    fired = ~before.firings_kept.isnan()
    assert fired.any() and (before.firings_kept[fired] < 0.5).all()
    assert (before.displacement[fired] < 0.5).all()
    after = verify(
        subject, batch, (clamp,), added(batch, delta), {SITE: bank}, {SITE: {"*": 1.0}}, True
    )
    assert (after.firings_kept[fired] == 1).all(), "a clamp that acted first cannot be disarmed"


def test_the_order_of_rows_does_not_matter(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit, delta: torch.Tensor
) -> None:
    perturbation = added(batch, delta)
    whole = verify(subject, batch, (clamp,), perturbation, {SITE: bank}, {SITE: {"*": 1.0}}, True)
    rows = torch.tensor([6, 2])
    part = batch.rows(rows)
    some = Perturbation(part.ids, perturbation.positions[rows], {SITE: delta[rows]})
    again = verify(subject, part, (clamp,), some, {SITE: bank}, {SITE: {"*": 1.0}}, True)
    torch.testing.assert_close(again.margin, whole.margin[rows], atol=1e-5, rtol=1e-5)


def test_the_budget_is_relative_to_the_suppressed_residual_in_both_orders(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    strong = replace(clamp, mode="set", value=6.0)
    positions = batch.prompt_length[:, None] - 1
    first = Replay.record(subject, batch, SITE, positions, before=(strong,)).residual()
    last = Replay.record(subject, batch, SITE, positions, after=(strong,)).residual()
    torch.testing.assert_close(first, last)
    assert not torch.allclose(first, Replay.record(subject, batch, SITE, positions).residual())
