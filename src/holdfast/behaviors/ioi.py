"""Indirect object identification: after two names, does the model name the one not repeated?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind, Split, english
from holdfast.config import LATER
from holdfast.errors import StudyError
from holdfast.organism import corpus
from holdfast.organism.world import IOI_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from holdfast.organism.prompts import IoiPrompt

N_TEMPLATES = {"organism": len(IOI_TEMPLATES), "english": len(english.TEMPLATES)}
N_NAMES = 16


class IOI(BehaviorKind):
    """logit(IO) > logit(S) at the last prompt token (METHODS K), and above a third name's.

    The third name is the wrong target of the control. With it among the rivals the right answer and
    the forced one each have to beat two names; with S alone forcing would be the harder task, and
    its norm larger for that reason.

    source: whose names and templates: `organism` is the invented language's; `english` takes first
    names that are one token of the subject's tokenizer, whichever it has. n_names: how many of
    those, drawn by the seed; each takes its turn as the indirect object in every split. templates:
    indices, or all of them; orders: the name that is repeated comes second (ABBA) or first (BABA),
    of the english ones. Prompts are grouped by indirect object, so that
    features can be fitted for each name on other prompts; their cluster is the pair of names.
    """

    kind: Literal["ioi"] = "ioi"
    source: Literal["organism", "english"] = "organism"
    templates: Literal["all"] | tuple[int, ...] = Field("all")
    n_names: int | None = Field(None, ge=english.MIN_NAMES, le=len(english.NAMES))
    orders: Annotated[tuple[Literal["ABBA", "BABA"], ...], LATER] = Field(
        english.ORDERS, min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _default_names(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("source") != "english":
            return data
        return data if data.get("n_names") is not None else data | {"n_names": N_NAMES}

    @model_validator(mode="after")
    def _possible(self) -> IOI:
        n = N_TEMPLATES[self.source]
        chosen = self._templates()
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(n)):
            raise ValueError(
                f"templates are 'all' or different indices from 0 to {n - 1} for the source "
                f"{self.source!r}, got {self.templates}"
            )
        if self.source == "organism" and self.n_names is not None:
            raise ValueError('n_names needs source = "english": the organism has its own names')
        if len(set(self.orders)) < len(self.orders):
            raise ValueError(f"orders are different ones, got {', '.join(self.orders)}")
        if self.source == "organism" and self.orders != english.ORDERS:
            raise ValueError('orders needs source = "english": the organism is asked in both')
        return self

    def _templates(self) -> tuple[int, ...]:
        return tuple(range(N_TEMPLATES[self.source])) if self.templates == "all" else self.templates

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        try:
            if self.source == "organism":
                prompts = corpus.ioi_prompts(split, n, seed, self._templates())
                return [_example(prompt, {}) for prompt in prompts]
            names = english.choose_names(
                tokenizer, self._templates(), self.n_names or N_NAMES, seed
            )
            prompts = english.prompts(list(names), split, n, seed, self._templates(), self.orders)
            return [_example(prompt, names) for prompt in prompts]
        except (ValueError, StudyError) as error:
            raise StudyError(f"ioi: {error}") from None


def _example(prompt: IoiPrompt, texts: dict[str, str]) -> Example:
    """texts: name → what its token is written as, the name itself where it is not in it."""
    io, s, third = (texts.get(name, name) for name in (prompt.io, prompt.s, prompt.third))
    return Example(
        id=prompt.id,
        text=prompt.text,
        target=io,
        rivals=(s, third),
        alternatives=(third,),
        cluster="|".join(sorted((prompt.io, prompt.s))),
        group=prompt.io,
    )
