"""Replay computes only what a perturbation can change: at least 20 times as many steps a second.

One step of the search (forward, backward, projection, update) for a perturbation of the last token
of 100, on a randomly initialized Llama with a random SAE. Side by side: the published loop on one
prompt at a time, with and without its drift terms (their weights are 0 by default); a batched full
forward pass with the rank-|S| clamp; and replay on the same batch. All four give the same margins
for the same perturbation, which is checked first. The bound is on replay against the batched pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import BenchmarkError, Bound, Cell, Options, Result, timings
from benchmarks.published import LongClamp, PublishedSearch
from holdfast.batch import Batch, margin_of
from holdfast.batching import Batching
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.problem import Lanes, Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.steppers import Steepest
from holdfast.subject import Subject
from holdfast.subspace import Iterate, NullSpace, into_ball
from holdfast.testing import random_sae, tiny_tokenizer

SPEEDUP = 20.0
PARITY = 1e-4
VALUE = -2.0
FULL, REPLAY = "full forward pass, batched", "replay, batched"
RECORDING = "recording a replay, once a search"
BUDGET = 0.25
"""Norm budget, as a share of the residual."""


@dataclass(frozen=True)
class Size:
    """The subject, the SAE and the prompts."""

    n_layers: int = 12
    d_model: int = 512
    n_heads: int = 8
    d_mlp: int = 1536
    vocabulary: int = 32_000
    n_features: int = 16_384
    clamped: int = 16
    layer: int = 4
    tokens: int = 100
    prompts: int = 24
    repeats: int = 7


QUICK = Size(
    n_layers=6, d_model=128, n_heads=4, d_mlp=256, vocabulary=2000, n_features=2048, tokens=50,
    prompts=8, repeats=3,
)  # fmt: skip


def run(options: Options) -> Result:
    size = QUICK if options.quick else Size()
    problem, edit = posed(size)
    searches = published(problem, edit, with_drift=True)
    error = disagreement(problem, edit, searches)
    n = size.prompts
    replayed = Lanes.of(problem, torch.arange(n)).margin
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "published loop": (1, one_of(searches)),
        "published loop, no drift terms": (1, one_of(published(problem, edit, with_drift=False))),
        FULL: (n, Step(problem, partial(full_margin, problem, edit))),
        REPLAY: (n, Step(problem, replayed)),
    }
    calls = {name: step for name, (_, step) in steps.items()}
    found = timings(calls | {RECORDING: partial(record, problem, edit)}, size.repeats)
    speed = {name: count / found[name].median for name, (count, _) in steps.items()}
    rows: list[tuple[Cell, ...]] = [
        (name, count, 1e3 * found[name].median, speed[name], speed[REPLAY] / speed[name])
        for name, (count, _) in steps.items()
    ]
    rows.append((RECORDING, n, 1e3 * found[RECORDING].median, None, None))
    bounds = [Bound("largest difference of margins", error, PARITY, False, "logits")]
    if not options.quick:  # small sizes have less to leave out
        faster = speed[REPLAY] / speed[FULL]
        bounds.append(Bound("replay over the batched full pass", faster, SPEEDUP, True, "times"))
    return Result(
        columns=("one step", "prompts", "median ms", "prompts a second", "replay is faster by"),
        rows=tuple(rows),
        bounds=tuple(bounds),
        settings={
            "layers": size.n_layers,
            "d_model": size.d_model,
            "vocabulary": size.vocabulary,
            "SAE_features": size.n_features,
            "clamped_features": size.clamped,
            "after_block": size.layer,
            "tokens": size.tokens,
            "repeats": size.repeats,
            "token_layers_in_full": size.n_layers * size.tokens,
            "token_layers_replayed": size.n_layers - size.layer - 1,
        },
    )


def posed(size: Size) -> tuple[Problem, FeatureEdit]:
    """A recovery problem under a clamp on features that really fire."""
    subject = random_subject(size)
    batch = random_batch(size)
    (site,) = subject.saes
    ids = busiest(subject, batch, site, size.clamped)
    features = FeatureSet(entries=(SiteFeatures(site=str(site), ids=ids),), source="busiest")
    bank = FeatureBank.of(subject.sae(site), features)
    edit = FeatureEdit(bank, "set_where_active", VALUE, include_bos=True)
    positions = batch.prompt_length[:, None] - 1
    replay = Replay.record(subject, batch, site, positions, before=(edit,))
    reference = replay.residual().norm(dim=(1, 2))
    goal = torch.full((size.prompts,), torch.inf)
    held = {site: bank}
    return Problem(replay, batch, goal, held, reference, BUDGET * reference), edit


def random_subject(size: Size) -> Subject:
    site = Site(size.layer + 1)
    sae = random_sae(site, size.d_model, size.n_features)
    tokenizer: Any = tiny_tokenizer()
    return Subject.of(
        "random", random_model(size), tokenizer, {site: sae}, batching=Batching(size.prompts)
    )


def random_model(size: Size) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.d_model, intermediate_size=size.d_mlp,
        num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads,
        max_position_embeddings=2 * size.tokens, initializer_range=0.06, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def random_batch(size: Size) -> Batch:
    """Prompts of equal length, each aimed at one token against two others."""
    generator = torch.Generator().manual_seed(0)
    n = size.prompts
    names = tuple(f"random:{i}" for i in range(n))
    answers = torch.stack([torch.randperm(size.vocabulary, generator=generator)[:4] for _ in names])
    return Batch(
        ids=names,
        clusters=names,
        groups=("",) * n,
        texts=names,
        tokens=torch.randint(size.vocabulary, (n, size.tokens), generator=generator),
        positions=torch.arange(size.tokens).repeat(n, 1),
        bos=torch.zeros(n, dtype=torch.bool),
        template=torch.full((n,), size.tokens),
        targets=answers[:, 0],
        rivals=answers[:, 1:3],
        alternatives=answers[:, 3:],
    )


def busiest(subject: Subject, batch: Batch, site: Site, n: int) -> tuple[int, ...]:
    """The features that fire most on the prompts, so that the clamp has something to do."""
    positions = batch.positions[:, :1]
    replay = Replay.record(subject, batch, site, positions)
    fired = (subject.sae(site).full().encode(replay.base) > 0).sum((0, 1))
    return tuple(fired.topk(n).indices.tolist())


def record(problem: Problem, edit: FeatureEdit) -> Replay:
    positions = problem.batch.prompt_length[:, None] - 1
    replay = problem.replay
    return Replay.record(replay.subject, problem.batch, replay.sites[0], positions, before=(edit,))


def published(problem: Problem, edit: FeatureEdit, with_drift: bool) -> list[PublishedSearch]:
    """The published search on each prompt."""
    subject, batch, site = problem.replay.subject, problem.batch, problem.replay.sites[0]
    sae = subject.sae(site)
    wanted = edit.bank.W_dec[0]
    ids = torch.cat([(sae.W_dec == row).all(1).nonzero()[0] for row in wanted])
    clamp = LongClamp(sae, ids, VALUE)
    block = subject.family.blocks_of(subject.model)[site.layer]
    rows = zip(batch.tokens, batch.targets, batch.rivals, problem.radius.tolist(), strict=True)
    return [PublishedSearch(subject.model, block, clamp, *row, with_drift) for row in rows]


def one_of(searches: list[PublishedSearch]) -> Callable[[], None]:
    """A call that steps one search, the next one each time."""
    turn = cycle(searches)
    return lambda: next(turn).step()


def full_margin(problem: Problem, edit: FeatureEdit, delta: Tensor) -> Tensor:
    """[n] the margin of a batched full forward pass with clamp and perturbation on."""
    batch, replay = problem.batch, problem.replay
    positions = batch.prompt_length[:, None] - 1
    perturbation = Perturbation(batch.ids, positions, {replay.sites[0]: delta})
    logits = replay.subject.forward_with_gradients(batch, (edit, perturbation))
    return margin_of(logits, batch.targets, batch.rivals)


class Step:
    """holdfast's step on all prompts, for a way to compute the margin."""

    def __init__(self, problem: Problem, margin: Callable[[Tensor], Tensor]):
        self.problem, self.margin, self.stepper = problem, margin, Steepest()
        held = problem.held[problem.sites[0]]
        self.sets = NullSpace.of(held.W_enc, held.valid, held.slices(problem.batch.frame()))
        self.delta = torch.zeros(problem.shape)
        self.state = self.stepper.start(self.delta)

    def __call__(self) -> None:
        leaf = self.delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.margin(leaf).sum(), leaf)
        radius = self.problem.radius
        move, self.state = self.stepper.move(
            self.state, self.sets.tangent(gradient, Iterate(self.delta))
        )
        moved = self.delta.detach() + (0.1 * radius)[:, None, None] * move
        self.delta = into_ball(self.sets.retract(moved), radius)


@torch.no_grad()
def disagreement(problem: Problem, edit: FeatureEdit, searches: list[PublishedSearch]) -> float:
    """The largest difference between the margins of the three ways, for one random perturbation.

    Raises BenchmarkError if the clamp or the perturbation does nothing to compare.
    """
    generator = torch.Generator().manual_seed(1)
    n = len(problem)
    delta = into_ball(torch.randn(problem.shape, generator=generator), problem.radius)
    replayed = Lanes.of(problem, torch.arange(n)).margin(delta)
    still = Lanes.of(problem, torch.arange(n)).margin(torch.zeros_like(delta))
    replay = problem.replay
    clean = problem.batch.margin(replay.subject.outputs(problem.batch)[:, -1])
    if min(float((replayed - still).abs().max()), float((still - clean).abs().max())) < 1e-2:
        raise BenchmarkError("the clamp or the perturbation hardly moves a margin")
    full = full_margin(problem, edit, delta)
    one = torch.cat([search.margin(search.pasted(delta[i])) for i, search in enumerate(searches)])
    return max(float((replayed - full).abs().max()), float((replayed - one).abs().max()))
