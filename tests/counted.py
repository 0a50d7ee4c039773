"""The operations of real work, counted stage by stage as torch makes them."""

from __future__ import annotations

from collections import Counter as Sums
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from holdfast import trial
from holdfast.attacks import residual
from holdfast.attacks.residual import Unclamped, Undone


def _fused(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


KNOWN: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused
}
"""Kernels that torch's own table does not have."""


class Counter(TorchDispatchMode):
    """flops: stage → operations, of the innermost stage that had begun; "" outside of all."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Sums[str] = Sums()
        self.stages = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, kernel = func(*args, **kwargs), func._overloadpacket
        if kernel in KNOWN:
            self.flops[self.stages[-1]] += KNOWN[kernel](*args, **kwargs)
        elif kernel in flop_registry:
            self.flops[self.stages[-1]] += flop_registry[kernel](*args, **kwargs, out_val=out)
        return out

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.stages.append(name)
        try:
            yield
        finally:
            self.stages.pop()

    def within(self, patch: pytest.MonkeyPatch, owner: Any, function: str, name: str) -> None:
        """Whatever a function does is of a stage."""
        plain = getattr(owner, function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return plain(*args, **kwargs)

        patch.setattr(owner, function, counted)


def operations(run: Callable[[], object]) -> int:
    with Counter() as counter:
        run()
    return counter.flops.total()


STAGES = {
    "prepare": [(trial, "prepare"), (residual, "result_of")],  # which reads where gates open
    "other features": [(trial, "_prepared")],  # all of it that is no setting
    "record": [(residual, "pose_together")],
    "search": [(residual, "recover_together")],
    "verify": [(residual, "verify"), (residual, "margin_in_order"), (Unclamped, "of"),
               (residual, "regain")],
    "undo": [(Undone, "of")],
    "compare": [(residual, "follow"), (residual, "between_orders"), (residual, "openly")],
}  # fmt: skip
"""Stage of a trial that searches → what does it."""


@contextmanager
def by_stage() -> Iterator[Counter]:
    """Counts trials by the names of the forecast's stages."""
    with pytest.MonkeyPatch.context() as patch, Counter() as counter:
        for name, functions in STAGES.items():
            for owner, function in functions:
                counter.within(patch, owner, function, name)
        yield counter
