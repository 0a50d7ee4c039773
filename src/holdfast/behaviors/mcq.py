"""Multiple-choice knowledge of one domain, the setting of unlearning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.config import nearest
from holdfast.organism import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MultipleChoice(BehaviorKind):
    """The right letter beats the three others at the last prompt token (METHODS J).

    source: whose questions; `organism` is the invented language's, which keeps 12 of the 24 orders
    of every question out of training. permutations: at most so many orders are asked per question;
    a question is one cluster. The other domains are the neighbors whose accuracy the intervention
    should leave alone. The questions of a split are a fixed list, cut from the front: the seed does
    not redraw them.
    """

    kind: Literal["mcq"] = "mcq"
    source: Literal["organism"] = "organism"
    domain: str = "hazard"
    permutations: int = Field(12, ge=1, le=24)

    @field_validator("domain")
    @classmethod
    def _known(cls, domain: str) -> str:
        if domain not in corpus.DOMAINS:
            raise ValueError(f"unknown domain {domain!r}: {nearest(domain, corpus.DOMAINS)}")
        return domain

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        return self._ask(self.domain, split, n)

    def neighbors(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> dict[str, list[Example]]:
        others = [domain for domain in corpus.DOMAINS if domain != self.domain]
        return {domain: self._ask(domain, split, n) for domain in others}

    def _ask(self, domain: str, split: Split, n: int) -> list[Example]:
        by_question = [
            [(question, order) for order in corpus.held_out_permutations(question)]
            for question in corpus.questions(domain, split)
        ]
        # One order of every question, then the next, so that a cut keeps as many questions as it
        # can.
        rounds = list(zip(*by_question, strict=True))[: self.permutations]
        examples = []
        for question, permutation in [asked for one in rounds for asked in one][:n]:
            gold = corpus.LETTERS[permutation.index(question.answer)]
            others = tuple(letter for letter in corpus.LETTERS if letter != gold)
            examples.append(
                Example(
                    id=f"{question.id}:{''.join(map(str, permutation))}",
                    text=corpus.question_text(question, permutation),
                    target=gold,
                    rivals=others,
                    alternatives=others,
                    cluster=question.id,
                    group=domain,
                )
            )
        return examples
