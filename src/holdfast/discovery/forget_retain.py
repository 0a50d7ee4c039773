"""Sparsity on two corpora: features that fire on what should go and hardly on what should stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.canonical import digest
from holdfast.config import IDENTITY
from holdfast.datasets import Dataset, DatasetKind
from holdfast.discovery import DiscoveryKind
from holdfast.errors import FeatureError, StudyError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject

_TOKENS = 4096
"""Tokens for which the encoder is gone through once: as many as features of a block then are."""

_TOKENS = 2**14
"""Most tokens, padding included, of one pass; a text that is longer has one of its own."""


class ForgetRetain(DiscoveryKind):
    """The n features that fire on most tokens of a corpus, of those that hardly fire on another.

    Farrell et al. 2410.19278 and SAEBench's unlearning (METHODS J.1): a feature's sparsity on a
    corpus is the share of its tokens, BOS, EOS and padding left out, on which the feature fires.
    Features with a retain sparsity of retain_threshold or more are dropped, and the n_features with
    the largest forget sparsity are taken from the rest, at every site with an SAE. Features that
    never fire on the forget corpus are not taken.

    forget, retain: datasets with a column `text`. Of each, n_sequences different texts of min_chars
    characters or more, drawn by a hash of the text whatever its place in the file, are cut to
    n_tokens tokens. Nothing of the behavior's prompts is read.
    """

    kind: Literal["forget_retain"] = "forget_retain"
    forget: Dataset
    retain: Dataset
    n_features: int = Field(20, ge=1)
    retain_threshold: float = Field(0.01, gt=0, le=1)
    n_sequences: int = Field(1024, ge=1)
    n_tokens: int = Field(1024, ge=2)
    min_chars: int = Field(50, ge=1)

    @property
    def reads_whole(self) -> bool:
        return False

    @property
    def corpora(self) -> tuple[int, int]:
        return 2 * self.n_sequences, self.n_tokens

    def find(self, subject: Subject, fit: Batch, neighbors: dict[str, Batch]) -> FeatureSet:
        entries = []
        for site in sorted(subject.saes):
            forget = self.sparsity(subject, site, self.forget)
            retain = self.sparsity(subject, site, self.retain)
            spared = retain < self.retain_threshold
            best = forget.masked_fill(~spared, -1.0).topk(min(self.n_features, len(forget)))
            fires = best.values > 0
            if not fires.any():
                raise FeatureError(
                    f"no feature at {site} fires on {self.forget.label} and on less than "
                    f"{self.retain_threshold:g} of the tokens of {self.retain.label}: "
                    f"{int((forget > 0).sum())} of {len(forget)} fire on the first, "
                    f"{int(spared.sum())} are below the threshold on the second; raise "
                    "retain_threshold, or take corpora that differ"
                )
            entries.append(
                SiteFeatures(
                    site=str(site),
                    ids=tuple(best.indices[fires].tolist()),
                    scores=tuple(best.values[fires].tolist()),
                )
            )
        return FeatureSet(entries=tuple(entries), source=self.kind)

    def sparsity(self, subject: Subject, site: Site, dataset: DatasetKind) -> Tensor:
        """[n_features] share of a corpus's tokens on which each feature of a site fires.

        Counted once a subject, whatever threshold and number are asked for.
        """
        read = [self.n_sequences, self.n_tokens, self.min_chars]
        named = dataset.model_dump(mode="json", context=dict(IDENTITY))
        key = digest(["sparsity", str(site), named, *read])
        if key not in subject.counted:
            sae = subject.sae(site).full()
            subject.counted[key] = firing(subject, sae, self._sequences(subject, dataset))
        return subject.counted[key]

    def _sequences(self, subject: Subject, dataset: DatasetKind) -> list[list[int]]:
        """The token ids of the texts that are read. Raises StudyError if there are too few."""
        texts = {
            text
            for row in dataset.rows(("text",))
            if isinstance(text := row.cells["text"], str) and len(text) >= self.min_chars
        }
        if len(texts) < self.n_sequences:
            raise StudyError(
                f"forget_retain: {dataset.label} has {len(texts)} different texts of "
                f"{self.min_chars} characters or more, n_sequences asks for {self.n_sequences}"
            )
        drawn = sorted(texts, key=digest)[: self.n_sequences]
        return [_encoded(subject, text)[: self.n_tokens] for text in drawn]


def firing(subject: Subject, sae: SAE, sequences: Sequence[Sequence[int]]) -> Tensor:
    """[n_features] share of the tokens of some texts on which each feature fires, float64.

    sequences: token ids. BOS, EOS and padding are read by the model and not counted (METHODS A.7).
    Raises FeatureError if no other token is left.
    """
    tokenizer = subject.tokenizer
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    left_out = torch.as_tensor([-1, *sorted(special)], device=subject.device)
    fired = torch.zeros(sae.n_features, dtype=torch.float64)
    n_tokens = 0

    def count(texts: list[Sequence[int]], rows: Tensor) -> tuple[Tensor, int]:
        x, tokens = subject.residual(sae.site, [texts[row] for row in rows.tolist()])
        counted = x[~torch.isin(tokens, left_out).to(x.device)]
        own = torch.zeros(sae.n_features, dtype=torch.float64)
        for some in counted.split(_TOKENS):
            own += torch.cat([(z > 0).sum(0) for _, z in sae.codes(some)]).double().cpu()
        return own, len(counted)

    for texts in _batches(sequences, subject.batching.sizes.passes):
        everyone = torch.arange(len(texts))
        for own, n_own in subject.batching.over("passes", everyone, partial(count, texts)):
            fired += own
            n_tokens += n_own
    if not n_tokens:
        raise FeatureError("the corpus has no token but BOS, EOS and padding")
    return fired / n_tokens


def _batches(sequences: Sequence[Sequence[int]], size: int) -> Iterator[list[Sequence[int]]]:
    """Texts of like lengths together, so that little is padded; which are does not matter."""
    batch: list[Sequence[int]] = []
    for row in sorted(sequences, key=len):
        if batch and (len(batch) == size or (len(batch) + 1) * len(row) > _TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _encoded(subject: Subject, text: str) -> list[int]:
    """As the subject reads its prompts, with BOS where they have one."""
    return subject.encode(Example("", text, "", (), (), ""))
