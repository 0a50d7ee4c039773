"""The SAE record: full and partial encode, in float32, with every step explicit.

One convention for elementwise SAEs: `z = p · 1[p > threshold]` with a strict inequality; a plain
ReLU is the threshold 0 (METHODS 0.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from holdfast.errors import FeatureError, SAEError
from holdfast.sites import Site


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder of one residual site; all tensors float32.

    W_enc [d_model n_features], W_dec [n_features d_model], b_enc [n_features], b_dec [d_model],
    threshold [n_features] (0 for ReLU). `subtract_b_dec`: whether the encoder reads `x - b_dec`.
    """

    site: Site
    W_enc: Tensor = field(repr=False)
    W_dec: Tensor = field(repr=False)
    b_enc: Tensor = field(repr=False)
    b_dec: Tensor = field(repr=False)
    threshold: Tensor = field(repr=False)
    subtract_b_dec: bool = False
    name: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        d, n = self.W_enc.shape
        expected = {"W_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
        for name, shape in expected.items():
            got = tuple(getattr(self, name).shape)
            if got != shape:
                raise SAEError(
                    f"SAE {self.name or self.site}: with W_enc {[d, n]} expected {name} "
                    f"{list(shape)}, got {list(got)}"
                )
        for name in ("W_enc", *expected):
            if getattr(self, name).dtype != torch.float32:
                raise SAEError(
                    f"SAE {self.name or self.site}: {name} is {getattr(self, name).dtype}; SAE "
                    "weights are kept in float32, since lower precision moves thresholds"
                )

        for name in ("W_enc", *expected):
            if not torch.isfinite(getattr(self, name)).all():
                raise SAEError(f"SAE {self.name or self.site}: {name} has NaN or infinite values")
        if (self.threshold < 0).any():
            raise SAEError(
                f"SAE {self.name or self.site}: negative thresholds would give negative codes; a "
                "BatchTopK SAE whose threshold was never set is saved with -1"
            )

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[1]

    @property
    def exact_null(self) -> bool:
        """Whether fixing an affine function of x fixes the chosen features: yes, elementwise."""
        return True

    def check_features(self, ids: Sequence[int]) -> None:
        """Raise FeatureError if an id is out of range or given twice."""
        outside = [i for i in ids if not 0 <= i < self.n_features]
        if outside:
            raise FeatureError(
                f"feature ids {outside[:5]} are out of range: the SAE at {self.site} has "
                f"{self.n_features} features (0 to {self.n_features - 1})"
            )
        twice = sorted({i for i in ids if list(ids).count(i) > 1})
        if twice:
            raise FeatureError(f"feature ids {twice[:5]} are given twice at {self.site}")

    def preactivations(self, x: Tensor, features: Sequence[int] | None = None) -> Tensor:
        """p [... n]: `(x - b_dec?) · W_enc + b_enc`, only the columns asked for."""
        W, b = self.W_enc, self.b_enc
        if features is not None:
            index = torch.as_tensor(list(features), dtype=torch.long, device=W.device)
            W, b = W[:, index], b[index]
        x = x.float()
        return (x - self.b_dec if self.subtract_b_dec else x) @ W + b

    def encode(self, x: Tensor, features: Sequence[int] | None = None) -> Tensor:
        """z [... n], zero where the pre-activation does not exceed its threshold."""
        p = self.preactivations(x, features)
        threshold = self.threshold if features is None else self.threshold[list(features)]
        return torch.where(p > threshold, p, torch.zeros((), dtype=p.dtype, device=p.device))

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction [... d_model] of codes [... n_features]."""
        return z @ self.W_dec + self.b_dec

    def to(self, device: torch.device | str) -> SAE:
        names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})
