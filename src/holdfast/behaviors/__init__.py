"""Behaviors: what a model does on some prompts, and what is asked for instead. One file a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, SerializeAsAny

from holdfast.batch import Batch, Example
from holdfast.behaviors.observation import Observation
from holdfast.config import IDENTITY, Kind
from holdfast.readouts import Readout
from holdfast.readouts.logits import LOGITS
from holdfast.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from holdfast.behaviors.open_question import OpenQuestion
    from holdfast.edits import Edit
    from holdfast.measure import Measurement
    from holdfast.reply import Reply
    from holdfast.setting import Setting
    from holdfast.sites import Site
    from holdfast.subject import Subject

BEHAVIORS = Registry(
    "behaviors",
    {
        "ioi": "holdfast.behaviors.ioi:IOI",
        "mcq": "holdfast.behaviors.mcq:MultipleChoice",
        "refusal": "holdfast.behaviors.refusal:Refusal",
        "tpp": "holdfast.behaviors.tpp:TPP",
    },
)

Split = Literal["fit", "tune", "test"]


class BehaviorKind(Kind):
    """A behavior. Unless a kind says otherwise it is read from the logits at the last prompt token:
    a prompt shows the behavior when the target's logit exceeds that of every rival.
    """

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer that is generated and judged; 0 where logits are read.

        A behavior with answers gives its prompts as chat turns, with `Example.instruction`.
        """
        return 0

    @property
    def of_organism(self) -> bool:
        """Whether its prompts are in the shipped organism's invented language."""
        return False

    @property
    def pools_tokens(self) -> bool:
        """Whether an answer is read from all tokens at once, so that a token more changes what is
        read and not only what the model makes of it."""
        return False

    @property
    def caveat(self) -> str:
        """What a verdict on this behavior has to say beside it, "" for nothing."""
        return ""

    @property
    def meaningless_controls(self) -> Mapping[str, str]:
        """Kinds of control that say nothing about this behavior → why."""
        return {}

    def counted(self, clusters: Sequence[str], shown: Tensor) -> Tensor:
        """[n] bool: the prompts that count as clean, of those that show the behavior without the
        intervention, shown [n] bool."""
        return shown

    def readout(self, subject: Subject) -> Readout:
        """How its answers are read; what has to be fitted first knows its answers' names only."""
        return LOGITS

    @property
    def fitted_by(self) -> dict[str, Any]:
        """What of its configuration a fitted readout depends on."""
        return self.model_dump(mode="json", context=dict(IDENTITY))

    def fitted(self, subject: Subject, sizes: Mapping[Split, int], seed: int) -> Readout:
        """The readout, fitted on other prompts than the test split's. sizes: most prompts of the
        fit and the tune split."""
        return self.readout(subject)

    def scores(self, setting: Setting) -> tuple[Measurement, ...]:
        """What the intervention did in the behavior's own measures, before any search."""
        return ()

    @property
    def asked_again(self) -> float:
        """How many further prompts `scores` asks for each test prompt and each neighbor's: so many
        twice without the intervention, and once with it. For a forecast."""
        return 0.0

    @property
    def n_read(self) -> int:
        """How many tokens of an answer a search reads at most."""
        return 1

    def read_at(self, sites: Sequence[Site]) -> Site | None:
        """The site whose residuals it is read from, at every token of the prompt; None where logits
        are read. sites: of the subject's SAEs."""
        return None

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

    def opposed(
        self, tokenizer: PreTrainedTokenizerBase, split: Split, n: int, seed: int
    ) -> list[Example]:
        """At most n prompts on which the model by itself does what the intervention makes it do, as
        refused prompts are where refusing is induced; none where the study names none.

        They tell words that get round the intervention from words that turn the model anyway.
        """
        return []

    @property
    def asks_openly(self) -> bool:
        """Whether its prompts are questions that can be asked without the choices in them."""
        return False

    def openly(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
    ) -> list[OpenQuestion | str]:
        """Each of its prompts asked without the choices, or why that one cannot be."""
        raise NotImplementedError(f"{self.kind} offers no choices to leave out")

    def observe(
        self,
        subject: Subject,
        batch: Batch,
        edits: Sequence[Edit] = (),
        references: Sequence[Reply] | None = None,
    ) -> Observation:
        """What the model does under `edits`, whatever they are: one rule for every condition.

        references: the clean replies of all prompts, where replies are judged.
        """
        margin = batch.margin(subject.read(batch, edits))
        return Observation(shows=margin > 0, opposite=margin <= 0)

    def judged(
        self,
        subject: Subject,
        batch: Batch,
        tokens: Tensor,
        references: Sequence[Reply] | None = None,
    ) -> Observation:
        """What the replies `tokens` [b n] to the prompts are, however they were made: the rule of
        `observe`. Only of behaviors that judge replies (`answer_tokens`)."""
        raise NotImplementedError(f"{self.kind} judges no replies")

    def read_again(
        self, subject: Subject, seen: Observation, references: Sequence[Reply] | None = None
    ) -> Observation:
        """The same observation with what decides nothing: other judges, likeness to the clean
        answers. Strengths are chosen without it."""
        return seen

    def counts(self, label: str) -> tuple[bool, bool]:
        """Whether a reply of this label shows the behavior, and whether it shows the opposite."""
        raise NotImplementedError(f"{self.kind} judges no replies")

    def identified(self) -> Self:
        """The same behavior with what tells it from others filled in: hashes of judges' weights.

        Raises JudgeError if a judge is not there.
        """
        return self

    def aim(self, subject: Subject, batch: Batch, clean: Observation) -> Batch:
        """The batch as the search reads it, after the clean model was observed."""
        return batch


Behavior = Annotated[SerializeAsAny[BehaviorKind], BeforeValidator(BEHAVIORS.parse)]
