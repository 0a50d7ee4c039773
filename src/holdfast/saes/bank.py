"""The |S| encoder columns and decoder rows that a clamp or a constraint needs, and no more.

Feature sets can differ by group (a name, a question), so a bank holds one slice a group, padded to
the widest with features that never fire.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.errors import FeatureError
from holdfast.features import EVERY_GROUP, FeatureSet
from holdfast.saes.sae import SAE
from holdfast.sites import Site


@dataclass(frozen=True)
class FeatureBank:
    """Slices of one SAE: g groups, k features in the widest.

    W_enc [g d k], W_dec [g k d], b_enc [g k] (with `b_dec` already folded in), threshold [g k]
    (+inf for padding, whose columns and rows are zero), valid [g k].
    """

    site: Site
    index: dict[str, int]
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    threshold: Tensor
    valid: Tensor

    @classmethod
    def of(cls, sae: SAE, features: FeatureSet) -> FeatureBank:
        """Slice `sae` by the features at its site. Raises FeatureError on bad ids."""
        entries = features.at(sae.site)
        if not entries:
            raise FeatureError(f"no features at {sae.site}; there are some at {features.sites}")
        k = max(len(entry.ids) for entry in entries)
        g, d = len(entries), sae.d_model
        device = sae.W_enc.device
        W_enc = torch.zeros(g, d, k, device=device)
        W_dec = torch.zeros(g, k, d, device=device)
        b_enc = torch.zeros(g, k, device=device)
        threshold = torch.full((g, k), torch.inf, device=device)
        valid = torch.zeros(g, k, dtype=torch.bool, device=device)
        for row, entry in enumerate(entries):
            sae.check_features(entry.ids)
            ids, n = list(entry.ids), len(entry.ids)
            W_enc[row, :, :n] = sae.W_enc[:, ids]
            W_dec[row, :n] = sae.W_dec[ids]
            b_enc[row, :n] = sae.b_enc[ids]
            if sae.subtract_b_dec:
                b_enc[row, :n] -= sae.b_dec @ sae.W_enc[:, ids]
            threshold[row, :n] = sae.threshold[ids]
            valid[row, :n] = True
        index = {entry.group: row for row, entry in enumerate(entries)}
        return cls(sae.site, index, W_enc, W_dec, b_enc, threshold, valid)

    def slices(self, frame: Frame) -> Tensor:
        """[b] which slice each row of the frame uses. Raises FeatureError for an unknown group."""
        fallback = self.index.get(EVERY_GROUP)
        rows = [self.index.get(group, fallback) for group in frame.groups]
        if None in rows:
            missing = sorted({g for g, r in zip(frame.groups, rows, strict=True) if r is None})
            raise FeatureError(
                f"no features for the groups {missing[:5]} at {self.site}: there are features for "
                f"{len(self.index)} groups; give the fit split prompts of every group"
            )
        return torch.as_tensor(rows, dtype=torch.long, device=self.W_enc.device)

    def preactivations(self, x: Tensor, frame: Frame) -> Tensor:
        """p [b s k] of x [b s d], in the dtype of x but at least float32; 0 for padding."""
        x = x if x.dtype == torch.float64 else x.float()
        if len(self.index) == 1:
            self.slices(frame)
            return x @ self.W_enc[0].to(x.dtype) + self.b_enc[0].to(x.dtype)
        rows = self.slices(frame)
        return torch.bmm(x, self.W_enc[rows].to(x.dtype)) + self.b_enc[rows, None].to(x.dtype)

    def activations(self, x: Tensor, frame: Frame) -> Tensor:
        """z [b s k] of x [b s d]; padding is 0."""
        p = self.preactivations(x, frame)
        return torch.where(p > self.limits(frame), p, torch.zeros_like(p))

    def limits(self, frame: Frame) -> Tensor:
        """Thresholds, broadcastable to [b s k]."""
        return self.threshold[self.slices(frame)][:, None]

    def decode(self, z: Tensor, frame: Frame) -> Tensor:
        """Σ z_i · W_dec[i], [b s d], without the decoder bias."""
        if len(self.index) == 1:
            return z @ self.W_dec[0].to(z.dtype)
        return torch.bmm(z, self.W_dec[self.slices(frame)].to(z.dtype))
