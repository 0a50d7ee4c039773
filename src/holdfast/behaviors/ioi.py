"""Indirect object identification: after two names, does the model name the one not repeated?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.errors import StudyError
from holdfast.organism import corpus
from holdfast.organism.world import IOI_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_TEMPLATES = len(IOI_TEMPLATES)


class IOI(BehaviorKind):
    """logit(IO) > logit(S) at the last prompt token (METHODS K), and above a third name's.

    The third name is the wrong target of the control. With it among the rivals the right answer and
    the forced one each have to beat two names; with S alone forcing would be the harder task, and
    its norm larger for that reason.

    source: whose names and templates; `organism` is the invented language's. templates: indices,
    or all of them, ABBA and BABA alike. Prompts are grouped by indirect object, so that features
    can be fitted for each name on other prompts; their cluster is the pair of names.
    """

    kind: Literal["ioi"] = "ioi"
    source: Literal["organism"] = "organism"
    templates: Literal["all"] | tuple[int, ...] = Field("all")

    @field_validator("templates")
    @classmethod
    def _exist(
        cls, templates: Literal["all"] | tuple[int, ...]
    ) -> Literal["all"] | tuple[int, ...]:
        outside = [t for t in templates if not 0 <= t < N_TEMPLATES] if templates != "all" else []
        if outside or not templates:
            raise ValueError(
                f"templates are 'all' or indices from 0 to {N_TEMPLATES - 1}, got {templates}"
            )
        return templates

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        templates = None if self.templates == "all" else self.templates
        try:
            prompts = corpus.ioi_prompts(split, n, seed, templates)
        except ValueError as error:
            raise StudyError(f"ioi: {error}") from None
        return [
            Example(
                id=prompt.id,
                text=prompt.text,
                target=prompt.io,
                rivals=(prompt.s, prompt.third),
                alternatives=(prompt.third,),
                cluster="|".join(sorted((prompt.io, prompt.s))),
                group=prompt.io,
            )
            for prompt in prompts
        ]
