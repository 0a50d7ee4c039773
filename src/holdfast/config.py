"""Configuration: frozen pydantic models that are TOML, Python object and JSON at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


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


class Kind(Config):
    """An interchangeable kind: its fields are its configuration, `kind` is its name."""

    kind: str
