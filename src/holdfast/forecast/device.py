"""How fast a device is and what it holds: measured here, or from a vendor's data sheet."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from holdfast.config import nearest
from holdfast.errors import DeviceError
from holdfast.forecast.work import Work

Range = tuple[float, float]
"""The least and the most."""

EFFICIENCY: Range = (0.10, 0.40)
"""Share of a data sheet's peak that eager PyTorch reaches in a transformer's matrix products."""

STREAMED: Range = (0.40, 0.80)
"""Share of a data sheet's bandwidth that reading weights reaches."""

LAUNCH: Range = (2e-4, 1e-3)
"""Seconds that one call of a block takes on a GPU however little it computes: some 40 launches from
Python. An assumption; where a GPU is at hand it is measured."""

OPERATIONS = 60
"""Small operations of one block's forward call, as a launch is probed by."""


@dataclass(frozen=True)
class Device:
    """Rates from the slowest to the fastest that can be expected.

    flops, flops32: operations a second in the model's precision, and in float32; bandwidth: bytes a
    second; launch: seconds of a block's call, from the shortest; memory: bytes, of `count` devices
    together. source: where the figures are from.
    """

    name: str
    flops: Range
    flops32: Range
    bandwidth: Range
    launch: Range
    memory: float
    source: str
    count: int = 1

    def seconds(self, work: Work) -> Range:
        """The least and the most time that work takes: computing or reading, whichever is longer,
        and launching."""

        def at(fast: int) -> float:
            compute = work.flops / self.flops[fast] + work.flops32 / self.flops32[fast]
            return (
                max(compute, work.bytes / self.bandwidth[fast]) + work.calls * self.launch[1 - fast]
            )

        return at(1), at(0)


@dataclass(frozen=True)
class GPU:
    """A data sheet: dense (not sparse) TFLOP/s, GB, GB/s.

    half: bfloat16 with float32 accumulation on tensor cores; single: float32 without TF32, as torch
    multiplies unless told otherwise.
    """

    half: float
    single: float
    memory: float
    bandwidth: float
    source: str


GPUS: dict[str, GPU] = {
    "a10": GPU(125, 31.2, 24, 600, "NVIDIA A10 data sheet"),
    "a100-40gb": GPU(312, 19.5, 40, 1555, "NVIDIA A100 data sheet, SXM 40GB"),
    "a100-80gb": GPU(312, 19.5, 80, 2039, "NVIDIA A100 data sheet, SXM 80GB"),
    "h100": GPU(989, 67, 80, 3350, "NVIDIA H100 data sheet, SXM; half of the sparse rate"),
    "h100-pcie": GPU(756, 51, 80, 2000, "NVIDIA H100 data sheet, PCIe; half of the sparse rate"),
    "h200": GPU(989, 67, 141, 4800, "NVIDIA H200 data sheet, SXM; half of the sparse rate"),
    "l4": GPU(121, 30.3, 24, 300, "NVIDIA L4 data sheet; half of the sparse rate"),
    "l40s": GPU(362, 91.6, 48, 864, "NVIDIA L40S data sheet"),
    "rtx-4090": GPU(165.2, 82.6, 24, 1008, "NVIDIA Ada GPU architecture white paper, RTX 4090"),
    "rtx-6000-ada": GPU(364.2, 91.1, 48, 960, "NVIDIA RTX 6000 Ada data sheet; 1/4 of sparse FP8"),
    "rtx-a6000": GPU(154.8, 38.7, 48, 768, "NVIDIA RTX A6000 data sheet; half of the sparse rate"),
}
"""Name → data sheet."""


def gpu(name: str, dtype: str) -> Device:
    """A GPU of the table by name, or several (`4xh100`) that a model's blocks are spread over.

    The memory of several adds up; one at a time is at work.

    Raises DeviceError naming the nearest known ones.
    """
    several = re.fullmatch(r"([1-9]\d*)\s*x\s*(.+)", name.lower())
    count, plain = (int(several[1]), several[2]) if several else (1, name.lower())
    plain = re.sub(r"[_\s]+", "-", plain).removeprefix("nvidia-")
    if plain not in GPUS:
        raise DeviceError(
            f"no data sheet of a GPU {name!r}: {nearest(plain, GPUS)}; leave --gpu out to measure "
            "this device"
        )
    sheet = GPUS[plain]
    single = _share(sheet.single * 1e12, EFFICIENCY)
    return Device(
        name=plain if count == 1 else f"{count} x {plain}",
        flops=single if dtype == "float32" else _share(sheet.half * 1e12, EFFICIENCY),
        flops32=single,
        bandwidth=_share(sheet.bandwidth * 1e9, STREAMED),
        launch=LAUNCH,
        memory=count * sheet.memory * 1e9,
        source=f"{sheet.source}; {EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of its peak",
        count=count,
    )


def _share(peak: float, share: Range) -> Range:
    return peak * share[0], peak * share[1]


def probe(device: str, dtype: str, d_model: int, seconds: float = 0.1) -> Device:
    """This device, measured for about 8 times `seconds`: products of few and of many rows with a
    weight of the model's width, a read of memory, and many small operations."""
    here = torch.device("cuda" if device == "auto" else device)
    kind = getattr(torch, dtype)

    def products(of: torch.dtype) -> Range:
        rates = []
        weight = torch.randn(d_model, 4 * d_model, device=here, dtype=of)
        for rows in (16, 256):
            x = torch.randn(rows, d_model, device=here, dtype=of)
            rates.append(
                2 * x.numel() * 4 * d_model / _time(partial(torch.matmul, x, weight), here, seconds)
            )
        return min(rates), max(rates)

    block = torch.ones(16_000_000, device=here)
    read = block.numel() * 4 / _time(lambda: block.sum(), here, seconds)
    small = torch.randn(8, 32, device=here)
    operation = _time(lambda: small * 1.0, here, seconds)
    own = products(kind)
    return Device(
        name=torch.cuda.get_device_name(here) if here.type == "cuda" else "this CPU",
        flops=own,
        flops32=own if kind == torch.float32 else products(torch.float32),
        bandwidth=(read / 2, read),
        launch=(operation * OPERATIONS, 3 * operation * OPERATIONS),
        memory=_memory(here),
        source=f"measured on {here.type}, {torch.get_num_threads()} threads",
    )


def _time(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median seconds of a call, over as many as fit."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 10_000):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
