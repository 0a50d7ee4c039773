"""Counts what makes the host wait for a device: reading a tensor's values, shapes that depend on
them, and copies of Python lists. On a CPU nothing waits, but the same operations are called."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast import ascent, gates, polyhedron, waiting
from holdfast.jacobian import restoration
from holdfast.waiting import Question

_WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique",
          "unique_dim", "unique_consecutive", "isin", "_linalg_check_errors")  # fmt: skip


_WORK = ("mm", "bmm", "addmm", "baddbmm", "linalg_solve_triangular", "_scaled_dot_product")


class Waits(TorchDispatchMode):
    """`places`: where the package was when it waited, one for each time; given: how much work the
    device was given so far."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.given = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.given += name.startswith(_WORK)
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1] or ()
        )
        if by_mask or any(name.startswith(wait) for wait in _WAITS):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, what: str, beyond: str = "") -> None:
        own = [
            f for f in traceback.extract_stack()
            if "holdfast" in f.filename.split("/") and not (beyond and f.filename.endswith(beyond))
        ]  # fmt: skip
        where = f"{own[-1].filename.split('/')[-1]}:{own[-1].lineno}" if own else "elsewhere"
        self.places.append(f"{what} at {where}")


@contextmanager
def counted() -> Iterator[list[str]]:
    """The places where the package waits inside the `with` block."""
    waits = Waits()
    with pytest.MonkeyPatch.context() as patch, waits:
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch.setattr(torch, name, _noting(waits, name, getattr(torch, name)))
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, _noting(waits, name, getattr(Tensor, name)))
        _note_idle_answers(waits, patch)
        yield waits.places


def _note_idle_answers(waits: Waits, patch: pytest.MonkeyPatch) -> None:
    """An answer that is read before the device was given more to do is a wait."""
    asked: dict[int, int] = {}
    put, answer = Question.of.__func__, Question.answer

    def of(cls: type[Question], values: Tensor) -> Question:
        question = put(cls, values)
        asked[id(question.values)] = waits.given
        return question

    def answered(question: Question) -> Any:
        if waits.given == asked[id(question.values)]:
            waits.note("idle answer", beyond="waiting.py")
        return answer(question)

    patch.setattr(Question, "of", classmethod(of))
    patch.setattr(Question, "answer", answered)


def idle(places: Sequence[str]) -> list[str]:
    """Of places, those where a device would have nothing to do: all but answers to what was asked
    before, and what is sent without a wait."""
    fine = ("numpy at waiting.py", "from_numpy at waiting.py")
    return [place for place in places if not place.startswith(fine)]


def _noting(waits: Waits, name: str, do: Any) -> Any:
    def noted(value: Any, *args: Any, **kwargs: Any) -> Any:
        if name not in ("tensor", "as_tensor") or not isinstance(value, Tensor):
            waits.note(name)
        return do(value, *args, **kwargs)

    return noted


def pretend(patch: pytest.MonkeyPatch, waits: bool) -> None:
    """The CPU is read as if the host had to wait for it, or as it is."""
    for module in (waiting, ascent, gates, polyhedron, restoration):
        patch.setattr(module, "waits", lambda device: waits)
