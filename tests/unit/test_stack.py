"""Searches that share their passes: each finds what it would find alone, and leaves when it has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.ascent import Ascent, Climb, ascend
from holdfast.attacks import Attacked, TrialResult
from holdfast.attacks.residual import MOST_ROWS, _searched, _sharing, pose, pose_together
from holdfast.batch import Example
from holdfast.batching import Beginning, Sizes
from holdfast.constraints import ConstraintKind
from holdfast.constraints.one_sided import OneSided
from holdfast.controls import Case
from holdfast.controls.none import NoControl
from holdfast.controls.wrong_target import WrongTarget
from holdfast.edits import FeatureEdit
from holdfast.errors import EmptyValidSetError
from holdfast.executor import Runtime, execute
from holdfast.per_row import Dealt, SetPerRow, StepperPerRow
from holdfast.planning import plan
from holdfast.polyhedron import Polyhedron
from holdfast.problem import Lanes, Problem
from holdfast.recovery import Recovery, RecoverySpec, Search, recover, recover_together
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.setting import Setting
from holdfast.sites import Site
from holdfast.stack import Stack
from holdfast.stacked import StackPlan, stacked
from holdfast.steppers import Adam, Steepest
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.subspace import Everything, Iterate
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.timed import Stopwatch, shares
from holdfast.trial import Ended, Lab, Trial, run_trial, run_trials, setting_key
from tests.unit.recovered import features_at, set_up

SITES = (Site(1), Site(2))

ONE_SITE = (
    "unconstrained", "gradient_projection", "encoder_null", "one_sided", "feature_floor",
    "decoder_null", "undo_null", "random_subspace",
)  # fmt: skip
"""Constraints of one site, whose sets ask for no pass of their own."""

IN_PASS = ("feature_hold", "feature_floor", "one_sided", "undo_null")
"""Constraints that are kept in the forward pass where several sites are held."""

SEVERAL_SITES = (
    "unconstrained", "gradient_projection", "random_subspace", *IN_PASS, "jacobian_null",
    "jacobian_probes",
)  # fmt: skip
"""The last two run the model themselves, each in its own way."""


def a_setting(
    sites: Sequence[Site], subject: Subject | None = None, seed: int = 0, value: float = -2.0
) -> Setting:
    """seed: of the prompts; value: what features are set to."""
    subject = subject or tiny_subject(sites=sites)
    features = features_at(sites)
    banks = [FeatureBank.of(subject.sae(site), features) for site in sites]
    clamps = tuple(FeatureEdit(bank, "set_where_active", value) for bank in banks)
    return set_up(subject, tiny_batch(subject, 6, seed=seed), features, clamps, gain=2.0)


@pytest.fixture(scope="module")
def one_site() -> Setting:
    return a_setting(SITES[1:])


@pytest.fixture(scope="module")
def two_sites() -> Setting:
    return a_setting(SITES)


def no_twin() -> Setting:
    raise AssertionError


def spec_of(constraint: str, relative: float = 0.8, **fields: object) -> RecoverySpec:
    return RecoverySpec.model_validate(
        {"constraint": {"kind": constraint}, "budget": {"relative": relative}, "steps": 12,
         "refine_steps": 8, "doublings": 1, "tolerance": 0.05} | fields
    )  # fmt: skip


def attacked(setting: Setting, spec: RecoverySpec, wrong: bool = False, seed: int = 0) -> Attacked:
    control = WrongTarget() if wrong else NoControl()
    return Attacked(setting, control.case(setting, no_twin), spec, seed)


def alone(each: Attacked) -> Recovery:
    assert each.recovery is not None
    return recover(pose(each.recovery, each.case), each.recovery, each.seed)


def posed(members: Sequence[Attacked]) -> tuple[Problem, list[Search]]:
    specs = [each.recovery for each in members if each.recovery is not None]
    searches = [Search(len(m.case.rows), s, m.seed) for m, s in zip(members, specs, strict=True)]
    return pose_together(specs, [each.case for each in members]), searches


def together(members: Sequence[Attacked]) -> list[Recovery]:
    return recover_together(*posed(members))


def stack_of(members: Sequence[Attacked]) -> Stack:
    return Stack.of(*posed(members))


def check_the_same(one: Recovery, other: Recovery) -> None:
    assert one.outcomes == other.outcomes
    away = (one.delta - other.delta).norm(dim=(1, 2))
    assert (away <= 1e-5 * other.norm.clamp_min(1)).all(), away / other.norm
    torch.testing.assert_close(one.margin, other.margin, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        one.smallest_norm, other.smallest_norm, atol=1e-5, rtol=1e-5, equal_nan=True
    )
    assert torch.equal(one.steps, other.steps)
    assert torch.equal(one.null_dimension, other.null_dimension)
    assert len(one.trace) == len(other.trace)
    for mine, theirs in zip(one.trace, other.trace, strict=True):
        assert mine["n_searching"] == theirs["n_searching"]
        assert mine["n_reached"] == theirs["n_reached"]
        assert mine["margin_mean"] == pytest.approx(theirs["margin_mean"], abs=1e-4)


# --- What each finds ------------------------------------------------------------------------------


def test_constraints_targets_budgets_and_seeds_find_what_they_find_alone(
    one_site: Setting,
) -> None:
    """A small budget makes rows fail, so that the harder search is stacked too."""
    members = [attacked(one_site, spec_of(name), wrong=i % 2 == 1) for i, name in
               enumerate(ONE_SITE)]  # fmt: skip
    members += [attacked(one_site, spec_of("encoder_null", 0.05), seed=seed) for seed in (0, 1)] + [
        attacked(one_site, spec_of("encoder_null", 0.3, stop={"clean_margin": 0.5}), wrong=True)
    ]
    found = together(members)
    names = {name for recovery in found for name in recovery.outcomes}
    assert {"recovered", "not_recovered"} <= names, "the fixture: rows that succeed, rows that fail"
    for each, recovery in zip(members, found, strict=True):
        by_itself = alone(each)
        check_the_same(recovery, by_itself)
        assert torch.equal(recovery.lane_steps, by_itself.lane_steps), "it ran more, or less"
    one, other = found[len(ONE_SITE)], found[len(ONE_SITE) + 1]
    assert not torch.equal(one.delta, other.delta), "two seeds, two random starts"


def test_a_seed_of_the_search_is_the_studys_for_the_search_alone(one_site: Setting) -> None:
    specs = [spec_of("encoder_null", 0.05, **seed) for seed in ({}, {"seed": 1}, {"seed": 0})]
    assert specs[0].pace == specs[1].pace
    members = [attacked(one_site, spec) for spec in specs]
    assert len(_sharing(members)) == 1, "rows of one batch"
    plain, other, same = [found for _, found, _ in _searched(members)]
    ((_, expected, _),) = _searched([attacked(one_site, spec_of("encoder_null", 0.05), seed=1)])
    check_the_same(other, expected)
    check_the_same(same, plain)
    assert not torch.equal(other.delta, plain.delta), "two seeds, two random starts"


def test_trials_that_differ_in_the_seed_of_the_search_are_one_stack() -> None:
    trials = plan(parse(bundled("sweeps"))).trials
    own = {
        name: [trial for trial in trials if trial.audit == name] for name in ("seed", "search_seed")
    }
    assert [len(stack) for stack in stacked(own["search_seed"])] == [3]
    assert len({setting_key(trial, trial.subject) for trial in own["search_seed"]}) == 1
    assert len({trial.id for trial in own["search_seed"]}) == 3
    assert [len(stack) for stack in stacked(own["seed"])] == [1, 1, 1], "other prompts"
    assert not any("seed" in t.canonical()["recovery"] for t in own["seed"] if t.recovery)


def test_trials_that_differ_in_their_prompts_are_one_stack_where_features_do_not_go_by_them() -> (
    None
):
    trials = plan(parse(bundled("demo"))).trials
    for audit, together in (("bottleneck", True), ("ioi", False)):
        own = [t for t in trials if t.audit == audit and t.control.alongside]
        assert len(stacked(own)) == 1 and own[0].discovery.by_prompts is not together
        for n_prompts, fit in ((20, True), (200, False)):  # of six searches of each seed
            data = own[0].data.model_copy(update={"test": n_prompts})
            seeds = [
                [trial.model_copy(update={"seed": seed, "data": data}) for trial in own]
                for seed in (0, 1, 2)
            ]
            every = [trial for pair in zip(*seeds, strict=True) for trial in pair]
            stacks = stacked(every)
            assert [len(stack) for stack in stacks] == ([18] if together and fit else [6, 6, 6])
            assert [t.id for t in stacks[0]] == [t.id for t in every if t in stacks[0]], "in order"


def test_constraints_that_run_the_model_themselves_climb_the_same_beside_all_others(
    two_sites: Setting,
) -> None:
    members = [attacked(two_sites, spec_of(name), wrong) for name in SEVERAL_SITES
               for wrong in (False, True)]  # fmt: skip
    members.append(attacked(two_sites, spec_of("feature_hold", 0.3)))
    assert len(_sharing(members)) == 1, "rows of one batch"
    check_climbs(members)


def test_a_vector_at_the_first_of_two_sites_is_held_beside_one_that_is_free(
    two_sites: Setting,
) -> None:
    """Only the Jacobian holds what is above the vector: rows of its own, by a way of their own."""
    at = {"perturb": {"sites": [str(SITES[0])]}}
    names = ("jacobian_null", "gradient_projection", "unconstrained")
    members = [attacked(two_sites, spec_of(name, **at), wrong) for name in names
               for wrong in (False, True)]  # fmt: skip
    check_climbs(members)
    found = together(members)
    for each, recovery in zip(members, found, strict=True):
        by_itself = alone(each)
        assert recovery.outcomes == by_itself.outcomes
        assert torch.equal(recovery.null_dimension, by_itself.null_dimension)
        torch.testing.assert_close(
            recovery.smallest_norm, by_itself.smallest_norm, rtol=0.05, atol=0, equal_nan=True
        )


def test_what_is_held_in_the_forward_pass_shares_the_passes_that_put_it_there(
    two_sites: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    plain = Replay.realized

    def counted(self: Replay, delta: Tensor) -> Tensor:
        rows.append(len(delta))
        return plain(self, delta)

    monkeypatch.setattr(Replay, "realized", counted)
    members = [attacked(two_sites, spec_of(name)) for name in (*IN_PASS, "unconstrained")]
    whole = stack_of(members)
    started = 0.2 * torch.randn(whole.problem.shape)
    few_steps(whole, started)
    together = list(rows)
    rows.clear()
    each = whole.parts
    for member, (_, own) in zip(members[:-1], each, strict=False):
        few_steps(stack_of([member]), started[own])
    assert len(together) < 0.5 * len(rows), "in fewer passes"


def check_climbs(members: Sequence[Attacked]) -> None:
    """A few steps, from a random start: what a whole search makes of a difference in the last digit
    would say nothing about rows that get into each other's way."""
    whole = stack_of(members)
    started = 0.2 * torch.randn(whole.problem.shape)
    together = few_steps(whole, started)
    begin = 0
    for each in members:
        rows = slice(begin, begin + len(each.case.rows))
        begin = rows.stop
        alone = few_steps(stack_of([each]), started[rows])
        torch.testing.assert_close(together.delta[rows], alone.delta, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.margin[rows], alone.margin, atol=1e-4, rtol=1e-4)
        assert not torch.equal(alone.delta, started[rows]), "the fixture: it moves"


def few_steps(stack: Stack, start: Tensor) -> Ascent:
    n = len(stack)
    climb = Climb(
        torch.arange(n), start, torch.full((n,), 1e9), stack.problem.radius, torch.full((n,), 0.1)
    )
    return ascend(stack.problem, stack.feasible, climb, 3, stack.stepper)


def test_prompts_of_two_seeds_under_one_clamp_find_what_they_find_alone(
    one_site: Setting,
) -> None:
    """A clamp that was made twice is one, whatever else was measured of its features."""
    other = a_setting(SITES[1:], one_site.subject, seed=1)
    entries = tuple(e.model_copy(update={"median_active": 2.0}) for e in other.features.entries)
    other = replace(other, features=other.features.model_copy(update={"entries": entries}))
    members = [
        attacked(setting, spec_of(name, 0.3), seed=seed)
        for seed, setting in enumerate((one_site, other))
        for name in ("encoder_null", "unconstrained")
    ]
    assert one_site.edits[0] is not other.edits[0]
    assert _sharing(members) == [[0, 1, 2, 3]]
    for each, (problem, recovery, _) in zip(members, _searched(members), strict=True):
        assert problem.batch is each.case.batch and len(recovery.delta) == len(each.case.rows)
        check_the_same(recovery, alone(each))
    stronger = attacked(
        a_setting(SITES[1:], one_site.subject, seed=1, value=-3.0), spec_of("encoder_null")
    )
    assert _sharing([*members, stronger]) == [[0, 1, 2, 3], [4]], "another clamp"


def test_several_searches_of_forced_answers_are_stacked(one_site: Setting) -> None:
    batch = one_site.test.forcing([[4 + i, 9, 12 + i][: 2 + i % 2] for i in range(6)])
    longer = replace(one_site, test=batch)
    members = [
        attacked(longer, spec_of(name, 1.5), wrong)
        for name in ("unconstrained", "encoder_null")
        for wrong in (False, True)
    ]
    assert len(_sharing(members)) == 1
    for each, recovery in zip(members, together(members), strict=True):
        check_the_same(recovery, alone(each))


def test_rows_without_a_looser_constraint_may_be_the_only_ones_that_failed(
    one_site: Setting,
) -> None:
    members = [attacked(one_site, spec_of("unconstrained", 0.01)),
               attacked(one_site, spec_of("encoder_null", 3.0))]  # fmt: skip
    tight, wide = together(members)
    assert "not_recovered" in tight.outcomes and set(wide.outcomes) == {"recovered"}
    for each, recovery in zip(members, (tight, wide), strict=True):
        check_the_same(recovery, alone(each))


# --- Who leaves when ------------------------------------------------------------------------------


def test_rows_that_got_there_leave_the_batch(
    one_site: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes in the passes of a stack are those of its searches alone, in as few passes as the
    longest of them needs."""
    sizes: list[int] = []

    def counting(name: str) -> None:
        plain = getattr(Lanes, name)

        def counted(self: Lanes, delta: Tensor) -> Any:
            sizes.append(len(delta))
            return plain(self, delta)

        monkeypatch.setattr(Lanes, name, counted)

    counting("climbed")
    counting("margin")
    members = [
        attacked(one_site, spec_of(name), wrong)
        for name in ("unconstrained", "encoder_null")
        for wrong in (False, True)
    ]
    single = []
    for each in members:
        sizes.clear()
        recovery = alone(each)
        single.append((len(sizes), sum(sizes)))
        assert sum(sizes) == int(recovery.lane_steps.sum())
    sizes.clear()
    together(members)
    assert sum(sizes) == sum(lanes for _, lanes in single), "as many lanes as alone"
    assert len(sizes) < 0.6 * sum(passes for passes, _ in single), "in fewer passes"
    assert min(sizes) < max(sizes) / 2, "the batch shrinks"


def test_a_success_ends_the_lanes_of_its_row_in_balls_as_large_and_no_others(
    one_site: Setting,
) -> None:
    each = attacked(one_site, spec_of("unconstrained"))
    problem = pose(spec_of("unconstrained"), each.case)
    best = alone(each)
    row = int(best.smallest_norm.nan_to_num(torch.inf).argmin())
    there = best.delta[row]
    n = float(best.smallest_norm[row])
    radius = torch.tensor([0.3 * n, n * 1.001, n * 1.001, 2 * n])
    zero = torch.zeros_like(there)
    climb = Climb(
        torch.full((4,), row), torch.stack([zero, there, zero, zero]),
        problem.goal[row].expand(4).clone(), radius, torch.full((4,), 1e-6),
    )  # fmt: skip
    feasible = spec_of("unconstrained").constraint.feasible(problem)
    ended = ascend(problem, feasible, climb, 3, Steepest())
    assert ended.reached.tolist() == [False, True, False, False]
    assert ended.passes.tolist() == [4, 1, 1, 1]

    # Lanes that stand apart do not know of each other, and are not counted for what that costs.
    batching = problem.replay.subject.batching
    before = batching.sizes
    batching.begin(Beginning(Sizes.every(1)))
    try:
        apart = ascend(problem, feasible, climb, 3, Steepest())
    finally:
        batching.begin(Beginning(before))
    assert torch.equal(apart.reached_at, ended.reached_at)
    assert torch.equal(apart.passes, ended.passes)


# --- What each costs ------------------------------------------------------------------------------


def test_a_search_pays_for_what_its_constraint_does_by_itself(
    two_sites: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by a second whenever the model is run, and by ten whenever residuals
    are put between two planes."""
    now = [0.0]

    def slow(kind: type, name: str, seconds: int) -> None:
        plain = getattr(kind, name)

        def counted(self: Any, *args: Any) -> Any:
            now[0] += seconds
            return plain(self, *args)

        monkeypatch.setattr(kind, name, counted)

    slow(Replay, "_run", 1)
    slow(Polyhedron, "retract", 10)
    names = ("unconstrained", "feature_hold", "one_sided", "jacobian_probes")
    members = [attacked(two_sites, spec_of(name)) for name in names]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    searched = dict(zip(names, _searched(members), strict=True))
    own = {name: found.own_seconds for name, (_, found, _) in searched.items()}
    lanes = {name: int(found.lane_steps.sum()) for name, (_, found, _) in searched.items()}
    a_lane = {name: own[name] / lanes[name] for name in names}
    assert own["unconstrained"] == 0, "it only runs in passes that all share"
    assert a_lane["jacobian_probes"] > a_lane["feature_hold"] > 0
    assert a_lane["one_sided"] > 10 * a_lane["feature_hold"], "the passes of one are the other's"
    taken = {name: seconds for name, (_, _, seconds) in searched.items()}
    assert sum(taken.values()) == pytest.approx(now[0])
    beside = {name: (taken[name] - own[name]) / lanes[name] for name in names}
    assert list(beside.values()) == pytest.approx([beside["unconstrained"]] * len(names))


def test_a_search_pays_for_the_looser_constraint_that_it_starts_warm_from(
    one_site: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only goes on where residuals are put between two planes, which nothing but
    the looser constraint does: it is that of two searches, and only one of them fails."""
    now, plain = [0.0], Polyhedron.retract

    def slow(self: Polyhedron, delta: Tensor) -> Tensor:
        now[0] += 1
        return plain(self, delta)

    monkeypatch.setattr(Polyhedron, "retract", slow)
    monkeypatch.setattr(ConstraintKind, "looser", OneSided())
    spec = {"unconstrained": 0.01, "encoder_null": 0.01, "gradient_projection": 3.0}
    members = [attacked(one_site, spec_of(name, relative)) for name, relative in spec.items()]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    _, failed, reached = found = [recovery for _, recovery, _ in _searched(members)]
    assert "not_recovered" in failed.outcomes and set(reached.outcomes) == {"recovered"}
    assert [recovery.own_seconds for recovery in found] == [0, now[0], 0] and now[0] > 0


def test_a_clock_stands_still_while_one_within_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    outer = Stopwatch()
    inner = Stopwatch(outer)
    with outer.running():
        now[0] += 1
        with inner.running():
            now[0] += 2
    with inner.running():
        now[0] += 4
    assert (outer.seconds, inner.seconds) == (1, 6)
    assert shares([[outer], [outer, inner], []], [1, 3, 5]) == pytest.approx([0.25, 6.75, 0])
    assert shares([[outer]], [0]) == [0]


# --- Rows and their owners ------------------------------------------------------------------------


def test_rows_keep_their_owners_however_they_are_picked() -> None:
    sets = [Everything(torch.arange(3)), Everything(10 + torch.arange(2))]
    owner = torch.tensor([0, 1, 0, 1, 0])
    dealt = SetPerRow(Dealt.to(sets, owner))
    assert dealt.dimension.tolist() == [0, 10, 1, 11, 2]
    picked = torch.tensor([4, 3, 3, 0])
    assert dealt.rows(picked).dimension.tolist() == [2, 11, 11, 0]
    left = dealt.rows(picked).rows(torch.tensor([2, 1]))
    assert left.dimension.tolist() == [11, 11] and len(left.sets.parts) == 1
    x = torch.randn(2, 1, 4)
    assert torch.equal(left.tangent(x, Iterate.zero(x)), x)


def test_step_rules_of_several_rows_do_what_each_does_alone() -> None:
    owner = torch.tensor([0, 1, 1, 0, 2])
    steppers = [Steepest(), Adam(), Steepest(momentum=0.1)]
    mixed = StepperPerRow.of(steppers, owner)
    delta = torch.zeros(5, 2, 3)
    state, states = mixed.start(delta), [s.start(delta) for s in steppers]
    for _ in range(4):
        gradient = torch.randn(5, 2, 3)
        move, state = mixed.move(state, gradient)
        for index, stepper in enumerate(steppers):
            own, states[index] = stepper.move(states[index], gradient)
            assert torch.equal(move[owner == index], own[owner == index])
    assert StepperPerRow.of([Adam(), Adam()], owner.clamp(max=1)) == Adam()


# --- Which trials are searched together -----------------------------------------------------------


def test_trials_are_stacked_that_differ_in_the_search_alone() -> None:
    trials = plan(parse(bundled("demo"))).trials
    stacks = stacked(trials)
    assert [t.id for s in stacks for t in s if t.audit == "bottleneck"] == [
        t.id for t in trials if t.audit == "bottleneck"
    ]
    assert sorted(t.id for s in stacks for t in s) == sorted(t.id for t in trials)
    seen = {
        (stack[0].audit, *sorted({(t.label, t.control.kind) for t in stack})) for stack in stacks
    }
    both = ("none", "wrong_target")
    ioi = [(c, k) for c in ("unconstrained", "gradient_projection", "encoder_null") for k in both]
    assert ("ioi", *sorted(ioi)) in seen
    for control in ("no_clamp", "ignorant"):  # other edits, another subject
        assert ("ioi", ("encoder_null", control)) in seen
    for audit in ("three_layers", "one_vector"):  # whatever runs the model itself within a step
        own = {(t.label, t.control.kind) for t in trials if t.audit == audit}
        assert {"jacobian_probes", "jacobian_null"} & {name for name, _ in own}
        assert (audit, *sorted(own)) in seen
    for stack in stacks:
        if not stack[0].searches:
            assert len(stack) == 1


def test_a_stack_holds_no_more_rows_than_fill_a_batch(one_site: Setting) -> None:
    each = attacked(one_site, spec_of("encoder_null"))
    n = len(each.case.rows)
    members = [each] * (2 * (MOST_ROWS // n) + 1)
    sizes = [len(group) for group in _sharing(members)]
    assert sizes == [MOST_ROWS // n, MOST_ROWS // n, 1]


def test_cases_under_other_edits_share_no_pass(one_site: Setting) -> None:
    each = attacked(one_site, spec_of("encoder_null"))
    other = replace(each, case=replace(each.case, edits=()))
    assert _sharing([each, other, each]) == [[0, 2], [1]]


# --- Trials of a stack ----------------------------------------------------------------------------


def tiny_lab(setting: Setting) -> Lab:
    """A lab with one setting, for every trial."""
    test = setting.test
    examples = tuple(
        Example(id=name, text=text, target="w1", rivals=("w2",), alternatives=(), cluster=name)
        for name, text in zip(test.ids, test.texts, strict=True)
    )
    return Lab({"tiny": setting.subject}, _settings={"tiny": replace(setting, examples=examples)})


@pytest.fixture
def lab(one_site: Setting, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(Lab, "setting", lambda self, trial, identity: self._settings["tiny"])
    monkeypatch.setattr(Lab, "subject", lambda self, identity: self.subjects["tiny"])
    return tiny_lab(one_site)


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    """Two constraints, with the right target and a wrong one."""
    made = [t for t in plan(parse(bundled("demo"))).trials if t.audit == "ioi"]
    return [
        trial.model_copy(update={"recovery": spec_of(trial.label), "paths": None})
        for trial in made
        if trial.control.alongside and trial.label != "gradient_projection"
    ]


def test_trials_run_together_say_what_they_say_alone_and_so_does_a_resumed_rest(
    lab: Lab, trials: list[Trial]
) -> None:
    assert len(stacked(trials)) == 1 and len(trials) == 4
    before = time.perf_counter()
    whole = {ended.trial.id: ended for ended in run_trials(trials, lab)}
    took = time.perf_counter() - before
    seconds = [ended.seconds for ended in whole.values()]
    assert all(s > 0 for s in seconds) and 0.5 * took < sum(seconds) <= took
    assert whole.keys() == {trial.id for trial in trials}
    rest = {ended.trial.id: ended for ended in run_trials(trials[1:3], lab)}
    alone = {trials[0].id: Ended(trials[0], run_trial(trials[0], lab), 0.0)}
    for key, ended in (rest | alone).items():
        one, other = whole[key].result, ended.result
        assert isinstance(one, TrialResult) and isinstance(other, TrialResult)
        assert one.result["funnel"] == other.result["funnel"]
        assert one.result["outcome"] == other.result["outcome"]
        assert one.result["readout"] == other.result["readout"]
        assert one.tensors.keys() == other.tensors.keys()
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], atol=1e-5, rtol=1e-5)
        assert [row["outcome"] for row in one.examples] == [r["outcome"] for r in other.examples]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_every_trial_of_a_stack_is_done_once(
    lab: Lab, trials: list[Trial], n_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.executor.load_lab", lambda *a: tiny_lab(a_setting(SITES[1:])))
    slow = trials[0].recovery.model_copy(update={"steps": 13})  # another stack
    more = [*trials, trials[0].model_copy(update={"recovery": slow})]
    assert [len(stack) for stack in stacked(more)] == [4, 1]
    made = plan(parse(bundled("demo")))
    stacks = StackPlan.of(more, (), None).todo
    done = list(execute(made, stacks, Runtime(workers=n_workers), lab))
    assert sorted(each.trial.id for each in done) == sorted(trial.id for trial in more)
    # Whoever needs the setting first has to prepare it, and nobody else of its stack.
    first = [each for each in done if each.unprepared]
    assert {each.trial.id for each in first} == {more[0].id, more[4].id}


def test_a_trial_without_a_prompt_keeps_nothing_else_from_running(
    lab: Lab, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: WrongTarget, setting: Setting, twin: object) -> Case:
        raise EmptyValidSetError("nothing is left", {"valid": 0})

    monkeypatch.setattr(WrongTarget, "case", nothing)
    ended = {e.trial.id: e.result for e in run_trials(trials, lab)}
    empty = [t.control.kind for t in trials if isinstance(ended[t.id], EmptyValidSetError)]
    assert empty == ["wrong_target", "wrong_target"] and len(ended) == 4
