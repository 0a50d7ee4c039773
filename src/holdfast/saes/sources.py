"""Where SAEs are loaded from. One class a layout; each yields the same SAE record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, SerializeAsAny, field_validator

from holdfast.canonical import sha256_tree
from holdfast.config import Config, Kind
from holdfast.errors import SAEError
from holdfast.organism.assets import resolve
from holdfast.registry import Registry
from holdfast.sites import Site

if TYPE_CHECKING:
    from holdfast.saes.sae import SAE

SOURCES = Registry("sae_sources", {"folder": "holdfast.saes.sources:Folder"})


class SAESource(Kind):
    """A place an SAE can be read from."""

    def folder(self) -> Path:
        """The local folder that holds it. Raises SAEError if there is none."""
        raise NotImplementedError

    def sha256(self) -> str:
        """Hash over the files that make the SAE."""
        raise NotImplementedError

    def load(self, site: Site) -> SAE:
        """Read it for `site`. Raises SAEError if it was trained for another site."""
        raise NotImplementedError


class Folder(SAESource):
    """A folder in the SAELens layout: `cfg.json` and `sae_weights.safetensors`.

    Architectures `standard` (ReLU) and `jumprelu`, without input normalization. `path` may begin
    with the name of a shipped subject (`organism:saes/1`).
    """

    kind: Literal["folder"] = "folder"
    path: str

    def folder(self) -> Path:
        folder = resolve(self.path)
        for name in ("cfg.json", "sae_weights.safetensors"):
            if not (folder / name).is_file():
                raise SAEError(
                    f"{self.path}: expected an SAELens folder with cfg.json and "
                    f"sae_weights.safetensors; {name} is not there"
                )
        return folder

    def sha256(self) -> str:
        return sha256_tree(self.folder(), ("cfg.json", "*.safetensors"))

    def load(self, site: Site) -> SAE:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from holdfast.saes.sae import SAE

        folder = self.folder()
        try:
            cfg = json.loads((folder / "cfg.json").read_text())
            tensors = load_file(folder / "sae_weights.safetensors")
        except (ValueError, SafetensorError) as error:  # ValueError: no JSON, or no text at all
            raise SAEError(f"{self.path}: the SAE's files cannot be read: {error}") from None
        if not isinstance(cfg, dict):
            raise SAEError(f"{self.path}: cfg.json holds a {type(cfg).__name__}, not a table")
        architecture = cfg.get("architecture")
        # Before SAELens 6 a TopK SAE was a "standard" one with another activation function.
        activation = cfg.get("activation_fn_str", "relu")
        if architecture not in ("standard", "jumprelu") or activation != "relu":
            named = architecture if activation == "relu" else activation
            raise SAEError(
                f"{self.path}: architecture {named!r} is not supported from a folder; "
                "known: standard, jumprelu"
            )
        if "scaling_factor" in tensors or cfg.get("finetuning_scaling_factor"):
            raise SAEError(
                f"{self.path}: it has a scaling_factor per feature that is not folded into its "
                "weights; fold it (SAELens: fold_activation_norm_scaling_factor, or multiply W_dec "
                "row by row) and save it again"
            )
        normalization = cfg.get("normalize_activations", "none")
        if normalization != "none":
            raise SAEError(
                f"{self.path}: normalize_activations is {normalization!r}, which makes the "
                "features depend on the input's scale; only 'none' is supported"
            )
        hook = (cfg.get("metadata") or {}).get("hook_name") or cfg.get("hook_name")
        if hook is not None and Site.parse(hook) != site:
            raise SAEError(
                f"{self.path}: trained at {Site.parse(hook)}, asked for at {site}; an SAE of "
                "another site reads the wrong residual"
            )
        missing = {"W_enc", "W_dec", "b_enc", "b_dec"} - set(tensors)
        if architecture == "jumprelu" and "threshold" not in tensors:
            missing.add("threshold")
        if missing:
            raise SAEError(f"{self.path}: sae_weights.safetensors lacks {sorted(missing)}")
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        threshold = tensors.get("threshold", torch.zeros_like(tensors["b_enc"]))
        if architecture == "standard":
            threshold = torch.zeros_like(tensors["b_enc"])
        return SAE(
            site=site,
            W_enc=tensors["W_enc"],
            W_dec=tensors["W_dec"],
            b_enc=tensors["b_enc"],
            b_dec=tensors["b_dec"],
            threshold=threshold,
            subtract_b_dec=self._subtracts(cfg),
            name=self.path,
            sha256=self.sha256(),
        )

    def _subtracts(self, cfg: dict[str, Any]) -> bool:
        """Whether the encoder reads x − b_dec: never guessed, since it moves every feature."""
        value = cfg.get("apply_b_dec_to_input")
        if not isinstance(value, bool):
            raise SAEError(
                f"{self.path}: cfg.json must say apply_b_dec_to_input = true or false, it says "
                f"{value!r}; ask whoever trained it (SAELens took true where it was missing)"
            )
        return value


class SAESpec(Config):
    """An SAE and the site it belongs to."""

    site: str
    source: Annotated[SerializeAsAny[SAESource], BeforeValidator(SOURCES.parse)]

    @field_validator("site")
    @classmethod
    def _canonical(cls, site: str) -> str:
        return str(Site.parse(site))
