"""Loading 16 features of a 16k-wide SAE takes at most 1.2 times reading its file, and the memory it
takes does not depend on the SAE's width.

A plain read goes through the file once, in blocks, and keeps nothing; files are in the page cache.
Memory is what the resident size of a process grows by, at its peak and afterwards, when it has
loaded another SAE of the same layout before.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.harness import BenchmarkError, Bound, Options, Result, timings
from holdfast.saes.sources import Folder
from holdfast.sites import Site

D = 2304
N_FEATURES = 16
WIDTHS = (16_384, 65_536)
RATIO = 1.2
GROWTH = 32.0
DIFFERENCE = 8.0
SITE = "blocks.12.hook_resid_post"
BLOCK = 8 << 20

MEASURE = """
import sys
from holdfast.saes.sources import Folder
from holdfast.sites import Site

def resident(which):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) / 1024

def load(path):
    sae = Folder(path=path).load(Site.parse(sys.argv[3]))
    n = sae.n_features
    return sae.take(range(0, n, n // int(sys.argv[4])))

load(sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins again
before = resident("VmRSS")
kept = load(sys.argv[1])
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""


@dataclass(frozen=True)
class Measured:
    """One layout and width: seconds of a plain read and of loading a slice; MiB, peak and after."""

    layout: str
    n: int
    size: float
    read: float
    slice: float
    peak: float
    after: float

    @property
    def ratio(self) -> float:
        return self.slice / self.read


def run(options: Options) -> Result:
    if sys.platform != "linux":
        raise BenchmarkError("memory is read from /proc, which only Linux has")
    widths = tuple(n // 4 for n in WIDTHS) if options.quick else WIDTHS
    repeats = 5 if options.quick else 25
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for layout, write in (("safetensors", _safetensors), ("npz", _npz), ("torch", _torch)):
            other = Path(folder) / layout / "other"
            write(other, widths[0] // 4)
            for n in widths:
                write(other.with_name(str(n)), n)
                found.append(_measured(layout, n, other.with_name(str(n)), other, repeats))
                shutil.rmtree(other.with_name(str(n)))
    peaks = {n: [m.peak for m in found if m.n == n] for n in widths}
    ratio = max(m.ratio for m in found if m.n == WIDTHS[0])
    difference = max(peaks[widths[1]]) - max(peaks[widths[0]])
    return Result(
        columns=(
            "layout", "features", "file, MiB", "plain read, s", "16 features, s", "ratio",
            "peak, MiB", "after, MiB",
        ),
        rows=tuple(
            (m.layout, m.n, m.size, m.read, m.slice, m.ratio, m.peak, m.after) for m in found
        ),
        bounds=(
            Bound("16 features of 16k against plain read, worst", ratio, RATIO, False),
            Bound("growth at the peak, worst", max(m.peak for m in found), GROWTH, False, "MiB"),
            Bound("growth afterwards, worst", max(m.after for m in found), GROWTH, False, "MiB"),
            Bound("growth at the peak, widest minus other", difference, DIFFERENCE, False, "MiB"),
        ),
        settings={"d_model": D, "features": N_FEATURES, "dtype": "float32", "repeats": repeats},
    )  # fmt: skip


def _measured(layout: str, n: int, path: Path, other: Path, repeats: int) -> Measured:
    file = max(path.iterdir(), key=lambda file: file.stat().st_size)
    calls: dict[str, Callable[[], object]] = {
        "read": partial(_read, file),
        "slice": partial(_slice, path),
    }
    seconds = timings(calls, repeats)
    command = [sys.executable, "-c", MEASURE, str(path), str(other), SITE, str(N_FEATURES)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"loading in a process of its own failed:\n{done.stderr[-2000:]}")
    peak, after = map(float, done.stdout.split())
    size = file.stat().st_size / 2**20
    return Measured(layout, n, size, seconds["read"].median, seconds["slice"].median, peak, after)


def _matrices(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "W_enc": torch.randn(D, n, generator=generator),
        "W_dec": torch.randn(n, D, generator=generator),
        "b_enc": torch.randn(n, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "threshold": torch.rand(n, generator=generator),
    }


def _safetensors(path: Path, n: int) -> None:
    path.mkdir(parents=True)
    save_file(_matrices(n), path / "sae_weights.safetensors")
    cfg = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "hook_name": SITE}
    (path / "cfg.json").write_text(json.dumps(cfg))


def _npz(path: Path, n: int) -> None:
    path.mkdir(parents=True)
    arrays: dict[str, Any] = {name: t.numpy() for name, t in _matrices(n).items()}
    np.savez(path / "params.npz", **arrays)


def _torch(path: Path, n: int) -> None:
    path.mkdir(parents=True)
    made = _matrices(n)
    tensors = {
        "encoder.weight": made["W_enc"].T.contiguous(),
        "decoder.weight": made["W_dec"].T.contiguous(),
        "encoder.bias": made["b_enc"],
        "b_dec": made["b_dec"],
        "threshold": torch.tensor(0.5),
    }
    torch.save(tensors, path / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "k": 64, "layer": Site.parse(SITE).layer}
    (path / "config.json").write_text(json.dumps({"trainer": trainer}))


def _read(path: Path) -> int:
    """Go through a file once, as fast as it can be had."""
    buffer, read = bytearray(BLOCK), 0
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            read += n
    return read


def _slice(path: Path) -> None:
    sae = Folder(path=str(path)).load(Site.parse(SITE))
    own = sae.take(range(0, sae.n_features, sae.n_features // N_FEATURES))
    assert own.W_enc.shape == (D, N_FEATURES)
