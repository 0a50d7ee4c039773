"""All features of a TopK SAE, as far as they decide which of them are on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.saes.encoders import Encoder, Held
from holdfast.saes.inputs import Inputs
from holdfast.saes.products import product
from holdfast.saes.sae import SAE, kth_of


@dataclass(frozen=True)
class Rivals:
    """The encoder of a TopK SAE: half of it, for its decoder decides nothing.

    Tensors as in `SAE`; those of one in memory are shared with it. scale [n_features]: a factor on
    the columns, where they have not got it already.
    """

    encoder: Encoder
    b_enc: Tensor
    b_dec: Tensor
    subtract_b_dec: bool
    k: int
    inputs: Inputs
    scale: Tensor | None = None

    @classmethod
    def of(cls, sae: SAE) -> Rivals:
        assert sae.k is not None, "only in a TopK do features compete"
        encoder = Held(sae.W_enc)
        return cls(encoder, sae.b_enc, sae.b_dec, sae.subtract_b_dec, sae.k, sae.inputs)

    def limit(self, x: Tensor) -> Tensor:
        """[... 1] what a pre-activation of residuals x [... d_model] must exceed to be among the k
        largest; a block of features is computed at a time. It carries no gradient."""
        there = x.detach().to(self.b_dec.device)
        read = self.inputs.enter(there if x.dtype == torch.float64 else there.float())
        read = read - self.b_dec if self.subtract_b_dec else read
        return kth_of(self._preactivations(read), self.k).to(x.device)

    def _preactivations(self, x: Tensor) -> Iterator[Tensor]:
        """[... m] of a block of features after the other."""
        for own in self.encoder.blocks(x.shape[:-1].numel()):
            p = product(x, self.encoder.columns(own, x.device))
            p = p if self.scale is None else p * self.scale[own].to(x.device)
            yield p + self.b_enc[own].to(x.device)

    def to(self, device: torch.device | str) -> Rivals:
        there = {name: getattr(self, name) for name in ("encoder", "b_enc", "b_dec", "scale")}
        return replace(self, **{name: t.to(device) for name, t in there.items() if t is not None})
