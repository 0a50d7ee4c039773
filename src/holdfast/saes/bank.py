"""The |S| encoder columns and decoder rows that a clamp or a constraint needs, and no more.

Feature sets can differ by group (a name, a question), so a bank holds one slice a group, padded to
the widest with features that never fire. Only TopK needs the rest of the SAE: for the k-th value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.errors import FeatureError
from holdfast.features import EVERY_GROUP, FeatureSet
from holdfast.saes.inputs import Inputs
from holdfast.saes.rivals import Rivals
from holdfast.saes.sae import SAE, Guarantee, activate, guarantee_of
from holdfast.saes.stored import StoredSAE
from holdfast.sites import Site
from holdfast.spans import Spans
from holdfast.waiting import sent


@dataclass(frozen=True)
class FeatureBank:
    """Slices of one SAE: g groups, k features in the widest.

    W_enc [g d k], W_dec [g k d], b_enc [g k] (`b_dec` and affine input steps are folded in),
    threshold [g k] (+inf for padding, whose columns and rows are zero), gain, offset [g k],
    valid [g k]; ids: the features of each group. norm: per-token input steps, if any; rivals: the
    encoder of all features where a limit depends on them (TopK).
    """

    site: Site
    index: dict[str, int]
    ids: tuple[tuple[int, ...], ...]
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    threshold: Tensor
    gain: Tensor
    offset: Tensor
    valid: Tensor
    norm: Inputs | None = None
    rivals: Rivals | None = None

    @classmethod
    def of(cls, sae: SAE | StoredSAE, features: FeatureSet) -> FeatureBank:
        """Slice `sae` by the features at its site. Raises FeatureError on bad ids."""
        entries = features.at(sae.site)
        if not entries:
            raise FeatureError(f"no features at {sae.site}; there are some at {features.sites}")
        slices = [sae.take(entry.ids) for entry in entries]
        k = max(len(entry.ids) for entry in entries)
        g, d, device = len(entries), sae.d_model, slices[0].W_enc.device
        bank = cls(
            site=sae.site,
            index={entry.group: row for row, entry in enumerate(entries)},
            ids=tuple(entry.ids for entry in entries),
            W_enc=torch.zeros(g, d, k, device=device),
            W_dec=torch.zeros(g, k, d, device=device),
            b_enc=torch.zeros(g, k, device=device),
            threshold=torch.full((g, k), torch.inf, device=device),
            gain=torch.ones(g, k, device=device),
            offset=torch.zeros(g, k, device=device),
            valid=torch.zeros(g, k, dtype=torch.bool, device=device),
            norm=None if sae.inputs.affine else sae.inputs,
            rivals=rivals_of(sae),
        )
        for row, own in enumerate(slices):
            n = len(own.ids)
            bank.W_enc[row, :, :n] = own.W_enc
            bank.W_dec[row, :n] = own.W_dec
            bank.b_enc[row, :n] = own.b_enc
            bank.threshold[row, :n] = own.threshold
            bank.gain[row, :n] = own.gain
            bank.offset[row, :n] = own.offset
            bank.valid[row, :n] = True
        return bank

    @property
    def guarantee(self) -> Guarantee:
        """What unchanged pre-activations of these features guarantee about their codes."""
        return guarantee_of(self.norm or Inputs(), None if self.rivals is None else self.rivals.k)

    def to(self, device: torch.device | str) -> FeatureBank:
        """On another device, but for rivals, which are large and read residuals from anywhere."""
        if self.W_enc.device == torch.device(device):
            return self
        names = ("W_enc", "W_dec", "b_enc", "threshold", "gain", "offset", "valid")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def slices(self, frame: Frame) -> Tensor:
        """[b] which slice each row of the frame uses. Raises FeatureError for an unknown group."""
        return frame.once_for_rows(self, lambda: self._slices(frame))

    def _slices(self, frame: Frame) -> Tensor:
        fallback = self.index.get(EVERY_GROUP)
        of_group = {group: self.index.get(group, fallback) for group in set(frame.groups)}
        missing = sorted(group for group, row in of_group.items() if row is None)
        if missing:
            raise FeatureError(
                f"no features for the groups {missing[:5]} at {self.site}: there are features for "
                f"{len(self.index)} groups; give the fit split prompts of every group"
            )
        return sent([of_group[group] or 0 for group in frame.groups], self.W_enc.device)

    def rows(self, values: Tensor, frame: Frame) -> Tensor:
        """values [g k] as [b 1 k] (or [1 1 k] with one slice): each row's own."""
        slices = self.slices(frame)
        return values[:, None] if len(self.index) == 1 else values[slices][:, None]

    @cached_property
    def encoder_spans(self) -> Spans:
        """What the encoder columns of each group span: factored once, whichever constraints and
        measurements ask."""
        return Spans.among(self.W_enc, self.valid)

    @cached_property
    def decoder_spans(self) -> Spans:
        """What the features of each group write; factored once."""
        return Spans.among(self.W_dec.mT, self.valid)

    def preactivations(self, x: Tensor, frame: Frame) -> Tensor:
        """p [b s k] of x [b s d], in the dtype of x but at least float32; 0 for padding."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.norm is not None:
            x = self.norm.enter(x)
        if len(self.index) == 1:
            self.slices(frame)
            return x @ self.W_enc[0].to(x.dtype) + self.b_enc[0].to(x.dtype)
        rows = self.slices(frame)
        return torch.bmm(x, self.W_enc[rows].to(x.dtype)) + self.b_enc[rows, None].to(x.dtype)

    def activations(self, x: Tensor, frame: Frame) -> Tensor:
        """z [b s k] of x [b s d]; padding is 0."""
        p = self.preactivations(x, frame)
        magnitude = self.rows(self.gain, frame) * p + self.rows(self.offset, frame)
        return activate(p, self.limits(x, frame), magnitude)

    def limits(self, x: Tensor, frame: Frame) -> Tensor:
        """What p must exceed to fire, broadcastable to [b s k]; +inf for padding."""
        limits = self.rows(self.threshold, frame)
        if self.rivals is not None:
            # Padding keeps its +inf.
            limits = torch.maximum(limits, self.rivals.limit(x).to(limits.dtype))
        return limits

    def decode(self, z: Tensor, x: Tensor, frame: Frame) -> Tensor:
        """[b s d]: the change of the residual x that a change z of the codes makes."""
        if len(self.index) == 1:
            change = z @ self.W_dec[0].to(z.dtype)
        else:
            change = torch.bmm(z, self.W_dec[self.slices(frame)].to(z.dtype))
        return change if self.norm is None else change * self.norm.magnify(x.to(z.dtype))


def rivals_of(sae: SAE | StoredSAE) -> Rivals | None:
    """What the k-th value of a TopK is found among, None elsewhere."""
    if sae.k is None:
        return None
    return sae.rivals() if isinstance(sae, StoredSAE) else Rivals.of(sae)
