"""A study: a TOML file that says what to audit."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from holdfast.attacks import Attack, AttackKind
from holdfast.behaviors import Behavior
from holdfast.config import IDENTITY, Config, nearest
from holdfast.controls import Control
from holdfast.discovery import Discovery
from holdfast.dotted import put
from holdfast.errors import HoldfastError, StudyError
from holdfast.grid import Grid, Variants, points
from holdfast.interventions import Intervention
from holdfast.loading import SubjectSpec
from holdfast.placed import at_point
from holdfast.recovery import RecoverySpec
from holdfast.setting import Data
from holdfast.variants import PathSpec
from holdfast.verdict import VerdictRule

Asked = bool | PathSpec
"""Whether recoveries are compared with variants of theirs, or how."""

EXACT = ("encoder_null", "feature_hold", "jacobian_null")
"""Constraints that hold every clamped feature where it is, the ones to read first."""


def headline_constraint(constraints: Sequence[str]) -> str:
    """The constraint a verdict is read from: the exact one if it was run, else the last."""
    return next((name for name in EXACT if name in constraints), constraints[-1])


def _beside(attack: AttackKind) -> AttackKind:
    if attack.searches:
        raise ValueError(
            f"{attack.kind!r} is the search that every audit makes; `attacks` takes those that are "
            "run beside it, in the prompt"
        )
    return attack


Beside = Annotated[Attack, AfterValidator(_beside)]


class Audit(Config):
    """One behavior under one intervention. What it leaves out it takes from the study."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    behavior: Behavior
    discovery: Discovery
    intervention: Intervention
    subject: SubjectSpec | None = None
    ignorant: SubjectSpec | None = None
    data: Data | None = None
    controls: tuple[Control, ...] | None = None
    attacks: tuple[Beside, ...] | None = None
    grid: Grid | None = None
    paths: Asked | None = None
    known_answer: Literal["holds", "does_not_hold"] | None = None
    """For a subject built so that the answer is known: the report checks the verdict against it."""


class Study(Config):
    """A study file. `grid` maps a dotted path to values: one trial per audit, point and control.

    attacks: attempts in the prompt, beside the search: one trial per audit and point of what the
    grid varies apart from the search. variants: name → dotted paths with a value each, which move
    together; `variant` is their axis. paths: whether each recovery is set beside baselines of its
    norm and split into parts, for the constraint that verdicts are read from. It takes some fifty
    passes over the recovered prompts, or generations of their answers.
    """

    schema_: Literal[1] = Field(1, alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    seed: int = 0
    subject: SubjectSpec
    ignorant: SubjectSpec | None = None
    data: Data = Data()
    recovery: RecoverySpec
    verdict: VerdictRule = VerdictRule()
    controls: tuple[Control, ...] = ()
    attacks: tuple[Beside, ...] = ()
    audits: tuple[Audit, ...] = Field(min_length=1)
    grid: Grid = Field(default_factory=dict)
    variants: Variants = Field(default_factory=dict)
    paths: Asked = False

    @model_validator(mode="after")
    def _names_differ(self) -> Study:
        names = [audit.name for audit in self.audits]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two audits have the name {twice[0]!r}")
        return self

    def grid_of(self, audit: str) -> Grid:
        """The grid of the audit of that name: its own, else the study's."""
        own = {each.name: each.grid for each in self.audits}
        found = own.get(audit)
        return self.grid if found is None else found

    def identified(self) -> Study:
        """The same study with the hashes of what its behaviors read by. Raises JudgeError."""
        audits = (
            audit.model_copy(update={"behavior": audit.behavior.identified()})
            for audit in self.audits
        )
        return self.model_copy(update={"audits": tuple(audits)})

    def canonical(self) -> dict[str, Any]:
        """As plain JSON types. Data files stand in it by their hash and not by their path, so that
        a run can be read after they have moved."""
        return self.model_dump(mode="json", by_alias=True, context=dict(IDENTITY))


def bundled(name: str) -> str:
    """The text of a study that is shipped with the package."""
    return (files("holdfast") / "studies" / f"{name}.toml").read_text()


def bundled_names() -> list[str]:
    """The studies that are shipped with the package, by name."""
    folder = files("holdfast") / "studies"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def read_text(path: Path | str) -> str:
    """The text of a study file, or of a bundled study by its name. Raises StudyError if there is
    neither."""
    name, path = str(path), Path(path)
    if not path.is_file():
        if name in bundled_names():
            return bundled(name)
        raise StudyError(
            f"no study file at {path}, and no bundled study of that name "
            f"({nearest(name, bundled_names())}); `holdfast demo` shows one that works"
        )
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not a text file: {error}") from None


def parse(text: str, sets: Sequence[str] = (), limit: int | None = None) -> Study:
    """Parse TOML, apply `path=value` overrides and a limit on audited prompts, and check it.

    Raises StudyError naming every wrong entry, with the nearest known names.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"the study is no valid TOML: {error}") from None
    for assignment in sets:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise StudyError(f"--set takes path=value, got {assignment!r}")
        put(data, path.strip(), _toml_value(value.strip()))
    if limit is not None:
        if limit < 1:
            raise StudyError(f"--limit takes 1 or more, got {limit}")
        for table in (data.setdefault("data", {}), *_audit_data(data)):
            table["test"] = min(limit, table.get("test", Data().test))
    return _checked(data)


def _audit_data(data: dict[str, Any]) -> list[dict[str, Any]]:
    audits = data.get("audits", [])
    return [a["data"] for a in audits if isinstance(a, dict) and isinstance(a.get("data"), dict)]


def _checked(data: dict[str, Any]) -> Study:
    try:
        study = Study.model_validate(data)
        for audit in study.audits:
            for point in points(study.grid_of(audit.name)):
                at_point(study, audit, point)
        return study
    except ValidationError as error:
        raise StudyError(_explain(error)) from None
    except ValueError as error:  # from a registry, which names the kind
        raise StudyError(f"the study cannot be used:\n  {error}") from None


def _explain(error: ValidationError) -> str:
    """Pydantic's findings as one line each: where, what."""
    lines = []
    findings = error.errors(include_url=False)
    for finding in findings:
        # Of a list whose entries are all wrong pydantic says that it is empty, too.
        inside = [f for f in findings if f["loc"][: len(finding["loc"])] == finding["loc"]]
        if finding["type"] == "too_short" and len(inside) > 1:
            continue
        where = ".".join(str(part) for part in finding["loc"]) or "study"
        message = finding["msg"].removeprefix("Value error, ")
        given = finding["input"]
        shown = "" if isinstance(given, dict | list) else f" (got {given!r})"
        lines.append(f"  {where}: {message}{shown}")
    return "the study cannot be used:\n" + "\n".join(lines)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word is what people type on a shell for a string.
        return text


def load(path: Path | str, sets: Sequence[str] = (), limit: int | None = None) -> Study:
    """Read and check a study file. Raises StudyError naming the file."""
    try:
        return parse(read_text(path), sets, limit)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    except HoldfastError as error:
        raise type(error)(f"{path}: {error}") from None
