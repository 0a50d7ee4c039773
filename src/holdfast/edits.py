"""Edits: everything that touches activations, and the only place where it is done.

A clamp is an edit, a perturbation is an edit, reading a residual is an edit that returns what it
got. Edits at one site act in the order of the tuple they are given in; sites act in forward order,
so a later site sees what earlier edits did.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.errors import EditNeverFiredError, PositionError
from holdfast.gates import Gating
from holdfast.positions import Where, check_possible, selected
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sae import SAE
from holdfast.sites import Site


@runtime_checkable
class Edit(Protocol):
    """A change of the residual stream at some sites and positions."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it acts on."""
        ...

    def selects(self, site: Site, frame: Frame) -> Tensor:
        """[b s] bool: the tokens it acts on. Where this is false, x must come back bit-equal."""
        ...

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        """The residual after the edit, [b s d_model], in the dtype of x."""
        ...

    def check_fired(self, site: Site, n_fired: int) -> None:
        """Raise EditError if acting on `n_fired` tokens in a whole pass is not what was asked."""
        ...


@runtime_checkable
class Placed(Protocol):
    """An edit that names positions which a prompt may not have."""

    def check_inside(self, batch: Batch, n_generated: int = 0) -> None:
        """Raise PositionError if they are outside a prompt and what is generated."""
        ...


@runtime_checkable
class Deciding(Protocol):
    """An edit that may decide on a whole prompt what it does to each token of it."""

    @property
    def decides_on(self) -> str:
        """What it decides on, if that is more than each token by itself; empty otherwise."""
        ...


def decided_on_whole(edits: Sequence[Edit]) -> str:
    """What the first of the edits that decide on a whole prompt decides on; empty if none does."""
    reasons = (edit.decides_on for edit in edits if isinstance(edit, Deciding))
    return next(filter(None, reasons), "")


def in_order(clamp: Sequence[Edit], added: Edit, clamp_first: bool) -> tuple[Edit, ...]:
    """A clamp's edits and what is added to the residual, so that the one or the other has the last
    word at a site (METHODS A.9)."""
    return (*clamp, added) if clamp_first else (added, *clamp)


def never_fired(edit: object, site: Site) -> EditNeverFiredError:
    return EditNeverFiredError(
        f"{type(edit).__name__} at {site} touched no token of any row; check its positions and "
        "whether BOS is excluded"
    )


def splice(x: Tensor, change: Tensor, mask: Tensor) -> Tensor:
    """x + change where mask, x itself (bit-equal) elsewhere; the sum is taken in float32 at least.

    x [b s d], change [b s d], mask [b s].
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(mask[..., None], (wide + change).to(x.dtype), x)


MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "set": lambda z, value: value.expand_as(z),
    "set_where_active": lambda z, value: torch.where(z > 0, value, z),
    "multiply": lambda z, value: value * z,
    "add": lambda z, value: z + value,
    "floor": lambda z, value: torch.maximum(z, value),
    "ceiling": lambda z, value: torch.minimum(z, value),
}
"""What a feature is given, from its present value z and a value of its own (METHODS A.3)."""


@dataclass(frozen=True)
class FeatureEdit:
    """Give some features new values: `x + Σ_i (c_i − z_i)·W_dec[i] − (1 − α)·e`.

    The sum is the error-preserving clamp `D(clamp(z)) + (x − D(z))` for any linear decoder, with
    only |S| columns and rows (METHODS 0.2). `e = x − D(E(x))` is the SAE's error: α = 1 keeps it
    (and needs no full encode), α = 0 drops it, so that the clamped reconstruction is passed on.
    All c_i are computed from the same z, before any of them is set. value: one number for all
    features, or [g k] like the bank's other tensors; gate: where it acts, None for everywhere.
    """

    bank: FeatureBank
    mode: str
    value: float | Tensor
    where: Where = "all"
    include_bos: bool = False
    error_scale: float = 1.0
    sae: SAE | None = None
    gate: Gating | None = None

    def __post_init__(self) -> None:
        assert self.mode in MODES, self.mode
        assert self.error_scale == 1.0 or self.sae is not None, "scaling the error needs the SAE"
        assert self.gate is None or self.gate.site <= self.bank.site

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.bank.site,)

    @property
    def decides_on(self) -> str:
        return "" if self.gate is None else self.gate.decides_on

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return selected(self.where, self.include_bos, frame)

    def check_inside(self, batch: Batch, n_generated: int = 0) -> None:
        """Raise PositionError if a prompt has not what the policy names."""
        check_possible(self.where, self.include_bos, batch.frame(), n_generated)

    def assigned(self, z: Tensor, frame: Frame) -> Tensor:
        """The value each feature is given, from its present value z [b s k]."""
        if isinstance(self.value, Tensor):
            value = self.bank.rows(self.value, frame).to(z.dtype)
        else:
            value = torch.full((), self.value, dtype=z.dtype, device=z.device)
        # The bank's padding has z = 0 and rows of zeros: what it is given changes nothing.
        return MODES[self.mode](z, value)

    def finds(self, x: Tensor, frame: Frame) -> Tensor:
        """[b s m] bool: what it finds at the tokens it acts on, false at all others: which of its
        features are on, of a scaled error which of the SAE's; last, that its gate is open."""
        on = [self.bank.activations(x, frame) > 0]
        if self.sae is not None and self.error_scale != 1.0:
            on.append(self.sae.encode(x.float()) > 0)
        opens = on[0].new_ones(x.shape[:2]) if self.gate is None else self.gate.opens(x, frame)
        return (
            torch.cat([*on, opens[..., None]], -1) & self.selects(self.bank.site, frame)[..., None]
        )

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        z = self.bank.activations(x, frame)
        change = self.bank.decode(self.assigned(z, frame) - z, x, frame)
        if self.sae is not None and self.error_scale != 1.0:
            h = x.float()
            error = h - self.sae.reconstruct(h)
            change = change - (1.0 - self.error_scale) * error
        mask = self.selects(site, frame)
        if self.gate is not None:
            mask = mask & self.gate.opens(x, frame)
        return splice(x, change, mask)

    def check_fired(self, site: Site, n_fired: int) -> None:
        if n_fired == 0:
            raise never_fired(self, site)


@dataclass(frozen=True)
class Perturbation:
    """Vectors added to the residual at absolute positions, one set a prompt.

    deltas: site → [b p d_model] float32; positions [b p] absolute, -1 where a row has fewer;
    rows are found by example id, so a pass over some of the rows adds the right vectors.
    """

    ids: tuple[str, ...]
    positions: Tensor
    deltas: Mapping[Site, Tensor]
    _row: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        b, p = self.positions.shape
        assert len(self.ids) == b
        for site, delta in self.deltas.items():
            assert delta.shape[:2] == (b, p), f"{site}: {tuple(delta.shape)} for {(b, p)}"
        object.__setattr__(self, "_row", {example: row for row, example in enumerate(self.ids)})

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.deltas)

    @property
    def norm(self) -> Tensor:
        """[b] Frobenius norm over all perturbed sites and positions, in residual units."""
        squares = [delta.double().pow(2).sum((1, 2)) for delta in self.deltas.values()]
        return torch.stack(squares).sum(0).sqrt()

    def _own_rows(self, frame: Frame) -> Tensor:
        return frame.once_for_rows(self, lambda: self._found(frame))

    def _found(self, frame: Frame) -> Tensor:
        unknown = [example for example in frame.ids if example not in self._row]
        if unknown:
            raise PositionError(
                f"the perturbation has no vectors for the prompts {unknown[:3]}; it was made for "
                f"{len(self.ids)} others"
            )
        return torch.as_tensor([self._row[e] for e in frame.ids], device=self.positions.device)

    def _matches(self, frame: Frame) -> Tensor:
        """[b p s] bool: perturbed position p of the row is column s of the frame."""
        own = self.positions[self._own_rows(frame)].to(frame.positions.device)
        return (own[:, :, None] == frame.positions[:, None, :]) & (own >= 0)[:, :, None]

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return self._matches(frame).any(1)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        matches = self._matches(frame)
        delta = self.deltas[site][self._own_rows(frame)].to(x.device)
        change = torch.einsum("bps,bpd->bsd", matches.to(delta.dtype), delta)
        return splice(x, change, matches.any(1))

    def check_fired(self, site: Site, n_fired: int) -> None:
        # Which rows ran is not known here, so the exact count is checked by `check_inside`.
        if n_fired == 0:
            raise never_fired(self, site)

    def rows(self, rows: Tensor) -> Perturbation:
        """The vectors of some prompts, in the order given."""
        own = rows.to(self.positions.device)
        return Perturbation(
            tuple(self.ids[row] for row in rows.tolist()),
            self.positions[own],
            {site: delta[rows.to(delta.device)] for site, delta in self.deltas.items()},
        )

    def within(self, batch: Batch) -> Perturbation:
        """The vectors at positions that the rows of `batch` have: a text may end before the last
        of them."""
        end = batch.positions[self._rows_of(batch), -1:] + 1
        return replace(self, positions=torch.where(self.positions < end, self.positions, -1))

    def _rows_of(self, batch: Batch) -> list[int]:
        return [batch.ids.index(example) for example in self.ids]

    def check_inside(self, batch: Batch, n_generated: int = 0) -> None:
        """Raise PositionError if a position lies outside the prompt and what is generated.

        The published code skips such rows silently, which is how its answer perturbations came to
        act nowhere (METHODS D.9-1).
        """
        own = self.positions[self._own_rows(batch.frame())]
        end = batch.positions[:, -1:] + 1 + n_generated
        outside = own >= end
        if outside.any():
            row = int(outside.any(1).int().argmax())
            raise PositionError(
                f"prompt {batch.ids[row]}: perturbed positions {own[row].tolist()}, but the "
                f"sequence has positions 0 to {int(end[row, 0]) - 1}"
            )


class EveryToken(ABC):
    """An edit that meets every token at one site. Most of these read the residual there, and give
    it back as it is."""

    site: Site

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return frame.positions >= 0

    @abstractmethod
    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor: ...

    def check_fired(self, site: Site, n_fired: int) -> None:
        if n_fired == 0:
            raise never_fired(self, site)


@dataclass
class Capture(EveryToken):
    """Reads the residual at one site as the edits before it in the tuple left it.

    The one edit with state: `seen` holds (frame, x) of every pass, x detached.
    """

    site: Site
    seen: list[tuple[Frame, Tensor]] = field(default_factory=list)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.seen.append((frame, x.detach()))
        return x

    def at(self, ids: tuple[str, ...], positions: Tensor) -> Tensor:
        """[b p d_model]: what was read for the prompts `ids` at absolute positions [b p].

        Rows of -1 come back as zeros, all on the device of `positions`. Raises PositionError if a
        position was never seen.
        """
        aimed = CaptureAt(self.site, ids, positions)
        for frame, x in self.seen:
            aimed.apply(self.site, x, frame)
        return aimed.read


@dataclass
class CaptureAt(EveryToken):
    """Reads the residual of the prompts `ids` at absolute positions [b p], -1 where a row has
    fewer, and keeps nothing of other tokens.

    seen: of every pass the rows that it had [m], which of their positions were there [m p], and
    what was read [m p d_model] float32.
    """

    site: Site
    ids: tuple[str, ...]
    positions: Tensor
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        here = [(i, self._row[e]) for i, e in enumerate(frame.ids) if e in self._row]
        if here:
            local, rows = (torch.as_tensor(column) for column in zip(*here, strict=True))
            wanted, there = self.positions[rows], frame.positions[local].to(self.positions.device)
            match = (wanted[:, :, None] == there[:, None, :]) & (wanted >= 0)[:, :, None]
            column = match.int().argmax(-1).to(x.device)
            values = x.detach()[local[:, None], column].float()
            self.seen.append((rows, match.any(-1), values.to(self.positions.device)))
        return x

    @cached_property
    def _row(self) -> dict[str, int]:
        return {example: row for row, example in enumerate(self.ids)}

    def columns(self, n: int) -> CaptureAt:
        """What was read at the first n of the positions."""
        seen = [(rows, there[:, :n], x[:, :n]) for rows, there, x in self.seen]
        return CaptureAt(self.site, self.ids, self.positions[:, :n], seen)

    @property
    def read(self) -> Tensor:
        """[b p d_model] float32, on the device of the positions; rows of -1 come back as zeros.
        Raises PositionError if a position was never seen."""
        d = self.seen[0][2].shape[-1] if self.seen else 0
        device = self.positions.device
        found = torch.zeros(self.positions.shape, dtype=torch.bool, device=device)
        out = torch.zeros(*self.positions.shape, d, device=device)
        for rows, hit, values in self.seen:
            out[rows] = torch.where(hit[..., None], values, out[rows])
            found[rows] |= hit
        missing = ~found & (self.positions >= 0)
        if missing.any():
            row = int(missing.any(1).int().argmax())
            raise PositionError(
                f"prompt {self.ids[row]}: nothing was read at {self.site} at the positions "
                f"{self.positions[row][missing[row]].tolist()}"
            )
        return out
