"""Pretend cards: tensors that say they lie on one, computed on the CPU, that refuse to meet.

What a machine with several GPUs refuses is refused here: an operation whose tensors lie on two
devices. As there, an index may wait on the host, and so may a number. Nothing is looked up by
device in what torch runs below, so no such hardware is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CARD = "xla"
"""A kind of device that torch knows by name and never initializes."""
HOST = torch.device("cpu")
ANYWHERE = torch.device("meta")
"""Of constants that torch makes by itself, which it takes to be where its tensors are."""


class TwoCardsError(AssertionError):
    """Tensors of two devices met in an operation."""


class OnCard(Tensor):
    """A tensor that says it lies on a card; `held` has its numbers."""

    held: Tensor
    card: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, card: torch.device) -> OnCard:
        made: OnCard = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta", requires_grad=False,
        )  # type: ignore[attr-defined]  # fmt: skip
        made.held, made.card = held, card
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.card

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TwoCardsError("numpy() of a tensor on a card")

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnCard({self.held}, {self.card})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Cards(TorchDispatchMode):
    """Tensors that are made on a card are there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


MOVES = ("aten::_to_copy", "aten::copy_", "aten::to")


def run(func: Any, args: Any, kwargs: Any) -> Any:
    flat = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    name = func._schema.name
    asked = kwargs.get("device")
    if asked is not None:
        asked = torch.device(asked)
        kwargs = kwargs | {"device": HOST}
    places = [t.card if isinstance(t, OnCard) else HOST for t in flat]
    card = place_of(name, flat, places)
    if asked is not None and (not flat or asked != ANYWHERE):
        card = asked if asked.type in (CARD, "meta") else HOST
    plain = tree_map(lambda t: t.held if isinstance(t, OnCard) else t, (args, kwargs))
    out = func(*plain[0], **plain[1])
    if name.endswith("_") and not name.endswith("__"):
        return args[0]  # in place: the tensor itself
    if card == HOST:
        return out
    return tree_map(lambda t: OnCard(t, card) if isinstance(t, Tensor) else t, out)


def place_of(name: str, tensors: list[Tensor], places: list[torch.device]) -> torch.device:
    """Where the result of an operation is. Raises TwoCardsError if there is no such place."""
    known = [(t, p) for t, p in zip(tensors, places, strict=True) if p != ANYWHERE]
    if not known:
        return ANYWHERE if tensors else HOST
    tensors, places = [t for t, _ in known], [p for _, p in known]
    if name.startswith(MOVES):
        return places[0]
    if name.startswith("aten::index") and "index_select" not in name and "index_add" not in name:
        # Indices may wait on the host, not the other way round.
        if any(p not in (HOST, places[0]) for p in places[1:]):
            raise TwoCardsError(f"{name}: {places[0]} indexed or filled from {places[1:]}")
        return places[0]
    wide = {p for t, p in zip(tensors, places, strict=True) if t.ndim or p != HOST}
    numbers = {p for t, p in zip(tensors, places, strict=True) if not t.ndim}
    if len(wide) > 1:
        shapes = [(tuple(t.shape), str(p)) for t, p in zip(tensors, places, strict=True)]
        raise TwoCardsError(f"{name}: {shapes}")
    return next(iter(wide or numbers))


def on_card(tensor: Tensor, card: int) -> OnCard:
    return OnCard(tensor.detach().clone(), torch.device(CARD, card))


def spread(model: Any, layers: nn.ModuleList, cards: list[int], last: int) -> None:
    """Lay a model out as accelerate does: embeddings on card 0, every block on its own, what is
    after them on the last; a module's inputs are brought to it, the cache is left where it is, and
    the whole gives its logits where its tokens came from."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    for child in [*inner.children(), *model.children()]:
        if child is not inner and child is not layers and child not in layers:
            before_blocks = "Embedding" in type(child).__name__
            put(child, 0 if before_blocks else last)
    for block, card in zip(layers, cards, strict=True):
        put(block, card)

    def back(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        output.logits = output.logits.to(kwargs["input_ids"].device)
        return output

    model.register_forward_hook(back, with_kwargs=True)


def put(module: nn.Module, card: int) -> None:
    for own in module.modules():
        for name, parameter in list(own._parameters.items()):
            if parameter is not None:
                own._parameters[name] = nn.Parameter(on_card(parameter, card), requires_grad=False)
        for name, buffer in list(own._buffers.items()):
            if buffer is not None:
                own._buffers[name] = on_card(buffer, card)
    device = torch.device(CARD, card)
    module._hf_hook = SimpleNamespace(execution_device=device)  # as accelerate leaves it

    def bring(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def there(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return tree_map(there, args), {
            k: v if k in ("past_key_values", "past_key_value") else tree_map(there, v)
            for k, v in kwargs.items()
        }

    module.register_forward_pre_hook(bring, with_kwargs=True, prepend=True)


class Move(torch.autograd.Function):
    """To another device, and the gradient back from there: where from torch would not know."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, there: torch.device, home: torch.device) -> Tensor:
        made: Tensor = torch.ops.aten._to_copy(x, device=there)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.there, ctx.home = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Move.apply(gradient, ctx.home, ctx.there), None, None


def moved(func: Any, args: Any, kwargs: Any) -> Tensor:
    """`x.to(…)` and `x.cpu()`, of which what is said of a device is done by `Move`."""
    x, *rest = args
    device = kwargs.pop("device", HOST if func is Tensor.cpu else None)
    others = []
    for value in rest:
        if isinstance(value, Tensor):
            device = value.device
            others.append(value.dtype)
        elif isinstance(value, torch.device | str):
            device = torch.device(value)
        elif value is not None:
            others.append(value)
    if device is not None and x.device != torch.device(device):
        x = Move.apply(x, torch.device(device), x.device)
    return x.to(*others, **kwargs) if others or kwargs else x


class Made(TorchFunctionMode):
    """Tensors that are made of Python's numbers, which torch puts on a device by itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.as_tensor, torch.tensor, Tensor.new_tensor):
            asked = kwargs.pop("device", None)
            if func is Tensor.new_tensor:
                asked = asked or args[0].device
                func, args = torch.tensor, (args[1],)
                kwargs.setdefault("dtype", None)
            made = func(*args, **kwargs)
            return made if asked is None else made.to(asked)
        if func in (Tensor.to, Tensor.cpu):
            return moved(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def cards() -> Iterator[None]:
    """Around everything that is done with a model that is spread over cards."""
    with Made(), Cards():
        yield
