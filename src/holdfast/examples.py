"""A prompt as a behavior gives it, before it is tokens."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One prompt before tokenization.

    target: the answer that is the behavior; rivals: what it must beat; alternatives: other answers
    that could be forced instead, for the wrong-target control; each a continuation of one token.
    cluster: its independent unit (a question, a prompt); group: what features may be fitted for.
    suffix: what a chat template put after the instruction, the end of `text`; special: whether the
    tokenizer adds its special tokens (a rendered chat template has its own); instruction: what the
    user asks, without the template, for prompts that can be asked in other words; dataset, row:
    where it came from, the row from 1; "" and None for prompts that are made and not read.
    """

    id: str
    text: str
    target: str
    rivals: tuple[str, ...]
    alternatives: tuple[str, ...]
    cluster: str
    group: str = ""
    suffix: str = ""
    special: bool = True
    instruction: str = ""
    dataset: str = field(default="", compare=False)
    row: int | None = field(default=None, compare=False)
