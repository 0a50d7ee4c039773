"""What came on again is counted slot by slot, and never where a constraint holds every feature."""

from __future__ import annotations

import math

import pytest
import torch

from holdfast.batch import Batch
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.features import FeatureSet
from holdfast.reactivation import Reactivation
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import NullSpace
from holdfast.verify import Checks, verify

SITE = Site(2)
SCALE = {SITE: {"*": 1.0}}


def added(batch: Batch, delta: torch.Tensor) -> Perturbation:
    return Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {SITE: delta})


def checked(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit, delta: torch.Tensor
) -> Checks:
    return verify(subject, batch, (clamp,), added(batch, delta), {SITE: bank}, SCALE, True)


def test_shares_by_hand() -> None:
    """Two prompts, one position, four features; the last of prompt 1 is padding."""
    before = torch.tensor([[[0.0, 0.0, 2.0, 0.0]], [[0.0, 3.0, 1.0, 0.0]]])
    after = torch.tensor([[[0.5, 0.0, 0.0, 1.5]], [[0.0, 3.0, 1.0, 9.0]]])
    held = torch.tensor([[[True] * 4], [[True, True, True, False]]])
    found = Reactivation.between(before, after, held)
    assert found.slots.tolist() == [4, 3] and found.eligible.tolist() == [3, 1]
    assert found.reactivated.tolist() == [2, 0] and found.mass.tolist() == [2.0, 0.0]
    assert found.highest.tolist() == [1.5, 3.0] and found.silent.tolist() == [False, False]
    assert found.within_eligible.tolist() == pytest.approx([2 / 3, 0.0])
    assert found.of_all.tolist() == [0.5, 0.0]
    pooled = found.pooled()
    assert pooled["reactivated_within_eligible"] == 2 / 4 and pooled["reactivated_of_all"] == 2 / 7
    assert pooled["reactivated_mass_mean"] == 2.0 / 4
    made = {m.name: m for m in found.measurements(torch.tensor([True, True]), ["a", "b"])}
    assert made["reactivated_within_eligible"].estimate == pytest.approx(1 / 3)
    assert made["zero_reactivation_rate"].estimate == 0.0
    assert made["none_reactivated_rate"].estimate == 0.5, "3.0 was on before the recovery"


def test_a_prompt_that_did_not_come_back_is_no_zero_reactivation_recovery() -> None:
    off = torch.zeros(3, 1, 2)
    found = Reactivation.between(off, off, torch.ones(3, 1, 2, dtype=torch.bool))
    made = {
        m.name: m for m in found.measurements(torch.tensor([True, False, True]), ["a", "b", "c"])
    }
    for name in ("zero_reactivation_rate", "none_reactivated_rate"):
        assert made[name].estimate == pytest.approx(2 / 3) and made[name].n == 3


def test_where_nothing_is_off_a_share_is_unscored_with_a_reason() -> None:
    on = torch.ones(2, 1, 3)
    found = Reactivation.between(on, on, torch.ones(2, 1, 3, dtype=torch.bool))
    within = found.measurements(torch.tensor([True, True]), ["a", "b"])[0]
    assert within.estimate is None and within.n_unscored == 2 and within.reason
    assert math.isnan(found.pooled()["reactivated_within_eligible"])
    assert found.pooled()["reactivated_of_all"] == 0.0


def test_a_free_vector_along_a_column_switches_its_feature_on_and_a_held_one_none(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit
) -> None:
    far = 20 * bank.W_enc[0, :, 1].expand(len(batch), 1, -1)
    free = checked(subject, batch, bank, clamp, far)
    assert (free.reactivated > 0).all() and (free.reactivated_mass > 0).all()
    assert not free.reactivation.silent.any()
    null = NullSpace.of(bank.W_enc, bank.valid, bank.slices(batch.frame()))
    held = checked(subject, batch, bank, clamp, null.retract(torch.randn(len(batch), 1, 32)))
    assert held.reactivated.sum() == 0 and held.reactivated_mass.sum() == 0
    assert held.decode_drift.max() < 1e-5 < free.decode_drift.min()


def test_counts_and_decode_drift_equal_a_loop_over_prompts_and_features(
    subject: Subject, batch: Batch, grouped_features: FeatureSet
) -> None:
    """Through the whole SAE; groups hold different features, and different numbers."""
    bank = FeatureBank.of(subject.sae(SITE), grouped_features)
    clamp = FeatureEdit(bank, "set_where_active", -2.0)
    delta = 3 * torch.randn(len(batch), 1, 32)
    checks = checked(subject, batch, bank, clamp, delta)
    sae = subject.sae(SITE).full()
    seen = Capture(SITE)
    subject.read(batch, (clamp, seen))
    h = seen.at(batch.ids, batch.prompt_length[:, None] - 1)[:, 0]
    before, after = (sae.encode(x) for x in (h, h + delta[:, 0]))
    for row, group in enumerate(batch.groups):
        ids = next(e.ids for e in grouped_features.entries if e.group == group)
        off = [i for i in ids if before[row, i] <= 0]
        again = [i for i in off if after[row, i] > 0]
        assert checks.slots[row] == len(ids) and checks.eligible[row] == len(off)
        assert checks.reactivated[row] == len(again)
        mass = sum(float(after[row, i]) for i in off)
        assert float(checks.reactivated_mass[row]) == pytest.approx(mass, abs=1e-5)
        moved = sum((after[row, i] - before[row, i]) * sae.W_dec[i] for i in ids)
        assert isinstance(moved, torch.Tensor)
        assert float(checks.decode_drift[row]) == pytest.approx(float(moved.norm()), rel=1e-4)
