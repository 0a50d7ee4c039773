"""The encoder of a TopK, a block of features at a time: in memory, or left in its file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.capacity import total_bytes
from holdfast.errors import SAEError
from holdfast.saes.sae import STORED, blocks_of, is_finite
from holdfast.saes.tensors import Stored, whole
from holdfast.waiting import carried

SHARE = 0.25
"""Of a device's memory: what an encoder may take of it for as long as it is used."""


class Encoder(Protocol):
    """Columns [d_model n_features]."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def blocks(self, n_tokens: int) -> Iterator[slice]:
        """All features in slices for which columns, where they have to be read, and pre-activations
        can be held at a time."""
        ...

    def columns(self, own: slice, device: torch.device) -> Tensor:
        """[d_model m] those of a block, in the precision they are kept in."""
        ...

    def to(self, device: torch.device | str) -> Encoder: ...


@dataclass(frozen=True)
class Held:
    """In memory, W [d_model n_features]."""

    W: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        d, n = self.W.shape
        return d, n

    def blocks(self, n_tokens: int) -> Iterator[slice]:
        return blocks_of(self.shape[1], n_tokens)

    def columns(self, own: slice, device: torch.device) -> Tensor:
        return self.W[:, own].to(device)

    def to(self, device: torch.device | str) -> Held:
        return replace(self, W=self.W.to(device))


@dataclass(frozen=True)
class Streamed:
    """In its file, of which a block is read when it is used. What the system keeps of a file that
    was read is memory it takes back where others need it.

    stored: the matrix as the file has it; axis: which of its axes features are along; n: how many
    of them, from the first on.
    """

    stored: Stored
    axis: int
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[1 - self.axis], self.n

    def blocks(self, n_tokens: int) -> Iterator[slice]:
        d, n = self.shape
        return blocks_of(n, max(n_tokens, d))

    def columns(self, own: slice, device: torch.device) -> Tensor:
        read = self.stored.between(own, self.axis)
        return carried(read if self.axis == 1 else read.T, device)

    def to(self, device: torch.device | str) -> Streamed:
        return self  # blocks go where the residuals are


def kept(d: int, n: int, itemsize: int, memory: float) -> int:
    """Bytes of a number of an encoder [d n] that is kept in so many bytes of memory: 4 where it is
    kept in float32, `itemsize` where only the file's precision takes at most SHARE of the memory, 0
    where it is left in its file."""
    room = SHARE * memory
    return next((size for size in (4, itemsize) if size * d * n <= room), 0)


def encoder_of(stored: Stored, axis: int, n: int, device: torch.device | str) -> Encoder:
    """The first n features of a stored matrix, as `kept` says, on a device. What cannot be read in
    parts is kept whatever it takes. Raises SAEError on NaN."""
    d, every = stored.shape[1 - axis], stored.shape[axis]
    size = kept(d, n, min(4, stored.dtype.itemsize), total_bytes(device))
    if size == 0 and stored.in_parts:
        if not all(is_finite(part) for _, part in stored.parts()):
            raise SAEError(NOT_FINITE)
        return Streamed(stored, axis, n)
    if n < every:
        read = stored.take(range(n), axis)
        W = (read if axis == 1 else read.T).to(torch.float32 if size == 4 else read.dtype)
    else:
        own = torch.float32 if size == 4 or stored.dtype not in STORED else stored.dtype
        # As it lies in the file: turning it takes longer than reading it, and products need it not.
        read = stored.read() if stored.dtype == own else whole(stored)
        W = read if axis == 1 else read.T
    if not is_finite(W):
        raise SAEError(NOT_FINITE)
    return Held(W.to(device))


NOT_FINITE = "W_enc has NaN or infinite values"
