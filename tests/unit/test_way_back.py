"""Lanes on their way back into the set of the true Jacobian, where answers are late and at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.ascent import Climb, ascend
from holdfast.batch import Batch
from holdfast.constraints.jacobian_null import JacobianNull
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.jacobian import frame as frames
from holdfast.jacobian.chords import Chords
from holdfast.jacobian.framed import Framed
from holdfast.jacobian.offsets import Offsets, Plain
from holdfast.jacobian.settled import Settled
from holdfast.jacobian.way_back import Place, Stage, Steps, Walk
from holdfast.problem import Lanes, Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import Iterate
from holdfast.testing import tiny_batch, tiny_subject
from tests.waits import counted, idle, pretend

SITES = (Site(1), Site(2), Site(3))
IDS = {Site(1): (3, 7, 20), Site(2): (1, 5, 9, 30), Site(3): (2, 11)}
N = 8


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject(sites=SITES)


@pytest.fixture(scope="module")
def batch(subject: Subject) -> Batch:
    return tiny_batch(subject, N)


def posed(
    subject: Subject, batch: Batch, sites: tuple[Site, ...], back: int, width: int
) -> Problem:
    """Vectors at `width` tokens from `back` before the end on; what follows is to be held too."""
    features = FeatureSet(
        entries=tuple(SiteFeatures(site=str(s), ids=ids) for s, ids in IDS.items()), source="test"
    )
    banks = {site: FeatureBank.of(subject.sae(site), features) for site in SITES}
    clamps = tuple(FeatureEdit(bank, "set_where_active", 1.5) for bank in banks.values())
    positions = batch.prompt_length[:, None] - back + torch.arange(width)
    replay = Replay.record(subject, batch, sites, positions, before=clamps, watch=SITES)
    reference = replay.residual().norm(dim=(1, 2))
    goal = torch.full((len(batch),), torch.inf)
    return Problem(replay, batch, goal, banks, reference, reference)


WAYS = ("vectors", "offsets", "settled")


@pytest.fixture(params=WAYS)
def framed(
    request: pytest.FixtureRequest, subject: Subject, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Problem, Framed]:
    """J is kept: of vectors at the lowest of three layers, of offsets, of later tokens alone."""
    if request.param == "settled":
        monkeypatch.setattr(frames, "SMALL", 4000)
    problem = {
        "vectors": lambda: posed(subject, batch, SITES[:1], 3, 3),
        "offsets": lambda: posed(subject, batch, SITES, 5, 1),
        "settled": lambda: posed(subject, batch, SITES, 5, 3),
    }[request.param]()
    level = JacobianNull().feasible(problem)
    assert isinstance(level, Framed)
    return problem, level


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The stages that lanes were at."""
    seen: list[Tensor] = []
    measured = Place.measured

    def noted(self: Place, *args: Any) -> Place:
        place = measured(self, *args)
        seen.append(place.stage)
        return place

    monkeypatch.setattr(Place, "measured", noted)
    return seen


def apart(one: Tensor, other: Tensor) -> Tensor:
    """[n] the difference of vectors as a share of their length."""
    return (one - other).norm(dim=(1, 2)) / other.norm(dim=(1, 2))


def step_of(problem: Problem, level: Framed) -> tuple[Tensor, Tensor, Iterate]:
    """A step of every lane, of other lengths and into balls that some of them have reached."""
    draw = torch.Generator().manual_seed(12)
    noise = torch.randn(2, *problem.shape, generator=draw)
    unit = noise / noise.norm(dim=(2, 3), keepdim=True) * problem.reference_norm[:, None, None]
    last = level.retract(0.05 * unit[0])
    lengths = torch.tensor([0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 3.0, 10.0])
    far = last + lengths[:, None, None] * unit[1]
    radius = problem.radius * torch.tensor([1.0, 0.04, 0.06, 0.08, 2.0, 0.3, 4.0, 30.0])
    return far, torch.maximum(radius, last.norm(dim=(1, 2))), Iterate(last)


def test_lanes_that_wait_for_answers_find_what_they_find(
    framed: tuple[Problem, Framed], stages: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, level = framed
    far, radius, last = step_of(problem, level)
    stages.clear()
    found = []
    for late in (False, True):
        pretend(monkeypatch, late)
        with counted() as places:
            found.append(level.inside(far, radius, last))
    assert idle(places) == []
    # J is made for other lanes together, which rounds otherwise.
    assert apart(*found).max() < 5e-3
    seen = set(torch.cat(stages).tolist())
    waiting = {
        Plain: {Stage.SLOW}, Offsets: {Stage.SLOW, Stage.LONG, Stage.LOST},
        Settled: {Stage.SLOW, Stage.LONG},
    }[type(level.coordinates)]  # fmt: skip
    assert seen >= {Stage.ENDED, *waiting}, "the fixture: lanes wait for everything there is"
    held = level.features(found[0])[1].abs().amax((1, 2))
    assert held.max() <= 2 * level.tolerance
    assert (found[0].norm(dim=(1, 2)) <= radius * (1 + 1e-4)).all()


def test_a_lane_alone_goes_the_way_it_goes_beside_others(framed: tuple[Problem, Framed]) -> None:
    problem, level = framed
    far, radius, last = step_of(problem, level)
    found = level.inside(far, radius, last)
    for row in range(N):
        own = torch.tensor([row])
        alone = level.rows(own).inside(far[own], radius[own], last.rows(own))
        # Corrections stop within the tolerance: rounding may end them a round earlier.
        assert apart(alone, found[own]) < 5e-3


def test_a_search_waits_for_nothing_but_what_it_asked_before(
    framed: tuple[Problem, Framed], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, level = framed
    made: list[int] = []
    anew = frames.Frame.anew
    monkeypatch.setattr(
        frames.Frame, "anew",
        lambda self, features, delta, rows: made.append(len(rows))
        or anew(self, features, delta, rows),
    )  # fmt: skip
    climb = Climb(
        torch.arange(3), torch.zeros(3, *problem.shape[1:]), problem.goal[:3], problem.radius[:3],
        torch.full((3,), 0.1),
    )  # fmt: skip
    stepper = JacobianNull().stepper
    at_once = ascend(problem, level, climb, 3, stepper)
    pretend(monkeypatch, True)
    waits = []
    for steps in (1, 3):
        with counted() as places:
            late = ascend(problem, level, climb, steps, stepper)
        waits.append(Counter(idle(places)))
    assert sum(made) > 0, "J was made anew on the way"
    assert waits[1] == waits[0], "the steps that are more"
    torch.testing.assert_close(late.margin, at_once.margin, rtol=1e-3, atol=1e-3)


def test_lanes_that_leave_take_along_what_was_asked_of_them(
    framed: tuple[Problem, Framed], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, level = framed
    with torch.no_grad():
        margin = Lanes.of(problem, torch.arange(N)).margin(torch.zeros(problem.shape))
    # The first ones at once; of those that stay only some go far.
    rising = torch.tensor([-1.0, -1.0, 0.01, *[torch.inf] * 5])
    rate = torch.tensor([0.1, 0.1, 0.1, 0.01, 0.15, 0.01, 0.15, 0.15])
    climb = Climb(
        torch.arange(N), torch.zeros(problem.shape), margin + rising, problem.radius, rate
    )
    found = []
    for late in (False, True):
        pretend(monkeypatch, late)
        found.append(ascend(problem, level, climb, 4, JacobianNull().stepper))
    at_once, late_ = found
    assert torch.equal(at_once.reached_at, late_.reached_at)
    assert len(set(at_once.reached_at.tolist())) > 1, "the fixture: some leave"
    torch.testing.assert_close(late_.margin, at_once.margin, rtol=1e-3, atol=1e-3)


def test_where_a_try_begins_far_from_j_it_is_made_there_first(
    framed: tuple[Problem, Framed],
) -> None:
    problem, level = framed
    far, radius, last = step_of(problem, level)
    chords = Chords.of(level.coordinates, level.frame, level.tolerance)
    shares = torch.tensor([[1.0, 0.01]]).expand(N, -1)
    anywhere = torch.full_like(radius, torch.inf)
    steps = Steps(last.delta, far - last.delta, shares, anywhere, 0.2 * level.size)
    walk = Walk.of(chords, steps)
    begun = (far - level.frame.center).norm(dim=(1, 2)) > 0.2 * level.size
    assert begun.any() and not begun.all()
    assert torch.equal(walk.place.stage == Stage.SLOW, begun)
    own = begun.nonzero().flatten()
    there = walk.renewed(own, far)
    assert (there.place.stage == Stage.GOING).all()
    torch.testing.assert_close(there.chords.frame.center[own], far[own])
    assert torch.equal(there.chords.frame.J[~begun], chords.frame.J[~begun])
