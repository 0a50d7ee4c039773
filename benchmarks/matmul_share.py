"""What share of the machine's matrix-multiply speed does a step of the search reach?

The peak is what torch reaches on this machine with large square matrices in the model's precision,
measured in turn with the steps. A step's operations are counted by torch's own counter, forward and
backward, attention and unembedding included; norms, activations and the optimizer are not counted
as work but take their time. Small batches are bound by reading weights, which the second peak
shows: the same counter on one product of a batch with a weight of the model.

On a GPU, where there is one, with the shape of Gemma-2-2B in bfloat16, 64 prompts and 48 positions,
the claim is at least 40 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Bound, Cell, Options, Result, timings
from benchmarks.random_llama import QUICK, Size, posed, replayed

SHARE = 0.40
SQUARES = (512, 1024, 2048)
BATCHES = ((1, 1), (24, 1), (64, 1), (8, 48), (24, 48))
"""(prompts, perturbed positions) on the CPU."""

GEMMA = Size(
    n_layers=26, d_model=2304, n_heads=8, d_mlp=9216, vocabulary=256_000, layer=3, tokens=100,
    positions=48, prompts=64, repeats=10, n_kv_heads=4, head_dim=256, family="gemma2",
)  # fmt: skip
"""The shape of Gemma-2-2B."""


def run(options: Options) -> Result:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        sizes = [replace(QUICK, positions=4)]
    elif device == "cuda":
        sizes = [replace(GEMMA, device=device, dtype="bfloat16", prompts=n) for n in (8, 64)]
    else:
        sizes = [replace(Size(), prompts=n, positions=p) for n, p in BATCHES]
    dtype = getattr(torch, sizes[0].dtype)
    squares = {f"{n} x {n}": _square(n, dtype, device) for n in SQUARES}
    if device == "cuda":
        squares |= {f"{n} x {n}": _square(n, dtype, device) for n in (4096, 8192)}
    rows: list[tuple[Cell, ...]] = []
    best, shares = 0.0, {}
    for size in sizes:
        problem, _ = posed(size)
        step = replayed(problem)
        with FlopCounterMode(display=False) as counted:
            step()
        flops = counted.get_total_flops()
        name = f"{size.prompts} prompts, {size.positions} positions"
        thin = size.prompts * size.positions
        weight = torch.randn(size.d_model, size.d_mlp, dtype=dtype, device=device)
        x = torch.randn(thin, size.d_model, dtype=dtype, device=device)
        calls: dict[str, Callable[[], object]] = {
            "step": _waiting(step, device),
            "thin": _waiting(partial(torch.matmul, x, weight), device),
            **{key: _waiting(call, device) for key, (call, _) in squares.items()},
        }
        found = timings(calls, size.repeats, warm_up=2)
        peak = max(work / found[key].median for key, (_, work) in squares.items())
        best = max(best, peak)
        rate = flops / found["step"].median
        thin_rate = 2 * x.numel() * size.d_mlp / found["thin"].median
        shares[name] = rate / peak
        rows.append(
            (name, flops / 1e9, 1e3 * found["step"].median, rate / 1e9, rate / peak,
             rate / thin_rate)
        )  # fmt: skip
        del problem, step
    bounds = []
    if device == "cuda" and not options.quick:
        last = list(shares)[-1]
        bounds.append(Bound(f"share of the peak, {last}", shares[last], SHARE, True))
    return Result(
        columns=("one step", "GFLOP", "median ms", "GFLOP/s", "share of the square peak",
                 "share of one thin product's rate"),
        rows=tuple(rows),
        bounds=tuple(bounds),
        settings=sizes[0].summary | {
            "peak_GFLOP/s": best / 1e9, "dtype": sizes[0].dtype, "device": _name(device),
        },
    )  # fmt: skip


def _square(n: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return partial(torch.matmul, a, b), 2.0 * n**3


def _waiting(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, and the wait for what it started."""

    def both() -> Any:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return both


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"
