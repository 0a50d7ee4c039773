"""A step of a search does not wait for the device: its parts read no values and copy no lists."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast import waiting
from holdfast.ascent import Climb, ascend
from holdfast.batch import Batch
from holdfast.constraints import CONSTRAINTS
from holdfast.edits import Edit, FeatureEdit, Perturbation
from holdfast.errors import NonFiniteError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.gates import DirectionGate, Gate, PromptGate, Sensor
from holdfast.problem import Lanes, Problem
from holdfast.recovery import RecoverySpec, Search
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sampling import Sampled
from holdfast.sites import Site
from holdfast.stack import Stack
from holdfast.subject import Subject
from holdfast.subspace import Charted, FeasibleSet, Iterate
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.waiting import Question
from tests.waits import counted, idle, pretend

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
        torch.linalg.solve(torch.eye(4), x)
    assert len(places) >= 10
    with counted() as places:
        at_once, later = Question.of(x), Question.of(x)
        at_once.answer()
        x.outer(x) @ x[:, None]
        later.answer()
    assert len(idle(places)) == 1, "an answer for which the device is waited for"
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
    clamp_first: bool = True, watch: tuple[Site, ...] = (),
) -> Problem:  # fmt: skip
    last = batch.positions[:, -1:]
    positions = torch.cat([torch.where(last % 2 == 0, last - 1, -1), last], 1)
    replay = Replay.record(
        subject, batch, sites, positions, before=edits if clamp_first else (),
        after=() if clamp_first else edits, watch=watch or sites,
    )  # fmt: skip
    reference = replay.residual().norm(dim=(1, 2))
    held = {s: FeatureBank.of(subject.sae(s), features_at(s)) for s in watch or sites}
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


# --- Coming back into the set ---------------------------------------------------------------------


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is asked as if it had to be waited for."""
    pretend(monkeypatch, True)


NEVER = (
    "unconstrained", "gradient_projection", "random_subspace", "jacobian_probes",
)  # fmt: skip
ONE_SITE = ("encoder_null", "decoder_null", "undo_null", "feature_hold", "active_null")
HELD = ("feature_hold", "decoder_null", "undo_null", "active_null")
BOUNDED = ("one_sided", "feature_floor")


def a_set(
    subject: Subject, batch: Batch, kind: str, sites: tuple[Site, ...]
) -> tuple[Problem, FeasibleSet]:
    constraint = CONSTRAINTS.parse({"kind": kind})
    problem = posed(subject, batch, clamps(subject, "plain")[-len(sites) :], sites)
    return problem, constraint.feasible(constraint.acting(problem)).rows(torch.arange(6))


def a_step_of(sets: FeasibleSet, problem: Problem, gradient: Tensor, length: float) -> Tensor:
    here = Iterate(torch.zeros(problem.shape), 0, gradient)
    if isinstance(sets, Charted):
        sets = sets.asking(here.delta)
        gradient.flatten(1) @ gradient.flatten(1).T  # in place of the objective's own pass
        sets = sets.around(here)
    here = replace(here, along=sets.tangent(gradient, here))
    return sets.inside(length * gradient, problem.radius, here)


def waits_of(sets: FeasibleSet, problem: Problem, length: float) -> list[str]:
    """Those of a step which is not the first, in which indices are looked up."""
    gradient = torch.randn(problem.shape, generator=torch.Generator().manual_seed(1))
    a_step_of(sets, problem, gradient, length)
    with counted() as places:
        a_step_of(sets, problem, gradient, length)
    return places


@pytest.mark.parametrize(
    ("kind", "sites"),
    [(kind, SITES[1:]) for kind in (*NEVER, *ONE_SITE, *BOUNDED)]
    + [(kind, SITES) for kind in (*NEVER, *HELD, *BOUNDED)],
)
@pytest.mark.parametrize("length", [0.1, 10.0])
def test_coming_back_into_the_set_never_waits(
    subject: Subject, batch: Batch, kind: str, sites: tuple[Site, ...], length: float, far: None
) -> None:
    problem, sets = a_set(subject, batch, kind, sites)
    assert waits_of(sets, problem, length) == []


ROUNDS = [(kind, SITES) for kind in (*HELD, *BOUNDED)] + [(kind, SITES[1:]) for kind in BOUNDED]
"""Sets that iterates are brought back into in rounds, until all are there."""


@pytest.mark.parametrize(("kind", "sites"), ROUNDS)
def test_rounds_that_nobody_asks_for_change_nothing(
    subject: Subject, batch: Batch, kind: str, sites: tuple[Site, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    problem, sets = a_set(subject, batch, kind, sites)
    gradient = torch.randn(problem.shape)
    # Some rows need no round, others several.
    gradient = gradient * torch.tensor([1e-3, 1.0, 30.0, 0.0, 5.0, 1e-2])[:, None, None]
    found = []
    for waits in (False, True):
        pretend(monkeypatch, waits)
        found.append(a_step_of(sets, problem, gradient, 1.0))
    near, far = found
    torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("perturbed", [SITES, SITES[:1]], ids=["in place", "kept"])
@pytest.mark.parametrize("length", [0.1, 10.0])
def test_the_true_jacobians_set_reads_behind_passes_and_finds_the_same(
    subject: Subject, batch: Batch, perturbed: tuple[Site, ...], length: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    constraint = CONSTRAINTS.parse({"kind": "jacobian_null"})
    problem = posed(subject, batch, clamps(subject, "plain"), perturbed, watch=SITES)
    sets = constraint.feasible(constraint.acting(problem)).rows(torch.arange(6))
    gradient = length * torch.randn(problem.shape)
    found, waits = [], []
    for far in (False, True):
        pretend(monkeypatch, far)
        a_step_of(sets, problem, gradient, 1.0)
        with counted() as places:
            found.append(a_step_of(sets, problem, gradient, 1.0))
        waits.append(idle(places))
    at_once, late = found
    torch.testing.assert_close(late, at_once, rtol=1e-5, atol=1e-6)
    assert late.abs().max() > 0
    assert waits[1] == []


def test_a_step_of_several_constraints_in_one_batch_never_waits(
    subject: Subject, batch: Batch
) -> None:
    """Whose rows are whose is looked up when rows leave the batch."""
    kinds = ("unconstrained", "gradient_projection", "encoder_null")
    six = posed(subject, batch, clamps(subject, "plain")[1:], SITES[1:])
    specs = [RecoverySpec(constraint=CONSTRAINTS.parse({"kind": kind})) for kind in kinds]
    stack = Stack.of(six, [Search(2, spec, 0) for spec in specs])
    rows = torch.tensor([5, 0, 3, 2, 1])
    sets, stepper = stack.feasible.rows(rows), stack.stepper.rows(rows)
    delta = torch.randn(5, *six.shape[1:])
    here, state = Iterate(torch.zeros_like(delta), 0, delta), stepper.start(delta)
    for _ in range(2):
        with counted() as places:
            again = sets.around(here) if isinstance(sets, Charted) else sets
            move, state = stepper.move(state, again.tangent(delta, here))
            again.inside(move, six.radius[rows], here)
    assert places == []


@pytest.mark.parametrize(
    ("kind", "sites"),
    [("encoder_null", SITES[1:]), ("one_sided", SITES[1:]), ("one_sided", SITES),
     ("feature_hold", SITES)],
)  # fmt: skip
def test_a_search_reads_of_its_lanes_a_step_later_and_of_nothing_else(
    subject: Subject, batch: Batch, kind: str, sites: tuple[Site, ...], far: None
) -> None:
    problem, sets = a_set(subject, batch, kind, sites)
    stepper = CONSTRAINTS.parse({"kind": kind}).stepper
    climb = climb_of(problem, goal=1e6)
    waits = []
    for steps in (8, 16):
        ascend(problem, sets, climb, steps, stepper)
        with counted() as places:
            ascend(problem, sets, climb, steps, stepper)
        waits.append(Counter(places))
    ((place, n),) = (waits[1] - waits[0]).items()
    assert "waiting.py" in place and n == 8, "one answer a step, to what was asked a step before"


def climb_of(problem: Problem, goal: float) -> Climb:
    n = len(problem)
    return Climb(
        torch.arange(n), torch.zeros(problem.shape), torch.full((n,), goal), problem.radius,
        torch.full((n,), 0.1),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["encoder_null", "gradient_projection"])
def test_lanes_that_leave_late_find_what_they_find(
    subject: Subject, batch: Batch, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, sets = a_set(subject, batch, kind, SITES[1:])
    stepper = CONSTRAINTS.parse({"kind": kind}).stepper
    with torch.no_grad():
        margin = Lanes.of(problem, torch.arange(6)).margin(torch.zeros(problem.shape))
    climb = climb_of(problem, 0.0)
    # At once, after some steps, and never.
    rising = torch.tensor([-1.0, 0.02, 0.05, 0.1, 0.2, 1e6])
    climb = replace(climb, goal=margin + rising, lr=torch.full((6,), 0.01))
    found = []
    for waits in (False, True):
        pretend(monkeypatch, waits)
        found.append(ascend(problem, sets, climb, 12, stepper))
    near, far = found
    assert len(set(near.reached_at.tolist())) > 3, "the fixture: they leave at different steps"
    assert torch.equal(near.reached_at, far.reached_at) and torch.equal(near.passes, far.passes)
    torch.testing.assert_close(far.delta, near.delta, rtol=1e-5, atol=1e-6)


def test_answers_are_those_of_a_round_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [torch.tensor([i, i + 1]) for i in range(4)]
    pretend(monkeypatch, False)
    near = waiting.Behind()
    assert [near.read(x).tolist() for x in asked] == [x.tolist() for x in asked]
    pretend(monkeypatch, True)
    behind = waiting.Behind()
    assert behind.read(asked[0]) is None
    assert [behind.read(x).tolist() for x in asked[1:]] == [x.tolist() for x in asked[:-1]]
    behind.forget()
    assert behind.read(asked[0]) is None


# --- Generation -----------------------------------------------------------------------------------

N_NEW = 20


@pytest.fixture
def ending(subject: Subject, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """Answers end after different numbers of tokens, all before the last."""
    made = subject.generate(batch, (), N_NEW)
    last = made[torch.arange(len(made)), torch.arange(len(made)) * 2]
    monkeypatch.setattr(Subject, "ends", frozenset(last.tolist()))
    return subject


def pushed(subject: Subject, batch: Batch) -> tuple[Edit, ...]:
    at = batch.prompt_length[:, None] - 1
    delta = torch.randn(len(batch), 1, 32, generator=torch.Generator().manual_seed(2))
    return (*clamps(subject, "plain"), Perturbation(batch.ids, at, {SITES[0]: delta}))


@pytest.mark.parametrize("n", [3, 8, N_NEW])
def test_knowing_late_what_has_ended_gives_the_same_tokens(
    ending: Subject, batch: Batch, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for waits in (False, True):
        pretend(monkeypatch, waits)
        made.append(
            [
                ending.generate(batch, edits, n, choose)
                for edits in ((), pushed(ending, batch))
                for choose in (Sampled(1e-6, 0, 0), Sampled(1.0, 0, 0))
            ]
        )
    for often, seldom in zip(*made, strict=True):
        assert torch.equal(often, seldom)
    assert any(tokens.shape[1] < n for tokens in made[0]) or n < 10, "nothing was cut"


def test_what_the_prompt_decided_stays_while_the_answer_is_made(
    subject: Subject, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody asks whether an edit selects anything, it is applied, and changes nothing."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    (plain,) = clamps(subject, "plain")[1:]
    assert isinstance(plain, FeatureEdit)
    read = DirectionGate(SITES[0], direction, -1.0)
    cosines = []
    with monkeypatch.context() as patch:
        measured = DirectionGate.cosines
        patch.setattr(
            DirectionGate, "cosines",
            lambda self, x, frame: cosines.append(measured(self, x, frame)) or cosines[-1],
        )  # fmt: skip
        subject.outputs(batch, (Sensor(read),))
    gate = replace(read, above=float(cosines[0].median()))
    edits = (
        Sensor(gate), replace(plain, gate=gate, value=30.0),
        replace(plain, where="prompt", value=9.0), replace(plain, where="generated", value=9.0),
    )  # fmt: skip
    made = []
    for waits in (False, True):
        pretend(monkeypatch, waits)
        made.append([subject.generate(batch, own, 9) for own in (edits, edits[:2], edits[2:3])])
    for often, seldom in zip(*made, strict=True):
        assert torch.equal(often, seldom)
    assert not torch.equal(made[0][1], subject.generate(batch, (), 9)), "the fixture: it acts"


@pytest.mark.parametrize("kind", ["plain", "gated", "gated by the prompt"])
def test_generation_reads_a_token_later_what_has_ended(
    subject: Subject, batch: Batch, kind: str, far: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "ends", frozenset())
    edits = (*clamps(subject, kind), *pushed(subject, batch)[-1:])
    counts = []
    subject.generate(batch, edits, 4)
    for n in (8, 16):
        with counted() as places:
            subject.generate(batch, edits, n)
        counts.append(Counter(places))
    more = counts[1] - counts[0]
    # Beside it the model itself asks once a token whether there is padding.
    assert sorted(more.values()) == [8, 8]
    assert sum("waiting.py" in place for place in more) == 1


def test_a_condition_on_the_prompt_is_decided_by_it_alone_where_nobody_asks(
    subject: Subject, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = clamps(subject, "gated by the prompt")
    edits = tuple(replace(edit, value=30.0) for edit in edits if isinstance(edit, FeatureEdit))
    made = []
    for waits in (False, True):
        pretend(monkeypatch, waits)
        made.append(subject.generate(batch, edits, 9))
    assert torch.equal(*made)
    assert not torch.equal(made[0], subject.generate(batch, (), 9)), "the fixture: it acts"


def test_where_nobody_asks_a_part_of_a_prompt_decides_nothing(
    subject: Subject, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = clamps(subject, "gated by the prompt")[0]
    assert isinstance(edit, FeatureEdit) and isinstance(edit.gate, PromptGate)
    x, frame = torch.randn(*batch.tokens.shape, 32), batch.frame()
    gate, part = replace(edit.gate, share=0.0), slice(-2, None)
    pretend(monkeypatch, True)
    decided = gate.opens(x, frame)[:, 0]
    assert decided.any(), "the fixture"
    assert torch.equal(gate.opens(torch.zeros_like(x[:, part]), frame.columns(part))[:, 0], decided)


def test_logits_that_are_not_finite_are_still_an_error(
    subject: Subject, batch: Batch, far: None
) -> None:
    at = batch.prompt_length[:, None] + 3  # while the answer is made
    bad = torch.full((len(batch), 1, 32), torch.nan)
    for n in (6, 20):
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            subject.generate(batch, (Perturbation(batch.ids, at, {SITES[0]: bad}),), n)
