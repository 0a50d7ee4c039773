"""Generation that begins where a perturbation does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.begun import Beginnings, first_perturbed
from holdfast.edits import Capture, Edit, FeatureEdit, Perturbation
from holdfast.errors import EditNeverFiredError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.gates import PromptGate
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject

SITE = Site(1)
N_NEW = 5


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject()


@pytest.fixture(scope="module")
def batch(subject: Subject) -> Batch:
    return tiny_batch(subject, 5, seed=3)


@pytest.fixture(scope="module")
def clamp(subject: Subject) -> FeatureEdit:
    features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(1, 4, 7)),), source="by hand")
    return FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "set", 4.0)


def added(batch: Batch, back: int = 1, seed: int = 0) -> Perturbation:
    """A vector so many tokens before the end of each prompt."""
    vectors = 3 * torch.randn(len(batch), 1, 32, generator=torch.Generator().manual_seed(seed))
    return Perturbation(batch.ids, batch.prompt_length[:, None] - back, {SITE: vectors})


@contextmanager
def columns(subject: Subject) -> Iterator[list[int]]:
    """How many columns each pass of the model runs."""
    seen: list[int] = []

    def note(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(kwargs["input_ids"].shape[1])

    handle = subject.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def fresh(subject: Subject) -> Subject:
    return replace(subject, begun=Beginnings())


def apart(subject: Subject) -> Subject:
    """One row at a time, so that nothing is kept: each text begins with its first token."""
    return replace(fresh(subject), batching=Batching(1))


@pytest.mark.parametrize("clamp_first", [True, False])
@pytest.mark.parametrize("back", [1, 3])
def test_every_vectors_text_is_what_it_is_from_the_first_token(
    subject: Subject, batch: Batch, clamp: FeatureEdit, clamp_first: bool, back: int
) -> None:
    own = fresh(subject)
    for seed in range(4):
        vector = added(batch, back, seed)
        edits = (clamp, vector) if clamp_first else (vector, clamp)
        got, expected = (s.generate(batch, edits, N_NEW) for s in (own, apart(subject)))
        assert torch.equal(got, expected)


def test_tokens_before_the_vector_are_run_once(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    own, width = fresh(subject), batch.tokens.shape[1]
    with columns(own) as seen:
        for seed in range(3):
            own.generate(batch, (clamp, added(batch, 2, seed)), N_NEW)
    # Every row's prompt ends in the last column, so its last token but one is the one before.
    assert [n for n in seen if n > 1] == [width - 2, 2, 2, 2]


@pytest.mark.parametrize("what", ["clamp", "prompts", "start", "order"])
def test_another_beginning_is_made_anew(
    subject: Subject, batch: Batch, clamp: FeatureEdit, what: str
) -> None:
    own = fresh(subject)
    second = replace(clamp, value=-2.0)
    own.generate(batch, (clamp, second, added(batch)), N_NEW)
    other, edits = batch, [clamp, second]
    if what == "clamp":
        edits = [clamp, replace(clamp, value=-3.0)]
    elif what == "prompts":
        other = tiny_batch(subject, 5, seed=4)
    elif what == "order":
        edits.reverse()
    vector = added(other, 2 if what == "start" else 1)
    got, expected = (s.generate(other, (*edits, vector), N_NEW) for s in (own, apart(subject)))
    assert torch.equal(got, expected)


def test_an_edit_that_acts_before_the_vector_alone_has_fired(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    own, early = fresh(subject), replace(clamp, where=(1, 2))
    for seed in range(2):  # made, and kept
        own.generate(batch, (early, added(batch, 1, seed)), N_NEW)
    never = replace(clamp, where="generated")
    for seed in range(2):
        with pytest.raises(EditNeverFiredError):
            own.generate(batch, (never, added(batch, 1, seed)), 1)


def test_what_watches_or_decides_on_a_prompt_gets_all_of_it(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    vector = added(batch)
    assert first_perturbed(batch, (clamp, vector)) == batch.tokens.shape[1] - 1
    everywhere = Perturbation(
        batch.ids,
        torch.stack([torch.zeros_like(batch.prompt_length), batch.prompt_length - 1], 1),
        {SITE: torch.ones(len(batch), 2, 32)},
    )
    gated = replace(clamp, gate=PromptGate(clamp.bank, 0.0, share=0.5))
    nothing: tuple[tuple[Edit, ...], ...] = (
        (clamp,),
        (clamp, Capture(SITE), vector),
        (gated, vector),
        (clamp, everywhere),
    )
    longest = int(batch.prompt_length.max())
    for edits in nothing:
        start = first_perturbed(batch, edits)
        assert start == (0 if edits[-1] is not everywhere else batch.tokens.shape[1] - longest)
