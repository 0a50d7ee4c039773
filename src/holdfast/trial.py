"""A trial: the whole method as a straight line. Read this file first.

It never branches on a kind: behaviors, constraints, controls and attacks answer for themselves.
Read `attacks/residual.py` next: what an audit's own search does, again as a straight line.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import model_validator

from holdfast.attacks import Attack, Attacked, TrialResult
from holdfast.attacks.residual import Residual
from holdfast.batching import Batching
from holdfast.behaviors import Behavior
from holdfast.canonical import digest, trial_id
from holdfast.config import EVERY_FIELD, IDENTITY, Config
from holdfast.controls import Case, Control
from holdfast.discovery import Discovery
from holdfast.errors import EmptyValidSetError, StudyError
from holdfast.found import unsearched
from holdfast.funnel import funnel_of
from holdfast.interventions import Intervention
from holdfast.prompt_rows import unsearched_examples
from holdfast.recovery import RecoverySpec
from holdfast.setting import Data, Setting, prepare
from holdfast.subject import Subject
from holdfast.variants import PathSpec


class SAEIdentity(Config):
    """An SAE as a trial knows it: where it reads, and the hash of its files."""

    site: str
    sha256: str


class SubjectIdentity(Config):
    """A subject as a trial knows it: a name and hashes, never a path."""

    name: str
    weights_sha256: str
    dtype: str
    attention: str
    quantization: str | None = None
    prepend_bos: bool = False
    saes: tuple[SAEIdentity, ...]


class Trial(Config):
    """Everything that changes numbers. Its canonical JSON is its identity.

    recovery: what the search is bound to; None for an attack that searches nothing.
    """

    audit: str
    seed: int
    subject: SubjectIdentity
    twin: SubjectIdentity | None
    data: Data
    behavior: Behavior
    discovery: Discovery
    intervention: Intervention
    recovery: RecoverySpec | None
    control: Control
    attack: Attack = Residual()
    paths: PathSpec | None = None

    @model_validator(mode="after")
    def _bound_if_it_searches(self) -> Trial:
        if self.attack.searches != (self.recovery is not None):
            need = "needs" if self.attack.searches else "searches nothing and takes no"
            raise ValueError(f"the attack {self.attack.kind!r} {need} `recovery`")
        return self

    @property
    def searches(self) -> bool:
        """Whether it is a search, of an audit or a control, and not an attempt in the prompt."""
        return self.attack.searches

    @property
    def is_audit(self) -> bool:
        """Whether a verdict is read from it."""
        return self.searches and self.control.kind == "none"

    @property
    def label(self) -> str:
        """What it is called beside others of its audit: the constraint, else the attack."""
        return self.attack.label if self.recovery is None else self.recovery.constraint.kind

    def canonical(self) -> dict[str, Any]:
        """As plain JSON types, without the paths of what is known by its hash, and without fields
        that are at the default they were added with (`config.LATER`)."""
        return self.model_dump(mode="json", by_alias=True, context=dict(IDENTITY))

    def described(self) -> dict[str, Any]:
        """The same with every field."""
        return self.model_dump(mode="json", by_alias=True, context=dict(EVERY_FIELD))

    @property
    def id(self) -> str:
        """16 hex digits of sha256 over the canonical JSON and the schema version."""
        return trial_id(self.canonical())


@dataclass
class Lab:
    """The loaded subjects of a run, how many rows go through them at once, and the settings that
    several trials share."""

    subjects: dict[str, Subject]
    batching: Batching = field(default_factory=Batching)
    _settings: dict[str, Setting] = field(default_factory=dict)

    def subject(self, identity: SubjectIdentity) -> Subject:
        return self.subjects[digest(identity.model_dump(mode="json"))]

    def has_setting(self, trial: Trial, identity: SubjectIdentity) -> bool:
        """Whether `setting` has been prepared already."""
        return setting_key(trial, identity) in self._settings

    def setting(self, trial: Trial, identity: SubjectIdentity) -> Setting:
        """The audit's setting on a subject, prepared once."""
        key = setting_key(trial, identity)
        if key not in self._settings:
            with self.batching.part(f"setting {key[:16]}"):
                self._settings[key] = prepare(
                    self.subject(identity), trial.behavior, trial.discovery, trial.intervention,
                    trial.data, trial.seed,
                )  # fmt: skip
        return self._settings[key]

    def twin_setting(self, trial: Trial) -> Setting:
        """The setting on the ignorant twin. Raises StudyError if the study names none."""
        if trial.twin is None:
            raise StudyError(
                f"audit {trial.audit!r}: the control 'ignorant' needs a subject trained without "
                "the knowledge; name it under [ignorant], or leave the control out"
            )
        return self.setting(trial, trial.twin)


def setting_key(trial: Trial, identity: SubjectIdentity) -> str:
    """What trials that share a setting on a subject have in common."""
    parts = trial.canonical()
    names = ("seed", "data", "behavior", "discovery", "intervention")
    return digest([identity.model_dump(mode="json"), *(parts[name] for name in names)])


@dataclass(frozen=True)
class Ended:
    """A trial that ended: what it found, or that no prompt was left to search; and the seconds it
    took, of what was done for several at once its share."""

    trial: Trial
    result: TrialResult | EmptyValidSetError
    seconds: float


def run_trial(trial: Trial, lab: Lab) -> TrialResult:
    """One trial by itself. Raises EmptyValidSetError if it has no prompt to search."""
    (ended,) = run_trials([trial], lab)
    if isinstance(ended.result, EmptyValidSetError):
        raise ended.result
    return ended.result


def run_trials(trials: Sequence[Trial], lab: Lab, ballast: Collection[str] = ()) -> Iterator[Ended]:
    """clean → suppressed → valid, then the attack: recovered → verified (`attacks/residual.py`).

    trials: one stack; each is yielded as it ends, but for those whose ids are ballast, which are
    searched beside the others if any of these is.
    """
    ready: dict[int, tuple[Attacked, float]] = {}
    cases: dict[str, Case] = {}
    places = sorted(range(len(trials)), key=lambda place: trials[place].id in ballast)
    for place in places:
        trial, wanted = trials[place], trials[place].id not in ballast
        if not wanted and not ready:
            return
        clock = time.perf_counter()
        try:
            made = _prepared(trial, lab, cases, not wanted)
        except EmptyValidSetError as error:
            if wanted:
                yield Ended(trial, error, time.perf_counter() - clock)
            continue
        seconds = time.perf_counter() - clock
        if isinstance(made, Attacked):
            ready[place] = made, seconds
        elif wanted:
            yield Ended(trial, made, seconds)
    if ready:
        order = sorted(ready)  # that of the stack
        attack = trials[order[0]].attack
        for index, result in attack.run_together([ready[place][0] for place in order]):
            _, seconds = ready[order[index]]
            yield Ended(trials[order[index]], result, seconds + result.seconds)


def _prepared(
    trial: Trial, lab: Lab, cases: dict[str, Case], ballast: bool
) -> Attacked | TrialResult:
    """What the trial's attack is given, or what there is to say where nothing is to be searched.
    cases: those that other trials of the stack have made, by control and setting."""
    setting = lab.setting(trial, trial.subject)
    twin = trial.twin and setting_key(trial, trial.twin)
    control = digest(trial.canonical()["control"])
    key = digest([control, twin, setting_key(trial, trial.subject)])
    if key not in cases:
        with lab.batching.part(f"case {key[:16]}"):
            cases[key] = trial.control.case(setting, lambda: lab.twin_setting(trial))
    case = cases[key]
    setting = case.setting or setting
    if not len(case.rows) and case.if_empty:
        return TrialResult(unsearched(setting, case), {}, unsearched_examples(setting, case))
    _require_prompts(trial, setting, case)
    return Attacked(setting, case, trial.recovery, trial.seed, trial.paths, trial.id, ballast)


def _require_prompts(trial: Trial, setting: Setting, case: Case) -> None:
    if len(case.rows):
        return
    funnel = funnel_of(setting, case, None)
    stages = ", ".join(f"{name} {n}" for name, n in funnel["stages"].items())
    # Of the first condition that leaves no prompt.
    seen = setting.changed if setting.clean.any() else setting.observed
    judged = f"; {seen.told}" if seen is not None and seen.told else ""
    raise EmptyValidSetError(
        f"audit {trial.audit!r}, control {trial.control.kind!r}: no prompt is left to search "
        f"({stages}{judged}). With no clean prompts the model does not show the behavior; with no "
        "suppressed ones the intervention does not remove it: try another strength, more features "
        "or another site",
        funnel["stages"],
    )
