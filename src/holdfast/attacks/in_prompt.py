"""What attempts in the prompt have in common: templates, and how an attempt is made and counted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from pydantic import model_validator

from holdfast.attacks import Attacked, AttackKind, TrialResult
from holdfast.attacks.attempts import Attempts, examples_of, result_of
from holdfast.attacks.conversation import hold
from holdfast.attacks.opposed import opposed_of
from holdfast.attacks.templates import Script, TemplateFile, sha256_of_own
from holdfast.behaviors import BehaviorKind
from holdfast.errors import StudyError


class InPromptKind(AttackKind):
    """An attempt in the prompt: the intervention stays on, and the instruction is asked otherwise.

    Every audited prompt is tried with every template, with the intervention and without, and the
    last answer is judged as every other answer is. Prompts on which the model by itself does what
    the intervention makes it do are tried too, without it: words that turn those get round the
    behavior's opposite as such, and not round the intervention. templates: a local file; the
    organism's own where none is named. own: those, by name.
    """

    own: ClassVar[Mapping[str, Script]]
    templates: TemplateFile = None  # type: ignore[assignment]  # filled in before it is checked

    @model_validator(mode="before")
    @classmethod
    def _own_if_none(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("templates") is None:
            return data | {"templates": {"sha256": sha256_of_own(cls.own)}}
        return data

    @model_validator(mode="after")
    def _fitting(self) -> InPromptKind:
        if self.templates.path is not None:
            for name, script in self.templates.read().items():
                try:
                    self.script(script)
                except StudyError as error:
                    raise ValueError(f"template {name!r}: {error}") from None
        return self

    def script(self, template: Script) -> Script:
        """What the user says, from a template as it was written. Raises StudyError for one of
        another shape."""
        raise NotImplementedError

    def scripts(self) -> dict[str, Script]:
        """Name → script. Raises StudyError where only the templates' hash is known."""
        own = self.templates.path is None and self.templates.sha256 == sha256_of_own(self.own)
        read = self.own if own else self.templates.read()
        return {name: self.script(template) for name, template in read.items()}

    @property
    def turns(self) -> tuple[int, ...]:
        return tuple(len(script) for script in self.scripts().values())

    def check(self, behavior: BehaviorKind) -> None:
        if not behavior.answer_tokens:
            raise StudyError(
                f"the attack {self.kind!r} asks in other words and judges the answer, and the "
                f"behavior {behavior.kind!r} is read from the logits of one token; refusal is the "
                "behavior it is for: leave it out of this audit's `attacks`"
            )
        if self.templates.path is None and not behavior.of_organism:
            raise StudyError(
                f"the attack {self.kind!r} has templates in the organism's invented language only, "
                "and none for real models are shipped: name a local file of your own, "
                f'{{ kind = "{self.kind}", templates = "FILE" }}'
            )

    def run(self, attacked: Attacked) -> TrialResult:
        """wrapped → asked without the intervention → asked with it → judged."""
        setting, case = attacked.setting, attacked.case
        behavior = self.behavior_of(attacked)
        assert setting.observed is not None, "a behavior that has answers to judge"
        asked = [setting.examples[row] for row in case.rows.tolist()]
        references = setting.observed.replies
        say = partial(hold, case.subject, behavior)
        opposed = opposed_of(setting, behavior)
        made = Attempts(setting, case, without={}, clamped={}, turned={})
        for name, script in self.scripts().items():
            made.without[name] = say(script, asked, (), references)
            made.clamped[name] = say(script, asked, case.edits, references)
            made.turned[name] = say(script, opposed)
        return TrialResult(result_of(made), {}, examples_of(made))
