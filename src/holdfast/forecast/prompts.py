"""How many prompts a trial has and how long they are: from the prompts, or as assumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.errors import StudyError
from holdfast.setting import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS: tuple[Split, ...] = ("fit", "tune", "test")


@dataclass(frozen=True)
class Prompts:
    """Prompts of each split, and of the neighbors together; width: tokens of the longest, which all
    are padded to; template: tokens of the longest chat template after an instruction.

    answers: most answers that compete for a prompt, where one token is read; opposed: prompts on
    which the model by itself does what the intervention makes it do; measured: whether the study's
    own prompts were counted; longest: the id of the longest, if so. texts: held-out texts that are
    predicted at every token, text_tokens: of the longest.
    """

    n: dict[Split, int]
    neighbors: dict[Split, int]
    width: int
    template: int
    measured: bool
    answers: int = 2
    opposed: int = 0
    longest: str = ""
    texts: int = 0
    text_tokens: int = 0

    @classmethod
    def assumed(cls, data: Data, width: int, template: int = 8) -> Prompts:
        """As many prompts as the study allows, of the given length."""
        if width < 2:
            raise StudyError(f"a prompt has at least 2 tokens, got {width}")
        n = {split: int(getattr(data, split)) for split in SPLITS}
        texts = 0 if data.texts is None else data.texts.n
        return cls(
            n, dict.fromkeys(SPLITS, 0), width, min(template, width), measured=False, texts=texts,
            text_tokens=width,
        )  # fmt: skip

    @classmethod
    def counted(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        behavior: BehaviorKind,
        data: Data,
        seed: int,
        prepend_bos: bool = False,
    ) -> Prompts:
        """Of the study's own prompts."""
        asked = {s: behavior.examples(tokenizer, s, getattr(data, s), seed) for s in SPLITS}
        beside = {s: behavior.neighbors(tokenizer, s, getattr(data, s), seed) for s in SPLITS}
        others = {s: [e for own in found.values() for e in own] for s, found in beside.items()}
        opposed = behavior.opposed(tokenizer, "test", data.test, seed)
        texts = [] if data.texts is None else data.texts.drawn(seed, "")
        every = [e for s in SPLITS for e in (*asked[s], *others[s])]
        suffixes = {e.suffix for e in every if e.suffix}

        def length(example: Example) -> int:
            return len(tokenizer.encode(example.text, add_special_tokens=example.special))

        lengths = {e.id: length(e) for e in every}
        longest = max(lengths, key=lambda name: lengths[name], default="")
        return cls(
            n={s: len(found) for s, found in asked.items()},
            neighbors={s: len(found) for s, found in others.items()},
            width=lengths.get(longest, 1) + prepend_bos,
            template=max(
                (len(tokenizer.encode(s, add_special_tokens=False)) for s in suffixes), default=1
            ),
            measured=True,
            answers=max((1 + len(e.rivals) for e in asked["test"]), default=2),
            opposed=len(opposed),
            longest=longest,
            texts=len(texts),
            text_tokens=max(map(length, texts), default=0) + prepend_bos,
        )
