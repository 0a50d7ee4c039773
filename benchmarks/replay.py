"""A step of the search is at least 100 times as fast as a step of the published loop.

One step (forward, backward, projection, update) for a perturbation of the last token of 100, on a
randomly initialized Llama with a random SAE. Two batches: 64 names to tell apart, and the 24
permutations of a question with four choices. Side by side: the published loop on one prompt at a
time, with and without its drift terms (their weights are 0 by default); a full forward pass with
the rank-|S| clamp, on one prompt and on the batch; and replay, on one prompt and on the batch. All
give the same margins for the same perturbation, which is checked first. The rows from one to the
next say where the factor comes from: no full-width encodes, no unembedding of tokens that nobody
reads, fewer token-layers, batching.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.harness import BenchmarkError, Bound, Cell, Options, Result, timings
from benchmarks.published import LongClamp, PublishedSearch
from benchmarks.random_llama import (
    QUICK,
    VALUE,
    Size,
    Step,
    last,
    posed,
    question,
    random_batch,
    replayed,
)
from holdfast.batch import Batch
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.margins import margin_of
from holdfast.problem import Lanes, Problem
from holdfast.replay import Replay
from holdfast.subspace import into_ball

SPEEDUP = 100.0
OVER_FULL = 20.0
PARITY = 1e-4
NAMES = 64


def run(options: Options) -> Result:
    size = QUICK if options.quick else Size()
    names = random_batch(Size(**{**vars(size), "prompts": 8 if options.quick else NAMES}))
    cases = {"names": names, "permutations": question(size)}
    rows: list[tuple[Cell, ...]] = []
    bounds = []
    for case, batch in cases.items():
        own, found = _case(case, size, batch, options.quick)
        rows += own
        bounds += found
    return Result(
        columns=("one step", "prompts", "median ms", "prompts a second", "times the row above it",
                 "times the published loop"),
        rows=tuple(rows),
        bounds=tuple(bounds),
        settings=size.summary | {
            "token_layers_in_full": size.n_layers * size.tokens,
            "token_layers_replayed": size.n_layers - size.layer - 1,
        },
    )  # fmt: skip


def _case(
    case: str, size: Size, batch: Batch, quick: bool
) -> tuple[list[tuple[Cell, ...]], list[Bound]]:
    problem, edit = posed(size, batch)
    searches = published(problem, edit, with_drift=True)
    error = disagreement(problem, edit, searches)
    n = len(batch)
    alone = problem.rows(torch.tensor([0]))
    one, whole = "full forward pass, one prompt", "full forward pass, batched"
    steps: dict[str, tuple[int, Callable[[], object]]] = {
        "published loop": (1, one_of(searches)),
        "published loop, no drift terms": (1, one_of(published(problem, edit, with_drift=False))),
        one: (1, Step(alone, partial(full_margin, alone, edit))),
        "replay, one prompt": (1, replayed(alone)),
        "replay, batched": (n, replayed(problem)),
        whole: (n, Step(problem, partial(full_margin, problem, edit))),
    }
    calls = {name: step for name, (_, step) in steps.items()}
    found = timings(calls, size.repeats)
    speed = {name: count / found[name].median for name, (count, _) in steps.items()}
    first = next(iter(speed.values()))
    rows: list[tuple[Cell, ...]] = []
    before: float | None = None
    for name, (count, _) in steps.items():
        # The last row stands beside the others: it is what replay is compared with.
        over = None if before is None or name == whole else speed[name] / before
        seconds = found[name].median
        rows.append(
            (f"{case}: {name}", count, 1e3 * seconds, speed[name], over, speed[name] / first)
        )
        before = speed[name]
    recording = timings({"": partial(record, problem, edit)}, size.repeats)[""].median
    rows.append((f"{case}: recording, once a search", n, 1e3 * recording, None, None, None))
    bounds = [Bound(f"{case}: largest difference of margins", error, PARITY, False, "logits")]
    if not quick:  # small sizes have less to leave out
        times, over_full = (speed["replay, batched"] / base for base in (first, speed[whole]))
        bounds += [
            Bound(f"{case}: replay over the published loop", times, SPEEDUP, True, "times"),
            Bound(
                f"{case}: replay over the batched full pass", over_full, OVER_FULL, True, "times"
            ),
        ]
    return rows, bounds


def record(problem: Problem, edit: FeatureEdit) -> Replay:
    replay = problem.replay
    positions = last(problem.batch)
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
    perturbation = Perturbation(batch.ids, last(batch), {replay.sites[0]: delta})
    logits = replay.subject.forward_with_gradients(batch, (edit, perturbation))
    return margin_of(logits, batch.targets, batch.rivals)


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
