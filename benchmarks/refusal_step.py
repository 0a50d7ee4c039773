"""A step of the refusal search is at least 40 times as fast as a step of the published loop.

Three clamped layers, a perturbation at each of them and at 48 positions, the answer of 48 tokens
forced, on a randomly initialized Llama with random SAEs. Published: one prompt at a time, nine
products with the Jacobian and five corrections, each of them full passes with full-width encodes.
holdfast: `feature_hold` on a batch, inside the replayed part. Both read the same logits and the
same held features for the same perturbation, which is checked first.

Where the factor comes from is measured alone: the same search on one prompt at a time (what is left
is batching), and the published loop without probes and corrections (what its projection costs).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from benchmarks import published_refusal
from benchmarks.harness import BenchmarkError, Bound, Cell, Options, Result, timings
from benchmarks.published_refusal import PublishedRefusalSearch
from benchmarks.random_llama import Size, random_batch, random_model
from holdfast.ascent import Climb, ascend
from holdfast.batching import Batching
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.problem import Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
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
    searches = published(problem, clamps)
    error = disagreement(problem, clamps, searches)
    turn, bare_turn = cycle(searches), cycle(searches)
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
        "published loop, no probes, no corrections": (1, 1, lambda: _bare(next(bare_turn))),
        "feature_hold, one prompt": (1, STEPS + 1, ours(everyone[:1])),
        "feature_hold, batched": (size.prompts, STEPS + 1, ours(everyone)),
    }
    found = timings({name: call for name, (_, _, call) in calls.items()}, size.repeats)
    speed = {name: n * k / found[name].median for name, (n, k, _) in calls.items()}
    best = speed["feature_hold, batched"]
    rows: list[tuple[Cell, ...]] = [
        (name, n, 1e3 * found[name].median / k, speed[name], best / speed[name])
        for name, (n, k, _) in calls.items()
    ]
    bounds = [Bound("largest difference of logits and features", error, PARITY, False)]
    if not options.quick:
        faster = best / speed["published loop"]
        bounds.append(Bound("feature_hold over the published loop", faster, SPEEDUP, True, "times"))
    return Result(
        columns=("one step", "prompts", "median ms", "prompts a second", "slower than the last by"),
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
        },
    )


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


def published(problem: Problem, edits: tuple[FeatureEdit, ...]) -> list[PublishedRefusalSearch]:
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
        PublishedRefusalSearch(subject.model, clamps, FACTOR, tokens, answer, radius)
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
    parts = replay.parts(delta)
    ours = replay.logits(delta)
    if (ours - replay.logits(torch.zeros_like(delta))).abs().max() < 1e-2:
        raise BenchmarkError("the perturbation hardly moves a logit")
    states = replay.states(delta, replay.sites)
    positions = batch.prompt_length[:, None] - 1 + torch.arange(ANSWER)
    full = replay.subject.read(batch, (*edits, Perturbation(batch.ids, positions, parts)))
    worst = float((ours - full).abs().max())
    for row, search in enumerate(searches):
        logits, codes = search.run(torch.stack([part[row] for part in parts.values()]))
        worst = max(worst, float((logits - ours[row]).abs().max()))
        for edit, z in zip(edits, codes, strict=True):
            (site,) = edit.sites
            mine = edit.bank.activations(states[site], replay.frame)[row]
            worst = max(worst, float((z - mine).abs().max() / z.abs().max().clamp_min(1e-6)))
    return worst


def _bare(search: PublishedRefusalSearch) -> None:
    """A step without what holds the features: no probes, no corrections."""
    kept = published_refusal.N_PROBES, published_refusal.CORRECTIONS
    published_refusal.N_PROBES, published_refusal.CORRECTIONS = 0, 0
    try:
        search.step()
    finally:
        published_refusal.N_PROBES, published_refusal.CORRECTIONS = kept
