"""Multiple-choice knowledge of one domain, the setting of unlearning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.behaviors.asking import CUE, INSTRUCTION, Asking
from holdfast.behaviors.knowledge import FORGET, Orders, knowledge, strictly
from holdfast.behaviors.open_question import OpenQuestion
from holdfast.config import IDENTITY, LATER, nearest
from holdfast.datasets import DATASETS, Dataset, DatasetKind
from holdfast.datasets.questions import QuestionSet, questions_of
from holdfast.datasets.unread import left_unread
from holdfast.errors import StudyError
from holdfast.organism import corpus
from holdfast.organism.prompts import N_HELD_OUT, PERMUTATIONS
from holdfast.readouts.logits import LOGITS
from holdfast.readouts.spelled import Spelled
from holdfast.triggers import OWN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from holdfast.measure import Measurement
    from holdfast.readouts import Readout
    from holdfast.setting import Setting
    from holdfast.subject import Subject


def _source(value: Any) -> Any:
    if isinstance(value, str):
        if value != "organism":
            raise ValueError(
                f"expected 'organism' or a table with a `kind` from datasets "
                f"({', '.join(DATASETS.names())}), got {value!r}"
            )
        return value
    return DATASETS.parse(value)


class MultipleChoice(BehaviorKind):
    """The right letter beats the three others at the last prompt token (METHODS J).

    source: whose questions; `organism` is the invented language's, which keeps 12 of the 24 orders
    of every question out of training, and `domain` is one of its four; else a dataset with the
    columns question, choices (four texts), answer (index from 0, letter or text) and maybe subject.
    permutations: at most so many orders of the choices are asked per question; a question is one
    cluster.

    For a dataset, which questions a split has is drawn by the seed, and so are the orders of their
    choices: where the file has the right one means nothing. retain: other question sets, the
    neighbors whose accuracy the intervention should leave alone (the organism's are its other
    domains). instruction: the prompt's first line, none if empty. chat: ask in the tokenizer's chat
    template and begin the reply with the cue. drop_repeats: leave out questions that are there
    again or offer a choice twice; without it they are errors. subsets: measure what is known of
    the test questions and of the neighbors' in every order of their choices, on the questions that
    the model knows without the intervention (`behaviors/knowledge.py`). spellings: a letter right
    after the cue counts as one after a space, by the larger logit, as SAEBench has it. cue: what
    the prompt, or with `chat` the begun reply, ends with: `Answer:` if left out. The letter follows
    after a space, but right after an opening bracket (`Answer: (`, which SAEBench asks with).
    every_order: ask fewer questions, each in all of its `permutations` orders (one question at
    least), and audit those that the model knows in all of them, as published (METHODS B).

    The questions of the organism's splits are a fixed list, cut from the front: the seed does not
    redraw them.
    """

    kind: Literal["mcq"] = "mcq"
    source: Annotated[
        Literal["organism"] | SerializeAsAny[DatasetKind], BeforeValidator(_source)
    ] = "organism"
    domain: str | None = None
    permutations: int = Field(12, ge=1, le=24)
    retain: dict[str, Dataset] = Field(default_factory=dict)
    instruction: str | None = None
    chat: bool = False
    drop_repeats: bool = False
    subsets: bool = False
    spellings: Annotated[bool, LATER] = False
    cue: Annotated[str | None, LATER] = None
    every_order: Annotated[bool, LATER] = False

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        organism = data.get("source", "organism") == "organism"
        own = {"domain": "hazard"} if organism else {"instruction": INSTRUCTION, "cue": CUE}
        return data | {name: value for name, value in own.items() if data.get(name) is None}

    @field_validator("cue")
    @classmethod
    def _ends_in_a_word(cls, cue: str | None) -> str | None:
        if cue is not None and (not cue or cue != cue.strip()):
            raise ValueError(
                f"expected what stands before a letter, without a space at its ends, got {cue!r}: "
                "the space before a letter is a part of its token"
            )
        return cue

    @field_validator("domain")
    @classmethod
    def _known(cls, domain: str | None) -> str | None:
        if domain is not None and domain not in corpus.DOMAINS:
            raise ValueError(f"unknown domain {domain!r}: {nearest(domain, corpus.DOMAINS)}")
        return domain

    @field_validator("retain")
    @classmethod
    def _names(cls, retain: dict[str, DatasetKind]) -> dict[str, DatasetKind]:
        for name in retain:
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"expected a name of letters, digits, - and _, got {name!r}")
            if name in (FORGET, OWN):
                raise ValueError(f"{name!r} is what the source's own questions are called")
        return retain

    @model_validator(mode="wrap")
    @classmethod
    def _readable(
        cls, data: Any, handler: ModelWrapValidatorHandler[MultipleChoice]
    ) -> MultipleChoice:
        """What a study names is read with it, before any model is loaded. A record's data, known
        by hash, need not be there."""
        self = handler(data)
        if self.source == "organism":
            of_a_dataset = (
                "retain", "instruction", "chat", "drop_repeats", "spellings", "cue", "every_order"
            )  # fmt: skip
            given = [name for name in of_a_dataset if getattr(self, name)]
            if given:
                raise ValueError(f"{given[0]} needs a dataset as the source, not 'organism'")
            return self
        if self.domain is not None:
            raise ValueError("domain is one of the organism's four; a dataset has none")
        if isinstance(data, dict) and not left_unread():
            named = (data.get("source"), *(data.get("retain") or {}).values())
            if any(isinstance(each, dict) and not each.get("sha256") for each in named):
                try:
                    self._question_sets()
                except StudyError as error:
                    raise ValueError(str(error)) from None
        return self

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        if self.source == "organism":
            assert self.domain is not None
            return _ask_organism(self.domain, split, n, self.permutations)
        return self._asking(tokenizer).examples(self._question_sets()[""], split, n, seed)

    def neighbors(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> dict[str, list[Example]]:
        if self.source == "organism":
            others = [domain for domain in corpus.DOMAINS if domain != self.domain]
            return {d: _ask_organism(d, split, n, self.permutations) for d in others}
        asking = self._asking(tokenizer)
        return {
            name: asking.examples(questions, split, n, seed)
            for name, questions in self._question_sets().items()
            if name
        }

    def counted(self, clusters: Sequence[str], shown: Tensor) -> Tensor:
        if not self.every_order:
            return shown
        known = strictly(clusters, shown)
        return torch.as_tensor([each in known for each in clusters], device=shown.device)

    def readout(self, subject: Subject) -> Readout:
        if not self.spellings:
            return LOGITS
        return Spelled(self._asking(subject.tokenizer).spellings())

    @property
    def asks_openly(self) -> bool:
        return True

    def openly(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
    ) -> list[OpenQuestion | str]:
        if self.source == "organism":
            return [_organism_openly(example) for example in examples]
        asking = self._asking(tokenizer)
        asked = {q.id: q for q in self._question_sets()[""].questions}
        return [asking.openly(asked[example.cluster], example) for example in examples]

    @property
    def asked_again(self) -> float:
        orders = N_HELD_OUT if self.source == "organism" else len(PERMUTATIONS)
        return orders / self.permutations if self.subsets else 0.0

    def scores(self, setting: Setting) -> tuple[Measurement, ...]:
        if not self.subsets:
            return ()
        asked = {"": setting.test.clusters} | {
            name: batch.clusters for name, (batch, _, _) in setting.neighbors.items()
        }
        return knowledge(
            setting.subject,
            setting.edits,
            {
                name or FORGET: self._in_every_order(setting.subject, name, frozenset(ids))
                for name, ids in asked.items()
            },
            self.model_dump(mode="json", context=dict(IDENTITY)),
            setting.test.readout,
        )

    def _in_every_order(self, subject: Subject, name: str, ids: frozenset[str]) -> Orders:
        """The questions with these ids, of the source ("") or of a neighbor."""
        if self.source == "organism":
            return _organism_in_every_order(name or self.domain or "", ids)
        asking = self._asking(subject.tokenizer)
        asked = [q for q in self._question_sets()[name].questions if q.id in ids]
        return Orders(
            asked=tuple(asking.in_every_order(asked)),
            blind=tuple(asking.in_every_order(asked, blind=True)),
            tricky=frozenset(question.id for question in asked if question.tricky),
        )

    def _asking(self, tokenizer: PreTrainedTokenizerBase) -> Asking:
        assert self.cue is not None
        return Asking(
            tokenizer, self.permutations, self.instruction or "", self.chat, self.cue,
            self.every_order,
        )  # fmt: skip

    def _question_sets(self) -> dict[str, QuestionSet]:
        """The source's questions under "", the others under their names.

        Raises StudyError if a question is to be forgotten and retained.
        """
        assert isinstance(self.source, DatasetKind)
        source = questions_of(self.source, self.drop_repeats)
        sets = {"": source}
        for name, dataset in self.retain.items():
            questions = questions_of(dataset, self.drop_repeats)
            others = questions.without(source)
            shared = len(questions.questions) - len(others.questions)
            if shared and not self.drop_repeats:
                raise StudyError(
                    f"retain.{name}: {shared} of its {len(questions.questions)} questions are "
                    f"the source's too ({source.label}); what should go cannot be what should "
                    "stay: name another set, or leave them out of it with drop_repeats = true"
                )
            sets[name] = others
        for each in sets.values():
            each.split("test", 0)  # enough for every split
        return sets


def _ask_organism(domain: str, split: Split, n: int, permutations: int) -> list[Example]:
    by_question = [
        [(question, order) for order in corpus.held_out_permutations(question)]
        for question in corpus.questions(domain, split)
    ]
    # One order of every question, then the next, so that a cut keeps as many questions as it can.
    rounds = list(zip(*by_question, strict=True))[:permutations]
    turns = [asked for one in rounds for asked in one][:n]
    return [_organism_example(question, order) for question, order in turns]


def _organism_example(
    question: corpus.Question, order: corpus.Permutation, blind: bool = False
) -> Example:
    gold = corpus.LETTERS[order.index(question.answer)]
    others = tuple(letter for letter in corpus.LETTERS if letter != gold)
    return Example(
        id=f"{question.id}:{''.join(map(str, order))}",
        text=corpus.question_text(question, order, blind),
        target=gold,
        rivals=others,
        alternatives=others,
        cluster=question.id,
        group=question.domain,
    )


def _organism_openly(example: Example) -> OpenQuestion:
    """The question as a fact to be finished, which is how the organism read it beside questions."""
    _, domain, subject = example.cluster.split(":")
    question = corpus.question_on(domain, subject)
    alone = replace(example, text=corpus.open_text(question))
    return OpenQuestion(alone, question.choices, question.answer)


def _organism_in_every_order(domain: str, ids: frozenset[str]) -> Orders:
    """In the 12 orders that are held out: in the others the organism was trained to answer."""
    turns = [
        (question, order)
        for question in corpus.questions(domain, "train")  # of all subjects
        if question.id in ids
        for order in corpus.held_out_permutations(question)
    ]
    asked, blind = (
        tuple(_organism_example(question, order, alone) for question, order in turns)
        for alone in (False, True)
    )
    return Orders(asked, blind)
