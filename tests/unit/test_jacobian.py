"""The true Jacobian: products and solves, the way back to the set, and what a search keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from holdfast.ascent import Ascent, Climb, ascend
from holdfast.batch import Batch
from holdfast.constraints import ConstraintKind
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.constraints.in_place import HeldInPlace
from holdfast.constraints.jacobian_null import JacobianNull
from holdfast.constraints.jacobian_probes import JacobianProbes
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.errors import ConstraintError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.jacobian import chords, framed, preconditioners, way_back
from holdfast.jacobian import frame as frames
from holdfast.jacobian import settled as settled_slots
from holdfast.jacobian.chords import Chords, within
from holdfast.jacobian.entries import Entries
from holdfast.jacobian.feature_map import FeatureMap, perturbed_columns
from holdfast.jacobian.frame import Frame
from holdfast.jacobian.framed import Framed
from holdfast.jacobian.learned import Learned
from holdfast.jacobian.level import Level
from holdfast.jacobian.linearized import Linearized
from holdfast.jacobian.null_space import (
    OFF,
    conjugate_gradients,
    correction,
    exact_tangent,
    tangent,
)
from holdfast.jacobian.offsets import Offsets, Plain
from holdfast.jacobian.preconditioners import Positions, Preconditioner, prepared
from holdfast.jacobian.restoration import SLACK, restore
from holdfast.jacobian.settled import Settled
from holdfast.per_row import SetPerRow
from holdfast.problem import Problem
from holdfast.recovery import Budget, Recovery, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.inputs import Inputs
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import Iterate
from holdfast.testing import (
    check_constraint,
    random_sae,
    tiny_batch,
    tiny_model,
    tiny_subject,
    tiny_tokenizer,
)
from holdfast.verify import Checks, verify
from tests.waits import pretend

SITES = (Site(1), Site(2), Site(3))
IDS = {Site(1): (3, 7, 20), Site(2): (1, 5, 9, 30), Site(3): (2, 11)}
FEATURES = FeatureSet(
    entries=tuple(SiteFeatures(site=str(s), ids=ids) for s, ids in IDS.items()), source="test"
)
N = 4


def banks_of(subject: Subject) -> dict[Site, FeatureBank]:
    return {site: FeatureBank.of(subject.sae(site), FEATURES) for site in SITES}


def clamps_of(banks: Mapping[Site, FeatureBank], mode: Any = "multiply") -> tuple[Any, ...]:
    return tuple(FeatureEdit(bank, mode, 1.5) for bank in banks.values())


def posed(
    subject: Subject,
    batch: Batch,
    clamps: tuple[Any, ...],
    sites: tuple[Site, ...] = SITES,
    back: int = 1,
    held: tuple[Site, ...] = SITES,
    width: int = 1,
) -> Problem:
    """Perturbed are `width` tokens from `back` tokens before the end of the prompt on; everything
    up to the end is replayed."""
    positions = batch.prompt_length[:, None] - back + torch.arange(width)
    return posed_at(subject, batch, clamps, positions, sites, held)


def posed_at(
    subject: Subject,
    batch: Batch,
    clamps: tuple[Any, ...],
    positions: Tensor,
    sites: tuple[Site, ...] = SITES,
    held: tuple[Site, ...] = SITES,
) -> Problem:
    """Perturbed are the positions [n p], -1 for none."""
    banks = {site: bank for site, bank in banks_of(subject).items() if site in held}
    replay = Replay.record(subject, batch, sites, positions, before=clamps, watch=tuple(banks))
    reference = replay.residual().norm(dim=(1, 2))
    q = positions.shape[1] * len(sites)
    start = batch.margin(replay.logits(torch.zeros(len(batch), q, 32)))
    return Problem(replay, batch, start.clamp_min(0) + 0.5, banks, reference, reference)


@pytest.fixture(scope="module")
def deep() -> Subject:
    return tiny_subject(sites=SITES)


@pytest.fixture(scope="module")
def prompts(deep: Subject) -> Batch:
    return tiny_batch(deep, N)


@pytest.fixture(scope="module")
def anchored(deep: Subject, prompts: Batch) -> Problem:
    """Vectors at the last token but one, and one more token to hold at every layer."""
    return posed(deep, prompts, clamps_of(banks_of(deep)), back=2)


BACK = 5


@pytest.fixture(scope="module")
def hard(deep: Subject, prompts: Batch) -> Problem:
    """One token's vectors, and four more tokens to hold at every layer."""
    return posed(deep, prompts, clamps_of(banks_of(deep), "set_where_active"), back=BACK)


@pytest.fixture(scope="module")
def low(deep: Subject, prompts: Batch) -> Problem:
    """Vectors at the lowest of three clamped layers, at the last three tokens."""
    return posed(deep, prompts, clamps_of(banks_of(deep)), SITES[:1], back=3, width=3)


def somewhere(problem: Problem, size: float = 0.05, seed: int = 0) -> Tensor:
    noise = torch.randn(problem.shape, generator=torch.Generator().manual_seed(seed))
    length = size * problem.reference_norm / noise.norm(dim=(1, 2))
    return noise * length[:, None, None]


def entries(features: FeatureMap) -> tuple[Entries, Tensor]:
    """Which entries are constraints: the same ones in every row of the problems here."""
    own = Entries.of(features)
    assert own.there.all() and (own.index == own.index[0]).all()
    return own, own.index[0]


def searched(problem: Problem, constraint: ConstraintKind, steps: int = 12) -> Recovery:
    spec = RecoverySpec(
        constraint=constraint, steps=steps, refine_steps=10, doublings=1, tolerance=0.02,
        budget=Budget(relative=1),
    )  # fmt: skip
    return recover(problem, spec, seed=0)


def checked(problem: Problem, delta: Tensor, clamps: tuple[Any, ...], positions: Tensor) -> Checks:
    batch = problem.batch
    push = Perturbation(batch.ids, positions, problem.replay.parts(delta))
    scale = {site: {"*": 1.0} for site in problem.held}
    return verify(problem.replay.subject, batch, clamps, push, problem.held, scale, True)


@pytest.mark.parametrize("which", ["anchored", "low"])
def test_products_are_those_of_the_jacobian(which: str, request: pytest.FixtureRequest) -> None:
    """Against torch's own Jacobian, and Φ against finite differences."""
    problem: Problem = request.getfixturevalue(which)
    features = FeatureMap.of(problem)
    delta, u = somewhere(problem), somewhere(problem, 1.0, seed=1)
    here, (every, used) = Linearized(features, delta), entries(features)
    J = here.matrix(every)
    row = features.rows(torch.tensor([2]))
    full = torch.autograd.functional.jacobian(
        lambda x: row(x[None])[0].flatten()[used], delta[2]
    ).flatten(1)
    torch.testing.assert_close(J[2], full, atol=1e-4 * float(full.abs().max()), rtol=1e-4)

    pushed = here.push(u).flatten(1)[:, used]
    size = float(pushed.abs().max())
    torch.testing.assert_close(pushed, (J @ u.flatten(1)[..., None])[..., 0], atol=1e-4 * size,
                               rtol=1e-4)  # fmt: skip
    y = torch.randn_like(here.value) * features.monitored
    pulled = (y.flatten(1)[:, used][:, None] @ J)[:, 0].view(delta.shape)
    torch.testing.assert_close(here.pull(y), pulled, atol=1e-4, rtol=1e-4)

    step = 3e-3 * u
    moved = (features(delta + step)[0] - features(delta - step)[0]) / 2
    assert (moved - here.push(step)).abs().max() < 0.01 * moved.abs().max()
    assert features(torch.zeros_like(delta))[0].abs().max() == 0, "nothing moves without a vector"


@pytest.mark.parametrize("which", ["anchored", "low"])
def test_matrix_free_solves_equal_exact_ones(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With either preconditioner, away from the reference that it was made at."""
    problem: Problem = request.getfixturevalue(which)
    features = FeatureMap.of(problem)
    here, (every, used) = Linearized(features, somewhere(problem)), entries(features)
    J = here.matrix(every).double()
    b = here.push(somewhere(problem, 1.0, seed=1))
    exact = torch.linalg.pinv(J, rtol=1e-6) @ b.flatten(1)[:, used, None].double()
    goal = 1e-6 * b.abs().amax((1, 2))
    monkeypatch.setattr("holdfast.jacobian.null_space.MAX_ITERATIONS", 300)
    kinds: list[Preconditioner] = [prepared(features)[0], Positions.of(features)]
    for near in kinds:
        step = here.pull(conjugate_gradients(here, near, b, goal)).flatten(1)
        error = (step - exact[..., 0].float()).norm(dim=1) / step.norm(dim=1)
        assert error.max() < 1e-3
        left = (J.float() @ step[..., None])[..., 0] - b.flatten(1)[:, used]
        assert left.abs().max() < 1e-4 * b.abs().max()


def test_a_tangent_moves_no_feature_to_first_order(low: Problem) -> None:
    features = FeatureMap.of(low)
    here, near = Linearized(features, somewhere(low)), prepared(features)[0]
    u = somewhere(low, 1.0, seed=1)
    along = tangent(here, near, u)
    moved, before = (here.push(x).abs().amax((1, 2)) for x in (along, u))
    assert (moved <= 0.11 * before).all()
    assert (along.norm(dim=(1, 2)) > 0.3 * u.norm(dim=(1, 2))).all(), "most directions are free"


def test_the_violation_falls_quadratically(low: Problem) -> None:
    features = FeatureMap.of(low)
    near = prepared(features)[0]
    left = []
    for size in (0.04, 0.01):
        here = Linearized(features, somewhere(low, size))
        step = correction(here, near, 1e-4 * here.held)
        left.append(Linearized(features, here.delta - step).value.abs().amax((1, 2)))
    assert (left[0] / left[1] > 8).all(), "16 for a step of a quarter"


def framed_at(problem: Problem, delta: Tensor) -> tuple[FeatureMap, Frame]:
    features = FeatureMap.of(problem)
    return features, Frame.at(features, delta, Entries.of(features))


@pytest.mark.parametrize("which", ["hard", "low"])
def test_a_frame_is_the_jacobian(which: str, request: pytest.FixtureRequest) -> None:
    """The J that is kept against products that never form it, and its solves against exact ones."""
    problem: Problem = request.getfixturevalue(which)
    delta, u = somewhere(problem), somewhere(problem, 1.0, seed=1)
    features, frame = framed_at(problem, delta)
    here = Linearized(features, delta)
    J = frame.J / frame.scale.clamp_min(1e-30)[..., None]
    pushed, pulled = here.push(u), here.pull(here.value)
    again = torch.bmm(J, u.flatten(1)[..., None])[..., 0]
    size, own = float(pushed.abs().max()), frame.entries
    torch.testing.assert_close(again, own.take(pushed), atol=1e-4 * size, rtol=1e-4)
    assert torch.equal(own.put(own.take(here.value), here.value), here.value)
    y = own.take(here.value)[:, None]
    size = float(pulled.abs().max())
    torch.testing.assert_close(torch.bmm(y, J).view_as(pulled), pulled, atol=1e-4 * size, rtol=1e-4)
    step = frame.correction(here.value)
    exact = torch.linalg.pinv(J.double(), rtol=1e-9) @ y.mT.double()
    error = (step.flatten(1) - exact[..., 0]).norm(dim=1) / exact[..., 0].norm(dim=1)
    assert error.max() < 1e-3
    assert torch.equal(frame.rows(torch.tensor([1])).correction(here.value[1:2]).isfinite().all(),
                       torch.tensor(True))  # fmt: skip


def test_one_correction_by_a_frame_falls_quadratically(hard: Problem) -> None:
    left = []
    for size in (0.02, 0.005):
        delta = somewhere(hard, size)
        features, frame = framed_at(hard, delta)
        there = delta - frame.correction(Linearized(features, delta).value)
        left.append(Linearized(features, there).value.abs().amax((1, 2)))
    assert (left[0] / left[1] > 8).all(), "16 for a step of a quarter"


def test_an_exact_tangent_needs_no_way_back(hard: Problem) -> None:
    """What is left of it across the set is short as a vector, though hardly a feature tells."""
    at, u = somewhere(hard), somewhere(hard, 1.0, seed=1)
    features, frame = framed_at(hard, at)
    here = Linearized(features, at)
    near = framed_at(hard, torch.zeros_like(at))[1]  # solved with what was made elsewhere
    across = {
        kind: frame.correction(here.push(kind(here, near, u))).norm(dim=(1, 2)) / u.norm(dim=(1, 2))
        for kind in (tangent, exact_tangent)
    }
    assert (across[exact_tangent] <= 4 * OFF).all()
    assert across[tangent].max() > 2 * across[exact_tangent].max(), "not so without"


def test_offsets_are_the_same_iterates(hard: Problem) -> None:
    features, delta = FeatureMap.of(hard), somewhere(hard, 0.2)
    offsets = Offsets(features, hard.reference_norm)
    x = offsets.written(delta)
    torch.testing.assert_close(offsets.vectors(x), delta, atol=1e-4, rtol=1e-4)
    *moved, vectors = offsets.moved(x)
    torch.testing.assert_close(vectors, delta, atol=1e-5, rtol=1e-5)
    for one, other in zip(moved, features(delta), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    step, weight = somewhere(hard, 1.0, seed=2), somewhere(hard, 1.0, seed=3)
    leaf = delta.clone().requires_grad_(True)
    states = features.replay.states(leaf, features.replay.sites)
    y = torch.cat([states[site] for site in features.replay.sites], 1)
    (pulled,) = torch.autograd.grad((y * weight).sum(), leaf)
    moved = offsets.change(delta, x, step)
    one, other = ((u * v).sum((1, 2)) for u, v in ((pulled, step), (weight, moved)))
    torch.testing.assert_close(one, other, atol=0.02 * float(one.abs().max()), rtol=0.02)
    # Features at a perturbed slot are linear in offsets, whatever a clamp there does.
    own = perturbed_columns(features.replay)[..., None] & features.monitored
    one, two = (offsets.moved(c * x)[0][own] for c in (1.0, 2.0))
    torch.testing.assert_close(two, 2 * one, atol=1e-6, rtol=1e-3)


def test_the_way_back_is_never_longer_than_what_is_allowed(hard: Problem) -> None:
    features, frame = framed_at(hard, torch.zeros(hard.shape))
    chord = Chords.of(Plain(features), frame, 1e-6)
    zero = Iterate.zero(somewhere(hard))
    for size in (0.01, 0.1, 1.0):
        delta = somewhere(hard, size)
        bend, share = chord.reach(delta, hard.radius, zero)
        assert torch.equal(bend, share), "without a gradient nothing else decides"
        assert ((bend > 0) & (bend <= 1)).all()
        back = frame.correction(features(delta)[0]).norm(dim=(1, 2))
        want = (chords.BEND * delta.norm(dim=(1, 2)) / back).clamp_max(1)
        torch.testing.assert_close(bend, want, rtol=1e-3, atol=0.0)


def test_the_hard_search_holds_and_ends(
    hard: Problem, deep: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many later tokens to hold against few directions: a whole search, in counted passes."""
    level = JacobianNull().feasible(hard)
    assert isinstance(level, Framed)
    n_constraints = level.features.monitored.sum((1, 2))
    assert (n_constraints > 0.3 * level.features.unknowns).all()
    passes = 0
    of_states = FeatureMap.of_states

    def counted(self: FeatureMap, states: Any) -> Any:
        nonlocal passes
        passes += 1
        return of_states(self, states)

    monkeypatch.setattr(FeatureMap, "of_states", counted)
    goal, lr, n = torch.full((N,), torch.inf), torch.full((N,), 0.1), 20
    climb = Climb(torch.arange(N), torch.zeros(hard.shape), goal, hard.radius, lr)
    found = ascend(hard, level, climb, n, JacobianNull().stepper)
    most = 4 + framed.TRIES * way_back.RETURNS * (way_back.CHORDS + 4)
    assert passes <= (n + 1) * most, "however badly the set bends"
    assert passes <= 60 * (n + 1), "and far fewer on the whole"
    start = hard.batch.margin(hard.replay.logits(torch.zeros(hard.shape)))
    assert (found.margin > start + 0.1).all(), "it got somewhere"
    assert (found.delta.norm(dim=(1, 2)) <= hard.radius * (1 + 1e-4)).all()
    positions = hard.batch.prompt_length[:, None] - BACK
    checks = checked(hard, found.delta, clamps_of(banks_of(deep), "set_where_active"), positions)
    assert checks.preactivation_drift.max() <= 1e-5
    assert checks.preactivation_drift_elsewhere.max() <= 1e-5


def test_where_every_slot_is_perturbed_the_rest_is_taken_away_in_place(
    deep: Subject, prompts: Batch
) -> None:
    problem = posed(deep, prompts, clamps_of(banks_of(deep)), back=3, width=3)
    level = JacobianNull().feasible(problem)
    assert isinstance(level, Level) and level.in_place is not None
    delta, last = somewhere(problem, 0.3), Iterate.zero(somewhere(problem))
    point = level.inside(delta, problem.radius, last)
    assert Linearized(level.features, point).held.max() <= level.tolerance
    other = replace(level, in_place=None).inside(delta, problem.radius, last)
    way = [(x - delta).norm(dim=(1, 2)) for x in (point, other, level.in_place.retract(delta))]
    assert (way[0] <= 1.2 * way[1]).all(), "about the shortest way"
    assert (way[0] < way[2]).all(), "which is not what feature_hold takes"


def test_what_cannot_be_put_into_its_ball_in_place_stays(
    deep: Subject, prompts: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = posed(deep, prompts, clamps_of(banks_of(deep)), back=3, width=3)
    level = JacobianNull().feasible(problem)
    last = level.inside(somewhere(problem, 0.3), problem.radius, Iterate.zero(somewhere(problem)))
    monkeypatch.setattr("holdfast.constraints.in_place.MAX_ROUNDS", 0)
    monkeypatch.setattr(HeldInPlace, "retract", lambda self, delta: 30 * delta)
    far = last + somewhere(problem, 0.5, seed=1)
    point = level.inside(far, problem.radius, Iterate(last))
    assert torch.equal(point, last) and point.any()


def test_what_is_put_into_the_set_goes_as_far_as_there_is_a_way_back(
    deep: Subject, prompts: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where no step of a climb follows; in a climb the next step is shorter."""
    problem = posed(deep, prompts, clamps_of(banks_of(deep)), back=3, width=3)
    level, delta = JacobianNull().feasible(problem), somewhere(problem, 0.3)
    assert isinstance(level, Level)
    most = torch.tensor([1.0, 0.3, 0.1, 0.01]) * delta.norm(dim=(1, 2))

    def restored(
        self: Level, trial: Tensor, radius: Tensor, last: Iterate
    ) -> tuple[Tensor, Tensor]:
        rows = [(delta / delta.norm(dim=(1, 2), keepdim=True) * t).sum((1, 2)) for t in trial]
        own = torch.stack(rows).argmax(1)
        return trial, trial.norm(dim=(1, 2)) <= most[own] * 1.001

    monkeypatch.setattr(Level, "_restored", restored)
    zero = Iterate.zero(delta)
    shares = level.inside(delta, problem.radius, zero).norm(dim=(1, 2)) / delta.norm(dim=(1, 2))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.25, 0.0625, 0.0]))
    climbing = replace(zero, gradient=delta)
    shares = level.inside(delta, problem.radius, climbing).norm(dim=(1, 2)) / delta.norm(dim=(1, 2))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.0, 0.0, 0.0]))


BETWEEN = 4000
"""Numbers of a kept J, between those for later tokens and all of them in the next problem."""


@pytest.fixture
def settled(
    deep: Subject, prompts: Batch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Problem, Framed]:
    """Vectors at three tokens of every layer, and two more tokens to hold; J is too large to keep,
    its rows for later tokens are not."""
    monkeypatch.setattr(frames, "SMALL", BETWEEN)
    problem = posed(deep, prompts, clamps_of(banks_of(deep)), back=5, width=3)
    level = JacobianNull().feasible(problem)
    assert isinstance(level, Framed) and isinstance(level.coordinates, Settled)
    return problem, level


def test_where_slots_are_settled_a_tangent_is_the_nearest_that_moves_nothing(
    settled: tuple[Problem, Framed], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, level = settled
    at, u = level.retract(somewhere(problem, 0.3)), somewhere(problem, 1.0, seed=1)
    features = FeatureMap.of(problem)
    here, (every, used) = Linearized(features, at), entries(features)
    J = here.matrix(every).double()
    off = torch.linalg.pinv(J, rtol=1e-6) @ here.push(u).flatten(1)[:, used, None].double()
    exact = u - off[..., 0].float().view_as(u)
    there = replace(level, frame=level.frame.anew(level.features, at, torch.arange(N)))
    moved = here.push(u).abs().amax((1, 2))
    for steps, apart in ((2, 0.5), (30, 0.02)):
        monkeypatch.setattr(settled_slots, "STEPS", steps)
        along = there.tangent(u, Iterate(at))
        assert (here.push(along).abs().amax((1, 2)) <= 1e-3 * moved).all(), "tangent, at any rate"
        error = (along - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
        assert error.max() <= apart
        assert ((along * u).sum((1, 2)) > 0).all()


def test_where_slots_are_settled_iterates_end_in_the_set_and_in_the_ball(
    settled: tuple[Problem, Framed],
) -> None:
    problem, level = settled
    last = level.inside(somewhere(problem, 0.1), problem.radius, Iterate.zero(somewhere(problem)))
    radius = last.norm(dim=(1, 2))
    point = level.inside(last + somewhere(problem, 0.1, seed=3), radius, Iterate(last))
    whole = FeatureMap.of(problem)  # of all tokens, with nothing settled in the pass
    assert Linearized(whole, point).held.max() <= 2e-6
    assert (point.norm(dim=(1, 2)) <= radius * (1 + SLACK)).all()
    assert (point.norm(dim=(1, 2)) >= 0.8 * radius).all(), "and not by giving up"
    assert ((point - last).norm(dim=(1, 2)) > 0.01 * problem.reference_norm).all()


def test_a_search_with_settled_slots_holds_later_tokens(
    settled: tuple[Problem, Framed], deep: Subject
) -> None:
    problem, _ = settled
    found = searched(problem, JacobianNull())
    positions = problem.batch.prompt_length[:, None] - 5 + torch.arange(3)
    checks = checked(problem, found.delta, clamps_of(banks_of(deep)), positions)
    assert checks.preactivation_drift.max() <= 1e-5
    assert checks.preactivation_drift_elsewhere.max() <= 1e-5
    assert (found.norm <= problem.radius * (1 + 1e-4)).all()
    assert set(found.outcomes) == {"recovered"}, "there is room enough"


def test_a_row_goes_the_way_that_it_goes_alone(
    deep: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four prompts, each kept in the set in another way, together and each by itself."""
    monkeypatch.setattr(frames, "SMALL", BETWEEN)
    monkeypatch.setattr(preconditioners, "FEW", 30)
    batch, clamps = tiny_batch(deep, N), clamps_of(banks_of(deep))
    widths, later = torch.tensor([2, 1, 4, 4]), torch.tensor([0, 1, 1, 3])
    steps = torch.arange(4)
    begin = batch.prompt_length - later - widths
    positions = torch.where(steps < widths[:, None], begin[:, None] + steps, -1)
    together = posed_at(deep, batch, clamps, positions)
    level = JacobianNull().feasible(together)
    assert isinstance(level, SetPerRow)
    ways = [level.sets.parts[i] for i in level.sets.owners.number.tolist()]
    assert [type(way) for way in ways] == [Level, Framed, Framed, Level]
    assert isinstance(ways[0], Level) and ways[0].in_place is not None
    assert isinstance(ways[1], Framed) and isinstance(ways[1].coordinates, Offsets)
    assert isinstance(ways[2], Framed) and isinstance(ways[2].coordinates, Settled)
    assert isinstance(ways[3], Level) and isinstance(ways[3].near, Positions)
    found = climbed(together)
    for row in range(N):
        own = torch.tensor([row])
        alone = posed_at(deep, batch.rows(own), clamps, positions[own][:, : int(widths[row])])
        one = climbed(alone)
        slots = together.replay.columns[row] >= 0
        delta = found.delta[row].view(len(SITES), -1, 32)[:, slots].flatten(0, 1)
        apart = (one.delta[0] - delta).norm() / one.delta[0].norm()
        # Products are summed until a share is left: rounding may end that a product earlier.
        solved = isinstance(ways[row], Level)
        assert apart < (0.01 if solved else 1e-3), f"row {row}"
        torch.testing.assert_close(one.margin[0], found.margin[row], atol=0.01, rtol=0.01)


def climbed(problem: Problem) -> Ascent:
    """Some steps of every row, wherever they lead."""
    n = len(problem)
    climb = Climb(
        torch.arange(n), torch.zeros(problem.shape), torch.full((n,), torch.inf), problem.radius,
        torch.full((n,), 0.1),
    )  # fmt: skip
    return ascend(problem, JacobianNull().feasible(problem), climb, 2, JacobianNull().stepper)


def test_steps_along_the_set_are_taken_back_along_it() -> None:
    delta = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]], [[0.3, 0.4]]])
    inward = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    radius = torch.tensor([3.5, 3.5, 1.0])
    out = within(delta, radius, inward)
    torch.testing.assert_close(out[0, 0], torch.tensor([3.0, 3.25**0.5]))
    torch.testing.assert_close(out[1, 0], torch.tensor([0.0, 3.5]))  # as near as it leads, scaled
    assert torch.equal(out[2], delta[2]), "inside already"
    torch.testing.assert_close(within(delta, radius, None).norm(dim=(1, 2))[:2], radius[:2])


def test_what_corrections_say_of_a_linear_map_is_all_there_is_to_know() -> None:
    """Broyden's method ends after at most 2n steps in n dimensions, from any invertible start."""
    draw = torch.Generator().manual_seed(0)
    A = (torch.eye(3) + 0.4 * torch.randn(2, 3, 3, generator=draw)).double()
    x = torch.randn(2, 1, 3, generator=draw).double()
    start, learned = x.norm(dim=(1, 2)), Learned()
    for _ in range(8):
        step, learned = learned.step(-(x @ A))
        x = x + step
    assert (x.norm(dim=(1, 2)) < 1e-6 * start).all()


def test_restoration_ends_in_the_set_and_in_the_ball(low: Problem) -> None:
    features = FeatureMap.of(low)
    near = prepared(features)[0]
    radius = 0.2 * low.reference_norm
    point, kept = restore(features, near, somewhere(low, 0.3), radius, 1e-6)
    assert kept.all()
    assert Linearized(features, point).held.max() <= 1e-6
    assert (point.norm(dim=(1, 2)) <= radius * (1 + SLACK)).all()
    assert (point.norm(dim=(1, 2)) >= 0.5 * radius).all(), "and not by giving up"


@pytest.mark.parametrize("which", ["anchored", "low"])
def test_a_row_alone_is_what_it_is_in_a_batch(which: str, request: pytest.FixtureRequest) -> None:
    problem: Problem = request.getfixturevalue(which)
    level = JacobianNull().feasible(problem)
    delta, zero = somewhere(problem, 0.2), Iterate.zero(somewhere(problem))
    whole = level.inside(delta, problem.radius, zero)
    for row in (torch.tensor([1]), torch.tensor([3, 0])):
        own = level.rows(row).inside(delta[row], problem.radius[row], Iterate.zero(delta[row]))
        # Corrections stop within the tolerance: rounding may end them a round earlier.
        apart = (own - whole[row]).norm(dim=(1, 2)) / whole[row].norm(dim=(1, 2))
        assert apart.max() < 0.02


def test_only_what_leads_out_of_its_ball_is_taken_back_along_the_set(
    settled: tuple[Problem, Framed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stands beside it, and where nobody asks whether any does."""
    problem, level = settled
    delta, zero = somewhere(problem, 0.2), Iterate(0.1 * somewhere(problem, 0.2))
    out = torch.arange(N) % 2 == 0
    radius = delta.norm(dim=(1, 2)) * torch.where(out, 0.5, 2.0)
    whole = level._inward(delta, radius, zero)
    assert whole is not None
    assert torch.equal(whole.abs().amax((1, 2)) > 0, out)
    few = level.rows(torch.tensor([1, 3]))
    assert few._inward(delta[[1, 3]], radius[[1, 3]], zero.rows(torch.tensor([1, 3]))) is None
    pretend(monkeypatch, True)
    unasked = few._inward(delta[[1, 3]], radius[[1, 3]], zero.rows(torch.tensor([1, 3])))
    assert unasked is not None and not unasked.any()


@pytest.mark.parametrize(
    ("mode", "late"), [("multiply", False), ("set_where_active", False), ("set_where_active", True)]
)
def test_later_tokens_are_held_after_the_whole_search(
    mode: str, late: bool, deep: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the saved vectors alone, at every layer and token, under clamps that read the state; where
    answers come at once, and a round later."""
    pretend(monkeypatch, late)
    prompts = tiny_batch(deep, 2)
    clamps = clamps_of(banks_of(deep), mode)
    problem = posed(deep, prompts, clamps, back=2)
    positions = prompts.prompt_length[:, None] - 2
    found = searched(problem, JacobianNull())
    checks = checked(problem, found.delta, clamps, positions)
    assert checks.preactivation_drift.max() <= 1e-5
    assert checks.preactivation_drift_elsewhere.max() <= 1e-5
    assert (found.norm <= problem.radius * (1 + 1e-4)).all()
    assert (found.norm > 0.01 * problem.radius).all(), "the search went somewhere"
    torch.testing.assert_close(checks.margin.float(), found.margin, atol=1e-4, rtol=1e-4)
    assert (checks.margin > problem.batch.margin(deep.outputs(prompts, clamps)[:, -1])).all()

    held = searched(problem, FeatureHold())
    leak = checked(problem, held.delta, clamps, positions).preactivation_drift_elsewhere
    assert leak.max() > 1e-4, "feature_hold promises nothing there"


def test_with_one_layer_and_the_last_token_it_is_encoder_null(
    deep: Subject, prompts: Batch
) -> None:
    site = SITES[1]
    banks = {site: banks_of(deep)[site]}
    problem = posed(deep, prompts, clamps_of(banks), (site,), held=(site,))
    level, null = JacobianNull().feasible(problem), EncoderNull().feasible(problem)
    assert torch.equal(level.dimension, null.dimension)
    delta = somewhere(problem, 0.3)
    torch.testing.assert_close(level.retract(delta), null.retract(delta), atol=1e-4, rtol=1e-4)
    check_constraint(JacobianNull(), problem)
    one, other = (searched(problem, kind).smallest_norm for kind in (JacobianNull(), EncoderNull()))
    assert torch.equal(one.isnan(), other.isnan())
    both = ~one.isnan()
    assert both.any()
    torch.testing.assert_close(one[both], other[both], rtol=0.04, atol=0.0)


def test_what_feature_hold_allows_at_the_last_token_lies_in_the_set(
    deep: Subject, prompts: Batch
) -> None:
    problem = posed(deep, prompts, clamps_of(banks_of(deep)))
    acting = FeatureHold().acting(problem)
    point = FeatureHold().feasible(acting).retract(somewhere(problem, 0.3))
    assert Linearized(FeatureMap.of(problem), point).held.max() < 1e-6
    back = JacobianNull().feasible(problem).retract(somewhere(problem, 0.3))
    again = FeatureHold().feasible(acting).retract(back)
    torch.testing.assert_close(again, back, atol=1e-4, rtol=1e-4)


def test_no_direction_left_is_infeasible(
    deep: Subject, prompts: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 features at 5 tokens or more against one vector of 32 numbers."""
    problem = posed(deep, prompts, clamps_of(banks_of(deep)), SITES[:1], back=5)
    level = JacobianNull().feasible(problem)
    assert (level.dimension == 0).all()
    found = searched(problem, JacobianNull())
    assert set(found.outcomes) == {"infeasible"} and found.margin.isnan().all()
    monkeypatch.setattr(preconditioners, "FEW", 0)
    monkeypatch.setattr(frames, "FEW", 0)
    assert (JacobianNull().feasible(problem).dimension == 0).all(), "and where J is not kept"


def test_repeated_features_are_no_further_constraints(deep: Subject, prompts: Batch) -> None:
    site = SITES[2]
    entry = SiteFeatures(site=str(site), ids=(2, 11))
    sae = deep.sae(site)
    bank = FeatureBank.of(sae, FeatureSet(entries=(entry,), source="test"))
    twice = replace(bank, W_enc=bank.W_enc[..., [0, 0]])
    problem = posed(deep, prompts, (), (site,), held=(site,))
    level = JacobianNull().feasible(replace(problem, held={site: twice}))
    assert isinstance(level, Framed)
    assert (level.dimension == 31).all()
    assert Linearized(level.features, level.retract(somewhere(problem))).held.max() < 1e-6


def test_bfloat16_is_held_up_to_its_rounding(prompts: Batch) -> None:
    model: Any = tiny_model()
    saes = {site: random_sae(site, seed=site.depth) for site in SITES}
    coarse = Subject.of("tiny", model.to(torch.bfloat16), tiny_tokenizer(), saes)
    problem = posed(coarse, prompts, clamps_of(banks_of(coarse)), back=2)
    level = JacobianNull().feasible(problem)
    assert isinstance(level, Framed)
    assert 1e-3 < level.tolerance < torch.finfo(torch.bfloat16).eps
    point = level.retract(somewhere(problem, 0.2))
    assert Linearized(level.features, point).held.max() <= level.tolerance
    assert (point.norm(dim=(1, 2)) > 0).any()


def test_what_cannot_be_held_is_refused(deep: Subject, prompts: Batch) -> None:
    above = posed(deep, prompts, (), SITES[2:], held=SITES[:1])
    for kind, message in ((JacobianNull(), "nothing to hold"), (JacobianProbes(), "to probe")):
        with pytest.raises(ConstraintError, match=message):
            kind.feasible(above)
    normed = replace(banks_of(deep)[SITES[0]], norm=Inputs(norm="layer_norm"))
    problem = posed(deep, prompts, (), SITES[:1], held=SITES[:1])
    with pytest.raises(ConstraintError, match="normalizes each token"):
        JacobianNull().feasible(replace(problem, held={SITES[0]: normed}))
    for bad in ({"tolerance": 0.0}, {"tolerance": -1.0}, {"tolerances": 1e-6}):
        with pytest.raises(ValidationError):
            JacobianNull(**bad)
    for bad in ({"n_probes": -1}, {"correction_steps": -1}, {"drift_weight": -1.0}):
        with pytest.raises(ValidationError):
            JacobianProbes(**bad)


def test_probes_take_away_the_drift_there_is(low: Problem) -> None:
    """The row along the present drift: without its own gradient, a step leaves its size alone."""
    u, at = somewhere(low, 1.0, seed=1), Iterate(somewhere(low, 0.02))
    plain, probing = (JacobianProbes(n_probes=k, drift_weight=0.0).feasible(low) for k in (0, 8))
    leaf = at.delta.clone().requires_grad_(True)
    moved = torch.cat([z.flatten(1) for z in plain._moved(plain._codes(leaf))], 1)
    (uphill,) = torch.autograd.grad(moved.square().sum(), leaf)
    before = (uphill * u).sum((1, 2)).abs()
    assert (before > 0).all()
    directions = [sets.tangent(u, at) for sets in (plain, probing)]
    for direction in directions:
        assert ((uphill * direction).sum((1, 2)).abs() < 1e-4 * before.max()).all()
    lost = [u.norm() - direction.norm() for direction in directions]
    assert lost[1] > 2 * lost[0] > 0, "random rows take away more"

    again = probing.rows(torch.tensor([2])).tangent(u[2:3], Iterate(at.delta[2:3]))
    torch.testing.assert_close(again, directions[1][2:3], atol=1e-3, rtol=1e-3)
    later = probing.tangent(u, replace(at, step=1))
    assert not torch.allclose(later, directions[1]), "every step draws anew"


def test_probes_leak_where_the_jacobian_does_not(low: Problem) -> None:
    """The published defaults, over the same steps in the same ball."""
    probes = JacobianProbes()
    assert probes.n_probes == 8 and probes.drift_weight == 200.0
    assert probes.correction_steps == 5 and probes.correction_lr == 0.05
    features, rows, held = FeatureMap.of(low), torch.arange(N), {}
    for kind in (probes, JacobianNull()):
        goal, lr = torch.full((N,), torch.inf), torch.full((N,), 0.1)
        climb = Climb(rows, torch.zeros(low.shape), goal, low.radius, lr)
        found = ascend(low, kind.feasible(low), climb, 5, kind.stepper)
        assert (found.delta.norm(dim=(1, 2)) <= low.radius * (1 + SLACK)).all()
        held[kind.kind] = Linearized(features, found.delta).held
    assert held["jacobian_null"].max() <= 1e-6
    assert (held["jacobian_probes"] > 1e-4).all()
