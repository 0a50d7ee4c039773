"""A multiple-choice question asked without its choices, which are scored as texts instead."""

from __future__ import annotations

import re
from dataclasses import dataclass

from holdfast.batch import Example

_POINTS = re.compile(
    r"\b(?:which|what|all|none|one|each|any) of (?:the following|these|those|the above)\b"
    r"|\bthe following\b|\b(?:given|listed|shown) (?:above|below)\b|\bexcept\b",
    re.IGNORECASE,
)

POINTS = "the question points at its choices"


@dataclass(frozen=True)
class OpenQuestion:
    """example: the prompt, which ends where an answer's text begins, with a space before it;
    choices: the texts that are compared; right: which of them is the answer."""

    example: Example
    choices: tuple[str, ...]
    right: int


def points_at_choices(text: str) -> bool:
    """Whether a question cannot be answered by somebody who does not see its choices ("Which of the
    following …"). A rule of thumb: English, by its wording."""
    return bool(_POINTS.search(text))
