"""What happens to a residual before an SAE encodes it, and how that is undone after decoding.

Scales that were left out, forgotten or folded twice are among the most frequent silent mistakes of
the field, so each step is explicit here and none is hidden in weights (METHODS 0.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

EPSILON = 1e-5
"""SAELens adds it to a token's standard deviation in `layer_norm`."""


@dataclass(frozen=True)
class Inputs:
    """Steps in order: center, scale, normalize.

    center: subtract the mean over d_model, for SAEs of models whose writing weights were centered
    (GPT-2 in TransformerLens); the mean is added back after decoding. scale: multiply by a constant
    (SAELens `expected_average_only_in`, Llama Scope's dataset norm). norm: SAELens' per-token
    `layer_norm` or `constant_norm_rescale` (to length √d_model).
    """

    center: bool = False
    scale: float = 1.0
    norm: Literal["layer_norm", "constant_norm_rescale"] | None = None

    @property
    def affine(self) -> bool:
        """Whether the encoder still reads an affine function of the residual."""
        return self.norm is None

    def enter(self, x: Tensor) -> Tensor:
        """What the encoder reads, of residuals x [... d_model]."""
        if self.center:
            x = x - x.mean(-1, keepdim=True)
        x = x * self.scale
        if self.norm == "layer_norm":
            centered = x - x.mean(-1, keepdim=True)
            return centered / (x.std(-1, keepdim=True) + EPSILON)
        if self.norm == "constant_norm_rescale":
            return x / self._length(x)
        return x

    def magnify(self, x: Tensor) -> Tensor | float:
        """[... 1] what a change of the decoder's output is multiplied by in the residual."""
        if self.norm is None:
            return 1.0 / self.scale
        before = self._before_norm(x)
        if self.norm == "layer_norm":
            return before.std(-1, keepdim=True) / self.scale
        return self._length(before) / self.scale

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """The reconstruction of x from the decoder's output y, both [... d_model]."""
        out = y * self.magnify(x)
        if self.norm == "layer_norm":
            out = out + self._before_norm(x).mean(-1, keepdim=True) / self.scale
        return out + x.mean(-1, keepdim=True) if self.center else out

    def fold(self, W_enc: Tensor) -> Tensor:
        """Encoder columns [d_model n] that read the residual itself; for affine inputs only."""
        assert self.affine
        # P(x)·a = x·P(a): centering is an orthogonal projection, so it moves to the weights.
        return (W_enc - W_enc.mean(0) if self.center else W_enc) * self.scale

    def _before_norm(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True) if self.center else x) * self.scale

    def _length(self, x: Tensor) -> Tensor:
        """[... 1] norm in units of √d_model."""
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
