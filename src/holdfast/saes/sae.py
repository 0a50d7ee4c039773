"""The SAE record: full and partial encode, in float32, with every step explicit.

One formula for every kind (METHODS 0.2): with `p = enter(x) · W_enc + b_enc`,

    z_i = relu(gain_i · p_i + offset_i)  where p_i > limit_i, else 0

and a strict inequality. The limit is 0 for ReLU, the threshold for JumpReLU (and BatchTopK, as
saved for inference), and for TopK between the token's k-th largest pre-activation and the next. A
gated SAE shares its columns between gate and magnitude, so that its magnitude is affine in p: gain
and offset.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from holdfast.chunks import per_chunk
from holdfast.errors import FeatureError, SAEError
from holdfast.saes.inputs import Inputs
from holdfast.saes.products import product
from holdfast.sites import Site

STORED = (torch.float32, torch.bfloat16, torch.float16)
"""What matrices may be kept in: float32, or the half precision of their file, which it holds."""

Guarantee = Literal["exact", "margin", "none"]
"""What an unchanged `p_S` says of the codes z_S, where p is read as an affine function of x.

exact: they cannot change. margin: they cannot, unless another feature overtakes them among the k
largest (TopK), which has to be measured. none: an affine function of x does not fix p at all,
because the token's norm enters (per-token normalization).
"""


@dataclass(frozen=True)
class Facts:
    """What an SAE's files say of it beside its weights; None where they say nothing.

    format: the layout it was read from; architecture: its kind, in the layout's words; model: the
    model it was trained on; l0: features active per token, as published; centered: whether that
    model's writing weights were centered; bos: whether it was trained with BOS in front.
    """

    format: str = ""
    architecture: str = ""
    model: str | None = None
    l0: float | None = None
    centered: bool | None = None
    bos: bool | None = None


@dataclass(frozen=True)
class Weights:
    """The tensors of an SAE, or of some of its features; shapes and precision as in `SAE`."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    gain: Tensor | None = None
    offset: Tensor | None = None

    def to(self, device: torch.device | str) -> Weights:
        there = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: tensor.to(device) for name, tensor in there.items()})


@dataclass(frozen=True)
class Slice:
    """Some features of an SAE as read from, and written to, the residual itself.

    W_enc [d_model k], W_dec [k d_model], b_enc, threshold, gain, offset [k]; `b_dec` and affine
    input steps are folded in.
    """

    ids: tuple[int, ...]
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    threshold: Tensor
    gain: Tensor
    offset: Tensor


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder of one residual site, whole and in memory; all tensors float32, but that
    the two matrices may be kept in the half precision that their file has. Everything is computed
    in float32 at least.

    W_enc [d_model n_features], W_dec [n_features d_model], b_enc [n_features], b_dec [d_model],
    threshold [n_features] (0 for ReLU and TopK); gain, offset [n_features] of a gated SAE's
    magnitudes; k of a TopK. `subtract_b_dec`: whether the encoder reads `enter(x) - b_dec`.
    """

    site: Site
    W_enc: Tensor = field(repr=False)
    W_dec: Tensor = field(repr=False)
    b_enc: Tensor = field(repr=False)
    b_dec: Tensor = field(repr=False)
    threshold: Tensor = field(repr=False)
    subtract_b_dec: bool = False
    gain: Tensor | None = field(default=None, repr=False)
    offset: Tensor | None = field(default=None, repr=False)
    k: int | None = None
    inputs: Inputs = field(default_factory=Inputs)
    name: str = ""
    sha256: str = ""
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        d, n = self.W_enc.shape
        expected = {"W_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
        expected |= {name: (n,) for name in ("gain", "offset") if getattr(self, name) is not None}
        for name, shape in expected.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise SAEError(
                    f"SAE {self.name or self.site}: with W_enc {[d, n]} expected {name} "
                    f"{list(shape)}, got {list(got)}"
                )
        for name in ("W_enc", *expected):
            kept = STORED if name in ("W_enc", "W_dec") else (torch.float32,)
            if getattr(self, name).dtype not in kept:
                raise SAEError(
                    f"SAE {self.name or self.site}: {name} is {getattr(self, name).dtype}; SAE "
                    "weights are kept in float32, since lower precision moves thresholds"
                )
            if not is_finite(getattr(self, name)):
                raise SAEError(f"SAE {self.name or self.site}: {name} has NaN or infinite values")
        if (self.threshold < 0).any():
            raise SAEError(
                f"SAE {self.name or self.site}: negative thresholds would give negative codes; a "
                "BatchTopK SAE whose threshold was never set is saved with -1"
            )
        if self.k is not None and not 0 < self.k < n:
            raise SAEError(f"SAE {self.name or self.site}: k = {self.k} of {n} features")

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    @property
    def guarantee(self) -> Guarantee:
        """What unchanged pre-activations of some features guarantee about their codes."""
        return guarantee_of(self.inputs, self.k)

    def check_features(self, ids: Sequence[int]) -> None:
        """Raise FeatureError if an id is out of range or given twice."""
        check_ids(ids, self.n_features, self.site)

    def full(self) -> SAE:
        """Itself: what is in memory needs no reading."""
        return self

    def take(self, ids: Sequence[int]) -> Slice:
        """Some features, in the order given. Raises FeatureError on bad ids."""
        self.check_features(ids)
        index = torch.as_tensor(list(ids), dtype=torch.long, device=self.W_enc.device)
        own = Weights(
            W_enc=self.W_enc[:, index].float(), W_dec=self.rows(index), b_enc=self.b_enc[index],
            b_dec=self.b_dec, threshold=self.threshold[index],
            gain=None if self.gain is None else self.gain[index],
            offset=None if self.offset is None else self.offset[index],
        )  # fmt: skip
        return fold(tuple(ids), own, self.inputs, self.subtract_b_dec)

    def pieces(self, n_tokens: int) -> Iterator[Slice]:
        """All features, some at a time, so that the codes of so many tokens can be held."""
        return (self.take(own) for own in pieces_of(self.d_model, self.n_features, n_tokens))

    def preactivations(self, x: Tensor, features: Sequence[int] | slice = slice(None)) -> Tensor:
        """p [... n] of residuals x [... d_model], only the columns asked for."""
        own: slice | Tensor
        if isinstance(features, slice):
            own = features  # a view, and no copy
        else:
            own = torch.as_tensor(list(features), dtype=torch.long, device=self.W_enc.device)
        x = self._entered(x)
        return product(x, self.W_enc[:, own]) + self.b_enc[own]

    def _entered(self, x: Tensor) -> Tensor:
        x = self.inputs.enter(x if x.dtype == torch.float64 else x.float())
        return x - self.b_dec if self.subtract_b_dec else x

    def kth(self, x: Tensor) -> Tensor | None:
        """[... 1] what a pre-activation must exceed in a TopK, None elsewhere; a block of features
        is computed at a time."""
        if self.k is None:
            return None
        x = self._entered(x)
        blocks = self.blocks(x.shape[:-1].numel())
        p = (product(x, self.W_enc[:, own]) + self.b_enc[own] for own in blocks)
        return kth_of(p, self.k)

    def blocks(self, n_tokens: int) -> Iterator[slice]:
        """All features in slices of which the codes of so many tokens can be held at a time."""
        return blocks_of(self.n_features, n_tokens)

    def codes(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """A block of features after the other, all of them: which, and z [... m] of residuals x
        [... d_model], without gradients. So that every column is cast, and met by every residual,
        once: of a TopK the codes that can be are kept until the last column has said which are."""
        blocks = list(self.blocks(x.shape[:-1].numel()))
        if self.k is None or len(blocks) == 1:
            for own in blocks:
                yield own, self.encode(x, own)
            return
        p, ids = largest((self.preactivations(x, own) for own in blocks), self.k)
        z = self._activated(p, kth_limit(p, self.k), ids)
        for own in blocks:
            inside = (ids >= own.start) & (ids < own.stop)
            codes = z.new_zeros(*z.shape[:-1], own.stop - own.start)
            yield own, codes.scatter_add_(-1, (ids - own.start) * inside, z * inside)

    def encode(
        self,
        x: Tensor,
        features: Sequence[int] | slice = slice(None),
        kth: Tensor | None = None,
    ) -> Tensor:
        """z [... n], the codes of the features asked for. kth: what `kth` gives, where it has been
        computed for these residuals before."""
        p = self.preactivations(x, features)
        own = features if isinstance(features, slice) else list(features)
        limit = self.threshold[own].to(p.dtype)
        if self.k is not None:
            if kth is None:
                everything = p.shape[-1] == self.n_features
                kth = kth_limit(p, self.k) if everything else self.kth(x)
            assert kth is not None
            limit = kth
        return self._activated(p, limit, own)

    def _activated(self, p: Tensor, limit: Tensor, own: list[int] | slice | Tensor) -> Tensor:
        """The codes of pre-activations p of the features `own`."""
        magnitude = p
        if self.gain is not None and self.offset is not None:
            magnitude = self.gain[own] * p + self.offset[own]
        return activate(p, limit, magnitude)

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction [... d_model] from codes z [... n_features].

        x [... d_model]: the residual they were encoded from, which undoing centering or a token's
        normalization needs. Raises SAEError if it is needed and not given.
        """
        y = self.written(z) + self.b_dec
        if x is None:
            if self.inputs.center or not self.inputs.affine:
                raise SAEError(f"SAE {self.name or self.site}: decoding needs the residual encoded")
            return y / self.inputs.scale
        return self.inputs.leave(y, x.float())

    def written(self, z: Tensor, features: slice = slice(None)) -> Tensor:
        """z·W_dec [... d_model] of codes z [... n] of the features asked for."""
        return product(z, self.W_dec[features])

    def rows(self, features: slice | Tensor) -> Tensor:
        """Decoder rows [... d_model] in float32: of a block, or of an index or mask of any
        shape."""
        return self.W_dec[features].float()

    def reconstruct(self, x: Tensor) -> Tensor:
        """D(E(x)) [... d_model]. Without a gradient a block of features is computed at a time; a
        gradient needs the codes of all of them."""
        if x.requires_grad:
            return self.decode(self.encode(x), x)
        y = torch.zeros((), device=x.device)
        for own, z in self.codes(x):
            y = y + self.written(z, own)
        return self.inputs.leave(y + self.b_dec, x.float())

    def to(self, device: torch.device | str) -> SAE:
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "gain", "offset")
        there = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t.to(device) for name, t in there.items() if t is not None})


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite. The least and the largest say it, for both are NaN
    where any number is; to look at every number makes copies of all of them."""
    if not tensor.numel():
        return True
    return all(math.isfinite(end) for end in tensor.aminmax())


def activate(p: Tensor, limit: Tensor, magnitude: Tensor) -> Tensor:
    """The codes: relu(magnitude) where p > limit, strictly."""
    zero = torch.zeros((), dtype=p.dtype, device=p.device)
    return torch.where((p > limit) & (magnitude > 0), magnitude, zero)


def kth_limit(p: Tensor, k: int) -> Tensor:
    """[... 1] what a pre-activation must exceed to be among the k largest of p [... n_features].

    Halfway between the k-th and the next, since a slice computes the same number with another
    rounding; negative ones count as 0, for TopK codes go through a ReLU. It is a gate and carries
    no gradient.
    """
    top = p.detach().topk(k + 1, dim=-1).values[..., k - 1 :].clamp_min(0.0)
    return top.mean(-1, keepdim=True)


def blocks_of(n_features: int, n_tokens: int) -> Iterator[slice]:
    """Slices of features such that n_tokens times as many numbers are at most a chunk."""
    size = per_chunk(n_tokens)
    return (slice(first, min(first + size, n_features)) for first in range(0, n_features, size))


def pieces_of(d_model: int, n_features: int, n_tokens: int) -> Iterator[range]:
    """Ranges of features of which neither the codes of n_tokens nor the encoder columns are more
    than a chunk."""
    for own in blocks_of(n_features, max(n_tokens, d_model)):
        yield range(own.start, own.stop)


def kth_of(preactivations: Iterable[Tensor], k: int) -> Tensor:
    """`kth_limit` of pre-activations that come some features [... m] at a time."""
    return kth_limit(largest(preactivations, k)[0], k)


@torch.no_grad()
def largest(preactivations: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """[... k+1] the largest of pre-activations that come some features [... m] at a time, and which
    they are: of what came so far these are kept."""
    begins, kept = 0, None
    for p in preactivations:
        values, ids = p.topk(min(k + 1, p.shape[-1]), dim=-1)
        ids, begins = ids + begins, begins + p.shape[-1]
        if kept is not None:
            values, ids = (torch.cat(both, -1) for both in zip(kept, (values, ids), strict=True))
            values, place = values.topk(min(k + 1, values.shape[-1]), dim=-1)
            ids = ids.gather(-1, place)
        kept = values, ids
    assert kept is not None, "an SAE has features"
    return kept


def guarantee_of(inputs: Inputs, k: int | None) -> Guarantee:
    if not inputs.affine:
        return "none"
    return "exact" if k is None else "margin"


def check_ids(ids: Sequence[int], n_features: int, site: Site) -> None:
    """Raise FeatureError if an id is out of range or given twice."""
    outside = [i for i in ids if not 0 <= i < n_features]
    if outside:
        raise FeatureError(
            f"feature ids {outside[:5]} are out of range: the SAE at {site} has "
            f"{n_features} features (0 to {n_features - 1})"
        )
    twice = sorted(i for i, n in Counter(ids).items() if n > 1)
    if twice:
        raise FeatureError(f"feature ids {twice[:5]} are given twice at {site}")


def fold(ids: tuple[int, ...], own: Weights, inputs: Inputs, subtract_b_dec: bool) -> Slice:
    """Weights of some features as a slice that reads the residual itself."""
    W_enc, W_dec, b_enc = own.W_enc, own.W_dec, own.b_enc
    if subtract_b_dec:
        b_enc = (b_enc.double() - own.b_dec.double() @ W_enc.double()).float()
    if inputs.affine:
        W_enc, W_dec = inputs.fold(W_enc), W_dec / inputs.scale
    gain = torch.ones_like(b_enc) if own.gain is None else own.gain
    offset = torch.zeros_like(b_enc) if own.offset is None else own.offset
    return Slice(ids, W_enc, W_dec, b_enc, own.threshold, gain, offset)
