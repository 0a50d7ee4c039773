"""A judge that is a language model, read at one token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from holdfast.chat import render
from holdfast.errors import StudyError
from holdfast.judges import JudgeError, Opinion
from holdfast.judges.pretrained import PretrainedJudge
from holdfast.reply import Reply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CausalLM(PretrainedJudge):
    """A language model asked a question; the answer with the largest next-token logit decides.

    Nothing is sampled. opinions_of: each answer → what the reply then is; an answer must be one
    token after the template, with or without a space before it, and of both spellings the likelier
    counts. chat: the template is a user turn in the tokenizer's chat template.
    """

    kind: Literal["causal_lm"] = "causal_lm"
    opinions_of: dict[str, Opinion] = Field(min_length=2)
    chat: bool = False

    @field_validator("template")
    @classmethod
    def _asks(cls, template: str) -> str:
        if template.rstrip().endswith("{text}"):
            raise ValueError(
                "expected the template to ask something after {text}: what follows it is the answer"
            )
        return template

    def opinions(self, replies: Sequence[Reply], device: str) -> list[Opinion]:
        model, tokenizer = self.loaded("AutoModelForCausalLM", device)
        rows = [self._encode(tokenizer, self._question(tokenizer, reply)) for reply in replies]
        for reply, row in zip(replies, rows, strict=True):
            self.check_room(reply, len(row) + 1, model)
        tokens = self._tokens(tokenizer)
        meant = list(self.opinions_of.values())

        def scores(ids: Tensor) -> Tensor:
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=1
            ).logits[:, -1]
            return torch.stack([logits[:, spelled].amax(-1) for spelled in tokens], -1)

        chosen = self.chosen(replies, rows, scores, model)
        return [meant[c] for c in chosen]

    def _question(self, tokenizer: PreTrainedTokenizerBase, reply: Reply) -> str:
        text = self.asked(reply)
        if not self.chat:
            return text
        try:
            return render(tokenizer, text).text
        except StudyError:  # whose message may quote the reply
            what = (
                "does not render what it is asked as it is"
                if tokenizer.chat_template
                else "is not there"
            )
            raise JudgeError(
                f"{self.label}: the tokenizer's chat template {what}; leave `chat` out and write "
                "the turns into the template"
            ) from None

    def _encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=not self.chat)
        # A token that ends texts would stand between the question and the answer.
        ended = not self.chat and ids[-1:] in ([tokenizer.eos_token_id], [tokenizer.sep_token_id])
        return ids[:-1] if ended else ids

    def _tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Each answer's tokens after the template. Raises JudgeError unless single and different.

        They are read off the template without a reply, so that no reply decides them.
        """
        text = self._question(tokenizer, Reply("", "", False, 0, ""))
        before = self._encode(tokenizer, text)
        tokens: dict[str, set[int]] = {}
        for answer in self.opinions_of:
            spellings = (text + answer, f"{text} {answer.strip()}")
            after = [self._encode(tokenizer, spelling) for spelling in spellings]
            tokens[answer] = {
                ids[-1] for ids in after if ids[:-1] == before and ids[-1] != tokenizer.unk_token_id
            }
            if not tokens[answer]:
                raise JudgeError(
                    f"{self.label}: the answer {answer!r} is not one token after its template; "
                    f"choose answers that {self.model or 'its tokenizer'} has as single tokens, "
                    "often letters or digits"
                )
        for first, second in itertools.combinations(tokens, 2):
            if tokens[first] & tokens[second]:
                raise JudgeError(
                    f"{self.label}: the answers {first!r} and {second!r} are the same token; "
                    "choose answers that differ in it"
                )
        return [sorted(spelled) for spelled in tokens.values()]
