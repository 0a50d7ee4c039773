"""What benchmarks set beside each other computes the same, so that only its time can differ."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch
from benchmarks import docs, harness, random_llama, replay
from benchmarks.harness import BenchmarkError
from benchmarks.published_refusal import PartialRefusalSearch, PublishedRefusalSearch
from benchmarks.random_llama import Size
from benchmarks.refusal_step import PARITY, disagreement, posed, published
from torch import Tensor

from holdfast.edits import FeatureEdit
from holdfast.problem import Problem
from holdfast.saes.sae import SAE
from tests.unit.test_schedule import published_loop

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


def test_the_published_loop_takes_the_published_steps() -> None:
    """METHODS C.2, written out once more in `published_loop`; with its drift terms, whose weights
    are 0, and without them."""
    problem, edit = random_llama.posed(SMALL)
    expected = published_loop(problem, projected=True, steps=12, lr=0.1)
    assert torch.allclose(expected.norm(dim=(1, 2)), problem.radius), "the budget binds"
    for with_drift in (True, False):
        searches = replay.published(problem, edit, with_drift)
        for search in searches:
            for _ in range(12):
                search.step()
        found = torch.stack([search.delta.detach() for search in searches])
        assert (found - expected).abs().max() < 2e-3 * float(expected.abs().max())
    free = published_loop(problem, projected=False, steps=12, lr=0.1)
    assert (free - expected).abs().max() > 0.05 * expected.abs().max(), "the projection is seen"


def published_refusal_step(
    search: PublishedRefusalSearch, delta: Tensor, m: Tensor, v: Tensor, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """METHODS D.2 to D.6, each term from a forward pass of its own: δ after step t, and Adam's
    means m of the gradient and v of its square."""

    def within(delta: Tensor) -> Tensor:
        return delta * min(1.0, search.budget / float(delta.norm()))

    def gradient(value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = delta.clone().requires_grad_(True)
        logits, codes = search.run(leaf)
        moved = [z - r for z, r in zip(codes, search.reference, strict=True)]
        return torch.autograd.grad(value(logits, torch.cat([x.flatten() for x in moved])), leaf)[0]

    def drift(_: Tensor, moved: Tensor) -> Tensor:
        parts = moved.split([r.numel() for r in search.reference])
        each = [
            (own**2).mean() / ((r**2).mean() + 1e-6)
            for own, r in zip(parts, search.reference, strict=True)
        ]
        return sum(each, torch.zeros(())) / len(each)

    with torch.no_grad():
        codes = search.run(delta)[1]
    moved = torch.cat([(z - r).flatten() for z, r in zip(codes, search.reference, strict=True)])
    probes = list(torch.nn.functional.normalize(torch.randn(8, len(moved)), dim=1))
    if moved.norm() > 1e-8:
        probes.insert(0, moved)
    rows = torch.stack([gradient(lambda _, x, r=r: x @ r).flatten() for r in probes])
    Q = torch.linalg.qr(rows.double().T).Q
    up = gradient(
        lambda logits, _: -5 * torch.nn.functional.cross_entropy(logits, search.answer)
    ).flatten()
    up = (up.double() - Q @ (Q.T @ up.double())).float().view_as(delta)
    g = 200 * gradient(drift) - up
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    delta = within(delta - 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    for _ in range(5):
        delta = within(delta - 0.05 * gradient(drift))
    return delta, m, v


def test_the_published_refusal_loop_takes_the_published_steps(
    scene: tuple[Problem, tuple[FeatureEdit, ...]],
) -> None:
    search = published(*scene, PublishedRefusalSearch)[0]
    expected = torch.zeros_like(search.delta)
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for t in (1, 2, 3):
        torch.manual_seed(t)
        expected, m, v = published_refusal_step(search, expected, m, v, t)
        torch.manual_seed(t)  # the probes are drawn
        search.step()
        off = (search.delta.detach() - expected).norm() / expected.norm()
        assert off < 2e-4, f"step {t}"  # one correction of five left out is 4e-4


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


def test_the_page_says_what_is_stored_and_a_result_says_on_what_it_was_measured() -> None:
    assert docs.results() in docs.PAGE.read_text(), "run `python -m benchmarks --docs`"
    told = harness.environment()
    assert told["processor"] and told["cpus"] and told["memory_GB"] > 0
    assert platform.node() not in map(str, told.values())
