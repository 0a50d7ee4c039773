"""The layouts SAEs are published in. One file each, found by the files a folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from holdfast.errors import SAEError
from holdfast.saes.layout import Layout

FormatName = Literal["saelens", "gemma_scope", "llama_scope", "dictionary_learning", "sparsify"]


@dataclass(frozen=True)
class Format:
    """A layout by its name, and the sets of files any of which shows a folder to be of it.

    beside: files that are read if they are there.
    """

    name: str
    sets: tuple[tuple[str, ...], ...]
    beside: tuple[str, ...] = ()

    def matches(self, folder: Path) -> bool:
        return any(all((folder / name).is_file() for name in names) for names in self.sets)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that may be read."""
        return tuple(dict.fromkeys(name for names in (*self.sets, self.beside) for name in names))

    def layout(self, folder: Path) -> Layout:
        """Read the folder's configuration. Raises SAEError for what is not supported, by name."""
        read: Callable[[Path], Layout] = import_module(f"holdfast.saes.formats.{self.name}").layout
        return read(folder)

    def __str__(self) -> str:
        return f"{self.name}: {' or '.join(' and '.join(names) for names in self.sets)}"


FORMATS = {
    form.name: form
    for form in (
        Format("saelens", (("cfg.json", "sae_weights.safetensors"),)),
        Format("sparsify", (("cfg.json", "sae.safetensors"),)),
        Format("gemma_scope", (("params.npz",), ("params.safetensors",)), ("config.json",)),
        Format(
            "llama_scope",
            (
                ("hyperparams.json", "checkpoints/final.safetensors"),
                ("config.json", "sae_weights.safetensors"),
            ),
        ),
        Format("dictionary_learning", (("config.json", "ae.pt"),)),
    )
}
assert set(FORMATS) == set(get_args(FormatName))


def layout_of(folder: Path, named: str | None = None) -> Layout:
    """The layout of an SAE's folder, recognized by its files unless `named`.

    Raises SAEError if the folder holds none of the known layouts.
    """
    if not folder.is_dir():
        raise SAEError("no such folder")
    forms = [form for form in FORMATS.values() if named in (None, form.name)]
    found = [form for form in forms if form.matches(folder)]
    if not found:
        inside = sorted(path.name for path in folder.iterdir())[:8]
        raise SAEError(
            f"expected an SAE ({'; '.join(map(str, forms))}), the folder holds "
            f"{', '.join(inside) or 'nothing'}"
        )
    return found[0].layout(folder)


T = TypeVar("T", str, int, float, bool, dict)
WORDS: dict[type, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table",
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A table of an SAE's configuration, asked for values of one type; null is nothing said."""

    values: dict[str, Any]
    file: str

    def get(self, key: str, kind: type[T]) -> T | None:
        """What it says, None if it says nothing. Raises SAEError for another type."""
        value = self.values.get(key)
        if value is None:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise SAEError(f"{self.file} must say {key} as {WORDS[kind]}, it says {value!r}")
        return value

    def needed(self, key: str, kind: type[T]) -> T:
        """The same. Raises SAEError if nothing is said: what moves features is never guessed."""
        value = self.get(key, kind)
        if value is None:
            raise SAEError(f"{self.file} does not say {key}, which changes what the features are")
        return value

    def count(self, key: str) -> int:
        """A number of at least 1 that has to be said."""
        value = self.needed(key, int)
        if value < 1:
            raise SAEError(f"{self.file} must say {key} as a number of at least 1, it says {value}")
        return value

    def flag(self, key: str) -> bool:
        """Whether it says so; nothing said is no."""
        return bool(self.get(key, bool))

    def table(self, key: str) -> Said:
        """A table inside it, empty if there is none."""
        return Said(self.get(key, dict) or {}, self.file)

    def __or__(self, other: Mapping[str, Any]) -> Said:
        return Said(self.values | dict(other), self.file)


def read_config(path: Path) -> Said:
    """A JSON file that holds a table. Raises SAEError otherwise."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no text at all
        raise SAEError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SAEError(f"{path.name} holds a {type(config).__name__}, not a table")
    return Said(config, path.name)


def transcoder(what: str) -> SAEError:
    """The refusal of what reads one point of the model and writes another."""
    return SAEError(
        f"it is a {what}: it reads one point and writes another, so its features are not "
        "directions of one residual that could be clamped or held there"
    )
