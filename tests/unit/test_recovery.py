"""The search: never beats the oracle, comes close to it, and says no more than it knows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.ascent import Climb, ascend
from holdfast.batch import Batch, Frame
from holdfast.batching import Batching
from holdfast.constraints import Constraint
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.constraints.gradient_projection import GradientProjection
from holdfast.constraints.unconstrained import Unconstrained
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.harder import _starts
from holdfast.outcome import Best
from holdfast.problem import Lanes, Problem, relative_violation
from holdfast.recovery import RecoverySpec, recover
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.stack import Search, Stack
from holdfast.steppers import Adam, Steepest
from holdfast.subject import Subject
from holdfast.subspace import Everything, Iterate, NullSpace, norms
from holdfast.testing import check_constraint, random_sae, tiny_problem
from tests.waits import pretend

SITE = Site(2)
D = 32


@dataclass(frozen=True)
class LinearReplay:
    """A "model" whose logits are linear in the perturbation: every optimum is known in closed form.

    slopes [n d]: gradient of the margin; start [n]: margin without perturbation.
    """

    slopes: Tensor
    start: Tensor
    frame: Frame
    batch_size: int = 128

    @property
    def subject(self) -> object:
        return SimpleNamespace(batching=Batching(self.batch_size))

    @property
    def sites(self) -> tuple[Site, ...]:
        return (SITE,)

    @property
    def hold(self) -> dict[Site, object]:
        return {}

    @property
    def reference(self) -> dict[Site, Tensor]:
        return {SITE: self.base}

    @property
    def base(self) -> Tensor:
        return torch.ones(len(self.start), 1, D)

    @property
    def columns(self) -> Tensor:
        return torch.zeros(len(self.start), 1, dtype=torch.long)

    def residual(self) -> Tensor:
        return self.base

    def rows(self, rows: Tensor) -> LinearReplay:
        return replace(
            self, slopes=self.slopes[rows], start=self.start[rows], frame=self.frame.rows(rows)
        )

    def logits(self, delta: Tensor, tokens: Tensor) -> Tensor:
        margin = self.start + (delta[:, 0] * self.slopes).sum(-1)
        return torch.stack([margin, torch.zeros_like(margin)], -1).gather(-1, tokens)


def linear_problem(
    slopes: Tensor, start: Tensor, goal: Tensor, radius: float, batch_size: int = 128,
    held: int = 6,
) -> Problem:  # fmt: skip
    n = len(start)
    batch = Batch(
        ids=tuple(f"row{i}" for i in range(n)),
        clusters=tuple(f"row{i}" for i in range(n)),
        groups=("",) * n,
        texts=("",) * n,
        tokens=torch.ones(n, 1, dtype=torch.long),
        positions=torch.zeros(n, 1, dtype=torch.long),
        bos=torch.zeros(n, dtype=torch.bool),
        template=torch.ones(n, dtype=torch.long),
        targets=torch.zeros(n, dtype=torch.long),
        rivals=torch.ones(n, 1, dtype=torch.long),
        alternatives=torch.ones(n, 1, dtype=torch.long),
    )
    features = FeatureSet(
        entries=(SiteFeatures(site=str(SITE), ids=tuple(range(held))),), source="test"
    )
    return Problem(
        replay=LinearReplay(slopes, start, batch.frame(), batch_size),  # type: ignore[arg-type]
        batch=batch,
        goal=goal,
        held={SITE: FeatureBank.of(random_sae(SITE), features)},
        reference_norm=torch.full((n,), D**0.5),
        radius=torch.full((n,), radius),
    )


def null_projector(problem: Problem) -> Tensor:
    """I − A A⁺ from a pseudo-inverse, independent of the QR under test."""
    A = problem.held[SITE].W_enc[0].double()
    return (torch.eye(D, dtype=torch.float64) - A @ torch.linalg.pinv(A)).float()


@pytest.mark.parametrize("held", [1, 6, 20])
def test_smallest_norm_meets_the_closed_form_and_never_beats_it(held: int) -> None:
    slopes, start, goal = torch.randn(12, D), -torch.rand(12) - 0.5, torch.rand(12) + 0.5
    problem = linear_problem(slopes, start, goal, radius=8.0, held=held)
    for constraint, effective in (
        (Unconstrained(), slopes),
        (EncoderNull(), slopes @ null_projector(problem)),
    ):
        oracle = (goal - start) / effective.norm(dim=1)
        found = recover(problem, RecoverySpec(constraint=constraint), seed=0)
        assert set(found.outcomes) == {"recovered"}
        assert (found.smallest_norm >= oracle * (1 - 1e-5)).all(), "beats the oracle"
        assert (found.smallest_norm <= oracle * 1.01).all(), (found.smallest_norm / oracle).max()


def test_the_budget_is_never_exceeded_and_decides_success() -> None:
    slopes, start = torch.randn(12, D), torch.full((12,), -1.0)
    goal = torch.ones(12)
    oracle = (goal - start) / slopes.norm(dim=1)
    radius = float(oracle.median())
    problem = linear_problem(slopes, start, goal, radius)
    found = recover(problem, RecoverySpec(constraint=Unconstrained()), seed=0)
    assert (found.norm <= radius * (1 + 1e-5)).all()
    clear = (oracle - radius).abs() > 0.02 * radius
    reached = ~found.smallest_norm.isnan()
    assert torch.equal(reached[clear], (oracle < radius)[clear])


@pytest.mark.parametrize("constraint", [Unconstrained(), GradientProjection(), EncoderNull()])
def test_no_perturbation_is_a_candidate_like_every_other(constraint: Constraint) -> None:
    """METHODS D.7, D.10: the published rule looks at the first iterate after a step. A goal that is
    met already takes none, and where every step leads down, nothing is what is kept."""
    slopes = torch.randn(4, D)
    met = linear_problem(slopes, torch.full((4,), 2.0), torch.ones(4), 8.0)
    found = recover(met, RecoverySpec(constraint=constraint), seed=0)
    assert (found.delta == 0).all() and (found.smallest_norm == 0).all()
    assert (found.steps == 0).all() and set(found.outcomes) == {"recovered"}

    problem = linear_problem(slopes, -torch.ones(4), torch.ones(4), 8.0)
    rows = torch.arange(4)
    climb = Climb(rows, torch.zeros(4, 1, D), problem.goal, problem.radius, torch.full((4,), 0.1))
    down = ascend(problem, constraint.feasible(problem), climb, 5, Downhill())
    assert (down.delta == 0).all() and (down.margin == -1).all() and not down.reached.any()


class Downhill:
    """A step rule that is wrong at every step."""

    def rows(self, rows: Tensor) -> Downhill:
        return self

    def start(self, delta: Tensor) -> tuple[Tensor, ...]:
        return ()

    def move(self, state: tuple[Tensor, ...], direction: Tensor) -> tuple[Tensor, Any]:
        return -direction / norms(direction).clamp_min(1e-30), state


@pytest.mark.parametrize("constraint", [Unconstrained(), GradientProjection(), EncoderNull()])
def test_a_search_uses_no_operation_that_may_differ_from_run_to_run(
    subject: Subject, batch: Batch, bank: FeatureBank, constraint: Constraint
) -> None:
    """METHODS C.5: torch refuses nothing of a search where it must be deterministic, and finds the
    same."""
    problem = tiny_problem(subject, batch, bank, goal=3.0, budget=0.5)
    spec = RecoverySpec(constraint=constraint, steps=10, refine_steps=5, doublings=1)
    free = recover(problem, spec, seed=0)
    torch.use_deterministic_algorithms(True)
    try:
        again = tiny_problem(subject, batch, bank, goal=3.0, budget=0.5)
        strict = recover(again, spec, seed=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(free.delta, strict.delta) and free.outcomes == strict.outcomes


@pytest.mark.parametrize("constraint", [Unconstrained(), GradientProjection(), EncoderNull()])
def test_constraints_keep_their_contract(
    subject: Subject, batch: Batch, bank: FeatureBank, constraint: object
) -> None:
    check_constraint(constraint, tiny_problem(subject, batch, bank))  # type: ignore[arg-type]


def test_exact_constraint_holds_at_every_step_and_the_published_one_does_not(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    """METHODS Q 4: the same test fails for project-gradient-then-Adam."""
    problem = tiny_problem(subject, batch, bank, goal=50.0, budget=1.0)  # never stops early
    traces = {}
    for constraint in (EncoderNull(), GradientProjection()):
        spec = RecoverySpec(constraint=constraint, steps=60, doublings=1)
        traces[constraint.kind] = recover(problem, spec, seed=0)
    exact = [step["violation_max"] for step in traces["encoder_null"].trace]
    leaky = [step["violation_max"] for step in traces["gradient_projection"].trace]
    assert len(exact) > 50 and max(exact) < 1e-6
    assert leaky[-1] > 1000 * max(exact) and leaky[-1] > 1e-3
    final = relative_violation(problem, traces["encoder_null"].delta, torch.arange(len(problem)))
    assert final.max() < 1e-6, "after the full optimizer, with random restarts"


def test_projection_of_the_gradient_is_exact_under_plain_gradient_descent(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    """The published projection itself is nearly right (its ridge apart): Adam is what leaks."""
    problem = tiny_problem(subject, batch, bank)
    rows = torch.arange(len(problem))
    feasible = GradientProjection(ridge=1e-12).feasible(problem)
    delta = torch.zeros(problem.shape)
    for _ in range(30):
        delta = delta + 0.05 * feasible.tangent(torch.randn(problem.shape), Iterate(delta))
    assert relative_violation(problem, delta, rows).max() < 1e-6


@dataclass(frozen=True)
class Reluctant(Everything):
    """A set into which no step as long as `least` [n] leads back."""

    least: Tensor

    def rows(self, rows: Tensor) -> Reluctant:
        return Reluctant(self.dimension[rows], self.least[rows])

    def inside(self, delta: Tensor, radius: Tensor, last: Iterate) -> Tensor:
        too_long = norms(delta - last.delta) >= self.least[:, None, None]
        return torch.where(too_long, last.delta, super().inside(delta, radius, last))


def test_a_lane_that_a_step_left_where_it_was_goes_less_far(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    problem = tiny_problem(subject, batch, bank, budget=1.0)
    n = len(problem)
    stride = 0.1 * problem.radius
    shares = torch.tensor([2.0, 0.3, 0.1, 0.01]).repeat(n)[:n]
    sets = Reluctant(torch.full((n,), 8), shares * stride)
    climb = Climb(
        torch.arange(n), torch.zeros(problem.shape), torch.full((n,), torch.inf), problem.radius,
        torch.full((n,), 0.1),
    )  # fmt: skip
    moved = norms(ascend(problem, sets, climb, 3, Steepest(0.0)).delta).flatten() / stride
    first = torch.tensor([2.0, 0.25, 0.0625, 0.0]).repeat(n)[:n]
    assert ((moved >= 0.99 * first) & (moved <= 3)).all()
    assert (moved[shares == 0.01] == 0).all(), "and after three it has ended"


def test_another_batch_size_gives_the_same_answers(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit
) -> None:
    spec = RecoverySpec(constraint=EncoderNull(), steps=40, refine_steps=10)
    found = [
        recover(
            tiny_problem(
                replace(subject, batching=Batching(size)), batch, bank, goal=3.0, budget=1.0
            ),
            spec,
            seed=0,
        )
        for size in (128, 3, 1)
    ]
    for other in found[1:]:
        assert other.outcomes == found[0].outcomes
        both = ~found[0].smallest_norm.isnan()
        ratio = other.smallest_norm[both] / found[0].smallest_norm[both].clamp_min(1e-12)
        positive = found[0].smallest_norm[both] > 0
        assert both.any() and (ratio[positive] - 1).abs().max() < 0.01


@pytest.mark.parametrize("constraint", [Unconstrained(), GradientProjection(), EncoderNull()])
def test_knowing_late_which_lanes_have_ended_finds_the_same(
    subject: Subject,
    batch: Batch,
    bank: FeatureBank,
    constraint: Constraint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lane that has ended stays in the batch for some steps, and keeps what it found."""
    problem = tiny_problem(subject, batch, bank, goal=3.0, budget=0.5)
    spec = RecoverySpec(constraint=constraint, steps=20)
    lanes: list[int] = []
    climbed = Lanes.climbed

    def counted(self: Lanes, delta: Tensor) -> tuple[Tensor, Tensor]:
        lanes.append(len(delta))
        return climbed(self, delta)

    monkeypatch.setattr(Lanes, "climbed", counted)
    found, n_lanes = [], []
    for waits in (False, True):
        pretend(monkeypatch, waits)
        lanes.clear()
        found.append(recover(problem, spec, seed=0))
        n_lanes.append(sum(lanes))
    at_once, late = found
    assert n_lanes[1] > n_lanes[0], "lanes that had ended were still in the batch"
    assert at_once.outcomes == late.outcomes
    assert torch.equal(at_once.steps, late.steps)
    torch.testing.assert_close(at_once.delta, late.delta, rtol=1e-3, atol=1e-4)
    for one, other in zip(at_once.trace, late.trace, strict=True):
        assert {k: one[k] for k in ("step", "n_searching", "n_reached")} == {
            k: other[k] for k in ("step", "n_searching", "n_reached")
        }
        assert one["margin_mean"] == pytest.approx(other["margin_mean"], abs=1e-3)


def test_one_seed_gives_identical_results(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    problem = tiny_problem(subject, batch, bank, goal=3.0, budget=0.2)
    spec = RecoverySpec(constraint=EncoderNull(), steps=20)
    first, second = recover(problem, spec, seed=0), recover(problem, spec, seed=0)
    assert torch.equal(first.delta, second.delta) and first.outcomes == second.outcomes
    assert first.trace == second.trace


def test_a_null_space_of_dimension_zero_is_infeasible() -> None:
    problem = linear_problem(torch.randn(4, D), -torch.ones(4), torch.ones(4), 8.0, held=D + 3)
    found = recover(problem, RecoverySpec(constraint=EncoderNull()), seed=0)
    assert found.outcomes == ("infeasible",) * 4
    assert (found.null_dimension == 0).all() and (found.delta == 0).all()


def test_dependent_columns_are_counted_once() -> None:
    columns = torch.randn(1, D, 5)
    columns[..., 3] = 2 * columns[..., 0]
    columns[..., 4] = columns[..., 1]
    null = NullSpace.of(columns, torch.ones(1, 5, dtype=torch.bool), torch.zeros(2).long())
    assert null.dimension.tolist() == [D - 3, D - 3]
    moved = null.retract(torch.randn(2, 1, D)) @ columns[0]
    assert moved.abs().max() < 1e-5


def test_a_bottleneck_is_not_recovered_and_the_published_way_reports_a_false_breach() -> None:
    """METHODS Q 8 in closed form: the margin depends on held encoder directions alone."""
    probe = linear_problem(torch.zeros(6, D), torch.zeros(6), torch.ones(6), 8.0)
    slopes = torch.randn(6, 6) @ probe.held[SITE].W_enc[0].T  # in the span of the held columns
    problem = linear_problem(slopes, -torch.ones(6), torch.ones(6), 8.0)
    exact = recover(problem, RecoverySpec(constraint=EncoderNull(), steps=40), seed=0)
    assert exact.outcomes == ("not_recovered",) * 6
    assert (exact.steps >= 2 * 40).all() and (exact.lane_steps >= 9 * 40).all(), "what it took"
    leaky = recover(problem, RecoverySpec(constraint=GradientProjection(), steps=40), seed=0)
    assert set(leaky.outcomes) == {"recovered"}


def test_a_rate_that_still_grows_leaves_the_rest_undecided() -> None:
    """One row comes into reach only in the second half, so the other may as well: undecided."""
    slopes = torch.eye(D)[:2]
    radius, steps, lr = 10.0, 10, 0.004
    # The fastest lane moves 3·lr·radius a step from a random start, whose share along the slope is
    # small: after `steps` it has gained about 1.2, after twice as many about 2.4.
    gained = 3 * lr * radius * steps
    problem = linear_problem(
        slopes, torch.tensor([-1.6 * gained, -20.0]), torch.tensor([1e-6, 1e-6]), radius
    )
    spec = RecoverySpec(constraint=Unconstrained(), steps=steps, lr=lr, doublings=1)
    stack = Stack.of(problem, [Search(2, spec, seed=0)])
    starts = _starts(stack, torch.tensor([0]), 0, Best.none(problem.shape, torch.device("cpu")))
    assert starts.start[:, 0, 0].max() < 1.6 * gained, "the fixture: no start is there already"
    found = recover(problem, spec, seed=0)
    assert found.outcomes == ("recovered", "undecided")
    longer = recover(problem, spec.model_copy(update={"steps": 400}), seed=0)
    assert longer.outcomes == ("recovered", "not_recovered"), "20 away, with a budget of 10"


def test_nan_is_divergence_of_that_row_alone() -> None:
    slopes = torch.randn(3, D)
    slopes[1] = torch.nan
    problem = linear_problem(slopes, -torch.ones(3), torch.ones(3), 8.0)
    found = recover(problem, RecoverySpec(constraint=Unconstrained()), seed=0)
    assert found.outcomes == ("recovered", "diverged", "recovered")


def test_adam_is_adam(subject: Subject, batch: Batch, bank: FeatureBank) -> None:
    """Parity with torch.optim.Adam, row by row, with the rate scaled to the row's radius."""
    problem = tiny_problem(subject, batch, bank, goal=1e9, budget=10.0)
    rows, steps, lr = torch.arange(len(problem)), 7, 0.01
    feasible = Unconstrained().feasible(problem)
    margins = []
    for row in rows.tolist():
        delta = torch.zeros(1, 1, D, requires_grad=True)
        rate = lr * float(problem.radius[row]) / D**0.5
        adam = torch.optim.Adam([delta], lr=rate, betas=(0.9, 0.999), eps=1e-8)
        replay, one = problem.replay.rows(torch.tensor([row])), batch.rows([row])
        best = -1e9
        for step in range(steps + 1):
            margin = one.margin(replay.logits(delta)).sum()
            best = max(best, float(margin.detach()))
            if step < steps:
                adam.zero_grad()
                (-margin).backward()
                adam.step()
        margins.append(best)
    found = ascend(
        problem,
        feasible,
        Climb(
            rows, torch.zeros(problem.shape), problem.goal, problem.radius,
            torch.full((len(rows),), lr),
        ),
        steps,
        Adam(),
    )  # fmt: skip
    torch.testing.assert_close(found.margin, torch.tensor(margins), atol=1e-3, rtol=1e-3)


def test_margin_gradient_agrees_with_finite_differences(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    problem = tiny_problem(subject, batch, bank)
    lanes_rows = torch.arange(len(problem))
    from holdfast.problem import Lanes

    lanes = Lanes.of(problem, lanes_rows)
    delta = 0.1 * torch.randn(problem.shape)
    direction = torch.randn(problem.shape)
    leaf = delta.clone().requires_grad_(True)
    gradient = torch.autograd.grad(lanes.margin(leaf).sum(), leaf)[0]
    slope = (gradient * direction).sum((1, 2))
    step = 1e-2
    with torch.no_grad():
        numeric = (
            lanes.margin(delta + step * direction) - lanes.margin(delta - step * direction)
        ) / (2 * step)
    assert ((slope - numeric).abs() <= 0.02 * numeric.abs() + 0.02).all()


def test_margin_uses_the_largest_rival_not_the_mean() -> None:
    from holdfast.margins import margin_of

    logits = torch.tensor([[1.0, 5.0, -9.0, 0.0]])
    margin = margin_of(logits, torch.tensor([0]), torch.tensor([[1, 2]]))
    assert margin.tolist() == [-4.0]
