"""What is climbed is what its kind says; what counts is the margin, whichever it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.constraints.unconstrained import Unconstrained
from holdfast.objectives import OBJECTIVES, ObjectiveKind
from holdfast.problem import Lanes, Problem
from holdfast.recovery import RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.subject import Subject
from holdfast.testing import tiny_problem

KINDS = ("margin", "mean_margin", "cross_entropy", "vocabulary")


def objective(kind: str) -> Any:
    return OBJECTIVES.parse({"kind": kind})


def by_hand(kind: str, logits: Tensor, target: int, rivals: set[int]) -> Tensor:
    """Of one row's logits [vocab]."""
    own, others = logits[target], torch.stack([logits[i] for i in sorted(rivals)])
    if kind == "margin":
        return own - others.max()
    if kind == "mean_margin":
        return own - others.mean()
    if kind == "cross_entropy":
        return torch.log_softmax(torch.cat([own[None], others]), 0)[0]
    return own - torch.cat([logits[:target], logits[target + 1 :]]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_answer_it_is_as_defined(
    kind: str, subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    """From logits of a full pass; a rival that only fills a row counts once."""
    rivals = batch.rivals.clone()
    rivals[::2, 1] = rivals[::2, 0]
    some = batch.aimed(batch.targets, rivals)
    problem = replace(tiny_problem(subject, some, bank), objective=objective(kind))
    lanes = Lanes.of(problem, torch.arange(len(problem)))
    climbed, margin = lanes.climbed(torch.zeros(problem.shape))
    logits = subject.read(some)
    for row in range(len(some)):
        expected = by_hand(kind, logits[row], int(some.targets[row]), set(rivals[row].tolist()))
        torch.testing.assert_close(climbed[row], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(margin, some.margin(logits), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(margin, lanes.margin(torch.zeros(problem.shape)))


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_text_it_is_as_defined(
    kind: str, subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    answers = [[7, 9, 11], [8], [5, 6], [12, 13, 14], [6, 6, 6], [9, 4], [21], [22, 23, 24]]
    text = batch.forcing(answers)
    replay = Replay.record(subject, text, bank.site, text.prompt_length[:, None] - 1)
    ones = torch.ones(len(text))
    problem = Problem(replay, text, ones, {bank.site: bank}, ones, ones, objective(kind))
    lanes = Lanes.of(problem, torch.arange(len(text)))
    climbed, margin = lanes.climbed(torch.zeros(problem.shape))
    logits = subject.read(text)
    for row, answer in enumerate(answers):
        at = logits[row, -len(answer) :]
        own = torch.stack([at[i, token] for i, token in enumerate(answer)])
        rest = [torch.cat([at[i, :t], at[i, t + 1 :]]) for i, t in enumerate(answer)]
        leads = own - torch.stack([others.max() for others in rest])
        expected = {
            "margin": leads.min(),
            "mean_margin": leads.mean(),
            "cross_entropy": torch.stack(
                [torch.log_softmax(at[i], 0)[t] for i, t in enumerate(answer)]
            ).mean(),
            "vocabulary": (own - torch.stack([others.mean() for others in rest])).mean(),
        }[kind]
        torch.testing.assert_close(climbed[row], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(margin[row], leads.min(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_ends_where_the_margin_says_and_holds_what_it_holds(
    kind: str, subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    problem = replace(
        tiny_problem(subject, batch, bank, goal=1.0, budget=1.5), objective=objective(kind)
    )
    spec = RecoverySpec(constraint=EncoderNull(), objective=objective(kind), steps=60, doublings=1)
    found = recover(problem, spec, seed=0)
    reached = ~found.smallest_norm.isnan()
    assert reached.float().mean() > 0.5
    lanes = Lanes.of(problem, torch.arange(len(problem)))
    assert (lanes.margin(found.delta)[reached] >= 1.0 - 1e-4).all()


def test_the_mean_can_rise_while_a_rival_wins() -> None:
    """METHODS C.4-6: why the margin takes the largest."""
    mean, largest = objective("mean_margin"), objective("margin")
    target, fresh, none = torch.tensor([1.0]), torch.ones(1, 3, dtype=torch.bool), torch.empty(1, 0)
    before = torch.tensor([[2.0, 0.0, 0.0]])
    after = torch.tensor([[2.0, -9.0, -9.0]])
    for kind, rises in ((mean, True), (largest, False)):
        gained = kind.of_answers(target, after, fresh, none)
        gained = gained - kind.of_answers(target, before, fresh, none)
        assert bool(gained > 0) == rises


def test_none_leads_to_a_shorter_vector_than_the_margin_does(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    """Judged alike, on the same prompts: what is judged is the best thing to climb."""
    found = {}
    for kind in KINDS:
        problem = replace(
            tiny_problem(subject, batch, bank, goal=1.0, budget=1.5), objective=objective(kind)
        )
        spec = RecoverySpec(constraint=Unconstrained(), steps=60, doublings=1)
        found[kind] = recover(problem, spec, seed=0).smallest_norm
    for kind in KINDS[1:]:
        both = ~(found[kind].isnan() | found["margin"].isnan())
        assert both.any()
        assert (found["margin"][both] <= found[kind][both] * 1.05).float().mean() > 0.7


def test_a_study_names_one() -> None:
    spec = RecoverySpec.model_validate(
        {"constraint": {"kind": "encoder_null"}, "objective": {"kind": "cross_entropy"}}
    )
    assert spec.objective.kind == "cross_entropy"
    assert RecoverySpec.model_validate(spec.model_dump(mode="json")) == spec
    assert isinstance(RecoverySpec(constraint=EncoderNull()).objective, ObjectiveKind)
