"""Text to force in an answer's place: as long as a prompt's own answer, and not of that prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from holdfast.batch import Batch
from holdfast.canonical import digest

Text = Literal["answer", "instruction"]

TEXTS: tuple[Text, ...] = get_args(Text)


@dataclass(frozen=True)
class Unrelated:
    """tokens: as many as the prompt's own answer has; kind: what they begin, or end."""

    tokens: list[int]
    kind: Text


def unrelated(batch: Batch) -> list[Unrelated | None]:
    """For each prompt the first tokens of another's answer, as many as its own has.

    Where all answers begin alike, the end of another prompt's instruction takes their place: text
    of the same language and length that answers nothing, and that a model which answers may be
    slower to write than any answer. None where there is no other prompt that long.
    """
    assert batch.forced is not None
    answers = [[token for token in row if token >= 0] for row in batch.forced.tolist()]
    asked = batch.unforced()
    instructions = [
        asked.tokens[row, (asked.positions[row] >= 0)][: int(asked.template[row])].tolist()
        for row in range(len(batch))
    ]
    found: list[Unrelated | None] = []
    for row, own in enumerate(answers):
        n = len(own)
        others = [Unrelated(a[:n], "answer") for a in answers if len(a) >= n and a[:n] != own] or [
            Unrelated(text[-n:], "instruction")
            for i, text in enumerate(instructions)
            if i != row and len(text) > n
        ]
        found.append(others[int(digest(batch.ids[row])[:8], 16) % len(others)] if others else None)
    return found
