"""Multiple-choice questions from the rows of a dataset, and the splits they fall into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from holdfast.canonical import digest
from holdfast.datasets import DatasetKind, Row
from holdfast.errors import StudyError

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("question", "choices", "answer")
_POINTS = re.compile(r"(?:both )?[a-d] (?:and|&) [a-d]\.?|all of the above\.?", re.IGNORECASE)
SHARES = {"fit": 0.35, "tune": 0.15, "test": 0.5}


@dataclass(frozen=True)
class Question:
    """A question with four different choices.

    id: a hash of its text and choices, whatever their order and wherever it was published; answer:
    index into choices; subject: the row's own label, "" without one; row: of its dataset, from 1.
    """

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    row: int | None = field(default=None, compare=False)

    @property
    def tricky(self) -> bool:
        """Whether a choice points at others ("Both A and C", "All of the above"): in another order
        it points at the wrong ones."""
        return any(_POINTS.fullmatch(choice) for choice in self.choices)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a dataset in its order, and how many rows were left out as repeats."""

    label: str
    questions: tuple[Question, ...]
    n_dropped: int = 0
    origin: str = ""

    def split(self, name: Literal["fit", "tune", "test"], seed: int) -> list[Question]:
        """The questions of a split in the order they are asked, both drawn by a seeded hash.

        Each question is in one split, whatever is asked for. Raises StudyError if there are fewer
        questions than splits.
        """
        if len(self.questions) < len(SHARES):
            raise StudyError(
                f"{self.label}: expected {len(SHARES)} questions or more, one for each of "
                f"{', '.join(SHARES)}, got {len(self.questions)}"
            )
        ordered = sorted(self.questions, key=lambda question: digest([seed, question.id]))
        n_fit, n_tune = (max(1, round(SHARES[s] * len(ordered))) for s in ("fit", "tune"))
        bounds = {
            "fit": (0, n_fit),
            "tune": (n_fit, n_fit + n_tune),
            "test": (n_fit + n_tune, len(ordered)),
        }
        return ordered[slice(*bounds[name])]

    def without(self, other: QuestionSet) -> QuestionSet:
        """The questions that the other set does not have."""
        theirs = {question.id for question in other.questions}
        kept = tuple(question for question in self.questions if question.id not in theirs)
        dropped = len(self.questions) - len(kept)
        return replace(self, questions=kept, n_dropped=self.n_dropped + dropped)


@lru_cache(maxsize=32)
def questions_of(dataset: DatasetKind, drop_repeats: bool = False) -> QuestionSet:
    """The questions of a dataset.

    drop_repeats: leave out what a public set often has a few of: a question that is there again
    (all of them, if they do not agree on the answer), and one that offers a choice twice. Without
    it they are errors. Raises StudyError naming the row.
    """
    rows = dataset.rows(COLUMNS, ("subject",))
    questions, flaws = [], []
    for row in rows:
        number = row.number
        try:
            question = _question(row)
        except ValueError as error:
            raise StudyError(f"{dataset.label}: row {number}: {error}") from None
        if len(set(question.choices)) < len(LETTERS):
            flaws.append(f"row {number} offers a choice twice")
        else:
            questions.append((number, question))
    kept: dict[str, tuple[int, Question]] = {}
    contradicted = set()
    for number, question in questions:
        first = kept.setdefault(question.id, (number, question))
        if first[0] != number:
            flaws.append(f"row {number} repeats row {first[0]}")
            if first[1].choices[first[1].answer] != question.choices[question.answer]:
                contradicted.add(question.id)
    if flaws and not drop_repeats:
        raise StudyError(
            f"{dataset.label}: {len(flaws)} of {len(rows)} rows repeat a question or a choice "
            f"({'; '.join(flaws[:3])}); remove them, or set drop_repeats = true"
        )
    left = tuple(question for id, (_, question) in kept.items() if id not in contradicted)
    return QuestionSet(dataset.label, left, len(rows) - len(left), dataset.origin)


def _question(row: Row) -> Question:
    """Raises ValueError saying what was expected."""
    cells = row.cells
    text, choices = _text("question", cells["question"]), cells["choices"]
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise ValueError(f"choices: expected a list of 4 texts, got {choices!r}")
    if len(choices) != len(LETTERS):
        raise ValueError(f"choices: expected {len(LETTERS)}, got {len(choices)}")
    options = tuple(_text(f"choice {i}", choice) for i, choice in enumerate(choices))
    subject = cells.get("subject")
    return Question(
        id=digest([_folded(text), sorted(map(_folded, options))])[:16],
        text=text,
        choices=options,
        answer=_answer(cells["answer"], options),
        subject="" if subject is None else str(subject),
        row=row.number,
    )


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what}: expected a text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: is no text that can be encoded: {error}") from None
    return value.strip()


def _folded(text: str) -> str:
    """What two writings of one question share."""
    return " ".join(text.casefold().split())


def _answer(value: Any, choices: tuple[str, ...]) -> int:
    """An index from 0, a letter, or the right choice's text."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(choices):
            raise ValueError(f"answer: expected an index from 0 to 3, got {value}")
        return value
    if not isinstance(value, str):
        raise ValueError(f"answer: expected an index, a letter or a choice, got {value!r}")
    value = value.strip()
    read = {LETTERS.index(value)} if value in LETTERS else set()
    read |= {i for i, choice in enumerate(choices) if choice == value}
    if len(read) != 1:
        what = "more than one choice" if read else "none of them"
        raise ValueError(
            f"answer: expected a letter from A to D or the text of one choice, got {value!r}, "
            f"which is {what}"
        )
    return read.pop()
