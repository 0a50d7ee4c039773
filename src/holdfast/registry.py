"""The one place where a kind becomes known: built-in ones and plug-ins.

A kind is named by a string and lives in one file, which is imported only when it is used.
Plug-ins declare an entry point in the group `holdfast.<family>`, for example
`holdfast.constraints`, whose name is the kind and whose object is the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from holdfast.config import Kind, nearest
from holdfast.errors import UnknownNameError


@dataclass(frozen=True)
class Registry:
    """The known kinds of one family.

    `builtin` maps a kind to `"module:Class"`; nothing is imported before it is asked for.
    """

    family: str
    builtin: Mapping[str, str]

    @cached_property
    def _plugins(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=f"holdfast.{self.family}")}

    def names(self) -> list[str]:
        """Every known kind, built-in ones and plug-ins, sorted."""
        return sorted({*self.builtin, *self._plugins})

    def get(self, kind: str) -> type[Kind]:
        """The class of `kind`. Raises UnknownNameError with the nearest known names."""
        if kind in self.builtin:
            module, _, name = self.builtin[kind].partition(":")
            cls = getattr(import_module(module), name)
        elif kind in self._plugins:
            cls = self._plugins[kind].load()
        else:
            raise UnknownNameError(
                f"unknown kind {kind!r} in {self.family}: {nearest(kind, self.names())}"
            )
        return cls

    def parse(self, value: Any) -> Kind:
        """Turn `{kind = …, …}` into the kind's object; an object passes through.

        Used as a pydantic validator, so that a plug-in's fields are checked like a built-in's.
        """
        if isinstance(value, Kind):
            return value
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise ValueError(
                f"expected a table with a `kind` from {self.family} "
                f"({', '.join(self.names())}), got {value!r}"
            )
        try:
            return self.get(value["kind"]).model_validate(value)
        except UnknownNameError as error:
            raise ValueError(str(error)) from None
