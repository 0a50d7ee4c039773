"""Texts as a model reads them: cut to a length, without special tokens but BOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from holdfast.datasets.labelled import LabelledText
from holdfast.errors import StudyError
from holdfast.manifest import prompt_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def readable(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[LabelledText], n: int, max_tokens: int
) -> list[LabelledText]:
    """The first n texts without special tokens but BOS, cut to `max_tokens`.

    BOS, EOS and padding are no part of what is pooled (METHODS I.2); only BOS is known by where it
    stands, so a text that holds another is left out. Raises StudyError if two of them are the same
    after the cut: a prompt counts once.
    """
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    # An unknown word is a word, unless its token is one of those as well.
    special = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - marks)
    kept: list[LabelledText] = []
    first: dict[str, str] = {}
    for text in texts:
        if len(kept) == n:
            break
        coded = tokenizer(text.text, return_offsets_mapping=True, truncation=False)
        ids, offsets = coded["input_ids"], coded["offset_mapping"]
        cut = text.text if len(ids) <= max_tokens else text.text[: offsets[max_tokens - 1][1]]
        inside = tokenizer(cut)["input_ids"]
        if special & set(inside[1:]) or (inside[0] in special - {tokenizer.bos_token_id}):
            continue
        other = first.setdefault(prompt_sha256(cut), text.id)
        if other != text.id:
            raise StudyError(
                f"{other} and {text.id} of class {text.label!r} are the same text after the cut to "
                f"max_tokens = {max_tokens}, and a prompt counts once; read more tokens, or take "
                "one of them out of the data"
            )
        kept.append(replace(text, text=cut))
    return kept
