"""What a null-space perturbation guarantees, SAE by SAE: after the whole optimizer, and refused
where it is nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from holdfast.batch import Batch
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.edits import Perturbation
from holdfast.errors import ConstraintError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.recovery import Budget, RecoverySpec, recover
from holdfast.saes.bank import FeatureBank
from holdfast.saes.inputs import Inputs
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import NullSpace
from holdfast.testing import random_sae, tiny_problem
from holdfast.verify import Checks, verify

SITE = Site(2)
N = 64


def gated(sae: SAE) -> SAE:
    generator = torch.Generator().manual_seed(3)
    gain = torch.rand(N, generator=generator) + 0.5
    return replace(
        sae, gain=gain, offset=0.3 * torch.randn(N, generator=generator),
        threshold=torch.zeros(N),
    )  # fmt: skip


KINDS: dict[str, Any] = {
    "ReLU": lambda: random_sae(SITE, jump=False),
    "JumpReLU": lambda: random_sae(SITE),
    "gated": lambda: gated(random_sae(SITE)),
    "centered": lambda: replace(random_sae(SITE), inputs=Inputs(center=True)),
    "scaled": lambda: replace(random_sae(SITE), inputs=Inputs(center=True, scale=0.3)),
    "TopK": lambda: replace(random_sae(SITE), k=8, threshold=torch.zeros(N)),
}


def checked(subject: Subject, batch: Batch, sae: SAE, budget: float = 0.5) -> Checks:
    """The features that fire most on the prompts, held through a whole search."""
    captured = tiny_problem(subject, batch, FeatureBank.of(sae, some(range(4)))).replay.residual()
    busiest = (sae.encode(captured[:, 0]) > 0).sum(0).topk(4).indices.tolist()
    bank = FeatureBank.of(sae, some(busiest))
    problem = tiny_problem(subject, batch, bank, budget=budget)
    spec = RecoverySpec(constraint=EncoderNull(), steps=20, doublings=1, budget=Budget(relative=1))
    found = recover(problem, spec, seed=0)
    perturbation = Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {SITE: found.delta})
    return verify(subject, batch, (), perturbation, {SITE: bank}, {SITE: {"*": 1.0}}, True)


def some(ids: Any) -> FeatureSet:
    return FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=tuple(ids)),), source="test")


def proof(kind: str) -> Any:
    return pytest.param(kind, marks=pytest.mark.proves("exact null", kind, "codes stay"), id=kind)


@pytest.mark.parametrize("kind", [proof(kind) for kind in KINDS if kind != "TopK"])
def test_codes_cannot_change_where_features_are_functions_of_affine_preactivations(
    kind: str, subject: Subject, batch: Batch
) -> None:
    sae = KINDS[kind]()
    assert sae.guarantee == "exact"
    checks = checked(subject, batch, sae)
    assert checks.norm.median() > 0.1, "the search went somewhere"
    assert checks.preactivation_drift.max() < 1e-6
    assert checks.gate_flips.sum() == 0 and checks.overtaken.sum() == 0
    assert checks.drift_relative.max() < 1e-4


def test_of_a_topk_preactivations_stay_and_overtaking_is_counted(
    subject: Subject, batch: Batch
) -> None:
    """Other features enter the k largest: measured, and not counted as recovery."""
    sae = KINDS["TopK"]()
    assert sae.guarantee == "margin"
    searched = checked(subject, batch, sae)
    assert searched.preactivation_drift.max() < 1e-6, "after the whole optimizer"

    replay = tiny_problem(subject, batch, FeatureBank.of(sae, some(range(4)))).replay
    h, positions = replay.residual(), batch.prompt_length[:, None] - 1
    held = sae.encode(h[0, 0]).topk(4).indices.tolist()
    bank = FeatureBank.of(sae, some(held))
    v = NullSpace.of(bank.W_enc, bank.valid, bank.slices(batch.frame())).retract(h.flip(0))

    def along(scale: float) -> Checks:
        perturbation = Perturbation(batch.ids, positions, {SITE: scale * v})
        return verify(subject, batch, (), perturbation, {SITE: bank}, {SITE: {"*": 1.0}}, True)

    near, far = along(1e-4), along(20.0)
    for checks in (near, far):
        assert checks.preactivation_drift.max() < 1e-5
        torch.testing.assert_close(checks.overtaken, checks.gate_flips)
    assert near.overtaken.sum() == 0, "a small enough perturbation overtakes nothing"
    assert far.overtaken.sum() > 0, "a large one does"
    for checks in (near, far):
        assert torch.equal(checks.recovered, (checks.margin > 0) & (checks.overtaken == 0))


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_a_per_token_norm_is_refused_by_name(norm: Any, subject: Subject, batch: Batch) -> None:
    sae = replace(random_sae(SITE), inputs=Inputs(norm=norm))
    assert sae.guarantee == "none"
    with pytest.raises(ConstraintError, match=f"{SITE}.*{norm}"):
        checked(subject, batch, sae)


def test_why_it_is_refused(subject: Subject, batch: Batch) -> None:
    """A vector orthogonal to the encoder columns moves the features of a normalized SAE."""
    plain = random_sae(SITE)
    sae = replace(plain, inputs=Inputs(norm="constant_norm_rescale"))
    bank = FeatureBank.of(sae, some((1, 5, 9)))
    replay = tiny_problem(subject, batch, bank).replay
    h = replay.residual()
    frame = batch.frame()
    v = NullSpace.of(bank.W_enc, bank.valid, bank.slices(frame)).retract(h)
    moved = bank.preactivations(h + v, frame) - bank.preactivations(h, frame)
    assert moved.abs().max() > 1e-2
    same = FeatureBank.of(plain, some((1, 5, 9)))
    stayed = same.preactivations(h + v, frame) - same.preactivations(h, frame)
    assert stayed.abs().max() < 1e-4


def test_the_margin_to_the_kth_value_says_when_a_topk_is_overtaken(
    subject: Subject, batch: Batch
) -> None:
    """The distance to what decides is measured, and it is short where a push overtakes."""
    sae = KINDS["TopK"]()
    bank = FeatureBank.of(sae, some(range(4)))
    positions = batch.prompt_length[:, None] - 1
    frame = batch.frame()

    def margin(scale: float) -> torch.Tensor:
        push = torch.full((len(batch), 1, 32), scale)
        perturbation = Perturbation(batch.ids, positions, {SITE: push})
        return verify(
            subject, batch, (), perturbation, {SITE: bank}, {SITE: {"*": 1.0}}, True
        ).gate_margin

    h = tiny_problem(subject, batch, bank).replay.residual()
    p, all_p = bank.preactivations(h, frame), sae.preactivations(h)
    top = all_p.topk(sae.k + 1, dim=-1).values
    middle = top[..., -2:].mean(-1, keepdim=True).clamp_min(0)
    length = bank.W_enc[0].norm(dim=0) * h.norm(dim=-1, keepdim=True)
    expected = ((p - middle).abs() / length).amin((1, 2)).double()
    torch.testing.assert_close(margin(0.0), expected, rtol=1e-4, atol=1e-6)
