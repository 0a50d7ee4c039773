"""Configuration: frozen pydantic models that are TOML, Python object and JSON at once.

And the one place that says which of their fields a trial's identity is made of.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

IDENTITY: Final = {"identity": True}
"""The context in which a trial's identity is written: what is known by its hash without its path,
and without fields that were added `LATER` where they say what there was before them."""

EVERY_FIELD: Final = {"identity": True, "every_field": True}
"""The same with every field, for what is shown or compared field by field."""


class _Later:
    def __repr__(self) -> str:
        return "LATER"


LATER: Final = _Later()
"""Marks a field that a kind or a spec has got since trials of it were first stored:

    spellings: Annotated[bool, LATER] = False

Its default does what was done before there was the field, so trials that leave it at that are the
ones they were: it is no part of their identity. The default of such a field is never changed."""


def in_identity(info: SerializationInfo) -> bool:
    """Whether what is being written is a trial's identity, where paths have no place."""
    return bool(info.context and info.context.get("identity"))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown `name`: close matches, then everything known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else '(none)'}"


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, no NaN, near-miss hints."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for key in data:
                if key not in known:
                    raise ValueError(f"unknown key {key!r}: {nearest(str(key), known)}")
        return data

    @model_serializer(mode="wrap")
    def _without_what_was_not_there(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> Any:
        data = handler(self)
        if in_identity(info) and not (info.context or {}).get("every_field"):
            for name, field in _later_fields(type(self)):
                if getattr(self, name) == field.get_default(call_default_factory=True):
                    data.pop((info.by_alias and field.serialization_alias) or name, None)
        return data


@cache
def _later_fields(of: type[Config]) -> tuple[tuple[str, FieldInfo], ...]:
    """Those that were added when trials were in use: every part of a trial asks for its own."""
    return tuple((n, field) for n, field in of.model_fields.items() if LATER in field.metadata)


class Kind(Config):
    """An interchangeable kind: its fields are its configuration, `kind` is its name."""

    kind: str
