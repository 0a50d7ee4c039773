"""What benchmarks set beside each other computes the same, so that only its time can differ."""

from __future__ import annotations

import pytest
import torch
from benchmarks.harness import BenchmarkError
from benchmarks.published_refusal import PartialRefusalSearch, PublishedRefusalSearch
from benchmarks.random_llama import Size
from benchmarks.refusal_step import PARITY, disagreement, posed, published
from torch import Tensor

from holdfast.edits import FeatureEdit
from holdfast.problem import Problem
from holdfast.saes.sae import SAE

SMALL = Size(
    n_layers=10, d_model=32, n_heads=4, d_mlp=64, vocabulary=120, n_features=128, tokens=12,
    prompts=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def scene() -> tuple[Problem, tuple[FeatureEdit, ...]]:
    return posed(SMALL)


@pytest.mark.parametrize("kind", [PublishedRefusalSearch, PartialRefusalSearch])
def test_ways_of_a_refusal_step_read_the_same_logits_features_and_margins(
    scene: tuple[Problem, tuple[FeatureEdit, ...]], kind: type[PublishedRefusalSearch]
) -> None:
    assert disagreement(*scene, published(*scene, kind)) < PARITY


def test_a_partial_encode_that_clamps_otherwise_is_told(
    scene: tuple[Problem, tuple[FeatureEdit, ...]],
) -> None:
    class Unclamped(PartialRefusalSearch):
        def clamped(self, sae: SAE, ids: Tensor, x: Tensor) -> Tensor:
            return x

    assert disagreement(*scene, published(*scene, Unclamped)) > 10 * PARITY


def test_a_partial_search_takes_the_published_steps(
    scene: tuple[Problem, tuple[FeatureEdit, ...]],
) -> None:
    """Same probes, same corrections: the columns alone are fewer."""
    (whole, *_), (part, *_) = (
        published(*scene, kind) for kind in (PublishedRefusalSearch, PartialRefusalSearch)
    )
    for search in (whole, part):
        torch.manual_seed(3)  # the probes are drawn
        search.step()
    assert whole.delta.norm() > 0
    torch.testing.assert_close(part.delta, whole.delta, atol=1e-3, rtol=1e-3)


def test_a_perturbation_that_does_nothing_compares_nothing(
    scene: tuple[Problem, tuple[FeatureEdit, ...]],
) -> None:
    problem, edits = scene
    still = Problem(
        problem.replay, problem.batch, problem.goal, problem.held, problem.reference_norm,
        torch.zeros_like(problem.radius),
    )  # fmt: skip
    with pytest.raises(BenchmarkError, match="hardly moves"):
        disagreement(still, edits, [])
