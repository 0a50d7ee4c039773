"""How often a condition opens: counted where the clamp may act, token by token, nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.batch import Batch
from holdfast.edits import Capture, FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.interventions import INTERVENTIONS
from holdfast.setting import Setting
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch
from holdfast.triggers import opened

SITE = Site(2)
FEATURES = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(1, 5)),), source="test")


def clamp(**fields: Any) -> Any:
    table = {"kind": "clamp", "mode": "set", "value": -2.0} | fields
    return INTERVENTIONS.parse(table)


@pytest.mark.parametrize("positions", ["all", "last_prompt"])
def test_shares_are_those_of_a_loop_over_tokens(
    positions: str, subject: Subject, batch: Batch
) -> None:
    conditional = clamp(condition={"feature": 7, "above": 0.3}, positions=positions)
    shares = opened(subject, batch, conditional.edits(subject, FEATURES))
    assert shares is not None
    capture = Capture(SITE)
    subject.outputs(batch, (capture,))
    ((frame, x),) = capture.seen
    z = subject.sae(SITE).full().encode(x)[..., 7]
    for row in range(len(batch)):
        own = [s for s in range(x.shape[1]) if frame.positions[row, s] > 0]  # without BOS
        own = own[-1:] if positions == "last_prompt" else own
        expected = sum(float(z[row, s]) > 0.3 for s in own) / len(own)
        assert float(shares[row]) == pytest.approx(expected)
    assert 0 < shares.mean() < 1, "the fixture has both"


def test_a_condition_reads_what_edits_before_it_left(subject: Subject, batch: Batch) -> None:
    """As the clamp itself does: a feature that was switched off opens nothing."""
    conditional = clamp(condition={"feature": 5}).edits(subject, FEATURES)
    before = clamp(value=-50.0).edits(subject, FEATURES)
    alone, after = (opened(subject, batch, e) for e in (conditional, (*before, *conditional)))
    assert alone is not None and after is not None
    assert alone.sum() > 0 and after.sum() == 0


def test_every_set_of_prompts_is_measured_and_only_where_there_is_a_condition(
    subject: Subject, batch: Batch
) -> None:
    other = tiny_batch(subject, 5, seed=4)
    shown = torch.ones(5, dtype=torch.bool)

    def setting(intervention: Any) -> Setting:
        n = len(batch)
        return Setting(
            subject=subject, features=FEATURES, intervention=intervention,
            edits=intervention.edits(subject, FEATURES), sizes={}, test=batch,
            clean_margin=torch.ones(n), suppressed_margin=-torch.ones(n),
            suppressed_answer=batch.targets, neighbors={"music": (other, shown, shown)},
        )  # fmt: skip

    assert setting(clamp()).triggers == []
    found = {m.name: m for m in setting(clamp(condition={"feature": 7})).triggers}
    assert set(found) == {
        f"{what}.{which}"
        for what in ("trigger_rate", "trigger_tokens")
        for which in ("audited", "music")
    }
    assert found["trigger_rate.music"].n == 5
    never = {m.name: m for m in setting(clamp(condition={"feature": 7, "above": 1e6})).triggers}
    assert all(m.estimate == 0 for m in never.values())


def test_a_clamp_without_condition_has_no_rate(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    assert opened(subject, batch, (clamp,)) is None
