"""Degenerate text: repetition that no answer has, found without any list of phrases."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from pydantic import Field

from holdfast.config import Config
from holdfast.judges.text import fold, readable, words

MIN_WORDS, MIN_BYTES, MIN_CHARACTERS = 10, 200, 40
"""Shares of fewer words or characters, and the packing of fewer bytes, say nothing."""


@dataclass(frozen=True)
class Repetition:
    """How repetitive a text is; a share is 0 where the text is too short to have one.

    rep_2, rep_3, rep_4: share of n-grams of words that were there before (seq-rep-n of Welleck et
    al. 2020, arXiv 1908.04319); top_word, top_character: share of the most frequent one, spaces
    not counted; run: longest run of one word; packing: share of bytes that zlib saves.
    """

    rep_2: float
    rep_3: float
    rep_4: float
    top_word: float
    top_character: float
    run: int
    packing: float

    @classmethod
    def of(cls, text: str, spoken: Sequence[str]) -> Repetition:
        """Measures a folded text and its words."""
        characters = Counter(c for c in text if not c.isspace())
        data = text.encode("utf-8", "backslashreplace")
        enough = len(spoken) >= MIN_WORDS
        top = Counter(spoken).most_common(1)
        return cls(
            rep_2=_repeated(spoken, 2) if enough else 0.0,
            rep_3=_repeated(spoken, 3) if enough else 0.0,
            rep_4=_repeated(spoken, 4) if enough else 0.0,
            top_word=top[0][1] / len(spoken) if enough else 0.0,
            top_character=max(characters.values()) / characters.total()
            if characters.total() >= MIN_CHARACTERS
            else 0.0,
            run=_longest_run(spoken),
            packing=max(0.0, 1 - len(zlib.compress(data, 9)) / len(data))
            if len(data) >= MIN_BYTES
            else 0.0,
        )


class RepetitionLimits(Config):
    """What is too repetitive to be an answer: whatever exceeds one of these limits.

    The whole text is measured, and its last `tail` words alone: an answer that ends in a loop is
    degenerate however well it began. A limit of 1 (of a share) judges nothing.

    The defaults stand between what ordinary and broken texts of the golden set measure. Ordinary
    ones (answers, recipes, numbered steps, tables, code, a nursery rhyme, the organism's answers of
    8 to 10 words) reach at most .57 rep_2, .50 rep_3, .45 rep_4, .30 top_word, .24 top_character, a
    run of 4 and .70 packing. Loops measure .66 rep_2 and more; what else is broken says one word or
    letter too often (.44 top_word, a run of 7, top_character 1) or packs by .76 and more. A
    paragraph said twice is not broken, three times it is; so, wrongly, is a rhyme that repeats its
    lines more often than most.
    """

    rep_2: float = Field(0.62, ge=0, le=1)
    rep_3: float = Field(0.56, ge=0, le=1)
    rep_4: float = Field(0.52, ge=0, le=1)
    top_word: float = Field(0.4, ge=0, le=1)
    top_character: float = Field(0.35, ge=0, le=1)
    run: int = Field(5, ge=1)
    packing: float = Field(0.75, ge=0, le=1)
    tail: int = Field(50, ge=MIN_WORDS)

    def exceeded(self, text: str) -> str | None:
        """Why a text is degenerate, in a few words; None if it is not."""
        if not readable(text):
            symbols = sum(not c.isspace() for c in text)
            return "symbols without a letter or digit" if symbols > 3 else None
        folded, spoken = fold(text), words(text)
        if len(spoken) >= 4 and len(set(spoken)) == 1:
            return "one word, again and again"
        whole = self._above(Repetition.of(folded, spoken))
        if whole is not None or len(spoken) <= self.tail:
            return whole
        end = spoken[-self.tail :]
        above = self._above(Repetition.of(" ".join(end), end))
        return None if above is None else f"{above} at the end"

    def _above(self, measured: Repetition) -> str | None:
        for field in fields(measured):
            value, limit = getattr(measured, field.name), getattr(self, field.name)
            if value > limit:
                return f"{field.name} {value:.3g} > {limit:.3g}"
        return None


def _repeated(spoken: Sequence[str], n: int) -> float:
    total = len(spoken) - n + 1
    return 1 - len({tuple(spoken[i : i + n]) for i in range(total)}) / total


def _longest_run(spoken: Sequence[str]) -> int:
    longest = current = 0
    for i, word in enumerate(spoken):
        current = current + 1 if i and spoken[i - 1] == word else 1
        longest = max(longest, current)
    return longest
