"""Every feature of an SAE on some residuals, a piece of the features at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from holdfast.saes.bank import rivals_of
from holdfast.saes.sae import SAE, Slice, activate
from holdfast.saes.stored import StoredSAE


@dataclass(frozen=True)
class Piece:
    """k neighboring features of an SAE on m residuals.

    own: their columns and rows; p, z [m k]: pre-activations and codes, in the dtype of the
    residuals; limit: what p must exceed, broadcastable to [m k].
    """

    own: Slice
    p: Tensor
    z: Tensor
    limit: Tensor


def encoded(sae: SAE | StoredSAE, x: Tensor) -> Iterator[Piece]:
    """What every feature does on residuals x [m d_model], float32 or wider.

    No more than a piece of the SAE is in memory at a time, but for the encoder of a TopK, which the
    k-th value needs.
    """
    rivals = rivals_of(sae)
    kth = None if rivals is None else rivals.limit(x)
    entered = x if sae.inputs.affine else sae.inputs.enter(x)
    for own in sae.pieces(len(x)):
        p = entered @ own.W_enc.to(x.dtype) + own.b_enc.to(x.dtype)
        limit = own.threshold.to(x.dtype)
        limit = limit if kth is None else limit.maximum(kth)
        yield Piece(own, p, activate(p, limit, own.gain * p + own.offset), limit)
