"""Answers spelled in two ways: the larger logit counts, in whole passes and in the search alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.batch import Batch
from holdfast.direct import unreadable
from holdfast.edits import FeatureEdit
from holdfast.readouts.spelled import Spelled
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject
from tests.unit.recovered import features_at, search, set_up

SITE = Site(2)
FEATURES = features_at((SITE,))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject()


@pytest.fixture(scope="module")
def plain(subject: Subject) -> Batch:
    return tiny_batch(subject, 6)


@pytest.fixture(scope="module")
def spelled(plain: Batch) -> Batch:
    """Every answer in play has another spelling, a token that none of them is."""
    named = sorted({*plain.targets.tolist(), *plain.rivals.flatten().tolist()})
    others = [token for token in range(5, 44) if token not in named]
    return replace(plain, readout=Spelled(tuple(zip(named, others, strict=False))))


def test_an_answer_has_the_larger_of_its_logits(
    subject: Subject, plain: Batch, spelled: Batch
) -> None:
    logits, scores = subject.read(plain), subject.read(spelled)
    pairs = spelled.readout.facts["spellings"]
    names = [name for name, _ in pairs]
    for name, other in pairs:
        assert torch.equal(scores[:, name], logits[:, [name, other]].amax(1))
    rest = [token for token in range(logits.shape[1]) if token not in names]
    assert torch.equal(scores[:, rest], logits[:, rest])
    assert not torch.equal(plain.margin(logits), spelled.margin(scores))
    assert unreadable(subject, spelled) and not unreadable(subject, plain)


def test_the_search_reads_what_a_whole_pass_reads(subject: Subject, spelled: Batch) -> None:
    """It recovers under that readout, by whichever spelling, and full passes agree."""
    bank = FeatureBank.of(subject.sae(SITE), FEATURES)
    clamp = FeatureEdit(bank, "set", 2.0, where="last_prompt")
    found = search(set_up(subject, spelled, FEATURES, (clamp,)))
    assert len(found) >= 4
    batch = found.case.batch
    read = subject.read(batch, found.edits(found.perturbation(found.delta)))
    problem = found.problem
    every = batch.readout.replayed(problem.replay, found.delta)
    torch.testing.assert_close(every, read, atol=1e-4, rtol=1e-4)
    answers = torch.cat([batch.targets[:, None], batch.rivals], 1)
    some = batch.readout.replayed(problem.replay, found.delta, answers)
    torch.testing.assert_close(some, every.gather(1, answers))
    assert (batch.margin(read) > 0).all()
