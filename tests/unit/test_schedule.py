"""Searches of fixed stages: the published loop step for step, and the rule for what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from holdfast.batch import Batch
from holdfast.config import IDENTITY
from holdfast.constraints import CONSTRAINTS
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.objectives.cross_entropy import CrossEntropy
from holdfast.objectives.mean_margin import MeanMargin
from holdfast.objectives.prefixes import Prefix, Prefixes
from holdfast.problem import Lanes, Problem
from holdfast.recovery import Recovery, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.schedule import Checkpoint
from holdfast.scheduled import Kept, Watch
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.subspace import into_ball
from holdfast.testing import tiny_batch, tiny_problem, tiny_subject

SITES = (Site(1), Site(2))
ANSWER = 3


def spec(constraint: str, *stages: dict[str, Any], **fields: Any) -> RecoverySpec:
    checkpoint = fields.pop("checkpoint", None)
    schedule = {"stages": list(stages), "checkpoint": checkpoint}
    return RecoverySpec.model_validate(
        {"constraint": {"kind": constraint}, "schedule": schedule} | fields
    )


@pytest.fixture
def one_layer(subject: Subject, batch: Batch, bank: FeatureBank) -> Problem:
    problem = tiny_problem(subject, batch, bank)
    return replace(problem, radius=torch.full_like(problem.radius, 3.0), objective=MeanMargin())


def published_loop(problem: Problem, projected: bool, steps: int, lr: float) -> Tensor:
    """METHODS C.2, one prompt at a time: PyTorch's Adam, the gradient's projection with its ridge,
    the norm cut to the budget; no stop, and the last iterate."""
    (site,) = problem.sites
    A = problem.held[site].W_enc[0]
    off = A @ torch.linalg.solve(A.T @ A + 1e-4 * torch.eye(A.shape[1]), A.T)
    found = []
    for row in range(len(problem)):
        lanes = Lanes.of(problem, torch.tensor([row]))
        delta = torch.zeros(1, *problem.shape[1:], requires_grad=True)
        adam = torch.optim.Adam([delta], lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            (-lanes.climbed(delta)[0]).sum().backward()
            assert delta.grad is not None
            if projected:
                delta.grad -= delta.grad @ off
            adam.step()
            with torch.no_grad():
                delta *= min(1.0, float(problem.radius[row] / delta.norm()))
        found.append(delta.detach())
    return torch.cat(found)


@pytest.mark.parametrize("constraint", ["unconstrained", "gradient_projection"])
def test_one_stage_is_the_published_loop(one_layer: Problem, constraint: str) -> None:
    found = recover(one_layer, spec(constraint, {"steps": 25, "lr": 0.1}), seed=0)
    expected = published_loop(one_layer, constraint != "unconstrained", 25, 0.1)
    assert torch.allclose(found.delta, expected, atol=2e-3 * float(expected.abs().max()))
    assert (expected.norm(dim=(1, 2)) > 2.9).any(), "the budget binds"
    assert found.steps.tolist() == [25] * len(one_layer), "no step is left out"


def test_it_goes_on_where_the_goal_is_reached(one_layer: Problem) -> None:
    """The published search overshoots; the study's own looks for the smallest norm."""
    staged = recover(one_layer, spec("unconstrained", {"steps": 40, "lr": 0.1}), seed=0)
    own = recover(one_layer, RecoverySpec.model_validate({"constraint": {"kind": "unconstrained"}}),
                  seed=0)  # fmt: skip
    both = staged.smallest_norm.isfinite() & own.smallest_norm.isfinite()
    assert both.any()
    assert (staged.smallest_norm >= 0.99 * own.smallest_norm)[both].all()
    assert (staged.margin > one_layer.goal)[both].all()
    assert set(staged.outcomes) <= {"recovered", "undecided"}
    assert len(staged.trace) == 40 and staged.trace[-1]["n_searching"] == len(one_layer)
    ever = int((staged.margin > one_layer.goal).sum())
    assert ever <= staged.trace[-1]["n_reached"] <= len(one_layer), "a row reaches its goal once"


def test_too_small_a_budget_is_undecided_and_never_held(one_layer: Problem) -> None:
    small = replace(one_layer, radius=torch.full_like(one_layer.radius, 1e-4))
    found = recover(small, spec("unconstrained", {"steps": 3, "lr": 0.1}), seed=0)
    lost = [name for name, margin in zip(found.outcomes, found.margin, strict=True) if margin <= 0]
    assert lost and set(lost) == {"undecided"}
    assert found.smallest_norm[found.margin <= 0].isnan().all()


def test_an_exact_constraint_is_kept_by_adam_too(one_layer: Problem) -> None:
    found = recover(one_layer, spec("encoder_null", {"steps": 20, "lr": 0.1}), seed=0)
    (site,) = one_layer.sites
    A = one_layer.held[site].W_enc[0]
    assert (found.delta @ A).abs().max() < 1e-5 * found.delta.norm()


# --- Several layers, an answer, two stages --------------------------------------------------------


@pytest.fixture(scope="module")
def answered() -> Problem:
    """Vectors at the last prompt token and at the first tokens of a forced answer, at two sites."""
    subject = tiny_subject(sites=SITES)
    batch = tiny_batch(subject, 3)
    batch = batch.forcing([[5 + i, 9, 11 + i, 3] for i in range(3)])
    features = FeatureSet(
        entries=tuple(SiteFeatures(site=str(site), ids=(1, 5, 9)) for site in SITES), source="test"
    )
    banks = {site: FeatureBank.of(subject.sae(site), features) for site in SITES}
    clamps = tuple(FeatureEdit(bank, "multiply", 1.5) for bank in banks.values())
    positions = batch.prompt_length[:, None] - 1 + torch.arange(1 + ANSWER)
    replay = Replay.record(subject, batch, SITES, positions, before=clamps, watch=SITES)
    reference = replay.residual().norm(dim=(1, 2))
    radius = torch.full_like(reference, 1.5)
    return Problem(replay, batch, torch.full_like(reference, 50.0), banks, reference, radius)


FIRST = {"steps": 12, "lr": 0.2, "at": "prompt",
         "objective": {"kind": "prefixes", "terms": [{"weight": 4.0, "n_tokens": 1}]}}  # fmt: skip
SECOND = {"steps": 12, "lr": 0.2, "at": "answer", "objective": {"kind": "cross_entropy"}}


def staged(problem: Problem, *stages: dict[str, Any], kind: str = "jacobian_probes",
           **fields: Any) -> Recovery:  # fmt: skip
    fields = {"perturb": {"answer": ANSWER}} | fields
    return recover(problem, spec(kind, *stages, **fields), seed=0)


@pytest.mark.parametrize("kind", ["unconstrained", "gradient_projection", "jacobian_probes"])
def test_a_stage_leaves_the_others_vectors_as_they_are(answered: Problem, kind: str) -> None:
    alone, both = staged(answered, FIRST, kind=kind), staged(answered, FIRST, SECOND, kind=kind)
    _, q, _ = answered.shape
    prompt = torch.zeros(q, dtype=torch.bool)
    prompt[:: 1 + ANSWER] = True  # the first of every site's slots
    assert torch.equal(both.delta[:, prompt], alone.delta[:, prompt])
    assert (alone.delta[:, ~prompt] == 0).all() and (both.delta[:, ~prompt] != 0).any()
    for part in (both.delta[:, prompt], both.delta[:, ~prompt]):
        length = part.norm(dim=(1, 2))
        assert (length <= 1.5 * (1 + 1e-5)).all(), "each stage has the budget for itself"
    assert (both.delta.norm(dim=(1, 2)) > 1.6).any(), "and both together may be longer"


def test_a_stage_is_the_same_whatever_is_in_the_batch(answered: Problem) -> None:
    whole = staged(answered, FIRST, SECOND)
    for row in range(len(answered)):
        alone = staged(answered.rows(torch.tensor([row])), FIRST, SECOND)
        assert torch.allclose(alone.delta[0], whole.delta[row], atol=1e-4)


def test_a_checkpoint_takes_no_more_drift_than_it_asks_for_where_it_can(answered: Problem) -> None:
    rule = {"every": 3, "drift": 0.01, "weight": 1e4}
    strict = staged(answered, SECOND, checkpoint=rule, kind="unconstrained")
    free = staged(answered, SECOND, kind="unconstrained")
    watch = Watch.of(answered)
    kept, last = watch.drift(strict.delta), watch.drift(free.delta)
    assert (last > 0.01).all(), "without the rule they drift"
    assert (kept <= last).all() and (kept < last).any()
    loose = staged(answered, SECOND, checkpoint=rule | {"drift": 1e3}, kind="unconstrained")
    objective = [
        Lanes.of(replace(answered, objective=CrossEntropy()), torch.arange(3)).climbed(each.delta)[
            0
        ]
        for each in (loose, strict)
    ]
    assert (objective[0] >= objective[1] - 1e-6).all(), "of all iterates the highest objective"


def by_hand(rule: Checkpoint, seen: Sequence[tuple[float, float]]) -> int:
    """The index the published rule takes of (objective, drift) pairs (METHODS D.7)."""
    near = [i for i, (_, drift) in enumerate(seen) if drift <= rule.drift]
    if near:
        return max(near, key=lambda i: seen[i][0])
    return max(range(len(seen)), key=lambda i: seen[i][0] - rule.weight * seen[i][1])


def test_what_is_kept_is_what_the_rule_says() -> None:
    rule = Checkpoint(drift=0.03, weight=80.0)
    generator = torch.Generator().manual_seed(0)
    n, steps = 200, 7
    objective = -20 * torch.rand(steps, n, generator=generator)
    drift = 0.12 * torch.rand(steps, n, generator=generator)
    kept = Kept.none(rule, torch.full((n, 1, 1), -1.0))
    for step in range(steps):
        kept.offer(torch.full((n, 1, 1), float(step)), objective[step], drift[step])
    pairs = [list(zip(objective[:, i].tolist(), drift[:, i].tolist(), strict=True))
             for i in range(n)]  # fmt: skip
    expected = [by_hand(rule, seen) for seen in pairs]
    assert kept.delta.flatten().tolist() == expected
    near = (drift <= 0.03).any(0)
    assert near.any() and not near.all(), "both branches"


def test_the_published_objective_of_beginnings() -> None:
    scores = torch.randn(2, 5, 7)
    forced = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, -1, -1]])
    likely = scores.log_softmax(-1)
    rows = [[likely[i, t, token] for t, token in enumerate(row) if token >= 0]
            for i, row in enumerate(forced.tolist())]  # fmt: skip
    expected = [4 * row[0] + 2 * sum(row[:4]) / len(row[:4]) for row in rows]
    made = Prefixes(terms=(Prefix(weight=4, n_tokens=1), Prefix(weight=2, n_tokens=4)))
    assert made.of_text(scores, forced).tolist() == pytest.approx([float(x) for x in expected])
    whole = Prefixes(terms=(Prefix(weight=5),)).of_text(scores, forced)
    assert torch.allclose(whole, 5 * CrossEntropy().of_text(scores, forced))


# --- What can be asked for ------------------------------------------------------------------------


def test_what_cannot_be_staged() -> None:
    with pytest.raises(ValidationError, match="needs positions of the answer"):
        spec("unconstrained", SECOND)
    for kind in ("feature_hold", "jacobian_null", "encoder_null"):
        with pytest.raises(ValidationError, match=f"{kind} keeps its promise for all of them"):
            spec(kind, FIRST, SECOND, perturb={"answer": 2})
    spec("feature_hold", {"steps": 1, "lr": 0.1})
    with pytest.raises(ValidationError, match="stages"):
        spec("unconstrained")


def test_what_is_adapted_is_said_until_it_is_as_published() -> None:
    stage = {"steps": 1, "lr": 0.1}
    assert spec("gradient_projection", stage).adapted == ""
    plain = RecoverySpec.model_validate({"constraint": {"kind": "gradient_projection"}})
    assert "smallest norm" in plain.adapted
    probes = RecoverySpec.model_validate({"constraint": {"kind": "jacobian_probes"}})
    assert "two stages" in probes.adapted and "discouraged openings" in probes.adapted
    staged = spec("jacobian_probes", stage).adapted
    assert "discouraged openings" in staged and "two stages" not in staged
    own = RecoverySpec.model_validate({"constraint": {"kind": "encoder_null"}})
    assert own.adapted == "", "nobody else's"


def test_a_search_without_stages_is_called_what_it_was_called() -> None:
    plain = RecoverySpec(constraint=CONSTRAINTS.parse({"kind": "unconstrained"}))
    assert "schedule" not in plain.model_dump(mode="json", context=IDENTITY)
    made = spec("unconstrained", {"steps": 1, "lr": 0.1})
    assert RecoverySpec.model_validate(made.model_dump(mode="json")) == made
    assert made.pace != plain.pace, "it shares no step with others"


def test_no_ball_is_left(answered: Problem) -> None:
    found = staged(answered, {"steps": 5, "lr": 5.0})
    assert torch.allclose(found.delta, into_ball(found.delta, answered.radius), atol=1e-6)
