"""How a multiple-choice question becomes a prompt, and its choices' order the right letter."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from holdfast.batch import Example
from holdfast.behaviors import Split
from holdfast.behaviors.continuation import as_one_token
from holdfast.behaviors.open_question import POINTS, OpenQuestion, points_at_choices
from holdfast.chat import Rendered, render
from holdfast.datasets.questions import LETTERS, Question, QuestionSet
from holdfast.errors import StudyError
from holdfast.organism.prompts import PERMUTATIONS, Permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Read the question and pick the one answer that is correct."
CUE = "Answer:"
BRACKETS = ("(", "[", "{")


@dataclass(frozen=True)
class Asking:
    """An instruction line, the question, lettered choices, the cue; the letter comes next.

    permutations: at most so many orders of a question's choices. chat: the question is a user turn
    in the tokenizer's chat template, and the reply begins with the cue. cue: a letter follows it
    after a space, but right after it where it ends in an opening bracket ("Answer: ("). whole: a
    question is asked in all of these orders or not at all.
    """

    tokenizer: PreTrainedTokenizerBase
    permutations: int
    instruction: str = INSTRUCTION
    chat: bool = False
    cue: str = CUE
    whole: bool = False

    @property
    def _gap(self) -> str:
        """What stands between cue and letter."""
        return "" if self.cue.endswith(BRACKETS) else " "

    def examples(self, questions: QuestionSet, split: Split, n: int, seed: int) -> list[Example]:
        """At most n prompts: one order of every question, then the next, so that a cut keeps as
        many questions as it can; of whole questions at least one.

        Raises StudyError if the letters are not one token each.
        """
        if self.whole:
            n_asked = max(1, n // self.permutations)
            n = n_asked * self.permutations
        else:
            n_asked = n
        asked = questions.split(split, seed)[:n_asked]
        orders = [_orders(question, seed) for question in asked]
        turns = (
            (question, order[turn])
            for turn in range(self.permutations)
            for question, order in zip(asked, orders, strict=True)
        )
        return self._examples(itertools.islice(turns, n), questions.origin)

    def in_every_order(self, questions: Sequence[Question], blind: bool = False) -> list[Example]:
        """A prompt for each of the 24 orders of each question. blind: the choices alone, without
        instruction and question (SAEBench's check of what can be guessed)."""
        turns = ((question, order) for question in questions for order in PERMUTATIONS)
        return self._examples(turns, "", blind)

    def openly(self, question: Question, example: Example) -> OpenQuestion | str:
        """The question of a prompt without instruction and choices, or why it cannot be asked
        so."""
        if question.tricky or points_at_choices(question.text):
            return POINTS
        unbracketed = replace(self, cue=self.cue.rstrip("".join(BRACKETS)).rstrip())
        text, suffix = unbracketed._prompt(question.text)
        alone = replace(example, text=text, suffix=suffix, instruction=question.text)
        return OpenQuestion(alone, question.choices, question.answer)

    def spellings(self) -> tuple[tuple[int, int], ...]:
        """Of each letter that can follow the cue with a space before it and without, the two
        tokens. Raises StudyError if there is none."""
        text, _ = self._prompt("?")
        before = self._encode(text)
        pairs = []
        for letter, told in zip(LETTERS, self._letters(text), strict=True):
            (name,) = self.tokenizer.encode(told, add_special_tokens=False)
            *start, other = self._encode(text + (letter if self._gap else f" {letter}"))
            if start == before and other not in (name, self.tokenizer.unk_token_id):
                pairs.append((name, other))
        if not pairs:
            raise StudyError(
                f"mcq: spellings = true, and after {text[-20:]!r} this tokenizer writes a letter "
                "in one way alone; leave it out"
            )
        return tuple(pairs)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=not self.chat)
        return ids

    def _examples(
        self, turns: Iterable[tuple[Question, Permutation]], origin: str, blind: bool = False
    ) -> list[Example]:
        examples: list[Example] = []
        letters: list[str] = []
        for question, order in turns:
            asks = self._question(question, order, blind)
            text, suffix = self._prompt(asks)
            letters = letters or self._letters(text)  # every prompt ends alike
            gold = order.index(question.answer)
            others = tuple(letter for slot, letter in enumerate(letters) if slot != gold)
            examples.append(
                Example(
                    id=f"{question.id}:{''.join(map(str, order))}",
                    text=text,
                    target=letters[gold],
                    rivals=others,
                    alternatives=others,
                    cluster=question.id,
                    group=question.subject,
                    suffix=suffix,
                    special=not self.chat,
                    instruction=asks,
                    dataset=origin,
                    row=question.row,
                )
            )
        return examples

    def _question(self, question: Question, order: Permutation, blind: bool) -> str:
        """Slot j shows choices[order[j]]."""
        slots = [f"{a}. {question.choices[i]}" for a, i in zip(LETTERS, order, strict=True)]
        if blind:
            return "\n".join(slots)
        first = [self.instruction, ""] if self.instruction else []
        return "\n".join((*first, question.text, *slots))

    def _prompt(self, asked: str) -> Rendered:
        """The text ends right before the letter."""
        if not self.chat:
            return Rendered(f"{asked}\n{self.cue}", "")
        text, suffix = render(self.tokenizer, asked)
        return Rendered(text + self.cue, suffix + self.cue)

    def _letters(self, prompt: str) -> list[str]:
        """The letters as texts that are the one token which comes after a prompt."""
        special = not self.chat
        found = as_one_token(self.tokenizer, prompt, LETTERS, special=special, gap=self._gap)
        if not self._gap:
            found = {letter: letter for letter in LETTERS if self._alone(letter)} | found
        if len(found) < len(LETTERS):
            raise StudyError(
                f"mcq: expected the letters {', '.join(LETTERS)} to be one token each after "
                f"{prompt[-20:]!r}, got {', '.join(found) or 'none'}: this tokenizer has no single "
                "logit for an answer"
            )
        return [found[letter] for letter in LETTERS]

    def _alone(self, letter: str) -> bool:
        """Whether a letter is a token by itself, without a space.

        A tokenizer may have a token for bracket and letter together and write a whole text with it.
        A model that goes on after the bracket says the letter alone, which is what SAEBench reads.
        """
        ids = self.tokenizer.encode(letter, add_special_tokens=False)
        return len(ids) == 1 and self.tokenizer.convert_ids_to_tokens(ids[0]) == letter


def _orders(question: Question, seed: int) -> list[Permutation]:
    """All 24 orders of the choices, in an order of the question's own."""
    orders = list(PERMUTATIONS)
    random.Random(f"{seed}:{question.id}").shuffle(orders)
    return orders
