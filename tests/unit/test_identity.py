"""What a trial's id is made of: a field that came later changes no trial that leaves it alone."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import Field, SerializeAsAny

import holdfast
from holdfast.canonical import trial_id
from holdfast.config import EVERY_FIELD, IDENTITY, LATER, Config
from holdfast.planning import plan
from holdfast.study import Study, bundled, bundled_names, parse
from holdfast.trial import Trial
from holdfast.variants import PathSpec

FIRST = Path(__file__).with_name("first_fields.json")
"""Fields that are part of every trial's id, by class: those it had when it was added."""


# --- The mechanism --------------------------------------------------------------------------------


class Spec(Config):
    steps: int = 3


class Longer(Spec):
    """The same spec a version later."""

    rule: Annotated[str, LATER] = Field("plain", serialization_alias="how")
    parts: Annotated[tuple[float, ...], LATER] = (1.0,)
    spec: Annotated[Spec, LATER] = Spec()


class Unmarked(Spec):
    rule: str = "plain"


class Whole(Config):
    spec: SerializeAsAny[Spec]
    specs: tuple[SerializeAsAny[Spec], ...] = ()


def id_of(config: Config) -> str:
    return trial_id(config.model_dump(mode="json", by_alias=True, context=dict(IDENTITY)))


def test_a_field_that_came_later_is_no_part_of_an_id_where_it_is_left_alone() -> None:
    assert id_of(Longer()) == id_of(Spec()) == id_of(Longer(rule="plain", parts=(1.0,)))
    assert id_of(Longer(steps=4)) == id_of(Spec(steps=4)) != id_of(Spec())
    for inside in (Spec, Longer):  # however deep
        whole = Whole(spec=inside(), specs=(inside(), inside(steps=9)))
        assert id_of(whole) == id_of(Whole(spec=Spec(), specs=(Spec(), Spec(steps=9))))
    ids = {id_of(Unmarked())} | {
        id_of(Longer(**fields))
        for fields in ({}, {"rule": "other"}, {"parts": (2.0,)}, {"parts": (1.0, 1.0)},
                       {"spec": Spec(steps=9)}, {"rule": "other", "parts": (2.0,)})
    }  # fmt: skip
    assert len(ids) == 7, "two of them are not the same trial"


def test_it_is_left_out_of_identities_alone() -> None:
    said = Longer().model_dump(mode="json", by_alias=True)
    assert said == {"steps": 3, "how": "plain", "parts": [1.0], "spec": {"steps": 3}}
    assert Longer().model_dump(mode="json", by_alias=True, context=dict(EVERY_FIELD)) == said
    assert Longer.model_validate(Longer(steps=4).model_dump(context=dict(IDENTITY))).steps == 4


# --- Every field has a status ---------------------------------------------------------------------


def below(cls: type[Config]) -> Iterator[type[Config]]:
    """A class and all that stand on it, of this package."""
    if cls.__module__.startswith("holdfast."):
        yield cls
        for sub in cls.__subclasses__():
            yield from below(sub)


def named_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from named_in(part)


def reachable() -> dict[str, type[Config]]:
    """Every spec and kind that can be part of a study or a trial, by name."""
    for module in pkgutil.walk_packages(holdfast.__path__, "holdfast."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    found: dict[str, type[Config]] = {}
    todo: list[type[Config]] = [Trial, Study]
    while todo:
        for cls in below(todo.pop()):
            name = f"{cls.__module__.removeprefix('holdfast.')}.{cls.__name__}"
            if name not in found:
                found[name] = cls
                todo += [c for f in cls.model_fields.values() for c in named_in(f.annotation)]
    return found


@pytest.fixture(scope="module")
def classes() -> dict[str, type[Config]]:
    return reachable()


def unmarked(cls: type[Config]) -> list[str]:
    return sorted(name for name, f in cls.model_fields.items() if LATER not in f.metadata)


def test_every_field_was_there_first_or_came_later(classes: dict[str, type[Config]]) -> None:
    """A new field of what exists would give all its trials new ids."""
    assert len(classes) > 60 and "behaviors.mcq.MultipleChoice" in classes
    first: dict[str, list[str]] = json.loads(FIRST.read_text())
    for name, cls in classes.items():
        assert name in first, (
            f"{name} is new: add its fields to {FIRST.name}, {json.dumps({name: unmarked(cls)})}"
        )
        assert unmarked(cls) == first[name], (
            f"{name}: a field that is added is Annotated[..., LATER] with what was done before as "
            f"its default, so that ids stay; if ids are to change, say so in {FIRST.name}"
        )
    assert first.keys() == classes.keys()


def test_what_came_later_can_be_left_out(classes: dict[str, type[Config]]) -> None:
    later = {
        f"{name}.{field}"
        for name, cls in classes.items()
        for field, info in cls.model_fields.items()
        if LATER in info.metadata
    }
    assert {"behaviors.mcq.MultipleChoice.spellings", "recovery.RecoverySpec.objective"} <= later
    for path in later:
        name, _, field = path.rpartition(".")
        assert not classes[name].model_fields[field].is_required(), f"{path} has no default"


DEFAULTS: dict[str, Any] = {
    "behaviors.mcq.MultipleChoice.spellings": False,
    "recovery.RecoverySpec.objective": {"kind": "margin"},
    "setting.Data.texts": None,
    "variants.PathSpec.margin_draws": 100,
    "variants.PathSpec.part_scales": [1.0],
    "variants.PathSpec.atoms": 32,
    "variants.PathSpec.principal": 16,
    "variants.PathSpec.likes": True,
    "variants.PathSpec.routes": True,
    "variants.PathSpec.heads": True,
    "variants.PathSpec.orders": False,
}
"""What is done by trials that do not say it."""


def test_what_is_not_said_means_what_it_meant(classes: dict[str, type[Config]]) -> None:
    """A changed default would make other trials of stored ones, under their ids."""
    for path, meant in DEFAULTS.items():
        name, _, field = path.rpartition(".")
        default = classes[name].model_fields[field].get_default(call_default_factory=True)
        said = default.model_dump() if isinstance(default, Config) else default
        assert json.loads(json.dumps(said)) == meant, path


# --- Trials ---------------------------------------------------------------------------------------


def test_trials_are_read_back_as_they_were_and_differ_where_a_later_field_does() -> None:
    trials = plan(parse(bundled("demo"))).trials
    for trial in trials:
        again = Trial.model_validate(trial.canonical())
        assert again.canonical() == trial.canonical() and again.id == trial.id
        assert "spellings" not in trial.canonical()["behavior"]
    trial = next(each for each in trials if each.paths is not None and each.recovery is not None)
    assert trial.paths is not None
    assert trial.described()["paths"]["atoms"] == 32 and "atoms" not in trial.canonical()["paths"]
    fewer = PathSpec.model_validate(trial.paths.model_dump() | {"atoms": 8})
    assert trial.model_copy(update={"paths": fewer}).id != trial.id


OFFLINE = [name for name in bundled_names() if not name.startswith("gemma")]
"""The others need files that are not shipped."""


@pytest.mark.parametrize("name", OFFLINE)
def test_studies_are_read_back_as_they_were(name: str) -> None:
    study = parse(bundled(name))
    assert Study.model_validate(study.canonical()).canonical() == study.canonical()
