"""The layouts SAEs are published in. One file each, found by the files a folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.errors import SAEError
from holdfast.saes.layout import Layout

FormatName = Literal["saelens", "gemma_scope", "llama_scope", "dictionary_learning", "sparsify"]


@dataclass(frozen=True)
class Format:
    """A layout by its name, and the files (glob patterns) that show a folder to be of it."""

    name: str
    files: tuple[str, ...]

    def matches(self, folder: Path) -> bool:
        return all(any(folder.glob(pattern)) for pattern in self.files)

    def layout(self, folder: Path) -> Layout:
        """Read the folder's configuration. Raises SAEError for what is not supported, by name."""
        read: Callable[[Path], Layout] = import_module(f"holdfast.saes.formats.{self.name}").layout
        return read(folder)


FORMATS = {
    form.name: form
    for form in (
        Format("saelens", ("cfg.json", "sae_weights.safetensors")),
        Format("sparsify", ("cfg.json", "sae.safetensors")),
        Format("gemma_scope", ("params.npz",)),
        Format("llama_scope", ("hyperparams.json", "checkpoints/final.safetensors")),
        Format("dictionary_learning", ("config.json", "ae.pt")),
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
        wanted = "; ".join(f"{form.name}: {' and '.join(form.files)}" for form in forms)
        inside = sorted(path.name for path in folder.iterdir())[:8]
        raise SAEError(f"expected an SAE ({wanted}), the folder holds {inside or 'nothing'}")
    return found[0].layout(folder)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table. Raises SAEError otherwise."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no text at all
        raise SAEError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise SAEError(f"{path.name} holds a {type(config).__name__}, not a table")
    return config


def needed(config: dict[str, Any], key: str, file: str) -> Any:
    """config[key]. Raises SAEError if it is not there: what moves features is never guessed."""
    if config.get(key) is None:
        raise SAEError(f"{file} does not say {key}, which changes what the features are")
    return config[key]
