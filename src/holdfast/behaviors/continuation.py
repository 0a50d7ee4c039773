"""How a word that goes on after a prompt is written, so that it is one token on its own too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_one_token(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    words: Sequence[str],
    *,
    special: bool = True,
    gap: str = " ",
) -> dict[str, str]:
    """Those of the words that are one token after `prompt` and a space, each with its text.

    The text is what `Subject.token_id` turns into the very token that the tokenizer makes at the
    end of the whole: byte-level tokenizers want the space in it, sentencepiece ones add it
    themselves, word-level ones drop it. special: whether the prompt gets the tokenizer's special
    tokens. gap: what stands between, where it is no space.
    """

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
        return ids

    before = encode(prompt, special)
    found = {}
    for word in words:
        *start, last = encode(f"{prompt}{gap}{word}", special)
        if start != before or last == tokenizer.unk_token_id:
            continue
        alone = (text for text in (" " + word, word) if encode(text, False) == [last])
        if (text := next(alone, None)) is not None:
            found[word] = text
    return found
