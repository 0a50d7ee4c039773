"""An SAE of a million features costs a search no memory and no time: at most 64 MiB, steps within
10 % of those with 16k; a TopK takes its encoder's share of the file and 256 MiB.

A file of 1M x 2304 in bfloat16 (9.7 GB) is written to a temporary folder, a few rows at a time, and
taken away in the end. While it is written, what its encoder makes of a few residuals is added up
from the numbers themselves: nothing that is measured reads the reference, nor made the file.
Another process opens a 16k SAE with the same 64 features, then the wide one, and says what its
anonymous memory (RssAnon, which leaves out pages of files) grew by at the most. A search on a
random Llama is timed with the one and the other in turn: its clamped features are the same, so what
it finds has to be the same to the last bit. The same file read as a TopK gives the k-th largest
pre-activation.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from benchmarks.harness import BenchmarkError, Bound, Cell, Options, Result, progress, timings
from benchmarks.random_llama import BUDGET, VALUE, last, random_batch, random_model
from benchmarks.random_llama import Size as ModelSize
from holdfast.batch import Frame
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.problem import Problem
from holdfast.recovery import Recovery, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import Folder
from holdfast.saes.stored import StoredSAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_tokenizer

GROWTH, TOPK_GROWTH = 64.0, 256.0
"""MiB of anonymous memory: in all, and beyond the encoder's share of the file."""

SLOWER = 1.10
PARITY = 1e-4
"""Of a pre-activation, relative to the largest: sums of 2304 products in float32."""

SITE = "blocks.0.hook_resid_post"
KINDS = ("jumprelu", "topk")
LOUD = 4.0
"""Clamped features are so many times as large as others: some are among the k largest of all."""

POOL = 1 << 22
"""Random numbers that are drawn; rows of the matrices are pieces of them from random places on."""

CHUNK = 1 << 23
"""Numbers written at a time."""

MARGIN = 2 << 30
"""Bytes of the disk that are left to others."""


@dataclass(frozen=True)
class Size:
    """wide, narrow: features of the SAEs; clamped: of which these are clamped, the same in both."""

    wide: int = 1 << 20
    narrow: int = 1 << 14
    d_model: int = 2304
    clamped: int = 64
    k: int = 64
    tokens: int = 8
    prompts: int = 4
    steps: int = 5
    repeats: int = 15

    def ids(self, n: int) -> list[int]:
        """The features that are clamped, among n."""
        return list(range(0, n, n // self.clamped))


QUICK = Size(wide=1 << 14, narrow=1 << 12, repeats=3)


def run(options: Options) -> Result:
    if sys.platform != "linux":
        raise BenchmarkError("memory is read from /proc, which only Linux has")
    size = QUICK if options.quick else Size()
    with tempfile.TemporaryDirectory() as folder:
        _check_room(Path(folder), size)
        reference = {}
        for n in (size.narrow, size.wide):
            start = time.perf_counter()
            reference[n] = _write(Path(folder) / str(n), size, n)
            progress.print(f"wide_sae: {n} features written, {time.perf_counter() - start:.0f} s")
        torch.save(reference[size.wide], Path(folder) / "reference.pt")
        found = {kind: _measured(kind, Path(folder), size) for kind in KINDS}
    return _result(size, found)


def _check_room(folder: Path, size: Size) -> None:
    need = sum(4 * size.d_model * n for n in (size.wide, size.narrow)) + MARGIN
    free = shutil.disk_usage(folder).free
    if free < need:
        raise BenchmarkError(
            f"skipped: the temporary folder has {free / 1e9:.1f} GB, and {need / 1e9:.1f} GB are "
            "needed; set TMPDIR to a larger disk"
        )


def _result(size: Size, found: dict[str, dict[str, float]]) -> Result:
    plain, topk = found["jumprelu"], found["topk"]
    encoder = 2 * size.wide * size.d_model / 2**20
    rows: list[tuple[Cell, ...]] = [
        (kind, size.wide, own["open"], own["cpu"], own["slice"], own["encode"],
         own["peak"], own["after"], own.get("narrow"), own.get("wide"), own["error"])
        for kind, own in found.items()
    ]  # fmt: skip
    bounds = [
        Bound("codes against the reference, largest difference", max(plain["error"], topk["error"]),
              PARITY, False),
        Bound("the k-th value against the reference", topk["kth_error"], PARITY, False),
        Bound("difference of what the two searches found", plain["differs"], 0.0, False),
    ]  # fmt: skip
    if size != QUICK:  # where 10 % is less than what times vary by
        bounds += [
            Bound("anonymous memory, elementwise, at the peak", plain["peak"], GROWTH, False,
                  "MiB"),
            Bound("anonymous memory, TopK, at the peak, beyond the encoder",
                  topk["peak"] - encoder, TOPK_GROWTH, False, "MiB"),
            Bound("a search with the wide SAE over one with 16k", plain["wide"] / plain["narrow"],
                  SLOWER, False, "times"),
        ]  # fmt: skip
    return Result(
        columns=(
            "kind", "features", "open, s", "of it CPU, s", "64 features, s",
            "codes of 8 tokens, s", "peak, MiB", "after, MiB", "search with the narrow, s",
            "search with the wide, s", "error",
        ),
        rows=tuple(rows),
        bounds=tuple(bounds),
        settings={**asdict(size), "dtype": "bfloat16"},
    )  # fmt: skip


# ---------------------------------------------------------------------- the file


def _write(folder: Path, size: Size, n: int) -> dict[str, Tensor]:
    """An SAE in the layout of SAELens, and beside it the same file as a TopK; what its encoder
    makes of `residuals`: p [tokens n], threshold [n]."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, d = size.ids(n), size.d_model
    own = torch.randn(d, size.clamped, generator=torch.Generator().manual_seed(1)).bfloat16()
    b_enc, threshold = 0.1 * pool[:n].float(), 1.0 + pool[-n:].float().abs()
    b_enc[ids], threshold[ids] = 0.0, 0.5
    x, p = residuals(size), b_enc.repeat(size.tokens, 1)
    pool, own = pool / d**0.5, LOUD * own / d**0.5
    places = torch.Generator().manual_seed(2)

    def some(numbers: int) -> Tensor:
        return pool[int(torch.randint(POOL - numbers, (), generator=places)) :][:numbers]

    shapes = {"W_enc": (d, n), "W_dec": (n, d)}
    vectors = {"b_enc": b_enc, "threshold": threshold, "b_dec": torch.zeros(d)}
    folder.mkdir()
    with (folder / "sae_weights.safetensors").open("wb") as file:
        _header(file, shapes, vectors)
        height = max(1, CHUNK // n)
        for first in range(0, d, height):
            block = torch.stack([some(n) for _ in range(min(height, d - first))])
            block[:, ids] = own[first : first + len(block)]
            p += x[:, first : first + len(block)] @ block.float()
            file.write(_bytes(block))
        at = torch.as_tensor(ids)
        for first in range(0, n, height := POOL // 4 // d):
            block = some(min(height, n - first) * d).view(-1, d).clone()
            here = ((at >= first) & (at < first + len(block))).nonzero().flatten()
            block[at[here] - first] = own.T[here]
            file.write(_bytes(block))
        for vector in vectors.values():
            file.write(_bytes(vector))
    said = {"hook_name": SITE, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps({**said, "architecture": "jumprelu"}))
    topk = folder.with_name(f"{n}-topk")
    topk.mkdir()
    (topk / "sae_weights.safetensors").hardlink_to(folder / "sae_weights.safetensors")
    (topk / "cfg.json").write_text(json.dumps({**said, "architecture": "topk", "k": size.k}))
    return {"p": p, "threshold": threshold}


def _header(
    file: BinaryIO, matrices: dict[str, tuple[int, int]], vectors: dict[str, Tensor]
) -> None:
    said: dict[str, Any] = {}
    at = 0
    every = [(name, "BF16", shape, 2) for name, shape in matrices.items()]
    every += [(name, "F32", tuple(v.shape), 4) for name, v in vectors.items()]  # type: ignore[misc]
    for name, dtype, shape, itemsize in every:
        end = at + itemsize * torch.Size(shape).numel()
        said[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(said).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def residuals(size: Size) -> Tensor:
    """[tokens d_model] what codes are compared at."""
    return torch.randn(size.tokens, size.d_model, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------- what is measured


def _measured(kind: str, folder: Path, size: Size) -> dict[str, float]:
    """Figures of one kind, from a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.wide_sae",
        kind,
        str(folder),
        json.dumps(asdict(size)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"a process of its own failed:\n{done.stderr[-2000:]}")
    progress.print(f"wide_sae: {kind} measured")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main(kind: str, folder: Path, size: Size) -> None:
    suffix = "" if kind == "jumprelu" else "-topk"
    narrow, wide = (folder / f"{n}{suffix}" for n in (size.narrow, size.wide))
    x, searches, found = residuals(size), dict[str, Problem](), list[Tensor]()
    drawn = ModelSize(
        n_layers=2, d_model=size.d_model, n_heads=8, d_mlp=size.d_model, vocabulary=2000,
        tokens=50, prompts=size.prompts,
    )  # fmt: skip
    model = random_model(drawn)

    def used_in_full(path: Path, name: str) -> Used:
        used = _used(path, size, x)
        if used.sae.k is None:
            searches[name] = _posed(used, model, drawn)
            found.append(_searched(searches[name], size).delta)
        return used

    used_in_full(narrow, "narrow")  # all that a process loads once is there after it
    with _grown() as made:
        used = used_in_full(wide, "wide")
    made |= used.seconds | _compared(used, folder, size)
    if searches:
        calls = {name: partial(_searched, problem, size) for name, problem in searches.items()}
        made["differs"] = float((found[0] - found[1]).abs().max())
        made |= {name: took.median for name, took in timings(calls, size.repeats).items()}
    print(json.dumps(made))


@dataclass(frozen=True)
class Used:
    """An SAE that was opened, its clamped features, and their codes [tokens clamped]."""

    sae: StoredSAE
    bank: FeatureBank
    codes: Tensor
    limit: Tensor | None
    seconds: dict[str, float]


def _used(path: Path, size: Size, x: Tensor) -> Used:
    """Open, slice, encode. open: to the whole encoder of a TopK, which it has to look at."""
    begun, worked = time.perf_counter(), time.process_time()
    sae = Folder(path=str(path)).load(Site.parse(SITE))
    rivals = sae.rivals() if sae.k is not None else None
    opened, worked = time.perf_counter(), time.process_time() - worked
    ids = size.ids(sae.n_features)
    entry = SiteFeatures(site=SITE, ids=tuple(ids))
    bank = FeatureBank.of(sae, FeatureSet(entries=(entry,), source="evenly spread"))
    sliced = time.perf_counter()
    frame = _frame(size)
    codes = bank.activations(x[None], frame)[0]
    limit = None if rivals is None else rivals.limit(x)
    seconds = {
        "open": opened - begun, "cpu": worked, "slice": sliced - opened,
        "encode": time.perf_counter() - sliced,
    }  # fmt: skip
    return Used(sae, bank, codes, limit, seconds)


def _compared(used: Used, folder: Path, size: Size) -> dict[str, float]:
    """What was computed against what was added up while the file was written."""
    reference = torch.load(folder / "reference.pt", weights_only=True)
    p, threshold = reference["p"], reference["threshold"]
    made = {}
    if used.sae.k is not None:
        assert used.limit is not None
        top = p.sort(dim=1, descending=True).values[:, used.sae.k - 1 : used.sae.k + 1]
        limit = top.mean(1, keepdim=True)
        made["kth_error"] = float((used.limit - limit).abs().max() / limit.abs().max())
        threshold = limit
    codes = torch.where(p > threshold, p, 0.0)[:, size.ids(p.shape[1])]
    # Where rounding decides, and not the SAE, either is right.
    sure = ((p - threshold).abs() > PARITY * p.abs().max())[:, size.ids(p.shape[1])]
    assert (codes > 0).any() and (codes == 0).any(), "some fire, some do not"
    error = torch.where(sure, codes - used.codes, 0.0).abs().max()
    return {**made, "error": float(error / p.abs().max())}


@contextmanager
def _grown() -> Iterator[dict[str, float]]:
    """MiB that anonymous memory grows by inside: at the peak, looked at often, and afterwards."""
    before = highest = _anonymous()
    ended = threading.Event()

    def look() -> None:
        nonlocal highest
        while not ended.wait(0.002):
            highest = max(highest, _anonymous())

    watch = threading.Thread(target=look)
    made: dict[str, float] = {}
    watch.start()
    try:
        yield made
    finally:
        ended.set()
        watch.join()
    after = _anonymous()
    made |= {"peak": max(highest, after) - before, "after": after - before}


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def _frame(size: Size) -> Frame:
    """One text of so many tokens."""
    n = torch.tensor([size.tokens])
    return Frame(("text",), ("",), torch.arange(size.tokens)[None], n, n > size.tokens, n)


# ---------------------------------------------------------------------- the search


def _posed(used: Used, model: Any, drawn: ModelSize) -> Problem:
    """A recovery problem on prompts under a clamp of the SAE's features."""
    tokenizer: Any = tiny_tokenizer()
    subject = Subject.of("random", model, tokenizer, {used.sae.site: used.sae})
    batch = random_batch(drawn)
    edit = FeatureEdit(used.bank, "set", VALUE, include_bos=True)
    replay = Replay.record(subject, batch, used.sae.site, last(batch), before=(edit,))
    reference = replay.residual().norm(dim=(1, 2))
    goal = torch.full_like(reference, torch.inf)  # so that all steps are made
    held = {used.sae.site: used.bank}
    return Problem(replay, batch, goal, held, reference, BUDGET * reference)


def _searched(problem: Problem, size: Size) -> Recovery:
    spec = RecoverySpec(
        constraint=EncoderNull(), steps=size.steps, refine_steps=size.steps, doublings=1
    )
    return recover(problem, spec, seed=0)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), Size(**json.loads(sys.argv[3])))
