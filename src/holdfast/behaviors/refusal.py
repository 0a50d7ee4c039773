"""Refusing and complying, judged on freely generated text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    model_validator,
)

from holdfast.batch import Batch, Example
from holdfast.behaviors import BehaviorKind, Split
from holdfast.behaviors.observation import Observation, Reading
from holdfast.behaviors.prompts import chat_examples, organism_examples, prompts_of
from holdfast.canonical import canonical_json
from holdfast.config import IDENTITY
from holdfast.datasets import DATASETS, Dataset, DatasetKind
from holdfast.datasets.unread import left_unread
from holdfast.edits import Edit
from holdfast.errors import StudyError
from holdfast.judges import Judge, JudgeError, JudgeKind, complies, named, refuses
from holdfast.judges.fidelity import Fidelity
from holdfast.judges.rules import Rules
from holdfast.reply import Reply, replies_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from holdfast.subject import Subject


def _source(value: Any) -> Any:
    return value if value == "organism" else DATASETS.parse(value)


def _hashed(given: Any) -> bool:
    """Whether a table of a dataset says which content it had, its own or that of its source."""
    return isinstance(given, dict) and bool(given.get("sha256") or _hashed(given.get("source")))


class Refusal(BehaviorKind):
    """The model complies and is made to refuse, or refuses and is made to comply (METHODS B, D, H).

    direction: what the clean model does and a recovery brings back, `comply` or `refuse`. A prompt
    is valid if the judge says of the clean answer that it does, and of the clamped answer that it
    does the opposite: broken text is neither. The search reads the first `n_forced` tokens of the
    prompt's own clean answer (how far each leads all other tokens); what counts is what the judge
    says of the text generated with the perturbation on.

    source: the prompts audited, `organism` or a dataset with a column prompt; refused: prompts that
    are refused, whose refusal features discovery looks for (the organism has its own; the source
    where none is named). benign: prompts whose answers the intervention should leave alone.
    comply_opening, refuse_opening: one token each, with which such answers begin; discovery reads
    their logits. max_new_tokens: where answers are cut; a cut answer is labelled so, and never
    counts as complying (METHODS H.4 asks for 256).

    judge: who decides. second_opinions: judges that label the same replies of all conditions and
    decide nothing; agreement and the recovery rate under each and under all are reported.
    """

    kind: Literal["refusal"] = "refusal"
    source: Annotated[
        Literal["organism"] | SerializeAsAny[DatasetKind], BeforeValidator(_source)
    ] = "organism"
    direction: Literal["comply", "refuse"] = "comply"
    refused: Dataset | None = None
    benign: Dataset | None = None
    comply_opening: str | None = None
    refuse_opening: str | None = None
    n_forced: int = Field(12, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    judge: Judge | None = None
    second_opinions: tuple[Judge, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        organism = data.get("source", "organism") == "organism"
        defaults = {
            "comply_opening": "sure" if organism else "Sure",
            "refuse_opening": "sorry" if organism else "I",
            "max_new_tokens": 24 if organism else 256,
            "judge": {"kind": "rules", "language": "organism" if organism else "english"},
        }
        missing = {name: value for name, value in defaults.items() if data.get(name) is None}
        return data | missing

    @model_validator(mode="after")
    def _cut_after_what_is_read(self) -> Refusal:
        if self.max_new_tokens < self.n_forced:
            raise ValueError(
                f"max_new_tokens ({self.max_new_tokens}) must be at least n_forced "
                f"({self.n_forced}): what the search reads has to be generated"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _readable(cls, data: Any, handler: ModelWrapValidatorHandler[Refusal]) -> Refusal:
        """What a study names is read with it, before any model is loaded. A record's data, known
        by hash, need not be there."""
        self = handler(data)
        if left_unread():
            return self
        for role in ("source", "refused", "benign") if isinstance(data, dict) else ():
            dataset = getattr(self, role)
            if isinstance(dataset, DatasetKind) and not _hashed(data.get(role)):
                try:
                    prompts_of(dataset)
                except StudyError as error:
                    raise ValueError(str(error)) from None
        return self

    @property
    def judges(self) -> dict[str, JudgeKind]:
        """All judges by name, the one that decides first."""
        return named((self.judge or Rules(), *self.second_opinions))

    def identified(self) -> Self:
        known = named([judge.identified() for judge in self.judges.values()])
        seen: dict[str, str] = {}
        for name, judge in known.items():
            identity = canonical_json(judge.model_dump(mode="json", context=dict(IDENTITY)))
            if identity in seen:
                raise JudgeError(
                    f"the judges {seen[identity]} and {name} are the same by their files and "
                    "fields: one would agree with itself; leave one out"
                )
            seen[identity] = name
        first, *others = known.values()
        return self.model_copy(update={"judge": first, "second_opinions": tuple(others)})

    def counts(self, label: str) -> tuple[bool, bool]:
        comply, refuse = complies(label), refuses(label)
        return (comply, refuse) if self.direction == "comply" else (refuse, comply)

    @property
    def answer_tokens(self) -> int:
        return self.max_new_tokens

    @property
    def of_organism(self) -> bool:
        return self.source == "organism"

    @property
    def n_read(self) -> int:
        return self.n_forced

    @property
    def _openings(self) -> tuple[str, str]:
        assert self.comply_opening is not None and self.refuse_opening is not None
        return self.comply_opening, self.refuse_opening

    def examples(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        comply, refuse = self._openings
        if split == "fit":  # where refusal features show: on prompts that are refused
            return self._prompts(tokenizer, "refused", split, n, seed, refuse, comply)
        wanted = (comply, refuse) if self.direction == "comply" else (refuse, comply)
        return self._prompts(tokenizer, "source", split, n, seed, *wanted)

    def neighbors(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> dict[str, list[Example]]:
        # Benign prompts are complied with: that is the behavior only in this direction.
        if self.direction == "refuse" or (self.source != "organism" and self.benign is None):
            return {}
        made = self._prompts(tokenizer, "benign", split, n, seed, *self._openings)
        return {"benign": made}

    def opposed(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        comply, refuse = self._openings
        comes = self.direction == "comply"
        named = self.refused if comes else self.benign
        if self.source != "organism" and named is None:
            return []
        role, wanted = ("refused", (refuse, comply)) if comes else ("benign", (comply, refuse))
        return self._prompts(tokenizer, role, split, n, seed, *wanted)

    def _prompts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        role: str,
        split: Split,
        n: int,
        seed: int,
        target: str,
        rival: str,
    ) -> list[Example]:
        if self.source == "organism":
            audited: Any = "grey" if self.direction == "comply" else "forbidden"
            kinds: Any = {"source": audited, "refused": "forbidden", "benign": "benign"}
            return organism_examples(tokenizer, kinds[role], split, n, seed, target, rival)
        assert isinstance(self.source, DatasetKind)
        sets = {
            "source": self.source,
            "refused": self.refused or self.source,
            "benign": self.benign or self.source,
        }
        return chat_examples(tokenizer, sets[role], split, n, seed, target, rival)

    def observe(
        self,
        subject: Subject,
        batch: Batch,
        edits: Sequence[Edit] = (),
        references: Sequence[Reply] | None = None,
    ) -> Observation:
        made = subject.generate(batch.unforced(), edits, self.max_new_tokens)
        return self.judged(subject, batch, made, references)

    def judged(
        self,
        subject: Subject,
        batch: Batch,
        tokens: Tensor,
        references: Sequence[Reply] | None = None,
    ) -> Observation:
        replies = replies_of(
            subject.tokenizer, batch.ids, tokens, prompts=batch.texts, ends=subject.ends
        )
        read = self._reading(self.judge or Rules(), replies, references, subject.device)
        said = tuple(
            tuple(row[: reply.n_tokens])
            for row, reply in zip(tokens.tolist(), replies, strict=True)
        )
        return Observation(read.shows, read.opposite, read.labels, tuple(replies), said)

    def read_again(
        self, subject: Subject, seen: Observation, references: Sequence[Reply] | None = None
    ) -> Observation:
        first, *others = self.judges.items()
        readings = {first[0]: Reading(seen.labels, seen.shows, seen.opposite)} | {
            name: self._reading(judge, seen.replies, references, subject.device)
            for name, judge in others
        }
        likeness: list[Fidelity] = []
        if references is not None:
            likeness = first[1].fidelities(seen.replies, references, str(subject.device))
        return replace(seen, readings=readings, fidelity=tuple(likeness))

    def _reading(
        self,
        judge: JudgeKind,
        replies: Sequence[Reply],
        references: Sequence[Reply] | None,
        device: torch.device,
    ) -> Reading:
        labels = tuple(judge.labels(replies, references, str(device)))
        shows, opposite = zip(*map(self.counts, labels), strict=True) if labels else ((), ())
        return Reading(
            labels,
            torch.as_tensor(shows, dtype=torch.bool, device=device),
            torch.as_tensor(opposite, dtype=torch.bool, device=device),
        )

    def aim(self, subject: Subject, batch: Batch, clean: Observation) -> Batch:
        """The batch read for the first tokens of each prompt's own clean answer."""
        return batch.forcing([list(tokens[: self.n_forced]) for tokens in clean.tokens])
