"""A soft suffix: tokens put into the prompt whose embeddings are searched, monitored or not."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from holdfast.attacks import Attacked, AttackKind, Listed, OwnSearch, TrialResult
from holdfast.attacks.suffix_found import SuffixFound, examples_of, result_of
from holdfast.attacks.suffix_search import Objective, climb
from holdfast.attacks.suffixed import Suffixed
from holdfast.behaviors import BehaviorKind
from holdfast.controls import Case
from holdfast.edits import Perturbation
from holdfast.errors import StudyError, SubjectError
from holdfast.problem import Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site

EMBEDDING = Site(0)


class SoftSuffix(AttackKind):
    """Embeddings of a suffix that bring the behavior back, the clamp on at the suffix too.

    The baseline of arXiv 2606.18322 after Obfuscated Activations (2412.09565; METHODS E). The
    published code has its monitor's scores detached, so that their term has no gradient: whatever
    its weight says, it is `weight` 0 in effect. Here the term is differentiable.

    n_tokens copies of `placeholder` (text of one token) go before the chat template's end, or to
    the end of a prompt without one. What is searched is added to them at `blocks.0.hook_resid_pre`,
    which is to replace their embeddings, within `budget` times the norm they have there. Every
    search takes `steps` steps up `min(margin, goal) − weight · drift`: the goal is `clean_margin`
    times the prompt's own clean margin, drift the squared relative drift (METHODS D.5) of the
    audit's features, at the tokens after the suffix and the one that is read, from the same prompt
    with the suffix as it began. weight: logits per unit of that; a λ of behavior against 1 − λ of
    monitor is (1 − λ)/λ. A clamp at listed positions means positions of the longer prompt.
    """

    kind: Literal["soft_suffix"] = "soft_suffix"
    listed: ClassVar[Listed] = "suffixes"
    n_tokens: int = Field(16, ge=1)
    weight: float = Field(0.0, ge=0)
    steps: int = Field(100, ge=1)
    lr: float = Field(0.1, gt=0)
    budget: float = Field(1.0, gt=0)
    clean_margin: float = Field(1.0, gt=0)
    placeholder: str = Field(".", min_length=1)

    @property
    def label(self) -> str:
        """The weight, which a sweep varies, and what else is not as by default."""
        others = [
            f"{name} {getattr(self, name)}"
            for name, info in type(self).model_fields.items()
            if name not in ("kind", "weight") and getattr(self, name) != info.default
        ]
        return ", ".join([self.kind, f"weight {self.weight:g}", *others])

    @property
    def own_search(self) -> OwnSearch:
        return OwnSearch(self.steps, self.n_tokens, self.weight > 0)

    def check(self, behavior: BehaviorKind) -> None:
        if behavior.pools_tokens:
            raise StudyError(
                f"the attack {self.kind!r} puts tokens into the prompt, and the behavior "
                f"{behavior.kind!r} is read from all tokens of it at once: the new ones would be "
                "part of what is read, clamp or not; leave it out of this audit's `attacks`"
            )

    def run(self, attacked: Attacked) -> TrialResult:
        """put in → searched → observed without the clamp, as it began, and as it was found."""
        setting, case = attacked.setting, attacked.case
        behavior = self.behavior_of(attacked)
        prompts = Suffixed.of(case.subject, case.batch, self._token(case), self.n_tokens)
        problem = self.pose(case, prompts)
        ended = climb(Objective.of(problem, prompts.monitored, self.weight), self.steps, self.lr)
        perturbation = Perturbation(prompts.batch.ids, prompts.slots, {EMBEDDING: ended.delta})
        observe = partial(
            behavior.observe, case.subject, prompts.batch,
            references=None if setting.observed is None else setting.observed.replies,
        )  # fmt: skip
        found = SuffixFound(
            setting, case, prompts, problem, perturbation, ended,
            without=observe(()), began=observe(case.edits),
            seen=observe((perturbation, *case.edits)),
        )  # fmt: skip
        return TrialResult(
            result=result_of(found) | {"suffix": self.model_dump(mode="json")},
            tensors={"positions": prompts.slots, str(EMBEDDING): ended.delta},
            examples=examples_of(found),
        )

    def pose(self, case: Case, prompts: Suffixed) -> Problem:
        """The search problem: the suffix's slots at the embedding, everything after them clamped,
        an SAE at the embedding itself included."""
        replay = Replay.record(
            case.subject, prompts.batch, EMBEDDING, prompts.slots, after=case.edits,
            watch=case.features.sites,
        )  # fmt: skip
        # Of the placeholder before any edit: a clamp at the embedding is no part of the suffix.
        reference = replay.unclamped[EMBEDDING].norm(dim=(1, 2))
        sites = case.features.sites
        return Problem(
            replay=replay,
            batch=prompts.batch,
            goal=self.clean_margin * case.clean_margin,
            held={s: FeatureBank.of(case.subject.sae(s), case.features) for s in sites},
            reference_norm=reference,
            radius=self.budget * reference,
        )

    def _token(self, case: Case) -> int:
        try:
            return case.subject.token_id(self.placeholder)
        except SubjectError as error:
            raise SubjectError(f"the attack {self.kind!r}: `placeholder`: {error}") from None
