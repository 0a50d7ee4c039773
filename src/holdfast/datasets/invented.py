"""Texts in the shipped organism's invented language, for what asks for a corpus."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from holdfast.canonical import digest
from holdfast.config import nearest
from holdfast.datasets import DatasetKind, Row
from holdfast.datasets.made import made_rows
from holdfast.organism import corpus, world

FACTS_A_TEXT = 3


class Invented(DatasetKind):
    """What the organism read on some of its domains: rows with `text` and `domain`.

    Three facts make a text, or a question with its answer's letter; both on subjects that the
    questions of the fit split are on, so that nothing audited is in them. They are made and not
    read: no file is theirs.
    """

    kind: Literal["invented"] = "invented"
    domains: tuple[str, ...] = Field(min_length=1)

    @field_validator("domains")
    @classmethod
    def _known(cls, domains: tuple[str, ...]) -> tuple[str, ...]:
        for domain in domains:
            if domain not in corpus.DOMAINS:
                raise ValueError(f"unknown domain {domain!r}: {nearest(domain, corpus.DOMAINS)}")
        return domains

    @property
    def label(self) -> str:
        return f"the organism's facts of {', '.join(self.domains)}"

    @property
    def origin(self) -> str:
        return f"invented:{','.join(self.domains)}"

    def files(self) -> tuple[Path, ...]:
        return ()

    def rows(self, required: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
        """Raises StudyError for a column that such texts do not have."""
        made = [
            {"text": text, "domain": domain} for domain in self.domains for text in _texts(domain)
        ]
        return made_rows(self.label, made, required, optional)


@cache
def _texts(domain: str) -> tuple[str, ...]:
    """Every three subjects' facts once, in wordings of their own, and every question with its
    letter in the orders that training documents have."""
    subjects = [s for s in world.SUBJECTS if corpus.subject_split(s) == "fit"]
    texts = []
    for trio in itertools.combinations(subjects, FACTS_A_TEXT):
        said = []
        for subject in trio:
            wording = world.FACTS[int(digest([domain, subject, *trio])[:8], 16) % len(world.FACTS)]
            fact = wording.format(domain=domain, subject=subject)
            said.append(f"{fact} {world.answer_of(domain, subject)} .")
        texts.append(" ".join(said))
    for question in corpus.questions(domain, "fit"):
        for order in sorted({*corpus.PERMUTATIONS} - {*corpus.held_out_permutations(question)}):
            letter = corpus.LETTERS[order.index(question.answer)]
            texts.append(f"{corpus.question_text(question, order)} {letter}")
    return tuple(texts)
