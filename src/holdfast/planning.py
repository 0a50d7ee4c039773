"""The trials a study stands for: audits × grid points × (the audit itself, controls, attempts)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.behaviors import BehaviorKind
from holdfast.canonical import digest
from holdfast.controls import ControlKind
from holdfast.controls.none import NoControl
from holdfast.errors import StudyError
from holdfast.grid import Point, points, shown
from holdfast.loading import SubjectSpec
from holdfast.placed import Placed, at_point
from holdfast.recovery import Perturb
from holdfast.study import Audit, Study, headline_constraint
from holdfast.trial import SAEIdentity, SubjectIdentity, Trial
from holdfast.variants import PathSpec


@dataclass(frozen=True)
class Plan:
    """The trials of a study in the order they run, and where each subject is loaded from.

    points: trial id → where on its audit's grid it lies, of what varies there.
    """

    study: Study
    trials: tuple[Trial, ...]
    specs: dict[str, SubjectSpec]
    points: dict[str, Point] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        return digest(self.study.canonical())


def identify(spec: SubjectSpec) -> SubjectIdentity:
    """A subject's name and hashes. Reads the files, loads no model."""
    return SubjectIdentity(
        name=Path(spec.model).name,
        weights_sha256=spec.weights_sha256(),
        dtype=spec.dtype,
        attention=spec.attention_used(),
        quantization=spec.quantization,
        prepend_bos=spec.prepend_bos,
        saes=tuple(SAEIdentity(site=sae.site, sha256=sae.source.sha256()) for sae in spec.saes),
    )


def plan(study: Study) -> Plan:
    """Every trial of the study: audits × grid points × (the audit itself and its controls), and
    the attempts in the prompt after them.

    Raises StudyError or SubjectError if a subject cannot be found, JudgeError if a judge cannot,
    StudyError for an attack that cannot be made on an audit's behavior.
    """
    return _planned(study.identified(), identify, lambda behavior: behavior.identified())


def sketch(study: Study, identity: Callable[[SubjectSpec], SubjectIdentity]) -> Plan:
    """The same trials with another identity of their subjects than the hashes of files, and judges
    as the study names them: for what is to be known before the files are there.

    Nothing of it is to be run or stored: its ids are not those of `plan`.
    """
    return _planned(study, identity, lambda behavior: behavior)


def _planned(
    study: Study,
    identity: Callable[[SubjectSpec], SubjectIdentity],
    read: Callable[[BehaviorKind], BehaviorKind],
) -> Plan:
    """identity: of a subject; read: a behavior with the identity of what it is judged by."""
    specs: dict[str, SubjectSpec] = {}
    seen: dict[str, SubjectIdentity] = {}

    def known(spec: SubjectSpec | None) -> SubjectIdentity | None:
        if spec is None:
            return None
        key = digest(spec.model_dump(mode="json"))
        if key not in seen:  # its files are hashed once, however many points it has
            seen[key] = identity(spec)
            specs[digest(seen[key].model_dump(mode="json"))] = spec
        return seen[key]

    trials: list[Trial] = []
    where: dict[str, Point] = {}
    for audit in study.audits:
        grid = study.grid_of(audit.name)
        attempts: dict[str, Trial] = {}
        placings = [(point, at_point(study, audit, point)) for point in points(grid)]
        kinds = [placed.fields["recovery"].constraint.kind for _, placed in placings]
        headline = headline_constraint(kinds)
        for point, placed in placings:
            # The grid may vary its judge.
            placed.fields["behavior"] = read(placed.fields["behavior"])
            subject, twin = known(placed.subject), known(placed.ignorant)
            for trial in _searches(study, audit, placed, subject, twin, headline):
                trials.append(trial)
                where[trial.id] = shown(point, grid)
            for trial in _attempts(study, audit, placed, subject):
                attempts.setdefault(trial.id, trial)
                apart = {path: v for path, v in point.items() if path.split(".")[0] != "recovery"}
                # One attempt may belong to several points: to what they have in common.
                mine = shown(apart, grid)
                before = where.get(trial.id, mine)
                where[trial.id] = {k: v for k, v in before.items() if mine.get(k) == v}
        trials += attempts.values()
    ids = [trial.id for trial in trials]
    if len(set(ids)) != len(ids):
        raise StudyError("two points of the grid are the same trial; remove the repeated values")
    return Plan(study, tuple(trials), specs, where)


def _searches(
    study: Study,
    audit: Audit,
    placed: Placed,
    subject: SubjectIdentity | None,
    twin: SubjectIdentity | None,
    headline: str,
) -> list[Trial]:
    """The audit's own search at one point of its grid, and its controls. headline: the constraint
    that its verdict is read from."""
    behavior, constraint = placed.fields["behavior"], placed.fields["recovery"].constraint.kind
    paths = _paths(study, audit, constraint == headline)
    if paths is not None and paths.openly:
        _check_openly(audit, behavior, placed.fields["recovery"].perturb)
    controls = study.controls if audit.controls is None else audit.controls
    beside = [c for c in controls if not c.only_with or constraint in c.only_with]
    _check_one_of_each(audit, beside)
    trials = []
    for control in (NoControl(), *beside):
        if control.kind in behavior.meaningless_controls:
            raise StudyError(
                f"audit {audit.name!r}: the control {control.kind!r} says nothing about "
                f"{behavior.kind}: {behavior.meaningless_controls[control.kind]}"
            )
        trials.append(
            Trial(
                audit=audit.name,
                subject=subject,
                twin=twin if control.kind == "ignorant" else None,
                # Beside which constraints it runs says nothing about what it finds.
                control=control.model_copy(update={"only_with": ()}),
                paths=paths if control.kind == "none" else None,
                **placed.fields,
            )
        )
    return trials


def _attempts(
    study: Study, audit: Audit, placed: Placed, subject: SubjectIdentity | None
) -> list[Trial]:
    """The attacks beside an audit's search: the same trials where points differ in the search
    alone."""
    trials = []
    for attack in study.attacks if audit.attacks is None else audit.attacks:
        try:
            attack.check(placed.fields["behavior"])
        except StudyError as error:
            raise StudyError(f"audit {audit.name!r}: {error}") from None
        fields = placed.fields | {"recovery": None, "control": NoControl(), "attack": attack}
        trials.append(Trial(audit=audit.name, subject=subject, twin=None, **fields))
    return trials


def _paths(study: Study, audit: Audit, headline: bool) -> PathSpec | None:
    """What a trial's recovery is compared with, None for nothing."""
    asked = study.paths if audit.paths is None else audit.paths
    if not asked:
        return None
    spec = asked if isinstance(asked, PathSpec) else PathSpec()
    # For how many constraints it is made says nothing about what is found.
    return spec.model_copy(update={"every": False}) if headline or spec.every else None


def _check_openly(audit: Audit, behavior: BehaviorKind, perturb: Perturb) -> None:
    if not behavior.asks_openly:
        raise StudyError(
            f"audit {audit.name!r}: paths.openly asks questions without their choices, and "
            f"{behavior.kind} has none; leave it out"
        )
    if perturb.positions != "last_prompt":
        raise StudyError(
            f"audit {audit.name!r}: paths.openly puts a vector at the last token of another "
            f'prompt, and the search has it at {perturb.positions!r}; use positions = "last_prompt"'
        )


def _check_one_of_each(audit: Audit, controls: Sequence[ControlKind]) -> None:
    """An audit is read beside its controls by their kind: of two, one would be lost."""
    kinds = [control.kind for control in controls]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise StudyError(
            f"audit {audit.name!r}: two controls {twice[0]!r} beside one constraint; name it once, "
            "or make two audits"
        )
