"""Predicted effects beside performed ones: exact where the readout is linear, else complete."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.batching import Batching
from holdfast.paths import follow
from holdfast.predicted import agreement, gradients, predictions
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.variants import PathSpec, Recovered, Variant, perform
from tests.unit.test_parts import SITE, linear_subject, pairs, recovered


def effects_of(found: Recovered, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    nothing, *made = perform(
        found,
        [
            Variant.whole("nothing", torch.zeros_like(found.delta)),
            *(Variant.whole(name, vector) for name, vector in vectors.items()),
        ],
    )
    return torch.stack([each.margin - nothing.margin for each in made])


def test_of_a_linear_readout_every_prediction_comes_true() -> None:
    subject = linear_subject()
    found = recovered(subject, pairs(subject), Site(3))
    vectors = {
        "all": found.delta,
        "half": 0.5 * found.delta,
        "noise": torch.randn_like(found.delta),
    }
    performed = effects_of(found, vectors)
    for gradient in gradients(found).values():
        made = torch.stack(list(predictions(gradient, vectors).values()))
        torch.testing.assert_close(made, performed, atol=5e-4, rtol=1e-3)
    record = follow(found, PathSpec(scales=(1.0,), draws=1), seed=0).record["predicted"]
    for kind in ("linear", "integrated"):
        assert record[kind]["correlation"]["estimate"] == pytest.approx(1, abs=1e-4)
        assert record[kind]["error"]["estimate"] < 1e-3
        assert record[kind]["regained"]["all"]["estimate"] == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject()


def test_along_the_way_the_whole_effect_is_predicted(subject: Subject) -> None:
    """The integral's theorem, up to its steps; the first gradient knows nothing of the way."""
    found = recovered(subject, pairs(subject), SITE)
    whole = effects_of(found, {"all": found.delta})[0]
    off = {
        kind: float(
            ((gradient * found.delta).sum((1, 2)) - whole).abs().mean() / whole.abs().mean()
        )
        for kind, gradient in gradients(found).items()
    }
    assert off["integrated"] < 0.02 < off["linear"]


def test_for_small_vectors_the_gradient_is_enough(subject: Subject) -> None:
    found = recovered(subject, pairs(subject), SITE)
    vectors = {"tiny": 1e-2 * torch.randn_like(found.delta)}
    performed = effects_of(found, vectors)[0]
    made = predictions(gradients(found)["linear"], vectors)["tiny"]
    torch.testing.assert_close(made, performed, atol=2e-4, rtol=0.05)


def test_chunks_change_nothing(subject: Subject) -> None:
    found = recovered(subject, tiny_batch(subject, 6), SITE)
    small = replace(subject, batching=Batching(2))
    problem = replace(found.problem, replay=replace(found.problem.replay, subject=small))
    again = replace(found, problem=problem, case=replace(found.case, subject=small))
    for kind, gradient in gradients(found).items():
        torch.testing.assert_close(gradients(again)[kind], gradient, atol=1e-6, rtol=1e-4)


def test_agreement_by_hand() -> None:
    performed = torch.tensor([[1.0, 2.0], [2.0, 2.0], [4.0, 2.0]]).double()
    correlation, error = agreement(2 * performed + 1, performed, performed[-1])
    assert correlation[0] == pytest.approx(1) and correlation[1].isnan(), "all alike: no r"
    torch.testing.assert_close(error, torch.tensor([10 / 3 / 4, 3 / 2]).double())
    assert agreement(-performed, performed, performed[-1])[0][0] == pytest.approx(-1)
