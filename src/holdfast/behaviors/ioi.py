"""Indirect object identification: after two names, does the model name the one not repeated?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.errors import StudyError
from holdfast.organism import corpus


class IOI(BehaviorKind):
    """logit(IO) > logit(S) at the last prompt token (METHODS K).

    source: whose names and templates; `organism` is the invented language's. templates: indices,
    or all of them, ABBA and BABA alike. Prompts are grouped by indirect object, so that features
    can be fitted for each name on other prompts; their cluster is the pair of names.
    """

    kind: Literal["ioi"] = "ioi"
    source: Literal["organism"] = "organism"
    templates: Literal["all"] | tuple[int, ...] = Field("all")

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        templates = None if self.templates == "all" else self.templates
        try:
            prompts = corpus.ioi_prompts(split, n, seed, templates)
        except (ValueError, IndexError) as error:
            raise StudyError(f"ioi: {error}") from None
        return [
            Example(
                id=prompt.id,
                text=prompt.text,
                target=prompt.io,
                rivals=(prompt.s,),
                alternatives=(prompt.third,),
                cluster="|".join(sorted((prompt.io, prompt.s))),
                group=prompt.io,
            )
            for prompt in prompts
        ]
