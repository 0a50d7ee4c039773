"""How a format keeps an SAE in a file: the names, turns and constants a reader needs.

A format (one file each in `formats/`) looks at a folder and returns a Layout; everything after
that is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from holdfast.errors import SAEError
from holdfast.saes.inputs import Inputs
from holdfast.saes.sae import Facts, Weights
from holdfast.saes.tensors import read_tensors


@dataclass(frozen=True)
class Layout:
    """An SAE on disk. Tensor names are those of the file; None where the format has none.

    enc_transposed, dec_transposed: the file holds [n_features d_model] encoders, [d_model
    n_features] decoders, as torch's Linear keeps them. threshold: a name, or one number for all.
    r_mag, b_mag: a gated SAE's magnitudes `relu(exp(r_mag)·(x·W_enc) + b_mag)`, its b_enc being
    the gate's bias. feature_scale: factors on the codes before decoding. rescale: pre-activations
    are compared in units of the decoder's norms (SAELens `rescale_acts_by_decoder_norm`).
    site: the spelling the file gives, None if it gives none.
    """

    folder: Path
    file: str
    W_enc: str = "W_enc"
    W_dec: str = "W_dec"
    b_enc: str | None = "b_enc"
    b_dec: str = "b_dec"
    enc_transposed: bool = False
    dec_transposed: bool = False
    threshold: str | float | None = None
    r_mag: str | None = None
    b_mag: str | None = None
    k: int | None = None
    subtract_b_dec: bool = False
    feature_scale: str | None = None
    rescale: bool = False
    inputs: Inputs = field(default_factory=Inputs)
    site: str | None = None
    facts: Facts = field(default_factory=Facts)
    hashed: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.folder / self.file

    def shape(self) -> tuple[int, int]:
        """(d_model, n_features). Raises SAEError if tensors are missing or of odd shape."""
        tensors = read_tensors(self.path)
        needed = [self.W_enc, self.W_dec, self.b_dec]
        optional = (self.b_enc, self.threshold, self.r_mag, self.b_mag, self.feature_scale)
        needed += [name for name in optional if isinstance(name, str)]
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise SAEError(f"{self.path.name} lacks {missing}; it has {sorted(tensors)}")
        shape = tuple(tensors[self.W_enc].shape)
        if len(shape) != 2:
            raise SAEError(f"{self.path.name}: {self.W_enc} is {list(shape)}, not a matrix")
        d, n = reversed(shape) if self.enc_transposed else shape
        decoder = tuple(tensors[self.W_dec].shape)
        expected = (d, n) if self.dec_transposed else (n, d)
        if decoder != expected:
            raise SAEError(
                f"{self.path.name}: with {self.W_enc} {list(shape)} expected {self.W_dec} "
                f"{list(expected)}, got {list(decoder)}"
            )
        return d, n

    def read(self, ids: Sequence[int] | None = None) -> Weights:
        """The SAE's tensors in float32, of some features or of all.

        Only what is asked for is read from the file.
        """
        tensors = read_tensors(self.path)
        index = None if ids is None else torch.as_tensor(list(ids), dtype=torch.long)

        def columns(name: str, transposed: bool) -> Tensor:
            tensor = tensors[name]
            if index is not None:
                tensor = tensor[index] if transposed else tensor[:, index]
            return (tensor.T if transposed else tensor).float().contiguous()

        def vector(name: str) -> Tensor:
            tensor = tensors[name].flatten()
            n = self.shape()[1]
            if len(tensor) == 1 and n > 1:
                tensor = tensor.expand(n)
            return (tensor if index is None else tensor[index]).float()

        W_enc = columns(self.W_enc, self.enc_transposed)
        W_dec = columns(self.W_dec, not self.dec_transposed).T.contiguous()
        zeros = torch.zeros(W_enc.shape[1])
        b_enc = zeros if self.b_enc is None else vector(self.b_enc)
        if isinstance(self.threshold, str):
            threshold = vector(self.threshold)
        else:
            threshold = zeros + (self.threshold or 0.0)
        gain = offset = None
        if self.r_mag is not None and self.b_mag is not None:
            # exp(r)·(x·W) + b_mag = gain·p + offset with p = x·W + b_gate.
            gain = vector(self.r_mag).exp()
            offset = vector(self.b_mag) - gain * b_enc
        if self.feature_scale is not None:
            W_dec = W_dec * vector(self.feature_scale)[:, None]
        if self.rescale:
            length = W_dec.norm(dim=1)
            W_enc, b_enc = W_enc * length, b_enc * length
            W_dec = W_dec / length.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        # What is still a view of the mapped file is copied, so that the file can be closed.
        b_dec = tensors[self.b_dec].flatten().float().clone()
        return Weights(W_enc, W_dec, b_enc.clone(), b_dec, threshold.clone(), gain, offset)
