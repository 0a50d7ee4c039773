"""Behaviors: what a model does on some prompts, and what is asked for instead. One file a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, SerializeAsAny

from holdfast.batch import Example
from holdfast.config import Kind
from holdfast.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEHAVIORS = Registry(
    "behaviors",
    {"ioi": "holdfast.behaviors.ioi:IOI", "mcq": "holdfast.behaviors.mcq:MultipleChoice"},
)

Split = Literal["fit", "tune", "test"]


class BehaviorKind(Kind):
    """A behavior read from the logits at the last prompt token.

    A prompt shows the behavior when the target's logit exceeds that of every rival.
    """

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        """At most n prompts of a split. The splits share no prompt and no cluster.

        tokenizer: the subject's, for what must be one token and for its chat template.
        """
        raise NotImplementedError

    def neighbors(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> dict[str, list[Example]]:
        """What the intervention should leave alone, by name: at most n prompts each."""
        return {}


Behavior = Annotated[SerializeAsAny[BehaviorKind], BeforeValidator(BEHAVIORS.parse)]
