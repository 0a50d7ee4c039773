"""All features of a TopK SAE, as far as they decide which of them are on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.saes.inputs import Inputs
from holdfast.saes.sae import SAE, kth_in_blocks


@dataclass(frozen=True)
class Rivals:
    """The encoder of a TopK SAE: half of it, for its decoder decides nothing.

    Tensors as in `SAE`; they are shared with it.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    subtract_b_dec: bool
    k: int
    inputs: Inputs

    @classmethod
    def of(cls, sae: SAE) -> Rivals:
        assert sae.k is not None, "only in a TopK do features compete"
        return cls(sae.W_enc, sae.b_enc, sae.b_dec, sae.subtract_b_dec, sae.k, sae.inputs)

    def limit(self, x: Tensor) -> Tensor:
        """[... 1] what a pre-activation of residuals x [... d_model] must exceed to be among the k
        largest; a block of features is computed at a time."""
        x = self.inputs.enter(x if x.dtype == torch.float64 else x.float())
        x = x - self.b_dec if self.subtract_b_dec else x
        return kth_in_blocks(x, self.W_enc, self.b_enc, self.k)

    def to(self, device: torch.device | str) -> Rivals:
        names = ("W_enc", "b_enc", "b_dec")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})
