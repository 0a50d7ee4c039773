"""An SAE in its file: features are sliced while they are read, the whole only where it is needed.

A 65k-wide SAE of a 2304-wide model is 1.2 GB; a clamp of 16 features needs 0.3 MB of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from holdfast.canonical import sha256_tree
from holdfast.errors import SAEError
from holdfast.saes.inputs import Inputs
from holdfast.saes.layout import Layout
from holdfast.saes.rivals import Rivals
from holdfast.saes.sae import (
    SAE,
    Facts,
    Guarantee,
    Slice,
    Weights,
    check_ids,
    fold,
    guarantee_of,
    pieces_of,
)
from holdfast.sites import Site

KEPT = 64
"""Slices that stay in memory after they were read."""


@dataclass(frozen=True)
class StoredSAE:
    """What `SAE` offers, read from its file when it is asked for.

    name: how the study calls it, for messages.
    """

    site: Site
    layout: Layout = field(repr=False)
    name: str = ""
    device: torch.device | str = "cpu"
    _whole: list[weakref.ref[SAE]] = field(default_factory=list, repr=False, compare=False)
    _rivals: list[weakref.ref[Rivals]] = field(default_factory=list, repr=False, compare=False)
    _taken: dict[tuple[int, ...], Slice] = field(default_factory=dict, repr=False, compare=False)

    @property
    def inputs(self) -> Inputs:
        return self.layout.inputs

    @property
    def k(self) -> int | None:
        return self.layout.k

    @property
    def facts(self) -> Facts:
        return self.layout.facts

    @property
    def guarantee(self) -> Guarantee:
        """What unchanged pre-activations of some features guarantee about their codes."""
        return guarantee_of(self.inputs, self.k)

    @cached_property
    def sha256(self) -> str:
        """Hash over the files that make the SAE."""
        return sha256_tree(self.layout.folder, self.layout.hashed)

    @cached_property
    def _shape(self) -> tuple[int, int]:
        try:
            return self.layout.shape()
        except SAEError as error:
            raise SAEError(f"{self.name}: {error}") from None

    @property
    def d_model(self) -> int:
        return self._shape[0]

    @property
    def n_features(self) -> int:
        return self._shape[1]

    def check_features(self, ids: Sequence[int]) -> None:
        """Raise FeatureError if an id is out of range or given twice."""
        check_ids(ids, self.n_features, self.site)

    def take(self, ids: Sequence[int]) -> Slice:
        """Some features, in the order given. Raises FeatureError on bad ids, SAEError on NaN.

        A clamp, its statistics and what a recovery has to hold ask for the same ones: they are read
        once, and the last KEPT slices stay in memory.
        """
        self.check_features(ids)
        known, key = self._taken, tuple(ids)
        if key not in known:
            own = self._read(ids)
            for name, tensor in vars(own).items():
                if tensor is not None and not torch.isfinite(tensor).all():
                    raise SAEError(f"{self.name}: {name} has NaN or infinite values")
            if len(known) == KEPT:
                del known[next(iter(known))]
            known[key] = fold(key, own.to(self.device), self.inputs, self.layout.subtract_b_dec)
        return known[key]

    def pieces(self, n_tokens: int) -> Iterator[Slice]:
        """All features, some at a time, so that the codes of so many tokens can be held: read, and
        not kept."""
        for own in pieces_of(self.d_model, self.n_features, n_tokens):
            read = self._read(own).to(self.device)
            yield fold(tuple(own), read, self.inputs, self.layout.subtract_b_dec)

    def full(self) -> SAE:
        """The whole SAE; read once for as long as somebody holds it, and freed after that."""
        held = self._whole[0]() if self._whole else None
        if held is None:
            held = SAE(
                site=self.site, name=self.name, subtract_b_dec=self.layout.subtract_b_dec,
                k=self.k, inputs=self.inputs, facts=self.facts, **vars(self._read()),
            ).to(self.device)  # fmt: skip
            self._whole[:] = [weakref.ref(held)]
        return held

    def rivals(self) -> Rivals:
        """The encoder of a TopK, of which the k-th value needs all; kept and freed as the whole,
        and shared with it if that is in memory already. Raises SAEError on NaN."""
        held = self._rivals[0]() if self._rivals else None
        if held is None:
            whole = self._whole[0]() if self._whole else None
            held = self._competing() if whole is None else Rivals.of(whole)
            self._rivals[:] = [weakref.ref(held)]
        return held

    def _competing(self) -> Rivals:
        try:
            return self.layout.rivals(self.device)
        except SAEError as error:
            raise SAEError(f"{self.name}: {error}") from None

    def _read(self, ids: Sequence[int] | None = None) -> Weights:
        try:
            return self.layout.read(ids)
        except SAEError as error:
            raise SAEError(f"{self.name}: {error}") from None

    def to(self, device: torch.device | str) -> StoredSAE:
        return replace(self, device=device, _whole=[], _rivals=[], _taken={})
