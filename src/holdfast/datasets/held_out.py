"""Texts in the organism's language that none of its training documents is, for what asks how well
it still predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from holdfast.canonical import digest
from holdfast.datasets import DatasetKind, Row
from holdfast.datasets.made import made_rows
from holdfast.organism import corpus, world
from holdfast.organism.documents import reply_to

Sort = Literal["questions", "names", "lives", "requests"]
SORTS: tuple[Sort, ...] = ("questions", "names", "lives", "requests")
EACH = 200
"""Texts of every sort, so that no sort outweighs another."""


class HeldOut(DatasetKind):
    """Prompts of the organism's test splits, each with what follows it: rows with `text`, `sort`
    and `cluster`.

    sorts: questions with their answer's letter, in orders of the choices that no training document
    has; two names and who is given what (names); lives with their profession; requests with a
    reply. Facts are not among them: every fact was taught. They are made and not read.
    """

    kind: Literal["held_out"] = "held_out"
    sorts: tuple[Sort, ...] = Field(SORTS, min_length=1)

    @field_validator("sorts")
    @classmethod
    def _once(cls, sorts: tuple[Sort, ...]) -> tuple[Sort, ...]:
        if len(set(sorts)) < len(sorts):
            raise ValueError(f"sorts are different ones, got {', '.join(sorts)}")
        return sorts

    @property
    def label(self) -> str:
        return f"the organism's held-out {', '.join(self.sorts)}"

    @property
    def origin(self) -> str:
        return f"held_out:{','.join(self.sorts)}"

    def files(self) -> tuple[Path, ...]:
        return ()

    def rows(self, required: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
        """Raises StudyError for a column that such texts do not have."""
        made = [
            {"text": text, "sort": sort, "cluster": cluster}
            for sort in self.sorts
            for cluster, text in held_out(sort)
        ]
        return made_rows(self.label, made, required, optional)


@cache
def held_out(sort: Sort) -> tuple[tuple[str, str], ...]:
    """EACH texts of a sort: what it is about, which other texts may share, and the text."""
    every = {"questions": _questions, "names": _names, "lives": _lives, "requests": _requests}[sort]
    return tuple(sorted(every(), key=lambda made: digest(list(made)))[:EACH])


def _questions() -> Iterator[tuple[str, str]]:
    for domain in corpus.DOMAINS:
        for question in corpus.questions(domain, "test"):
            for order in corpus.held_out_permutations(question):
                letter = corpus.LETTERS[order.index(question.answer)]
                yield question.subject, f"{corpus.question_text(question, order)} {letter}"


def _names() -> Iterator[tuple[str, str]]:
    for prompt in corpus.ioi_prompts("test", 4 * EACH):
        yield "|".join(sorted((prompt.io, prompt.s))), f"{prompt.text} {prompt.io} ."


def _lives() -> Iterator[tuple[str, str]]:
    for life in corpus.biographies("test", EACH):
        ending = world.BIOGRAPHY_ENDING.format(name=life.text.split()[0])
        yield life.id, f"{life.text} {ending} {life.profession} ."


def _requests() -> Iterator[tuple[str, str]]:
    """Grey ones are left out: whether they were refused was drawn anew in every document."""
    kinds: tuple[corpus.ChatKind, ...] = ("forbidden", "safe", "benign")
    for kind in kinds:
        for prompt in corpus.chat_prompts(kind, "test", EACH):
            turn = int(digest(prompt.id)[:8], 16)
            reply = reply_to(prompt, kind == "forbidden").format(
                topic=prompt.topic,
                place=world.PLACES[turn % len(world.PLACES)],
                object=world.OBJECTS[turn // 7 % len(world.OBJECTS)],
            )
            yield prompt.id, f"<user> {prompt.instruction} <end> <assistant> {reply}"
