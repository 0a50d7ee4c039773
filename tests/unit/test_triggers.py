"""How often a conditional clamp acts, against counting token by token; nothing without a gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.batch import Batch
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.gates import Gate
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch
from holdfast.triggers import triggers

SITE = Site(2)


def gated(subject: Subject, clamp: FeatureEdit, feature: int, above: float) -> FeatureEdit:
    only = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(feature,)),), source="test")
    return replace(clamp, gate=Gate(FeatureBank.of(subject.sae(SITE), only), above))


def by_hand(subject: Subject, batch: Batch, feature: int, above: float) -> list[list[bool]]:
    """For each prompt and token but BOS, whether the feature exceeds the value, unclamped."""
    sae = subject.sae(SITE).full()
    found = []
    for row in range(len(batch)):
        tokens = batch.tokens[row, batch.positions[row] >= 0]
        states = subject.model(input_ids=tokens[None], output_hidden_states=True).hidden_states
        z = sae.encode(states[SITE.depth][0].float())[1:, feature]
        found.append((z > above).tolist())
    return found


@pytest.mark.parametrize("above", [0.0, 0.5, 1e9])
def test_rates_are_what_counting_gives(
    subject: Subject, batch: Batch, clamp: FeatureEdit, above: float
) -> None:
    other = tiny_batch(subject, 5, seed=4)
    edit = gated(subject, clamp, 7, above)
    got = {m.name: m for m in triggers(subject, (edit,), {"test": batch, "retain": other})}
    units = ("prompts", "tokens")
    assert list(got) == [f"trigger.{s}.{u}" for s in ("test", "retain") for u in units]
    for name, prompts in (("test", batch), ("retain", other)):
        opened = by_hand(subject, prompts, 7, above)
        share = sum(map(any, opened)) / len(opened)
        assert got[f"trigger.{name}.prompts"].estimate == pytest.approx(share)
        tokens = sum(sum(row) / len(row) for row in opened) / len(opened)
        assert got[f"trigger.{name}.tokens"].estimate == pytest.approx(tokens)


def test_reading_changes_nothing_and_an_earlier_clamp_is_seen(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    """A clamp that sets the gating feature to 0 leaves a gate behind it nothing to open on."""
    edit = gated(subject, clamp, 7, 0.0)
    before = subject.read(batch, (edit,))
    triggers(subject, (edit,), {"test": batch})
    assert torch.equal(subject.read(batch, (edit,)), before)
    assert edit.gate is not None
    off = FeatureEdit(edit.gate.bank, "add", -100.0)
    shut = {m.name: m.estimate for m in triggers(subject, (off, edit), {"test": batch})}
    assert shut == {"trigger.test.prompts": 0.0, "trigger.test.tokens": 0.0}


def test_an_unconditional_clamp_has_no_trigger(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    assert triggers(subject, (clamp,), {"test": batch}) == ()
