"""What each constraint forbids, after the whole optimizer, and how the sets lie in each other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.constraints import CONSTRAINTS, ConstraintKind
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.polyhedron import Polyhedron
from holdfast.problem import Problem
from holdfast.recovery import Budget, Recovery, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import NullSpacePerSlot
from holdfast.testing import check_constraint, tiny_batch, tiny_subject
from holdfast.verify import Checks, verify

SITE = Site(2)


def kind(name: str) -> ConstraintKind:
    made = CONSTRAINTS.parse({"kind": name})
    assert isinstance(made, ConstraintKind)
    return made


# ------------------------------------------------------------------------------ nearest points


def nearest_by_enumeration(
    v: np.ndarray, A: np.ndarray, equal: np.ndarray, upper: np.ndarray, bound: np.ndarray
) -> np.ndarray:
    """The nearest point by trying every set of binding bounds: slow, and certainly right."""
    k = A.shape[1]
    best, best_distance = np.zeros_like(v), np.inf
    fixed = [i for i in range(k) if equal[i]]
    free = [i for i in range(k) if upper[i]]
    for size in range(len(free) + 1):
        for chosen in itertools.combinations(free, size):
            on = [*fixed, *chosen]
            point = v.copy()
            if on:
                B = A[:, on]
                wanted = np.array([0.0 if equal[i] else bound[i] for i in on])
                point = v - np.linalg.pinv(B).T @ (B.T @ v - wanted)
            values = A.T @ point
            if all(values[i] <= bound[i] + 1e-9 for i in free) and all(
                abs(values[i]) < 1e-9 for i in fixed
            ):
                distance = np.linalg.norm(point - v)
                if distance < best_distance:
                    best, best_distance = point, distance
    return best


def polyhedra(n: int, d: int, k: int, seed: int) -> tuple[Polyhedron, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(2, d, k, generator=generator)
    equal = torch.rand(n, 1, k, generator=generator) < 0.25
    bounded = ~equal & (torch.rand(n, 1, k, generator=generator) < 0.8)
    sign = torch.where(torch.rand(n, 1, k, generator=generator) < 0.5, 1.0, -1.0).double()
    bound = torch.rand(n, 1, k, generator=generator).double() * bounded
    v = 3 * torch.randn(n, 1, d, generator=generator)
    return Polyhedron(A, torch.arange(n) % 2, equal, bounded, sign, bound), v


@pytest.mark.parametrize(("d", "k"), [(8, 1), (8, 4), (12, 6), (4, 6)])
def test_the_nearest_point_is_that_of_a_brute_force_search(d: int, k: int) -> None:
    """METHODS Q 6. With more directions than dimensions they are dependent."""
    sets, v = polyhedra(24, d, k, seed=d * k)
    point = sets.retract(v.double())
    for row in range(24):
        A = (sets.A[sets.slice_of[row]].double() * sets.sign[row, 0]).numpy()
        expected = nearest_by_enumeration(
            v[row, 0].double().numpy(), A, sets.equal[row, 0].numpy(),
            sets.bounded[row, 0].numpy(), sets.bound[row, 0].numpy(),
        )  # fmt: skip
        np.testing.assert_allclose(point[row, 0].numpy(), expected, atol=1e-5)


def test_a_polyhedron_is_closed_and_differentiable() -> None:
    sets, v = polyhedra(16, 10, 4, seed=5)
    v = v.double()
    once = sets.retract(v)
    torch.testing.assert_close(sets.retract(once), once)
    torch.testing.assert_close(sets.retract(0.3 * once), 0.3 * once)
    assert (sets.retract(torch.zeros_like(v)) == 0).all()
    leaf = v.clone().requires_grad_(True)
    direction, weights = torch.randn_like(v), torch.randn_like(v)
    (gradient,) = torch.autograd.grad((sets.retract(leaf) * weights).sum(), leaf)
    step = 1e-6
    ahead, behind = sets.retract(v + step * direction), sets.retract(v - step * direction)
    slope = ((ahead - behind) * weights).sum((1, 2)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum((1, 2)), slope, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ after the search


@pytest.fixture(scope="module")
def subject() -> Subject:
    """With an SAE of which fewer features are on than the residual has dimensions: half of them
    never fire."""
    made = tiny_subject()
    sae = made.sae(SITE).full()
    never = torch.where(torch.arange(64) < 32, sae.threshold, 1e4)
    return replace(made, saes={SITE: replace(sae, threshold=never)})


def bank_of(sae: SAE, ids: tuple[int, ...]) -> FeatureBank:
    entry = SiteFeatures(site=str(SITE), ids=ids)
    return FeatureBank.of(sae, FeatureSet(entries=(entry,), source="test"))


@pytest.fixture(scope="module")
def some(subject: Subject) -> Batch:
    return tiny_batch(subject, 10)


@pytest.fixture(scope="module")
def busy(subject: Subject, some: Batch) -> FeatureBank:
    """Features that fire on some of the prompts and not on others."""
    replay = Replay.record(subject, some, SITE, some.prompt_length[:, None] - 1)
    rate = (subject.sae(SITE).full().encode(replay.residual()[:, 0]) > 0).float().mean(0)
    ids = (rate - 0.5).abs().argsort()[:6].tolist()
    return bank_of(subject.sae(SITE).full(), tuple(ids))


@pytest.fixture(scope="module")
def clamped(busy: FeatureBank) -> FeatureEdit:
    return FeatureEdit(busy, "set_where_active", -4.0)


@pytest.fixture(scope="module")
def problem(subject: Subject, some: Batch, busy: FeatureBank, clamped: FeatureEdit) -> Problem:
    positions = some.prompt_length[:, None] - 1
    replay = Replay.record(subject, some, SITE, positions, before=(clamped,))
    start = some.margin(replay.logits(torch.zeros(len(some), 1, 32)))
    reference = replay.residual().norm(dim=(1, 2))
    return Problem(replay, some, start.clamp_min(0) + 1.0, {SITE: busy}, reference, 1.5 * reference)


_DONE: dict[str, tuple[Recovery, Checks]] = {}


def done(name: str, problem: Problem, clamped: FeatureEdit) -> tuple[Recovery, Checks]:
    """A whole search under a constraint, once for all tests."""
    if name not in _DONE:
        spec = RecoverySpec(
            constraint=kind(name), steps=40, doublings=1, budget=Budget(relative=1), tolerance=0.01
        )
        found = recover(problem, spec, seed=0)
        batch = problem.batch
        push = Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {SITE: found.delta})
        checks = verify(
            problem.replay.subject, batch, (clamped,), push, problem.held, {SITE: {"*": 1.0}}, True,
            problem.held,
        )  # fmt: skip
        _DONE[name] = found, checks
    return _DONE[name]


HOLDING = (
    "encoder_null",
    "feature_hold",
    "decoder_null",
    "undo_null",
    "one_sided",
    "feature_floor",
    "active_null",
)


@pytest.mark.parametrize("name", HOLDING)
def test_what_is_promised_is_kept_after_the_whole_optimizer(
    name: str, problem: Problem, clamped: FeatureEdit
) -> None:
    found, checks = done(name, problem, clamped)
    assert (found.norm > 0.05).all(), "the search went somewhere"
    assert checks.broken(kind(name).promise).max() < 1e-6
    assert (found.norm <= problem.radius * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", ["unconstrained", "random_subspace"])
def test_what_promises_nothing_moves_the_features(
    name: str, problem: Problem, clamped: FeatureEdit
) -> None:
    """Else the promises above would be kept by anything."""
    _, checks = done(name, problem, clamped)
    for moved in (
        checks.preactivation_drift, checks.code_drift, checks.floor_violation, checks.others_drift,
    ):  # fmt: skip
        assert moved.max() > 1e-3


def test_decoder_null_and_undo_null_forbid_what_they_say(
    problem: Problem, busy: FeatureBank, clamped: FeatureEdit
) -> None:
    found, checks = done("decoder_null", problem, clamped)
    assert checks.decoder_share.max() < 1e-10
    along = (found.delta @ busy.W_dec[0].T).abs().amax((1, 2)) / found.norm
    assert along.max() < 1e-5

    found, checks = done("undo_null", problem, clamped)
    back = problem.replay.unclamped[SITE] - problem.replay.reference[SITE]
    space = kind("encoder_null").feasible(problem)
    free = space.retract(back)
    cosine = (found.delta * free).sum((1, 2)) / (found.norm * free.norm(dim=(1, 2))).clamp_min(1e-9)
    assert cosine.abs().max() < 1e-4
    _, plain = done("encoder_null", problem, clamped)
    assert plain.decoder_share.max() > 1e-3, "which encoder_null leaves open"
    assert plain.undo_cosine.nan_to_num().abs().max() > 0.01


def test_larger_sets_are_never_dearer(problem: Problem, clamped: FeatureEdit) -> None:
    """Smallest norms follow the inclusions of the sets, up to how exactly the search finds them."""
    inclusions = [
        ("unconstrained", "feature_floor"), ("unconstrained", "encoder_null"),
        ("one_sided", "encoder_null"), ("feature_floor", "encoder_null"),
        ("encoder_null", "decoder_null"), ("encoder_null", "undo_null"),
        ("encoder_null", "active_null"), ("unconstrained", "random_subspace"),
    ]  # fmt: skip
    for larger, smaller in inclusions:
        a, b = (done(name, problem, clamped)[0].smallest_norm for name in (larger, smaller))
        both = ~(a.isnan() | b.isnan())
        assert both.sum() >= 5
        assert (a[both] <= 1.05 * b[both]).all(), (larger, smaller, (a / b)[both])
        assert not (a.isnan() & ~b.isnan()).any(), f"{smaller} reaches what {larger} does not"


def test_random_subspace_has_the_dimension_of_the_encoders_null_space(problem: Problem) -> None:
    control, null = (kind(n).feasible(problem) for n in ("random_subspace", "encoder_null"))
    assert torch.equal(control.dimension, null.dimension)
    v = torch.randn(problem.shape)
    assert not torch.allclose(control.retract(v), null.retract(v), atol=1e-2)


@pytest.mark.parametrize("name", [*HOLDING, "random_subspace", "unconstrained"])
def test_the_contract_of_a_constraint(name: str, problem: Problem) -> None:
    check_constraint(kind(name), problem)


def test_one_sided_lets_a_feature_sink_and_keeps_its_code(
    problem: Problem, clamped: FeatureEdit
) -> None:
    _, checks = done("one_sided", problem, clamped)
    assert checks.code_drift.max() < 1e-6 < 1e-3 < checks.preactivation_drift.max()


# ------------------------------------------------------------------------------ the whole SAE


def all_codes(subject: Subject, h: Tensor) -> Tensor:
    """[n n_features] of residuals h [n d], by the whole SAE."""
    return subject.sae(SITE).full().encode(h)


def test_active_null_is_orthogonal_to_every_feature_that_is_on(
    subject: Subject, problem: Problem, busy: FeatureBank
) -> None:
    """And to no other: its dimension is what their columns and the held ones leave."""
    h = problem.replay.reference[SITE][:, 0]
    on = all_codes(subject, h) > 0
    on[:, list(busy.ids[0])] = True
    feasible = kind("active_null").feasible(problem)
    delta = feasible.retract(torch.randn(problem.shape))
    W = subject.sae(SITE).full().W_enc
    for row in range(len(problem)):
        columns = W[:, on[row]].double()
        left = 32 - int(torch.linalg.matrix_rank(columns))
        assert int(feasible.dimension[row]) == left
        assert (delta[row].double() @ columns).abs().max() < 1e-5
    assert len(feasible.dimension.unique()) > 1, "or one set for all would do"
    others = delta[:, 0] @ W
    assert (others[~on].abs() > 1e-2).any(), "what is off may move"


def test_features_that_are_not_clamped_are_counted_as_a_loop_counts_them(
    subject: Subject, problem: Problem, busy: FeatureBank, clamped: FeatureEdit
) -> None:
    h = problem.replay.reference[SITE].double()
    W, length = subject.sae(SITE).full().W_enc.double(), h[:, 0].norm(dim=1)
    for name in ("unconstrained", "encoder_null", "active_null"):
        found, checks = done(name, problem, clamped)
        after = (h + found.delta.double())[:, 0]
        before, now = all_codes(subject, h[:, 0]), all_codes(subject, after)
        for row in range(len(problem)):
            free = [i for i in range(64) if i not in busy.ids[0]]
            on = [i for i in free if before[row, i] > 0]
            moved = [
                float((found.delta[row, 0].double() @ W[:, i]).abs() / W[:, i].norm() / length[row])
                for i in on
            ]
            assert int(checks.others_active[row]) == len(on) > 0
            assert float(checks.others_drift[row]) == pytest.approx(max(moved), abs=1e-6)
            came = [i for i in free if now[row, i] > 0 and before[row, i] <= 0]
            went = [i for i in on if now[row, i] <= 0]
            assert (int(checks.others_on[row]), int(checks.others_off[row])) == (
                len(came), len(went),
            )  # fmt: skip
    assert done("encoder_null", problem, clamped)[1].others_drift.max() > 1e-2
    _, checks = done("active_null", problem, clamped)
    assert checks.others_drift.max() < 1e-6 and checks.others_off.sum() == 0
    assert checks.others_on.sum() > 0, "which it does not forbid"


def test_where_all_that_is_on_spans_the_residual_nothing_is_feasible(
    subject: Subject, some: Batch, busy: FeatureBank
) -> None:
    """Half of the prompts with every feature on: these are infeasible, and the others searched."""
    sae = subject.sae(SITE).full()
    replay = Replay.record(subject, some, SITE, some.prompt_length[:, None] - 1)
    h = replay.residual()[:, 0]
    weights = torch.linalg.lstsq(h, torch.where(torch.arange(10) % 2 == 0, 50.0, -50.0)[:, None])
    on_or_off = replace(
        sae, W_enc=sae.W_enc + weights.solution, threshold=torch.zeros(64), b_enc=torch.zeros(64)
    )
    one = replace(subject, saes={SITE: on_or_off})
    bank = bank_of(on_or_off, (1,))
    replay = replace(replay, subject=one)
    start = some.margin(replay.logits(torch.zeros(10, 1, 32)))
    norm = replay.residual().norm(dim=(1, 2))
    problem = Problem(replay, some, start + 0.01, {SITE: bank}, norm, norm)
    spec = RecoverySpec(constraint=kind("active_null"), steps=20, doublings=1)
    found = recover(problem, spec, seed=0)
    assert found.null_dimension.tolist() == [0, 31] * 5
    assert found.outcomes[::2] == ("infeasible",) * 5
    assert "infeasible" not in found.outcomes[1::2]
    assert (found.delta[::2] == 0).all() and (found.delta[1::2] != 0).any()


def test_a_row_can_be_searched_if_one_of_its_slots_can(subject: Subject, some: Batch) -> None:
    """Three positions, of which some rows have two: each slot has a set of its own."""
    end = some.prompt_length[:, None]
    positions = torch.cat([end - 3, end - 2, end - 1], 1)
    positions[::2, 2] = -1
    replay = Replay.record(subject, some, SITE, positions)
    bank = bank_of(subject.sae(SITE).full(), (1, 2))
    norm = replay.residual().norm(dim=(1, 2))
    problem = Problem(replay, some, norm, {SITE: bank}, norm, norm)
    feasible = kind("active_null").feasible(problem)
    assert isinstance(feasible, NullSpacePerSlot)
    assert (feasible.free[::2, 2] == 0).all() and (feasible.free[1::2] > 0).all()
    assert torch.equal(feasible.dimension, feasible.free.amax(1))
    on = all_codes(subject, replay.reference[SITE]) > 0
    delta = feasible.retract(torch.randn(problem.shape))
    leak = (delta @ subject.sae(SITE).full().W_enc).abs()
    assert leak[on & (positions >= 0)[..., None]].max() < 1e-5 < 1e-2 < leak[~on].max()
    rows = torch.tensor([7, 0, 0, 3])
    again = feasible.rows(rows).retract(delta[rows])
    torch.testing.assert_close(again, delta[rows])
