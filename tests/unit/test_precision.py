"""Models in bfloat16: SAE and perturbation math stays in float32, and drift is rounding alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from holdfast.batch import Batch
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.constraints.gradient_projection import GradientProjection
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.features import FeatureSet
from holdfast.recovery import Budget, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.inputs import Inputs
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_model, tiny_problem, tiny_subject
from holdfast.verdict import MAX_OVER_FLOOR, VerdictRule, judge
from holdfast.verify import Checks, verify

SITE = Site(2)


@pytest.fixture(scope="module")
def half() -> Subject:
    """A wider tiny subject in bfloat16, so that there is a null space worth the name."""
    subject = tiny_subject()
    model: Any = tiny_model()
    return replace(subject, model=model.to(torch.bfloat16))


@pytest.fixture(scope="module")
def prompts(half: Subject) -> Batch:
    return tiny_batch(half, 24)


def recovered(
    subject: Subject, batch: Batch, bank: FeatureBank, constraint: Any
) -> tuple[Checks, Perturbation]:
    """What is left of a constraint after the whole optimizer, measured in the model's precision."""
    spec = RecoverySpec(constraint=constraint, steps=20, budget=Budget(relative=0.5), doublings=1)
    problem = tiny_problem(subject, batch, bank)
    found = recover(problem, spec, seed=0)
    positions = batch.prompt_length[:, None] - 1
    perturbation = Perturbation(batch.ids, positions, {SITE: found.delta})
    held, scale = {SITE: bank}, {SITE: {"*": 1.0}}
    return verify(subject, batch, (), perturbation, held, scale, True), perturbation


def test_drift_in_bfloat16_is_at_the_rounding_floor(
    half: Subject, prompts: Batch, features: FeatureSet
) -> None:
    bank = FeatureBank.of(half.sae(SITE), features)
    checks, _ = recovered(half, prompts, bank, EncoderNull())
    drift, floor = checks.preactivation_drift.mean(), checks.rounding_floor.mean()
    assert 1e-5 < floor < 1e-2, "bfloat16 keeps 8 bits"
    assert drift <= MAX_OVER_FLOOR * floor
    leaky, _ = recovered(half, prompts, bank, GradientProjection())
    assert leaky.preactivation_drift.mean() > 3 * leaky.rounding_floor.mean()


def test_the_floor_is_what_rounding_makes_of_random_null_space_vectors(
    half: Subject, prompts: Batch, features: FeatureSet
) -> None:
    """The floor is not computed from the perturbation: its direction does not matter."""
    bank = FeatureBank.of(half.sae(SITE), features)
    positions = prompts.prompt_length[:, None] - 1
    generator = torch.Generator().manual_seed(1)
    floors = []
    for _ in range(2):
        delta = torch.randn(len(prompts), 1, 32, generator=generator)
        delta = 3.0 * delta / delta.norm(dim=-1, keepdim=True)
        perturbation = Perturbation(prompts.ids, positions, {SITE: delta})
        checks = verify(half, prompts, (), perturbation, {SITE: bank}, {SITE: {"*": 1.0}}, True)
        floors.append(checks.rounding_floor)
    torch.testing.assert_close(floors[0], floors[1])
    in_float32 = verify(
        tiny_subject(), prompts, (), perturbation, {SITE: bank}, {SITE: {"*": 1.0}}, True
    ).rounding_floor
    assert (in_float32 < 1e-6).all() and (floors[0] > 100 * in_float32).all()


def test_codes_and_edits_are_computed_in_float32(
    half: Subject, prompts: Batch, features: FeatureSet
) -> None:
    """The residual is rounded once, after the edit; nothing before that is in low precision."""
    bank = FeatureBank.of(half.sae(SITE), features)
    edit = FeatureEdit(bank, "set", 3.0)
    before, after = Capture(SITE), Capture(SITE)
    half.outputs(prompts, (before, edit, after))
    (frame, x), (_, y) = before.seen[0], after.seen[0]
    assert x.dtype == y.dtype == torch.bfloat16
    z = bank.activations(x.double(), frame)
    change = bank.decode(3.0 - z, x, frame)
    expected = (x.double() + change).to(torch.bfloat16)
    where = edit.selects(SITE, frame)
    differ = (y[where] != expected[where]).float().mean()
    assert differ < 0.01, "more than a rounding tie here and there"


def test_replay_in_bfloat16_is_the_full_pass_to_its_precision(
    half: Subject, prompts: Batch
) -> None:
    positions = prompts.prompt_length[:, None] - 1
    delta = torch.randn(len(prompts), 1, 32, generator=torch.Generator().manual_seed(0))
    replay = Replay.record(half, prompts, SITE, positions)
    with torch.no_grad():
        again = replay.logits(delta)
    full = half.outputs(prompts, (Perturbation(prompts.ids, positions, {SITE: delta}),))[:, -1]
    assert (again - full).abs().max() < 3e-2 * full.abs().max()


def _record(drift: float, floor: float | None) -> dict[str, Any]:
    checks = {"exact": True, "preactivation_drift_max": 3 * drift}
    if floor is not None:
        checks |= {"broken_mean": drift, "rounding_floor_mean": floor}
    counts = {"recovered": 0, "not_recovered": 9, "infeasible": 0, "diverged": 0, "undecided": 0}
    stages = {"valid": 9, "recovered": 0}
    return {
        "result": {"checks": checks, "outcome": {"counts": counts}, "funnel": {"stages": stages}}
    }


@pytest.mark.parametrize(
    ("drift", "floor", "verdict"),
    [
        (1e-3, 9e-4, "held"),
        (1e-3, 5e-4, "undecided"),
        (1e-3, None, "undecided"),
        (1e-8, 1e-8, "held"),
    ],
)
def test_a_verdict_allows_for_rounding_and_no_more(
    drift: float, floor: float | None, verdict: str
) -> None:
    assert judge(VerdictRule(), _record(drift, floor), []).verdict == verdict


def test_a_per_token_norm_has_no_floor(
    subject: Subject, batch: Batch, features: FeatureSet
) -> None:
    sae = replace(subject.sae(SITE).full(), inputs=Inputs(norm="layer_norm"))
    bank = FeatureBank.of(sae, features)
    positions = batch.prompt_length[:, None] - 1
    perturbation = Perturbation(batch.ids, positions, {SITE: torch.ones(len(batch), 1, 32)})
    checks = verify(subject, batch, (), perturbation, {SITE: bank}, {SITE: {"*": 1.0}}, True)
    assert checks.rounding_floor.isnan().all()
