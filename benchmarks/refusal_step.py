"""A step of the refusal search is at least 40 times as fast as a step of the published loop.

Three clamped layers, a perturbation at each of them and at 48 positions, the answer of 48 tokens
forced, on a randomly initialized Llama with random SAEs. Published: one prompt at a time, nine
products with the Jacobian and five corrections, each of them full passes with full-width encodes.
holdfast: `feature_hold` on a batch, inside the replayed part. Both read the same logits and the
same held features for the same perturbation, which is checked first.

Where the factor comes from is a chain of rows, each of which changes one thing of the row above it:
the published loop with the columns of its own features only (partial encode); without its probes
and corrections too (what its projection costs); holdfast's step by a full forward pass; the same
step replayed (fewer token-layers); with the features held in place; and on all prompts at once
(batching).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks import published_refusal
from benchmarks.harness import BenchmarkError, Bound, Cell, Options, Result, timings
from benchmarks.published_refusal import PartialRefusalSearch, PublishedRefusalSearch
from benchmarks.random_llama import Size, random_batch, random_model
from holdfast.ascent import Climb, ascend
from holdfast.batching import Batching
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.problem import Lanes, Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.steppers import Steepest
from holdfast.subject import Subject
from holdfast.subspace import into_ball
from holdfast.testing import random_sae, tiny_tokenizer

SPEEDUP = 40.0
PARITY = 1e-3
FACTOR = 3.0
ANSWER = 48
LAYERS = (4, 6, 8)
FEATURES = (7, 7, 6)
STEPS = 3
"""Steps of a call that is timed; the last iterate of a search is measured and not moved."""

FULL = Size(prompts=8, repeats=5)
QUICK = Size(
    n_layers=10, d_model=64, n_heads=4, d_mlp=128, vocabulary=500, n_features=512, tokens=60,
    prompts=3, repeats=2,
)  # fmt: skip


def run(options: Options) -> Result:
    size = QUICK if options.quick else FULL
    problem, clamps = posed(size)
    searches = published(problem, clamps, PublishedRefusalSearch)
    partials = published(problem, clamps, PartialRefusalSearch)
    error = max(disagreement(problem, clamps, each) for each in (searches, partials))
    turn, partial_turn = cycle(searches), cycle(partials)
    bare_turn = cycle(published(problem, clamps, PartialRefusalSearch))
    alone = problem.rows(torch.tensor([0]))
    held = FeatureHold().acting(problem)
    feasible = FeatureHold().feasible(held)

    def ours(rows: torch.Tensor) -> Callable[[], object]:
        n = len(rows)
        climb = Climb(
            rows, torch.zeros(n, *problem.shape[1:]), torch.full((n,), torch.inf),
            problem.radius[rows], torch.full((n,), 0.1),
        )  # fmt: skip
        return lambda: ascend(held, feasible, climb, STEPS, FeatureHold().stepper)

    everyone = torch.arange(size.prompts)
    calls: dict[str, tuple[int, int, Callable[[], object]]] = {
        "published loop": (1, 1, lambda: next(turn).step()),
        "the same, partial encode": (1, 1, lambda: next(partial_turn).step()),
        "the same, no probes, no corrections": (1, 1, lambda: _bare(next(bare_turn))),
        "full forward pass, one prompt": (1, 1, _Step(alone, partial(full_margin, alone, clamps))),
        "replay, one prompt": (1, 1, _Step(alone, Lanes.of(alone, torch.tensor([0])).margin)),
        "feature_hold, one prompt": (1, STEPS + 1, ours(everyone[:1])),
        "feature_hold, batched": (size.prompts, STEPS + 1, ours(everyone)),
    }
    found = timings({name: call for name, (_, _, call) in calls.items()}, size.repeats)
    speed = {name: n * k / found[name].median for name, (n, k, _) in calls.items()}
    best = speed["feature_hold, batched"]
    rows: list[tuple[Cell, ...]] = []
    before: float | None = None
    for name, (n, k, _) in calls.items():
        over = None if before is None else speed[name] / before
        rows.append((name, n, 1e3 * found[name].median / k, speed[name], over, best / speed[name]))
        before = speed[name]
    bounds = [Bound("largest difference of logits and features", error, PARITY, False)]
    if not options.quick:
        faster = best / speed["published loop"]
        bounds.append(Bound("feature_hold over the published loop", faster, SPEEDUP, True, "times"))
    return Result(
        columns=("one step", "prompts", "median ms", "prompts a second", "times the row above it",
                 "slower than the last by"),
        rows=tuple(rows),
        bounds=tuple(bounds),
        settings={
            "layers": size.n_layers,
            "d_model": size.d_model,
            "vocabulary": size.vocabulary,
            "SAE_features": size.n_features,
            "clamped_after_blocks": LAYERS,
            "clamped_features": FEATURES,
            "prompt_tokens": size.tokens,
            "answer_tokens": ANSWER,
            "repeats": size.repeats,
            "token_layers_in_full": size.n_layers * (size.tokens + ANSWER - 1),
            "token_layers_replayed": (size.n_layers - LAYERS[0] - 1) * ANSWER,
        },
    )  # fmt: skip


def posed(size: Size) -> tuple[Problem, tuple[FeatureEdit, ...]]:
    """Prompts with answers to force, under a clamp on the features that fire most."""
    model = random_model(size)
    sites = [Site(layer + 1) for layer in LAYERS]
    saes = {
        site: random_sae(site, size.d_model, size.n_features, seed=site.depth) for site in sites
    }
    subject = Subject.of("random", model, tiny_tokenizer(), saes, batching=Batching(size.prompts))
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(size.vocabulary, (size.prompts, ANSWER), generator=generator)
    batch = random_batch(size).forcing(answers.tolist())
    first = batch.prompt_length[:, None] - 1
    positions = first + torch.arange(ANSWER)
    plain = Replay.record(subject, batch, sites, positions)
    entries = []
    for site, k in zip(sites, FEATURES, strict=True):
        fired = (saes[site].encode(plain.reference[site]) > 0).sum((0, 1))
        entries.append(SiteFeatures(site=str(site), ids=tuple(fired.topk(k).indices.tolist())))
    features = FeatureSet(entries=tuple(entries), source="busiest")
    banks = {site: FeatureBank.of(subject.sae(site), features) for site in sites}
    edits = tuple(
        FeatureEdit(bank, "multiply", FACTOR, include_bos=True) for bank in banks.values()
    )
    replay = Replay.record(subject, batch, sites, positions, before=edits)
    reference = replay.residual().norm(dim=(1, 2))
    goal = torch.full((size.prompts,), torch.inf)
    return Problem(replay, batch, goal, banks, reference, 0.25 * reference), edits


def published(
    problem: Problem, edits: tuple[FeatureEdit, ...], kind: type[PublishedRefusalSearch]
) -> list[PublishedRefusalSearch]:
    """The published search on each prompt."""
    subject, batch = problem.replay.subject, problem.batch
    blocks = subject.family.blocks_of(subject.model)
    clamps = {}
    for edit in edits:
        (site,) = edit.sites
        ids = torch.as_tensor(edit.bank.ids[0])
        clamps[blocks[site.layer]] = (subject.sae(site).full(), ids)
    assert batch.forced is not None
    return [
        kind(subject.model, clamps, FACTOR, tokens, answer, radius)
        for tokens, answer, radius in zip(
            batch.tokens, batch.forced, problem.radius.tolist(), strict=True
        )
    ]


@torch.no_grad()
def disagreement(
    problem: Problem, edits: tuple[FeatureEdit, ...], searches: list[PublishedRefusalSearch]
) -> float:
    """The largest difference of logits, and of held features relative to their size, for one random
    perturbation. Raises BenchmarkError if it does nothing that could be compared."""
    replay, batch = problem.replay, problem.batch
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn(problem.shape, generator=generator)
    delta = delta / delta.norm(dim=(1, 2), keepdim=True) * problem.radius[:, None, None]
    ours = replay.logits(delta)
    if (ours - replay.logits(torch.zeros_like(delta))).abs().max() < 1e-2:
        raise BenchmarkError("the perturbation hardly moves a logit")
    states = replay.states(delta, replay.sites)
    full = replay.subject.read(batch, (*edits, _pushed(problem, delta)))
    margins = Lanes.of(problem, torch.arange(len(problem))).margin(delta)
    worst = float((margins - full_margin(problem, edits, delta)).abs().max())
    worst = max(worst, float((ours - full).abs().max()))
    for row, search in enumerate(searches):
        logits, codes = search.run(
            torch.stack([part[row] for part in replay.parts(delta).values()])
        )
        worst = max(worst, float((logits - ours[row]).abs().max()))
        for edit, z in zip(edits, codes, strict=True):
            (site,) = edit.sites
            mine = edit.bank.activations(states[site], replay.frame)[row]
            worst = max(worst, float((z - mine).abs().max() / z.abs().max().clamp_min(1e-6)))
    return worst


def full_margin(problem: Problem, edits: tuple[FeatureEdit, ...], delta: Tensor) -> Tensor:
    """[n] the margin of a full forward pass with clamps and perturbation on."""
    subject, batch = problem.replay.subject, problem.batch
    return batch.margin(subject.forward_with_gradients(batch, (*edits, _pushed(problem, delta))))


def _pushed(problem: Problem, delta: Tensor) -> Perturbation:
    batch = problem.batch
    positions = batch.prompt_length[:, None] - 1 + torch.arange(ANSWER)
    return Perturbation(batch.ids, positions, problem.replay.parts(delta))


class _Step:
    """A step that holds nothing, for a way to compute the margin."""

    def __init__(self, problem: Problem, margin: Callable[[Tensor], Tensor]):
        self.radius, self.margin, self.stepper = problem.radius, margin, Steepest()
        self.delta = torch.zeros(problem.shape)
        self.state = self.stepper.start(self.delta)

    def __call__(self) -> None:
        leaf = self.delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.margin(leaf).sum(), leaf)
        move, self.state = self.stepper.move(self.state, gradient)
        moved = self.delta.detach() + (0.1 * self.radius)[:, None, None] * move
        self.delta = into_ball(moved, self.radius)


def _bare(search: PublishedRefusalSearch) -> None:
    """A step without what holds the features: no probes, no corrections."""
    kept = published_refusal.N_PROBES, published_refusal.CORRECTIONS
    published_refusal.N_PROBES, published_refusal.CORRECTIONS = 0, 0
    try:
        search.step()
    finally:
        published_refusal.N_PROBES, published_refusal.CORRECTIONS = kept
