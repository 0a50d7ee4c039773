"""How a format keeps an SAE in a file: the names, turns and constants a reader needs.

A format (one file each in `formats/`) looks at a folder and returns a Layout; everything after
that is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from holdfast.errors import SAEError
from holdfast.saes.encoders import encoder_of
from holdfast.saes.inputs import Inputs
from holdfast.saes.rivals import Rivals
from holdfast.saes.sae import Facts, Weights, is_finite
from holdfast.saes.tensors import Stored, read_tensors, whole


@dataclass(frozen=True)
class Layout:
    """An SAE on disk. Tensor names are those of the file; None where the format has none.

    enc_transposed, dec_transposed: the file holds [n_features d_model] encoders, [d_model
    n_features] decoders, as torch's Linear keeps them. threshold: a name, or one number for all;
    log_threshold: the file holds its logarithm. r_mag, b_mag: a gated SAE's magnitudes
    `relu(exp(r_mag)·(x·W_enc) + b_mag)`, its b_enc being the gate's bias. feature_scale: factors on
    the codes before decoding.

    rescale: everything is in units of the decoder's norms: pre-activations, threshold and codes are
    those of the SAE with a decoder of norm 1 (SAELens `rescale_acts_by_decoder_norm`).
    gate_times_norm, threshold_times_scale: a feature fires if `p · ‖W_dec‖ > threshold · scale`
    with the scale of `inputs` (Llama Scope).

    first: only the first so many features are the SAE, None for all of the file's. site: the
    spelling the file gives, None if it gives none. hashed: glob patterns of the files that make the
    SAE.
    """

    folder: Path
    file: str
    W_enc: str = "W_enc"
    W_dec: str = "W_dec"
    b_enc: str | None = "b_enc"
    b_dec: str | None = "b_dec"
    enc_transposed: bool = False
    dec_transposed: bool = False
    threshold: str | float | None = None
    log_threshold: bool = False
    gate_times_norm: bool = False
    threshold_times_scale: bool = False
    r_mag: str | None = None
    b_mag: str | None = None
    k: int | None = None
    subtract_b_dec: bool = False
    feature_scale: str | None = None
    rescale: bool = False
    first: int | None = None
    inputs: Inputs = field(default_factory=Inputs)
    site: str | None = None
    facts: Facts = field(default_factory=Facts)
    hashed: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.folder / self.file

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """What the file holds, not yet read. Raises SAEError."""
        return read_tensors(self.path)

    @property
    def _vectors(self) -> list[str]:
        """Names of what has one number a feature."""
        names = (self.b_enc, self.threshold, self.r_mag, self.b_mag, self.feature_scale)
        return [name for name in names if isinstance(name, str)]

    def shape(self) -> tuple[int, int]:
        """(d_model, n_features). Raises SAEError if tensors are missing or of odd shape."""
        d, n = self._stored_shape
        if self.first is not None and self.first > n:
            raise SAEError(f"n_features = {self.first} asks for more than the {n} features it has")
        n = self.first or n
        if self.k is not None and not 0 < self.k < n:
            raise SAEError(f"k = {self.k} of {n} features")
        return d, n

    @cached_property
    def _stored_shape(self) -> tuple[int, int]:
        """(d_model, n_features) of the file."""
        needed = [self.W_enc, self.W_dec, *([self.b_dec] if self.b_dec else []), *self._vectors]
        missing = [name for name in needed if name not in self.tensors]
        if missing:
            raise SAEError(f"{self.path.name} lacks {missing}; it has {sorted(self.tensors)}")
        for name in needed:
            if not self.tensors[name].dtype.is_floating_point:
                raise SAEError(
                    f"{self.path.name}: {name} holds {self.tensors[name].dtype}, not "
                    "floating-point numbers; a quantized SAE has to be converted first"
                )
        shape = self.tensors[self.W_enc].shape
        if len(shape) != 2:
            raise SAEError(f"{self.path.name}: {self.W_enc} is {list(shape)}, not a matrix")
        d, n = reversed(shape) if self.enc_transposed else shape
        expected: dict[str, tuple[int, ...]] = {
            self.W_dec: (d, n) if self.dec_transposed else (n, d)
        }
        if self.b_dec is not None:
            expected[self.b_dec] = (d,)
        for name, wanted in (expected | dict.fromkeys(self._vectors, (n,))).items():
            got = self.tensors[name].shape
            one_for_all = name == self.threshold and got in ((), (1,))
            if got != wanted and not one_for_all:
                raise SAEError(
                    f"{self.path.name}: with {self.W_enc} {list(shape)} expected {name} "
                    f"{list(wanted)}, got {list(got)}"
                )
        return d, n

    def read(self, ids: Sequence[int] | None = None) -> Weights:
        """The SAE's tensors, of some features in float32, or of all.

        Only what is asked for is kept in memory, and a block of the file beside it. Matrices that
        the file has in half precision stay so if all are read: no number is another in float32.
        Raises SAEError for a threshold never set.
        """
        if ids is None and self.first is not None:
            ids = range(self.first)
        index = slice(None) if ids is None else torch.as_tensor(list(ids), dtype=torch.long)

        def matrix(name: str, axis: int, wanted: int, as_stored: bool) -> Tensor:
            """Features along `axis` in the file, along `wanted` in what is returned."""
            stored = self.tensors[name]
            if ids is None:
                return whole(stored, turned=axis != wanted, exact=as_stored)
            tensor = stored.take(ids, axis)
            return (tensor if axis == wanted else tensor.T).float().contiguous()

        def vector(name: str) -> Tensor:
            return self.tensors[name].read()[index].float()

        W_enc = matrix(self.W_enc, self._enc_axis, 1, not self.rescale)
        scaled = self.rescale or self.feature_scale is not None
        W_dec = matrix(self.W_dec, self._dec_axis, 0, not scaled)
        zeros = torch.zeros(len(W_dec))
        b_enc = zeros if self.b_enc is None else vector(self.b_enc)
        gain = offset = None
        if self.r_mag is not None and self.b_mag is not None:
            # exp(r)·(x·W) + b_mag = gain·p + offset with p = x·W + b_gate.
            gain = vector(self.r_mag).exp()
            offset = vector(self.b_mag) - gain * b_enc
        threshold = self._thresholds()[index] if self.threshold is not None else zeros
        if self.gate_times_norm:
            threshold = threshold / _length(W_dec)
        if self.threshold_times_scale:
            threshold = threshold * self.inputs.scale
        if self.feature_scale is not None:
            W_dec *= vector(self.feature_scale)[:, None]
        if self.rescale:
            length = _length(W_dec)
            b_enc = b_enc * length
            W_enc *= length  # in place: they are this call's own, and large
            W_dec /= length[:, None]
            offset = None if offset is None else offset * length
        b_dec = torch.zeros(len(W_enc))
        if self.b_dec is not None:
            b_dec = self.tensors[self.b_dec].read().float()
        return Weights(W_enc, W_dec, b_enc, b_dec, threshold, gain, offset)

    def rivals(self, device: torch.device | str) -> Rivals:
        """What decides which features of a TopK are on; its encoder stays in the file where it is
        large for the device. Raises SAEError on NaN."""
        assert self.k is not None, "only in a TopK do features compete"
        d, n = self.shape()
        zeros = torch.zeros(n)
        b_enc = zeros if self.b_enc is None else self.tensors[self.b_enc].read()[:n].float()
        b_dec = torch.zeros(d) if self.b_dec is None else self.tensors[self.b_dec].read().float()
        length = self._lengths() if self.rescale else None
        if length is not None:
            b_enc = b_enc * length
        for name, tensor in (("b_enc", b_enc), ("b_dec", b_dec)):
            if not is_finite(tensor):
                raise SAEError(f"{name} has NaN or infinite values")
        encoder = encoder_of(self.tensors[self.W_enc], self._enc_axis, n, device)
        made = Rivals(encoder, b_enc, b_dec, self.subtract_b_dec, self.k, self.inputs, length)
        return made.to(device)

    @property
    def _enc_axis(self) -> int:
        """The axis of the stored encoder that features are along."""
        return 0 if self.enc_transposed else 1

    @property
    def _dec_axis(self) -> int:
        return 1 if self.dec_transposed else 0

    def _lengths(self) -> Tensor:
        """[n_features] norms of the decoder's rows, of which a block is in memory at a time."""
        _, n = self._stored_shape
        stored, axis = self.tensors[self.W_dec], self._dec_axis
        scale = None
        if self.feature_scale is not None:
            scale = self.tensors[self.feature_scale].read().float()[:, None]
        squares = torch.zeros(n, dtype=torch.float64)
        for where, part in stored.parts():
            rows, own = (part if axis == 0 else part.T).float(), where[axis]
            rows = rows if scale is None else rows * scale[own]
            for some, out in zip(rows.split(4096), squares[own].split(4096), strict=True):
                out += some.double().square().sum(1)
        norms = squares[: self.shape()[1]].sqrt().float()
        return norms.clamp_min(torch.finfo(torch.float32).tiny)

    def _thresholds(self) -> Tensor:
        """[n], those of all features. Raises SAEError if all are negative."""
        n = self._stored_shape[1]
        if isinstance(self.threshold, str):
            stored = self.tensors[self.threshold].read()
            # Before the cast: SAELens keeps a BatchTopK threshold in float64.
            values = (stored.exp() if self.log_threshold else stored).float().expand(n)
        else:
            values = torch.full((n,), float(self.threshold or 0.0))
        if (values < 0).all():
            raise SAEError(
                f"all its thresholds are negative (the first is {float(values[0]):g}), as a "
                "BatchTopK SAE is saved whose threshold was never set: which features fire would "
                "depend on the batch"
            )
        # Codes go through a ReLU, so one below 0 is the same as 0.
        return values.clamp_min(0.0)


def _length(rows: Tensor) -> Tensor:
    """[n] Euclidean norms of rows [n d], never 0 (a zero row decodes to 0 in any units)."""
    norms = torch.cat([block.double().norm(dim=1) for block in rows.split(4096)])
    return norms.float().clamp_min(torch.finfo(torch.float32).tiny)
