"""A guardrail's thresholds: percentiles of what prompts to be left alone do, learnt without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from holdfast.batch import Batch
from holdfast.edits import Capture, FeatureEdit
from holdfast.errors import StudyError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.gates import PromptGate
from holdfast.interventions.clamp import Clamp, Learnt, PromptCondition
from holdfast.interventions.several import Several
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch

SITE = Site(2)
IDS = (1, 5, 9)
FEATURES = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=IDS),), source="test")
P = Learnt(percentile=70)


@pytest.fixture(scope="module")
def retain(subject: Subject) -> tuple[Batch, ...]:
    return tiny_batch(subject, 7, seed=5), tiny_batch(subject, 4, seed=6)


def largest(subject: Subject, retain: tuple[Batch, ...], ids: tuple[int, ...]) -> list[np.ndarray]:
    """A prompt's tokens but BOS: the largest value of these features."""
    found = []
    for batch in retain:
        seen = Capture(SITE)
        subject.outputs(batch, (seen,))
        z = subject.sae(SITE).full().encode(seen.seen[0][1])[..., list(ids)].amax(-1)
        found += [z[row, batch.positions[row] > 0].numpy() for row in range(len(batch))]
    return found


def clamp(**condition: object) -> Clamp:
    return Clamp(value=-2.0, condition=PromptCondition(**condition))  # type: ignore[arg-type]


def test_thresholds_are_percentiles_of_the_neighbors(
    subject: Subject, retain: tuple[Batch, ...]
) -> None:
    values = largest(subject, retain, IDS)
    above = np.percentile(np.concatenate(values), 70)
    share = np.percentile([(own > above).mean() for own in values], 70)
    learnt = clamp(share=P, above=P).fitted(subject, FEATURES, retain).condition  # type: ignore[attr-defined]
    assert learnt.above == pytest.approx(above) and learnt.share == pytest.approx(share)
    other = clamp(share=0.25, above=P, features=(7,)).fitted(subject, FEATURES, retain)
    expected = np.percentile(np.concatenate(largest(subject, retain, (7,))), 70)
    assert other.condition.above == pytest.approx(expected)  # type: ignore[attr-defined]
    assert other.condition.share == 0.25  # type: ignore[attr-defined]


def test_on_what_it_learnt_from_it_acts_as_often_as_it_says(
    subject: Subject, retain: tuple[Batch, ...]
) -> None:
    """At most 30 of 100 of the prompts have more than their 70th percentile."""
    fitted = clamp(share=P, above=P).fitted(subject, FEATURES, retain)
    (edit,) = fitted.edits(subject, FEATURES)
    assert isinstance(edit, FeatureEdit) and isinstance(edit.gate, PromptGate)
    acts = []
    for batch in retain:
        before, after = Capture(SITE), Capture(SITE)
        subject.outputs(batch, (before, edit, after))
        changed = (before.seen[0][1] != after.seen[0][1]).any(-1).any(-1)
        acts += changed.tolist()
    assert 0 < sum(acts) <= 0.3 * len(acts) + 1


def test_what_learns_nothing_is_itself_and_what_was_not_fitted_says_so(
    subject: Subject, retain: tuple[Batch, ...]
) -> None:
    plain = Clamp(value=-2.0)
    assert plain.fitted(subject, FEATURES, retain) is plain
    numbers = clamp(share=0.1, above=0.2)
    assert numbers.fitted(subject, FEATURES, retain) is numbers
    with pytest.raises(StudyError, match="give what `fitted` returns"):
        clamp(share=P).edits(subject, FEATURES)
    with pytest.raises(StudyError, match="this behavior has none"):
        clamp(share=P).fitted(subject, FEATURES, ())
    assert "percentile 70 of the neighbors" in clamp(share=P).formulas[0]


def test_members_of_several_learn_each_for_its_own_features(
    subject: Subject, retain: tuple[Batch, ...]
) -> None:
    both = Several(of=(Clamp(value=0.0), clamp(share=P, above=P)))
    own = both.clamped(FEATURES)
    fitted = both.fitted(subject, own, retain)
    alone = clamp(share=P, above=P).fitted(subject, FEATURES, retain)
    assert fitted.of[1] == alone and fitted.of[0] == both.of[0]  # type: ignore[attr-defined]
    batch = retain[0]
    read = subject.read(batch, fitted.edits(subject, own))
    assert torch.isfinite(read).all()
