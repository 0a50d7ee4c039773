"""Fidelity: how close a reply is to its prompt's clean answer, beyond what any answer would be."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import Field

from holdfast.canonical import digest
from holdfast.config import Config
from holdfast.judges.text import words
from holdfast.reply import Reply

MOST_UNRELATED = 200
"""More unrelated answers than these make a reply's comparison slower, not better."""
UNHEARD = 1.0
"""The weight of a word that is in no clean answer."""


class Fidelity(Config):
    """A reply against the clean answer of its prompt.

    token_f1, rouge_l: in [0, 1]; overlap: token F1 in which a word weighs what it tells (log n/k if
    k of the n clean answers have it), which is what is compared; z: its distance from the reply's
    overlaps with the unrelated answers, in their standard deviations; p: the share of answers, its
    own among them, that the reply overlaps with at least as much; n_unrelated: how many were
    compared. p and z are None for `reason`; z also where all unrelated overlaps are the same.
    """

    id: str
    token_f1: float | None
    rouge_l: float | None
    overlap: float | None
    z: float | None
    p: float | None
    n_unrelated: int
    reason: str = ""


class FidelityTest(Config):
    """Is a reply closer to its own prompt's clean answer than to the other prompts' answers?

    Long texts share function words whatever they are about, so no fixed similarity says "on topic"
    (METHODS H.3). The reply is therefore compared with the other prompts' clean answers as well:
    p = (1 + others it overlaps with at least as much) / (1 + others). If the reply has nothing to
    do with which of the answers is its own, all ranks are equally likely and P(p <= alpha) <=
    alpha, for any set of answers, in any language and at any length: of unrelated replies at most a
    share alpha is found on topic. The null is the reply's own, not that of pairs of clean answers,
    so that its length and manner are on both sides; and it uses no other reply, so that what a
    reply is called depends on that reply and the clean answers alone.

    Nothing is decided (p is None, and no reply is called off topic) where the reply's own answer is
    missing or is no answer, where fewer than 1/alpha - 1 others are there, and where so many others
    say the same as its own that a word for word copy could not stand out.
    """

    alpha: float = Field(0.05, gt=0, le=1)

    def compare(
        self, replies: Sequence[Reply], answers: Sequence[Reply], without: Mapping[str, str]
    ) -> list[Fidelity]:
        """One record a reply, in order.

        answers: clean answers with an id each; replies find theirs by id. without: ids of prompts
        whose clean answer is none, with the reason.
        """
        said = {answer.id: tuple(words(answer.text)) for answer in answers}
        if len(said) != len(answers):
            raise ValueError(f"expected one clean answer an id, got {len(answers)} of {len(said)}")
        weights = _weights(list(said.values()))
        pool = {id: _Bag.of(spoken, weights) for id, spoken in said.items()}
        return [self._compare(reply, pool, weights, without) for reply in replies]

    def unrelated(self, fidelity: Fidelity) -> bool:
        """Whether the reply is no closer to its own clean answer than to others."""
        return fidelity.p is not None and fidelity.p > self.alpha

    def _compare(
        self,
        reply: Reply,
        pool: Mapping[str, _Bag],
        weights: Mapping[str, float],
        without: Mapping[str, str],
    ) -> Fidelity:
        own = pool.get(reply.id)
        if own is None:
            reason = without.get(reply.id, "there is no clean answer to this prompt")
            return Fidelity(
                id=reply.id, token_f1=None, rouge_l=None, overlap=None, z=None, p=None,
                n_unrelated=0, reason=reason,
            )  # fmt: skip
        bag, others = _Bag.of(words(reply.text), weights), _drawn(reply.id, pool)
        overlap = weighted_f1(bag, own, weights)
        z = p = None
        reason = self._no_null(own, others, weights)
        if not reason:
            null = [weighted_f1(bag, other, weights) for other in others]
            p = (1 + sum(value >= overlap for value in null)) / (1 + len(null))
            spread = statistics.pstdev(null)
            z = (overlap - statistics.fmean(null)) / spread if spread else None
        return Fidelity(
            id=reply.id, token_f1=token_f1(bag, own), rouge_l=rouge_l(bag, own), overlap=overlap,
            z=z, p=p, n_unrelated=len(others), reason=reason,
        )  # fmt: skip

    def _no_null(self, own: _Bag, others: Sequence[_Bag], weights: Mapping[str, float]) -> str:
        needed = math.ceil(1 / self.alpha) - 1
        if len(others) < needed:
            return f"expected {needed} unrelated answers or more, got {len(others)}"
        whole = weighted_f1(own, own, weights)
        same = sum(weighted_f1(own, other, weights) >= whole for other in others)
        if (1 + same) / (1 + len(others)) > self.alpha:
            return f"{same} of {len(others)} other answers say the same as this prompt's own"
        return ""


class _Bag(NamedTuple):
    """A text's words: in order, counted, where each stands as a bit mask, and their weight."""

    words: tuple[str, ...]
    counts: Counter[str]
    places: dict[str, int]
    weight: float

    @classmethod
    def of(cls, spoken: Sequence[str], weights: Mapping[str, float]) -> _Bag:
        places: dict[str, int] = {}
        for i, word in enumerate(spoken):
            places[word] = places.get(word, 0) | 1 << i
        weight = sum(weights.get(word, UNHEARD) for word in spoken)
        return cls(tuple(spoken), Counter(spoken), places, weight)


def _drawn(id: str, pool: Mapping[str, _Bag]) -> list[_Bag]:
    """The others' answers; a fixed draw by id where there are very many."""
    others = [other for other in pool if other != id]
    if len(others) > MOST_UNRELATED:
        others = sorted(others, key=lambda other: digest([id, other]))[:MOST_UNRELATED]
    return [pool[other] for other in others]


def _weights(answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """What a word tells: nothing if every answer has it. Sums of whole sixteenths are exact, so
    that equal overlaps stay equal in whatever order they are added."""
    having = Counter(word for answer in answers for word in set(answer))
    return {word: round(16 * math.log(len(answers) / k)) / 16 for word, k in having.items()}


def weighted_f1(a: _Bag, b: _Bag, weights: Mapping[str, float]) -> float:
    """Token F1 with a weight for every word; 0 if no word tells anything."""
    few, many = sorted((a.counts, b.counts), key=len)
    shared = sum(min(n, many[w]) * weights.get(w, UNHEARD) for w, n in few.items() if w in many)
    return 2 * shared / (a.weight + b.weight) if a.weight + b.weight else 0.0


def _f(common: int, a: int, b: int) -> float:
    """The harmonic mean of common / a and common / b; 1 for two empty texts."""
    return 2 * common / (a + b) if a + b else 1.0


def token_f1(a: _Bag, b: _Bag) -> float:
    """F1 of the words two texts share, each as often as both have it (SQuAD's)."""
    return _f((a.counts & b.counts).total(), len(a.words), len(b.words))


def rouge_l(a: _Bag, b: _Bag) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), with beta = 1."""
    return _f(_common_subsequence(a, b), len(a.words), len(b.words))


def _common_subsequence(a: _Bag, b: _Bag) -> int:
    """Its length, a row of the dynamic program a machine word (Hyyrö 2004)."""
    full = (1 << len(a.words)) - 1
    row = full
    for word in b.words:
        match = a.places.get(word, 0)
        row = (row + (row & match) | row & ~match) & full
    return len(a.words) - row.bit_count()
