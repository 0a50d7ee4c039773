"""Several clamped layers: replay equals the full pass, and feature_hold holds them all, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast import spans
from holdfast.batch import Batch
from holdfast.constraints import ConstraintKind
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.constraints.gradient_projection import GradientProjection
from holdfast.constraints.in_place import SLACK
from holdfast.constraints.unconstrained import Unconstrained
from holdfast.constraints.undo_null import UndoNull
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.errors import ConstraintError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.problem import Problem, relative_violation
from holdfast.recovery import Budget, Recovery, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import Iterate
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.verify import Checks, verify

SITES = (Site(1), Site(2), Site(3))
IDS = {Site(1): (3, 7, 20), Site(2): (1, 5, 9, 30), Site(3): (2, 11)}
FEATURES = FeatureSet(
    entries=tuple(SiteFeatures(site=str(s), ids=ids) for s, ids in IDS.items()), source="test"
)


@pytest.fixture(scope="module")
def deep() -> Subject:
    return tiny_subject(sites=SITES)


@pytest.fixture(scope="module")
def prompts(deep: Subject) -> Batch:
    return tiny_batch(deep, 8)


@pytest.fixture(scope="module")
def banks(deep: Subject) -> dict[Site, FeatureBank]:
    return {site: FeatureBank.of(deep.sae(site), FEATURES) for site in SITES}


@pytest.fixture(scope="module")
def clamps(banks: dict[Site, FeatureBank]) -> tuple[FeatureEdit, ...]:
    """A clamp whose value depends on the state, so that lower layers can change what it does."""
    return tuple(FeatureEdit(bank, "multiply", 1.5) for bank in banks.values())


def last_two(batch: Batch) -> Tensor:
    return batch.prompt_length[:, None] - torch.tensor([2, 1])


def posed(
    subject: Subject,
    batch: Batch,
    banks: Mapping[Site, FeatureBank],
    clamps: tuple[Any, ...],
    sites: tuple[Site, ...] = SITES,
    budget: float = 0.5,
    order: str = "before",
) -> Problem:
    replay = Replay.record(
        subject, batch, sites, last_two(batch), watch=tuple(banks), **{order: clamps}
    )
    reference = replay.residual().norm(dim=(1, 2))
    # A little more than there is without a perturbation, so that every row has to move.
    start = batch.margin(replay.logits(torch.zeros(len(batch), 2 * len(replay.sites), 32)))
    goal = start.clamp_min(0) + 1
    return Problem(replay, batch, goal, banks, reference, budget * reference)


def searched(problem: Problem, constraint: ConstraintKind, steps: int = 25) -> Recovery:
    spec = RecoverySpec(constraint=constraint, steps=steps, doublings=1, budget=Budget(relative=1))
    return recover(problem, spec, seed=0)


def checked(problem: Problem, delta: Tensor, clamps: tuple[Any, ...]) -> Checks:
    batch = problem.batch
    push = Perturbation(batch.ids, last_two(batch), problem.replay.parts(delta))
    scale = {site: {"*": 1.0} for site in problem.held}
    return verify(problem.replay.subject, batch, clamps, push, problem.held, scale, True)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("sites", [SITES, SITES[:1], (SITES[0], SITES[2]), (Site(0), Site(2))])
def test_replay_of_several_sites_equals_the_full_pass(
    order: str,
    sites: tuple[Site, ...],
    deep: Subject,
    prompts: Batch,
    banks: dict[Site, FeatureBank],
    clamps: tuple[FeatureEdit, ...],
) -> None:
    """Logits and gradients, with the clamps before or after the perturbation at its site."""
    replay = posed(deep, prompts, banks, clamps, sites, order=order).replay
    delta = torch.randn(len(prompts), 2 * len(sites), 32, requires_grad=True)
    push = Perturbation(prompts.ids, last_two(prompts), replay.parts(delta))
    edits = (*clamps, push) if order == "before" else (push, *clamps)
    full = deep.forward_with_gradients(prompts, edits)
    again = replay.logits(delta)
    torch.testing.assert_close(again, full, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(full)
    one, other = (
        torch.autograd.grad((logits * weights).sum(), delta)[0] for logits in (again, full)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    rows = torch.tensor([3, 0, 3])
    torch.testing.assert_close(
        replay.rows(rows).logits(delta[rows]), again[rows], atol=1e-5, rtol=1e-5
    )


def test_without_a_hold_what_is_realized_is_what_was_asked_for(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    replay = posed(deep, prompts, banks, clamps).replay
    delta = torch.randn(len(prompts), 6, 32)
    torch.testing.assert_close(replay.realized(delta), delta, atol=1e-5, rtol=1e-5)


def test_feature_hold_holds_every_layer_after_the_whole_search(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    """Exact at all layers at once, in the saved vectors alone, inside the budget."""
    problem = posed(deep, prompts, banks, clamps)
    found = searched(problem, FeatureHold())
    checks = checked(problem, found.delta, clamps)
    assert checks.preactivation_drift.max() <= 1e-6
    assert checks.gate_flips.sum() == 0
    assert (found.norm <= problem.radius * (1 + SLACK)).all()
    assert (found.norm > 0.01 * problem.radius).all(), "the search went somewhere"
    torch.testing.assert_close(checks.margin.float(), found.margin, atol=1e-4, rtol=1e-4)
    assert (found.margin > problem.batch.margin(deep.outputs(prompts, clamps)[:, -1])).all()

    free = searched(problem, Unconstrained())
    drift = checked(problem, free.delta, clamps).preactivation_drift
    assert (drift > 1e-4).all(), "not trivially so"
    both = ~(found.smallest_norm.isnan() | free.smallest_norm.isnan())
    assert both.any()
    assert (found.smallest_norm[both] >= free.smallest_norm[both] * 0.95).all(), (
        "the held set lies in the free one"
    )


def test_the_columns_of_a_site_are_factored_once(
    deep: Subject, prompts: Batch, clamps: tuple[FeatureEdit, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many constraints hold them and vectors are verified."""
    factored: list[int] = []
    factor = spans.orthonormal_basis

    def factoring(own: Tensor) -> Tensor:
        factored.append(own.shape[1])
        return factor(own)

    monkeypatch.setattr(spans, "orthonormal_basis", factoring)
    fresh = {site: FeatureBank.of(deep.sae(site), FEATURES) for site in SITES}
    problem = posed(deep, prompts, fresh, clamps)
    for kind in (FeatureHold(), UndoNull(), FeatureHold()):
        sets = kind.feasible(kind.acting(problem))
        checked(problem, sets.retract(torch.randn(problem.shape)), clamps)
    assert sorted(factored) == sorted(2 * [len(ids) for ids in IDS.values()]), (
        "encoder columns and decoder rows"
    )


def test_the_retraction_is_idempotent_and_its_vectors_need_no_hold(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    problem = FeatureHold().acting(posed(deep, prompts, banks, clamps))
    sets = FeatureHold().feasible(problem)
    once = sets.retract(torch.randn(problem.shape))
    torch.testing.assert_close(sets.retract(once), once, atol=1e-4, rtol=1e-4)
    plain = replace(problem.replay, hold={})
    held = problem.replay.logits(once)
    torch.testing.assert_close(plain.logits(once), held, atol=1e-4, rtol=1e-4)
    assert relative_violation(problem, once, torch.arange(len(prompts))).max() < 1e-6
    assert torch.equal(sets.retract(torch.zeros(problem.shape)).abs() < 1e-5,
                       torch.ones(problem.shape, dtype=torch.bool))  # fmt: skip


@pytest.mark.parametrize("share", [1.0, 0.3, 0.01])
def test_the_budget_binds_what_is_really_added(
    share: float, deep: Subject, prompts: Batch, banks: Any, clamps: tuple[FeatureEdit, ...]
) -> None:
    problem = FeatureHold().acting(posed(deep, prompts, banks, clamps))
    sets = FeatureHold().feasible(problem)
    radius = share * problem.radius
    inside = sets.inside(
        30 * torch.randn(problem.shape), radius, Iterate.zero(torch.zeros(problem.shape))
    )
    length = inside.norm(dim=(1, 2))
    assert (length <= radius * (1 + SLACK)).all()
    assert (length >= 0.5 * radius).all(), "and not by giving up"
    assert relative_violation(problem, inside, torch.arange(len(prompts))).max() < 1e-6


def test_what_fits_after_no_scaling_stays_where_it_was(
    deep: Subject, prompts: Batch, banks: Any, clamps: tuple[FeatureEdit, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    problem = FeatureHold().acting(posed(deep, prompts, banks, clamps))
    sets, radius = FeatureHold().feasible(problem), problem.radius
    zero = Iterate.zero(torch.zeros(problem.shape))
    last = sets.inside(torch.randn(problem.shape), radius, zero)
    monkeypatch.setattr("holdfast.constraints.in_place.MAX_ROUNDS", 0)
    far = 30 * torch.randn(problem.shape)
    assert torch.equal(sets.inside(far, radius, Iterate(last)), last)
    assert not sets.inside(far, 0.5 * last.norm(dim=(1, 2)), Iterate(last)).any(), (
        "but not where that is outside of the ball too"
    )


def test_with_one_layer_it_is_encoder_null(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    site = SITES[1]
    problem = posed(deep, prompts, {site: banks[site]}, clamps[1:2], (site,))
    hold, null = searched(problem, FeatureHold()), searched(problem, EncoderNull())
    both = ~(hold.smallest_norm.isnan() | null.smallest_norm.isnan())
    assert torch.equal(hold.smallest_norm.isnan(), null.smallest_norm.isnan()) and both.any()
    torch.testing.assert_close(
        hold.smallest_norm[both], null.smallest_norm[both], rtol=0.03, atol=0.0
    )


def test_what_cannot_be_held_is_refused_with_what_to_do(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    cases: list[tuple[ConstraintKind, Problem, str]] = [
        (FeatureHold(), posed(deep, prompts, banks, clamps, SITES[:1]), "every clamped site"),
        (FeatureHold(), posed(deep, prompts, banks, clamps, order="after"), "clamp_then_pert"),
        (EncoderNull(), posed(deep, prompts, banks, clamps), "Use feature_hold"),
        (EncoderNull(), posed(deep, prompts, banks, clamps, SITES[:1]), "Use feature_hold"),
    ]
    for constraint, problem, message in cases:
        with pytest.raises(ConstraintError, match=message):
            searched(problem, constraint)


def test_drift_where_nothing_is_promised_is_measured(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    """A vector in the middle of a prompt reaches later tokens' features through attention."""
    positions = torch.full((len(prompts), 1), 2)
    replay = Replay.record(deep, prompts, SITES, positions, before=clamps)
    problem = FeatureHold().acting(
        Problem(replay, prompts, torch.ones(8), banks, torch.ones(8), torch.ones(8))
    )
    delta = FeatureHold().feasible(problem).retract(5 * torch.randn(problem.shape))
    push = Perturbation(prompts.ids, positions, replay.parts(delta))
    scale = {site: {"*": 1.0} for site in banks}
    checks = verify(deep, prompts, clamps, push, banks, scale, True)
    assert checks.preactivation_drift.max() < 1e-6
    assert (checks.preactivation_drift_elsewhere > 1e-4).all()
    assert checks.preactivation_drift_answer.isnan().all(), "no answer is forced"


def test_drift_is_told_apart_along_the_text(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    """At the anchor and at the first token of the answer, read by hooks of its own."""
    text = prompts.forcing([[5, 6, 7]] * len(prompts))
    anchor = text.prompt_length[:, None] - 1
    push = Perturbation(text.ids, anchor, {SITES[0]: torch.randn(len(text), 1, 32)})
    scale = {site: {"*": 1.0} for site in banks}
    checks = verify(deep, text, clamps, push, banks, scale, True)

    site = SITES[-1]
    before, after = Capture(site), Capture(site)
    deep.read(text, (*clamps, before))
    deep.read(text, (*clamps, push, after))
    for column, seen in ((0, "anchor"), (1, "answer"), (2, "answer")):
        x, y = (c.at(text.ids, anchor + column)[:, 0] for c in (before, after))
        W = banks[site].W_enc[0]
        moved = ((y - x) @ W).abs() / (W.norm(dim=0) * x.norm(dim=1, keepdim=True))
        largest = getattr(checks, f"preactivation_drift_{seen}")
        assert (largest >= moved.amax(1).double() * (1 - 1e-3)).all()
    assert torch.equal(checks.preactivation_drift_anchor, checks.preactivation_drift)
    assert torch.equal(checks.preactivation_drift_answer, checks.preactivation_drift_elsewhere)


def test_the_published_projection_is_made_at_each_site_by_itself(
    deep: Subject, prompts: Batch, banks: dict[Site, FeatureBank], clamps: tuple[FeatureEdit, ...]
) -> None:
    """Off the columns held there, by a least-squares of numpy's; and what lies between leaks."""
    published = GradientProjection(ridge=1e-9)
    problem = posed(deep, prompts, banks, clamps)
    gradient = torch.randn(problem.shape)
    zero = Iterate.zero(gradient)
    projected = problem.replay.parts(published.feasible(problem).tangent(gradient, zero))
    for site, own in problem.replay.parts(gradient).items():
        A = banks[site].W_enc[0].numpy()
        for x, y in zip(own.flatten(0, 1).numpy(), projected[site].flatten(0, 1), strict=True):
            left = x - A @ np.linalg.lstsq(A, x, rcond=None)[0]
            assert np.allclose(left, y.numpy(), atol=1e-4)
    lowest = posed(deep, prompts, banks, clamps, (Site(0), SITES[0]))
    free = replace(lowest, held={SITES[0]: banks[SITES[0]]})
    part = published.feasible(free).tangent(
        torch.ones(free.shape), Iterate.zero(torch.ones(free.shape))
    )
    assert (free.replay.parts(part)[Site(0)] == 1).all(), "nothing is held at the lower site"

    leaky, exact = (searched(problem, kind) for kind in (published, FeatureHold()))
    assert checked(problem, leaky.delta, clamps).preactivation_drift.max() > 1e-3
    assert checked(problem, exact.delta, clamps).preactivation_drift.max() < 1e-6
    with pytest.raises(ConstraintError, match="no perturbed site has any"):
        published.feasible(replace(lowest, held={SITES[2]: banks[SITES[2]]}))
