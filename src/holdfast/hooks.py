"""The only file that touches torch hooks.

Edits are attached to decoder blocks for the length of a `with` block, see absolute positions, take
tuple or tensor outputs, and are gone afterwards even if the pass raised. A pass in which an edit
never fired is an error: a hook that does nothing is the most quiet way to a wrong number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdfast.batch import Frame
from holdfast.calls import Calls
from holdfast.edits import Edit, decided_on_whole
from holdfast.errors import EditError
from holdfast.families import family_of
from holdfast.sites import Site
from holdfast.waiting import perhaps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_edits(edits: Sequence[Edit], site: Site, x: Tensor, frame: Frame) -> Tensor:
    """x [b s d] after every edit of `site`, in order.

    Whether an edit selects anything in the frame is not asked: the answer would have to be waited
    for, and an edit leaves alone what it does not select.
    """
    for edit in edits:
        if site in edit.sites:
            x = edit.apply(site, x, frame)
    return x


Fired = Mapping[tuple[int, Site], int | Tensor]
"""On how many tokens an edit, by its id(), has acted at a site."""


class AttachedEdits:
    """Edits attached to a model's blocks, used as a context manager.

    `frame` says which rows and columns the next forward call is about; set it before every call.
    """

    def __init__(self, blocks: nn.ModuleList, edits: Sequence[Edit]):
        self._blocks = blocks
        self._edits = tuple(edits)
        self._handles: list[Any] = []
        self._fired: dict[tuple[int, Site], int | Tensor] = defaultdict(int)
        self.frame: Frame | None = None

    def __enter__(self) -> AttachedEdits:
        try:
            for site in sorted({site for edit in self._edits for site in edit.sites}):
                self._attach(site)
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._detach()
        if kind is None:
            for index, edit in enumerate(self._edits):
                for site in edit.sites:
                    edit.check_fired(site, int(self._fired[index, site]))

    def fired(self) -> Fired:
        """So far, in all passes."""
        return {(id(self._edits[i]), site): n for (i, site), n in self._fired.items()}

    def credit(self, fired: Fired) -> None:
        """Count what edits did in passes that were run before and stand for a part of these."""
        for index, edit in enumerate(self._edits):
            for site in edit.sites:
                self._count((index, site), fired.get((id(edit), site), 0))

    def _count(self, which: tuple[int, Site], n: int | Tensor) -> None:
        # A number on the device until somebody asks, and never changed in place: it may be kept.
        self._fired[which] = self._fired[which] + n

    def mark(self) -> Callable[[], None]:
        """What takes back all that the edits will have noted from here on: a piece of rows that ran
        out of memory is done again, and nothing of it may be read or counted twice.

        An edit keeps what it notes in lists, sets or dicts of its own, or in attributes that it
        sets anew.
        """
        fired = dict(self._fired)
        noted = [
            (edit, {name: _copied(value) for name, value in vars(edit).items()})
            for edit in self._edits
            if not _is_frozen(edit)
        ]

        def take_back() -> None:
            self._fired = defaultdict(int, fired)
            for edit, before in noted:
                vars(edit).clear()
                vars(edit).update(before)

        return take_back

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach(self, site: Site) -> None:
        if site.depth > len(self._blocks):
            raise EditError(
                f"no site {site}: the model has {len(self._blocks)} blocks (0 to "
                f"{len(self._blocks) - 1})"
            )
        if site.depth == 0:

            def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                return (self._edit(site, args[0]), *args[1:])

            self._handles.append(self._blocks[0].register_forward_pre_hook(before))
            return

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            # transformers blocks return a tensor or a tuple that begins with it, by version
            if isinstance(output, tuple):
                return (self._edit(site, output[0]), *output[1:])
            return self._edit(site, output)

        self._handles.append(self._blocks[site.layer].register_forward_hook(after))

    def _edit(self, site: Site, x: Tensor) -> Tensor:
        frame = self.frame
        if frame is not None and frame.positions.device != x.device:
            # A model that is spread over devices hands its residual from one to the next.
            frame = self.frame = frame.to(x.device)
        if frame is None or x.ndim != 3 or x.shape[:2] != frame.positions.shape:
            expected = (
                "a call of the whole model, which says what rows and positions these are"
                if frame is None
                else f"a residual [b s d_model] with [b s] = {tuple(frame.positions.shape)}"
            )
            raise EditError(f"at {site}: expected {expected}, got a block's {tuple(x.shape)}")
        for index, edit in enumerate(self._edits):
            if site in edit.sites:
                selected = edit.selects(site, frame)
                self._count((index, site), selected.sum())
                # One that decides on the prompt has to see it, also where it acts on the answer.
                # Where the device is not asked, an edit that selects nothing changes nothing.
                if perhaps(selected) or decided_on_whole((edit,)):
                    x = edit.apply(site, x, frame)
        return x


def _is_frozen(edit: Edit) -> bool:
    """Whether an edit can note nothing, as a frozen record cannot."""
    made = getattr(edit, "__dataclass_params__", None)
    return bool(made and made.frozen)


def _copied(value: Any) -> Any:
    return copy(value) if isinstance(value, list | set | dict) else value


@contextmanager
def attached(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    group: str | None = None,
    template_tokens: int | None = None,
) -> Iterator[None]:
    """Edits on a plain transformers model, for every call and generation inside a `with` block.

    Positions come from the attention mask, the prompt is what is in the call with an empty cache,
    and BOS is what the model's configuration says. group: for features that were fitted by group;
    template_tokens: how many tokens the chat template puts after the instruction, for positions
    `template`. Raises EditError where the positions cannot be known, SubjectError for an unknown
    family; at the end EditNeverFiredError, or PositionError if only some rows had a listed
    position. Afterwards the model is as it was.
    """
    calls = Calls(model, edits, group, template_tokens)
    blocks = family_of(model.config, model).blocks_of(model)
    with AttachedEdits(blocks, edits) as inside:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside.frame = calls.begin(args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inside.frame = None
            calls.end(output)

        handles: list[Any] = [model.register_forward_pre_hook(before, with_kwargs=True)]
        try:
            handles.append(model.register_forward_hook(after))
            yield
        finally:
            for handle in handles:
                handle.remove()
        calls.check_reached()


See = Callable[[int, tuple[Any, ...], Any], Any]
"""Told a module's place in its list, the arguments it was called with, and what it returned; what
it gives back stands in for that, None for no change."""


@contextmanager
def tapped(*taps: tuple[Sequence[nn.Module], See]) -> Iterator[None]:
    """Watch, or stand in for, what modules inside the blocks return, inside a `with` block.

    Edits act on the residual stream between blocks and are what a study can ask for; this is for
    measuring what the parts of a block do. Raises EditError if a module was never called.
    """
    called: dict[tuple[int, int], int] = defaultdict(int)
    handles = []
    try:
        for tap, (modules, see) in enumerate(taps):
            for index, module in enumerate(modules):

                def after(
                    module: nn.Module, args: tuple[Any, ...], output: Any,
                    tap: int = tap, index: int = index, see: See = see,
                ) -> Any:  # fmt: skip
                    called[tap, index] += 1
                    return see(index, args, output)

                handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
    for tap, (modules, _) in enumerate(taps):
        missing = [index for index in range(len(modules)) if not called[tap, index]]
        if missing:
            raise EditError(
                f"{type(modules[missing[0]]).__name__} of block {missing[0]} was never called in "
                "this pass, so that nothing could be read from it"
            )


def record_calls(
    blocks: nn.ModuleList, run: Callable[[], None]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments each block was called with during `run()`, in block order.

    This is how replay needs no code per family: masks, rotary embeddings and whatever else a
    family passes are taken as they were. Raises EditError if a block was not called exactly once.
    """
    calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = defaultdict(list)
    handles = []
    try:
        for layer, block in enumerate(blocks):

            def before(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer
            ) -> None:
                calls[layer].append((args, dict(kwargs)))

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    counts = [len(calls[layer]) for layer in range(len(blocks))]
    if counts != [1] * len(blocks):
        raise EditError(f"expected one call of each block in a pass, counted {counts}")
    return [calls[layer][0] for layer in range(len(blocks))]
