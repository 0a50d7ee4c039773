"""A step of a search does not wait for the device: its parts read no values and copy no lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.batch import Batch
from holdfast.constraints import CONSTRAINTS
from holdfast.edits import Edit, FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.gates import Gate, PromptGate
from holdfast.problem import Lanes, Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import Iterate
from holdfast.testing import tiny_batch, tiny_subject
from tests.waits import counted

SITES = (Site(1), Site(2))


def test_the_counter_counts() -> None:
    x = torch.randn(4)
    with counted() as places:
        x.sum().item()
        bool(x.any())
        float(x[0])
        x.nonzero()
        x[x > 0]
        x[x > 0] = 0.0
        x.tolist()
        torch.as_tensor([1, 2])
        torch.isin(x, x)
    assert len(places) >= 9
    with counted() as places:
        x[torch.zeros(1, dtype=torch.long)]
        torch.where(x > 0, x, 0.0).sum()
    assert places == []


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject(sites=SITES)


@pytest.fixture(scope="module")
def batch(subject: Subject) -> Batch:
    return tiny_batch(subject, 6)


def features_at(*sites: Site) -> FeatureSet:
    """Features of two groups, so that each row has its own."""
    entries = [
        SiteFeatures(site=str(site), group=group, ids=ids)
        for site in sites
        for group, ids in (("g0", (1, 5, 9)), ("g1", (2, 60)))
    ]
    return FeatureSet(entries=tuple(entries), source="test")


def clamps(subject: Subject, kind: str) -> tuple[Edit, ...]:
    edits = []
    for site in SITES:
        bank = FeatureBank.of(subject.sae(site), features_at(site))
        one = FeatureSet(entries=(SiteFeatures(site=str(site), ids=(7,)),), source="test")
        gate = FeatureBank.of(subject.sae(site), one)
        edit = FeatureEdit(bank, "set_where_active", -2.0)
        whole = subject.sae(site).full()
        edits.append(
            {
                "plain": edit,
                "values of their own": replace(edit, value=torch.ones_like(bank.b_enc)),
                "listed positions": replace(edit, where=(3, 4)),
                "gated": replace(edit, gate=Gate(gate, 0.1)),
                "gated by the prompt": replace(edit, gate=PromptGate(gate, 0.1, 0.2)),
                "no error term": replace(edit, error_scale=0.0, sae=whole),
            }[kind]
        )
    return tuple(edits)


KINDS = (
    "plain", "values of their own", "listed positions", "gated", "gated by the prompt",
    "no error term",
)  # fmt: skip


def posed(
    subject: Subject, batch: Batch, edits: tuple[Edit, ...], sites: tuple[Site, ...] = SITES,
    clamp_first: bool = True,
) -> Problem:  # fmt: skip
    last = batch.positions[:, -1:]
    positions = torch.cat([torch.where(last % 2 == 0, last - 1, -1), last], 1)
    replay = Replay.record(
        subject, batch, sites, positions, before=edits if clamp_first else (),
        after=() if clamp_first else edits, watch=sites,
    )  # fmt: skip
    reference = replay.residual().norm(dim=(1, 2))
    held = {site: FeatureBank.of(subject.sae(site), features_at(site)) for site in sites}
    return Problem(replay, batch, torch.ones(len(batch)), held, reference, 0.5 * reference)


def step(lanes: Lanes, delta: torch.Tensor) -> torch.Tensor:
    leaf = delta.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(lanes.margin(leaf).sum(), leaf)
    return gradient


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("clamp_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_never_waits(
    subject: Subject, batch: Batch, kind: str, clamp_first: bool, forced: bool
) -> None:
    if forced:
        batch = batch.forcing([[5, 6, 7], [8], [9, 10], [11], [12], [13]])
    problem = posed(subject, batch, clamps(subject, kind), clamp_first=clamp_first)
    lanes = Lanes.of(problem, torch.tensor([0, 1, 2, 3, 4, 5, 0, 2]))
    delta = torch.randn(8, *problem.shape[1:])
    step(lanes, delta)  # what a frame is worked out for is worked out once
    with counted() as places:
        gradient = step(lanes, delta)
    assert places == [], "the step waits"
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["feature_hold", "decoder_null", "active_null"])
def test_a_step_with_vectors_held_in_place_never_waits(
    subject: Subject, batch: Batch, kind: str
) -> None:
    constraint = CONSTRAINTS.parse({"kind": kind})
    problem = constraint.acting(posed(subject, batch, clamps(subject, "plain")))
    assert problem.replay.hold
    lanes = Lanes.of(problem, torch.arange(6))
    delta = torch.randn(problem.shape)
    step(lanes, delta)
    with counted() as places:
        step(lanes, delta)
        lanes.replay.realized(delta)
    assert places == []


@pytest.mark.parametrize("kind", ["unconstrained", "encoder_null", "gradient_projection",
                                  "random_subspace", "active_null"])  # fmt: skip
def test_coming_back_into_the_set_never_waits(subject: Subject, batch: Batch, kind: str) -> None:
    constraint = CONSTRAINTS.parse({"kind": kind})
    problem = posed(subject, batch, clamps(subject, "plain")[1:], SITES[1:])
    sets = constraint.feasible(constraint.acting(problem)).rows(torch.arange(6))
    delta = torch.randn(problem.shape)
    here = Iterate.zero(delta)
    state = constraint.stepper.start(delta)
    with counted() as places:
        move, state = constraint.stepper.move(state, sets.tangent(delta, here))
        sets.inside(move, problem.radius, here)
    assert places == []
