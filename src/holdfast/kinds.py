"""Every family of kinds, for `holdfast list`."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.attacks import ATTACKS
from holdfast.behaviors import BEHAVIORS
from holdfast.config import nearest
from holdfast.constraints import CONSTRAINTS
from holdfast.controls import CONTROLS
from holdfast.datasets import DATASETS
from holdfast.discovery import DISCOVERIES
from holdfast.errors import UnknownNameError
from holdfast.interventions import INTERVENTIONS
from holdfast.judges import JUDGES
from holdfast.objectives import OBJECTIVES
from holdfast.registry import Registry
from holdfast.saes.sources import SOURCES

FAMILIES_OF_KINDS: dict[str, Registry] = {
    registry.family: registry
    for registry in (
        BEHAVIORS,
        DATASETS,
        DISCOVERIES,
        INTERVENTIONS,
        CONSTRAINTS,
        OBJECTIVES,
        CONTROLS,
        ATTACKS,
        JUDGES,
        SOURCES,
    )
}


@dataclass(frozen=True)
class Description:
    """A kind as a user sees it: family, name, the first line of its docstring, its fields."""

    family: str
    kind: str
    summary: str
    fields: tuple[str, ...]


def describe(family: str) -> list[Description]:
    """The kinds of one family. Raises UnknownNameError with the nearest names."""
    if family not in FAMILIES_OF_KINDS:
        raise UnknownNameError(
            f"no family of kinds {family!r}: {nearest(family, FAMILIES_OF_KINDS)}"
        )
    registry = FAMILIES_OF_KINDS[family]
    out = []
    for name in registry.names():
        cls = registry.get(name)
        fields = tuple(
            f"{field} = {info.get_default(call_default_factory=True)!r}"
            if not info.is_required()
            else field
            for field, info in cls.model_fields.items()
            if field != "kind"
        )
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        out.append(Description(family, name, summary, fields))
    return out
