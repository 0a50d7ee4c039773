"""How many rows are computed at once: the one mechanism wherever rows are split.

Every kind of work begins with a size. A piece that runs out of memory is halved and done again, and
what follows begins with the size that fitted; other pieces keep what they computed. No number
depends on it but in its last digits, because no row of a piece knows of the others; and for these
the parts of a run are split again as they were (`split.py`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from threading import RLock, local
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from holdfast.errors import OutOfMemoryError
from holdfast.split import Split, Splitting

T = TypeVar("T")

Work = Literal["passes", "generation", "steps", "discovery"]

WORK: Mapping[Work, str] = {
    "passes": "a forward pass over a whole prompt",
    "generation": "a prompt that is answered, with its keys and values kept",
    "steps": "a lane of a search's step, with its gradient",
    "discovery": "a prompt's pass with what every feature of an SAE does in it",
}
"""What one row is of each kind of work."""

FULL = ("out of memory", "DefaultCPUAllocator: can't allocate", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch's RuntimeErrors say where there is no memory left and no class of error for it."""


@dataclass(frozen=True)
class Sizes:
    """Most rows of a piece, by kind of work."""

    passes: int = 512
    generation: int = 512
    steps: int = 512
    discovery: int = 16

    def of(self, work: Work) -> int:
        return int(getattr(self, work))

    def at_most(self, *others: Sizes) -> Sizes:
        """The least of each."""
        return Sizes(**{w: min(s.of(w) for s in (self, *others)) for w in WORK})

    def at_least_one(self) -> Sizes:
        """What can be begun with: one row, also where not even one is said to fit."""
        return Sizes(**{work: max(1, self.of(work)) for work in WORK})

    @property
    def smallest(self) -> int:
        """Of the kinds of work that most of a trial is made of."""
        return min(self.passes, self.generation, self.steps)

    @classmethod
    def every(cls, rows: int) -> Sizes:
        """The same for all; features are found on fewer, if that is many."""
        return cls(rows, rows, rows, min(rows, MOST.discovery))


MOST = Sizes()
"""What is begun with where memory is no bound: more rows fill no device better. The codes of a
whole SAE are large, and few rows of them fill one."""


@dataclass(frozen=True)
class Beginning:
    """The sizes that work begins with, and why.

    asked: rows that were asked for, 0 for none; device: what memory it is, and how much of it;
    free_bytes: what was free of it; bytes_per_row: as forecast, by kind of work, of the trial that
    takes the most; why: in words; note: what of it the user should be told, if anything; parts:
    how parts that are done again were split.
    """

    sizes: Sizes = MOST
    asked: int = 0
    device: str = ""
    free_bytes: float | None = None
    bytes_per_row: Mapping[Work, float] | None = None
    why: str = "as many as are worth it: memory was not looked at"
    note: str = ""
    parts: Mapping[str, Split] = field(default_factory=dict)


class Batching:
    """The sizes of a run, shared by its subjects, and by trials that run side by side.

    changed: called, by one thread at a time, when `plan` is to be kept: a part of the run was split
    otherwise than its beginning says, or one begins after that.
    """

    def __init__(self, sizes: Sizes | int = MOST):
        self._lock = RLock()
        self._thread = local()
        self.changed: Callable[[], None] = lambda: None
        if isinstance(sizes, int):
            sizes = Sizes.every(sizes)
        self.begin(Beginning(sizes))

    def begin(self, beginning: Beginning) -> None:
        """Forget what was found, and begin with these sizes."""
        with self._lock:
            self._beginning = beginning
            self._rows: dict[Work, int] = {work: beginning.sizes.of(work) for work in WORK}
            self._halvings: dict[Work, int] = dict.fromkeys(WORK, 0)
            self._parts = dict(beginning.parts)

    @property
    def sizes(self) -> Sizes:
        """As they are now."""
        return Sizes(**self._rows)

    def plan(self) -> dict[str, Any]:
        """Plain JSON: what was begun with, why, and what it came to."""
        with self._lock:
            own, per_row = self._beginning, self._beginning.bytes_per_row or {}
            return {
                "batch_size": own.asked or "auto",
                "device": own.device,
                "free_bytes": own.free_bytes,
                "why": "; ".join(filter(None, (own.why, own.note))),
                "work": {
                    work: {
                        "rows": self._rows[work],
                        "begun_with": own.sizes.of(work),
                        "halvings": self._halvings[work],
                        "bytes_per_row": per_row.get(work),
                    }
                    for work in WORK
                },
            }

    def parts(self) -> dict[str, Any]:
        """Plain JSON: how the parts of the run were split; nothing where all were by one size."""
        with self._lock:
            if not self._uneven:
                return {}
            return {name: split.as_json() for name, split in self._parts.items()}

    @property
    def _uneven(self) -> bool:
        begun = asdict(self._beginning.sizes)
        return self._rows != begun or any(
            split.halved or split.begun_with != begun for split in self._parts.values()
        )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of a run, of this thread: it begins with the sizes of now, or, if a part of
        this name was begun before, is split as that was. A part within another is of its own."""
        with self._lock:
            if name not in self._parts:
                self._parts[name] = Split(asdict(self.sizes))
            if self._uneven:
                self.changed()
            own = Splitting(self._parts[name])
        with self._at_work(own):
            yield

    @contextmanager
    def _at_work(self, own: Splitting) -> Iterator[Splitting]:
        outer = self._now
        self._thread.now = own
        try:
            yield own
        finally:
            self._thread.now = outer

    @property
    def _now(self) -> Splitting | None:
        """The part that this thread is in."""
        return getattr(self._thread, "now", None)

    def halvings(self) -> list[str]:
        """What was too large, a sentence each."""
        return [
            f"out of memory with {own['begun_with']} rows at once ({work}), so it went on with "
            f"{own['rows']}; nothing was lost"
            for work, own in self.plan()["work"].items()
            if own["halvings"]
        ]

    def over(
        self,
        work: Work,
        rows: Tensor,
        do: Callable[[Tensor], T],
        mark: Callable[[], Callable[[], None]] | None = None,
        most: int | None = None,
    ) -> list[T]:
        """What `do` gives for consecutive pieces of rows [n], in order.

        A piece that does not fit is done again from its start, so `do` may change nothing outside
        of itself; mark: called before a piece, it returns what takes back whatever the piece has
        left behind; most: rows of a piece at most, where the work has a bound of its own. Raises
        OutOfMemoryError where a single row does not fit.
        """
        part = self._now
        if part is None:  # nobody will do it again
            with self._at_work(Splitting(Split(asdict(self.sizes)))):
                return self.over(work, rows, do, mark, most)
        part.depth += 1
        try:
            return self._over(part, work, rows, do, mark, most)
        finally:
            part.depth -= 1
            if not part.depth:
                self._learn(part)

    def _over(
        self,
        part: Splitting,
        work: Work,
        rows: Tensor,
        do: Callable[[Tensor], T],
        mark: Callable[[], Callable[[], None]] | None,
        most: int | None,
    ) -> list[T]:
        done: list[T] = []
        start, call = 0, part.call()
        while start < len(rows):
            size = part.size(work, call, start)
            piece = rows[start : start + (size if most is None else min(size, most))]
            take_back, stood = (mark() if mark is not None else None), part.mark()
            try:
                done.append(do(piece))
            except Exception as error:
                # A call within this one that has come down to a single row in vain: what this piece
                # holds may be what it lacks.
                within = isinstance(error, OutOfMemoryError)
                if not (within or is_out_of_memory(error)):
                    raise
                if len(piece) == 1:
                    if within:
                        raise
                    raise OutOfMemoryError(_one_row(work, error)) from error
            else:
                start += len(piece)
                continue
            # Outside of the handler: the error's traceback holds all that the piece had computed.
            if take_back is not None:
                take_back()
            part.halve(stood, work, len(piece), call, start, within)
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        return done

    def _learn(self, part: Splitting) -> None:
        """What follows begins with what fitted."""
        with self._lock:
            lower = False
            for work in WORK:
                if part.halvings[work] and part.rows[work] < self._rows[work]:
                    self._rows[work] = part.rows[work]
                    self._halvings[work] += part.halvings[work]
                    lower = True  # else another trial has met it before
            part.halvings.clear()
            if lower:
                self.changed()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or this machine, has no memory left."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in FULL)


@contextmanager
def explained() -> Iterator[None]:
    """Around a run: a lack of memory that no smaller piece can help says what to do.

    Raises OutOfMemoryError in the place of torch's errors.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory where no rows can be left for later ({_first_line(error)}). What "
            "finished is stored, and the same command goes on there. Use fewer prompts ([data], "
            "--limit), fewer trials side by side (--workers 1), a smaller dtype, or a device with "
            "more memory; `holdfast plan` says what a trial takes"
        ) from error


def _one_row(work: Work, error: BaseException) -> str:
    return (
        f"out of memory with a single row: {WORK[work]} does not fit beside what is held already "
        f"({_first_line(error)}). Use shorter prompts or answers, a smaller dtype or model, fewer "
        "trials side by side (--workers 1), or a device with more memory; `holdfast plan` says "
        "what a trial takes"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def kept_sizes(plan: Mapping[str, Any]) -> Sizes:
    """What a plan came to. Raises KeyError, TypeError or ValueError where it is none."""
    return Sizes(**{field.name: int(plan["work"][field.name]["rows"]) for field in fields(Sizes)})


def kept_parts(plan: Mapping[str, Any]) -> dict[str, Split]:
    """How parts were split. Raises KeyError, TypeError or ValueError where it cannot be read."""
    return {name: Split.of_json(kept) for name, kept in plan.get("parts", {}).items()}


def spelled(sizes: Sizes) -> str:
    """The sizes for people."""
    return ", ".join(f"{work} {n}" for work, n in asdict(sizes).items())
