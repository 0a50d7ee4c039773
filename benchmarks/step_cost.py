"""A step costs what the perturbation can change, whatever the SAE's width: flat within 10 %.

One step of the search on a randomly initialized Llama with a random SAE, everything as in `replay`
but one thing at a time: the SAE's width, the tokens of a prompt, the perturbed positions, the layer
of the perturbation, the prompts of a batch. The settings of one such sweep are timed in turn. A
longer prompt adds keys to attend to and nothing else: what attention over them costs alone is
measured beside it, and bounds by how much a step may grow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness import Bound, Cell, Options, Result, Timing, timings
from benchmarks.random_llama import QUICK, Size, posed, replayed
from holdfast.prefix import attend, attending
from holdfast.problem import Problem

FLAT = 1.10
SLACK = 0.10
"""Share of the shortest prompt's step by which a step may grow beyond attention's own growth."""

SWEEPS: dict[str, tuple[int, ...]] = {
    "n_features": (1024, 4096, 16_384, 65_536, 262_144, 1_048_576),
    "tokens": (50, 100, 200, 400, 800),
    "positions": (1, 4, 16, 48),
    "layer": (1, 4, 7, 10),
    "prompts": (1, 8, 24, 64),
}
QUICK_SWEEPS: dict[str, tuple[int, ...]] = {
    "n_features": (256, 1024), "tokens": (20, 50), "positions": (1, 8), "layer": (1, 4),
    "prompts": (1, 8),
}  # fmt: skip
FLAT_UP_TO = 262_144
NAMES = {
    "n_features": "SAE features", "tokens": "prompt tokens", "positions": "perturbed positions",
    "layer": "after block", "prompts": "prompts of a batch",
}  # fmt: skip


def run(options: Options) -> Result:
    size = QUICK if options.quick else replace(Size(), repeats=21)
    sweeps = QUICK_SWEEPS if options.quick else SWEEPS
    rows: list[tuple[Cell, ...]] = []
    steps: dict[str, dict[int, Timing]] = {}
    attention: dict[int, Timing] = {}
    for name, values in sweeps.items():
        problems = {value: posed(replace(size, **{name: value}))[0] for value in values}
        calls: dict[str, Callable[[], object]] = {
            f"step {value}": replayed(problem) for value, problem in problems.items()
        }
        if name == "tokens":
            calls |= {f"attention {v}": partial(attended, p) for v, p in problems.items()}
        found = timings(calls, size.repeats, warm_up=2)
        steps[name] = {value: found[f"step {value}"] for value in values}
        base = steps[name][values[0]].median
        for value in values:
            own, alone = found[f"step {value}"], found.get(f"attention {value}")
            if alone is not None:
                attention[value] = alone
            rows.append(
                (f"{NAMES[name]}: {value}", 1e3 * own.median, own.median / base,
                 None if alone is None else 1e3 * alone.median)
            )  # fmt: skip
    bounds = [] if options.quick else _bounds(steps, attention)
    return Result(
        columns=("one step", "median ms", "times the first", "attention to the prompt alone, ms"),
        rows=tuple(rows),
        bounds=tuple(bounds),
        settings=size.summary | {"positions": size.positions, "prompts": size.prompts},
    )


def _bounds(steps: dict[str, dict[int, Timing]], attention: dict[int, Timing]) -> list[Bound]:
    widths = [t.median for width, t in steps["n_features"].items() if width <= FLAT_UP_TO]
    flat = max(widths) / min(widths)
    by_length = {n: timing.median for n, timing in steps["tokens"].items()}
    short, long = min(by_length), max(by_length)
    grown = by_length[long] - by_length[short]
    owed = attention[long].median - attention[short].median
    beyond = (grown - owed) / by_length[short]
    return [
        Bound("slowest over fastest step, 1k to 256k features", flat, FLAT, False, "times"),
        Bound(
            f"growth from {short} to {long} tokens beyond attention's own, of the shortest step",
            beyond, SLACK, False,
        ),
    ]  # fmt: skip


def attended(problem: Problem) -> None:
    """Forward and backward of the attention of every replayed block over the prefix, alone."""
    cache = problem.replay.cache
    model = problem.replay.subject.model
    n, s = problem.replay.base.shape[:2]
    heads = model.config.num_attention_heads
    for layer, own in enumerate(cache.prefix):
        if own is None:
            continue
        keys, _ = own
        module = torch.nn.Module()
        module.layer_idx = layer  # type: ignore[assignment]
        query = torch.ones(n, heads, s, keys.shape[-1], requires_grad=True)
        new = torch.ones(n, keys.shape[1], s, keys.shape[-1], requires_grad=True)
        with attending(model, cache):
            read, _ = attend(module, query, new, new, None)
        torch.autograd.grad(read.sum(), (query, new))
