"""Likeness by the model's own middle layer: by its definition, and about 0 of unrelated texts."""

from __future__ import annotations

import pytest
import torch

from holdfast.embedding import embedded, likeness
from holdfast.subject import Subject

REPLIES = [[7, 9, 11, 5], [8], [], [12, 13, 14], [6, 6, 6, 6, 6, 6], [9, 4]]


def test_it_is_the_mean_of_the_middle_layer_of_the_reply_alone(subject: Subject) -> None:
    got = embedded(subject, REPLIES)
    assert subject.n_blocks == 3, "the middle is after the first block"
    for row, reply in enumerate(REPLIES):
        if not reply:
            assert got[row].isnan().all()
            continue
        ids = torch.tensor([[subject.tokenizer.bos_token_id, *reply]])
        states = subject.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(
            got[row], states[0, 1:].double().mean(0), atol=1e-5, rtol=1e-4, check_dtype=False
        )


def test_likeness_of_a_copy_is_one_and_of_nothing_is_unscored(subject: Subject) -> None:
    got = likeness(subject, {"copy": REPLIES}, range(len(REPLIES)), REPLIES)["copy"]
    there = torch.tensor([bool(reply) for reply in REPLIES])
    torch.testing.assert_close(got[there], torch.ones(5, dtype=torch.float64))
    assert got[~there].isnan().all()


def test_unrelated_answers_are_about_0_alike(subject: Subject) -> None:
    """Taking the mean off is what does it: without it any two texts are alike."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(4, 44, (40, 6), generator=generator).tolist()
    others = [*answers[1:], answers[0]]
    near = [[*answer[:5], answer[0]] for answer in answers]  # one word of six changed
    found = likeness(subject, {"others": others, "near": near}, range(40), answers)
    got = found["others"]
    assert abs(float(got.mean())) < 0.15
    raw = torch.nn.functional.cosine_similarity(
        embedded(subject, others), embedded(subject, answers)
    )
    assert float(raw.mean()) > float(got.mean())
    assert float(found["near"].mean()) > 0.5
    some = likeness(subject, {"near": near[3:5]}, [3, 4], answers)["near"]
    torch.testing.assert_close(some, found["near"][3:5])


def test_it_knows_no_batches(subject: Subject) -> None:
    whole = embedded(subject, REPLIES)
    for row, reply in enumerate(REPLIES):
        alone = embedded(subject, [reply])
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("replies", [[], [[]]])
def test_of_nothing_there_is_nothing(subject: Subject, replies: list[list[int]]) -> None:
    assert embedded(subject, replies).shape == (len(replies), subject.d_model)
