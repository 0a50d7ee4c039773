"""A norm with its scale held: a linear map, through which a sum can be followed term by term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.errors import SubjectError

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Of the norm's output, by precision; lower precisions are held to `LOOSE`."""

LOOSE = 3e-2


@dataclass(frozen=True)
class Frozen:
    """gain · scale · (x − mean(x)) at n residuals, the mean only where the norm centers.

    gain, bias [d]; scale [n], what the norm multiplies by at each residual it was frozen at. What
    it makes of a residual is the sum of what this makes of its terms, and the bias.
    """

    gain: Tensor
    bias: Tensor
    scale: Tensor
    centers: bool

    @classmethod
    def of(cls, norm: nn.Module, x: Tensor) -> Frozen:
        """norm as it is at residuals x [n d]. It is found out by asking, so that no kind of norm is
        known by name; raises SubjectError if it is of no such form."""
        signs = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
        signs[1::2] = -1
        with torch.no_grad():
            # Length √d and, widths being even, mean 0: what comes back is gain and bias alone.
            plus, minus, shifted = (norm(v[None])[0].double() for v in (signs, -signs, signs + 1))
            made = norm(x).double()
        gain, bias = (plus - minus) / 2 * signs.double(), (plus + minus) / 2
        centers = bool((shifted - plus).abs().max() < 0.1 * gain.abs().max())
        inner = _centered(x.double(), centers) * gain
        made = made - bias
        scale = (inner * made).sum(-1) / inner.square().sum(-1).clamp_min(1e-300)
        left = (made - scale[:, None] * inner).norm() / made.norm().clamp_min(1e-300)
        if not bool(left <= TOLERANCE.get(x.dtype, LOOSE)):
            raise SubjectError(
                f"{type(norm).__name__} is no gain times a scale of the token: {float(left):.1e} "
                "of its output is not explained, so that terms cannot be followed through it"
            )
        return cls(gain, bias, scale, centers)

    def __call__(self, terms: Tensor) -> Tensor:
        """terms [n ... d] of the residuals → what becomes of each, float64."""
        shape = (-1,) + (1,) * (terms.ndim - 1)
        return _centered(terms.double(), self.centers) * self.gain * self.scale.view(shape)


def _centered(x: Tensor, centers: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centers else x
