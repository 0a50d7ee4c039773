"""How many rows a run begins with: what is free, divided by what a row is forecast to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from holdfast.batching import MOST, WORK, Beginning, Sizes, Work, kept_parts, kept_sizes, spelled
from holdfast.capacity import available_bytes, machine_bytes, total_bytes
from holdfast.executor import Runtime
from holdfast.forecast.memory import FREE, Memory
from holdfast.forecast.show import amount


def beginning(
    memories: Sequence[Memory],
    runtime: Runtime,
    n_workers: int,
    kept: Mapping[str, Any] | None = None,
    new: Sequence[Memory] | None = None,
) -> Beginning:
    """What a run begins with, its subjects being loaded.

    memories: of its trials, as forecast; n_workers: trials side by side, each with subjects of its
    own; kept: the plan that earlier trials of the run came to, on this device or another; new: the
    memories of trials that are not in that plan, all of them if left out. Those that are in it have
    its sizes also where less is free now: what was begun is to be split as it was.
    """
    device, free = named(runtime.device), free_bytes(runtime.device)
    per_row: dict[Work, float] = {
        work: max((memory.per_row[work] for memory in memories), default=0.0) for work in WORK
    }

    def share(memory: Memory) -> float:
        """Bytes for the rows of one of the workers, of which one has its weights already."""
        own = (FREE * free - (n_workers - 1) * memory.weights) / n_workers
        return own - memory.saes

    def fit(those: Sequence[Memory]) -> Sizes:
        each = (memory.beside(share(memory), _count(runtime)) for memory in those)
        return MOST.at_most(*each).at_least_one()

    note = ""
    try:
        if kept is not None and kept["device"] != device:
            note = f"the run's folder has sizes for {kept['device']}; this is {device}, so they "
            note += "are chosen anew"
        elif kept is not None and runtime.batch_size in (0, kept["batch_size"]):
            found, parts = kept_sizes(kept), kept_parts(kept)
            asked = 0 if kept["batch_size"] == "auto" else int(kept["batch_size"])
            sizes = found if asked else found.at_most(fit(memories if new is None else new))
            why = f"no more than what earlier trials of this run came to ({spelled(found)})"
            return Beginning(sizes, asked, device, free, per_row, why, parts=parts)
    except (KeyError, TypeError, ValueError, AttributeError):
        note = "the plan in the run's folder cannot be read, so it is made anew"
    if runtime.batch_size:
        every = Sizes.every(runtime.batch_size)
        return Beginning(every, runtime.batch_size, device, free, per_row, "asked for")
    sizes = fit(memories)
    why = f"the most that fit into {FREE:.0%} of {amount(free, 'B')} that are free"
    if sizes == MOST:
        why = f"as many as are worth it: {amount(free, 'B')} are free, enough for them"
    if not memories:
        why = "as many as are worth it: what these trials hold is not forecast"
    return Beginning(sizes, 0, device, free, per_row, why, note)


def named(device: str) -> str:
    """Which memory a device has, so that another one is known for it."""
    if device == "cpu":
        return f"cpu, {amount(machine_bytes(), 'B')}"
    devices = _devices(device)
    names = {torch.cuda.get_device_name(i) for i in devices}
    total = sum(map(_cuda_bytes, devices))
    return f"{len(devices)} x {', '.join(sorted(names))}, {amount(total, 'B')}"


def free_bytes(device: str) -> float:
    """Memory that nobody holds. What torch keeps of a GPU to hand out again counts as free."""
    if device == "cpu":
        return available_bytes()
    free = 0
    for i in _devices(device):
        cached = torch.cuda.memory_reserved(i) - torch.cuda.memory_allocated(i)
        free += torch.cuda.mem_get_info(i)[0] + cached
    return float(free)


def one_device_bytes(device: str) -> float:
    """All memory of the device, of the smallest where there are several."""
    return machine_bytes() if device == "cpu" else min(map(_cuda_bytes, _devices(device)))


def _cuda_bytes(index: int) -> float:
    return total_bytes(torch.device("cuda", index))


def _devices(device: str) -> list[int]:
    if device == "auto":
        return list(range(torch.cuda.device_count()))
    index = torch.device(device).index
    return [torch.cuda.current_device() if index is None else index]


def _count(runtime: Runtime) -> int:
    return 1 if runtime.device == "cpu" else max(1, len(_devices(runtime.device)))
