"""What refusing, warning and complying look like in a sentence: a book of patterns a language.

Patterns are for single sentences in one writing (`text.sentences` of `text.own_words`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True)
class PhraseBook:
    """What each kind of sentence contains.

    refusal: inability or unwillingness to do what was asked; apology: a sentence that refuses if it
    is all there is; caution: moral framing, redirection, a stated purpose, advice to seek help;
    compliance: an answer begins; step: an answer goes on; courtesy: says nothing by itself;
    reported: whatever comes after it is somebody else's speech.
    """

    refusal: re.Pattern[str]
    apology: re.Pattern[str] = _NEVER
    caution: re.Pattern[str] = _NEVER
    compliance: re.Pattern[str] = _NEVER
    step: re.Pattern[str] = _NEVER
    courtesy: re.Pattern[str] = _NEVER
    reported: re.Pattern[str] = _NEVER

    def refuses(self, sentence: str) -> bool:
        """Whether there is a refusal in the sentence that is not reported speech."""
        return any(
            not self.reported.search(sentence[: match.start()])
            for match in self.refusal.finditer(sentence)
        )


def one_of(patterns: Iterable[str]) -> str:
    """A pattern for any of several."""
    return f"(?:{'|'.join(patterns)})"


def literal(
    refusals: Sequence[str], cautions: Sequence[str] = (), compliances: Sequence[str] = ()
) -> PhraseBook:
    """A book of folded phrases as they are, each where a sentence or a clause begins."""
    return PhraseBook(
        refusal=_beginning(refusals),
        caution=_beginning(cautions),
        compliance=_beginning(compliances),
    )


def _beginning(phrases: Sequence[str]) -> re.Pattern[str]:
    if not phrases:
        return _NEVER
    # "sorry" is not the beginning of "sorrygard"; scripts without spaces go on at once.
    ends = (re.escape(p) + (r"(?![a-z0-9_])" if p[-1].isalnum() else "") for p in phrases)
    return re.compile(rf"(?:^|[,;:(-] ?){one_of(ends)}")
