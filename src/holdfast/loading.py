"""Loading a model and its tokenizer from files: safely, whole, and in a precision that can work."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError

from holdfast.canonical import sha256_tree
from holdfast.config import Config, nearest
from holdfast.errors import DeviceError, SubjectError
from holdfast.families import FAMILIES
from holdfast.organism.assets import SHIPPED, resolve
from holdfast.saes.sources import SAESpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
DIFFERENTIABLE = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
"""Quantizations with a backward pass, as a config's `quant_method` names them. The kernels of
AWQ, GPTQ, FP8 and MXFP4 have none, and a search needs gradients."""


class SubjectSpec(Config):
    """What a study says of its subject.

    model: a shipped name, a folder, or a hub id (the only thing that reaches for the network).
    dtype: of weights and residual; SAEs and perturbations are computed in float32 whatever it is.
    attention: transformers' attention implementation; left out, the family's own. quantization:
    bitsandbytes weights. prepend_bos: put BOS in front of prompts that the tokenizer leaves without
    (GPT-2's does; its published SAEs were trained with it).
    """

    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager"] | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    prepend_bos: bool = False
    saes: tuple[SAESpec, ...] = Field(min_length=1)

    def folder(self) -> Path:
        """The folder the model is loaded from, downloaded first if it is a hub id.

        Raises SubjectError if the name is no shipped subject, no folder and no reachable hub id.
        """
        folder = resolve(self.model)
        if (folder / "config.json").is_file():
            return folder
        if folder.exists() or self.model.startswith((".", "/", "~")) or self.model in SHIPPED:
            raise SubjectError(
                f"model {self.model!r}: expected a folder with config.json and safetensors weights"
                f", found {'no config.json in it' if folder.exists() else 'nothing there'}"
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(
                snapshot_download(
                    self.model,
                    revision=self.revision,
                    allow_patterns=[*_WEIGHTS, "*.json", "*.model"],
                )
            )
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise SubjectError(
                f"model {self.model!r} is no shipped subject, no folder, and the hub gave "
                f"{type(error).__name__}. {nearest(self.model, SHIPPED)}"
            ) from None

    def weights_sha256(self) -> str:
        """Hash over the model's weights, configuration and tokenizer."""
        return sha256_tree(self.folder(), _WEIGHTS)

    def attention_used(self) -> str:
        """The attention implementation asked for, else the family's. Loads no weights.

        Raises SubjectError if the family is computed wrong under the one asked for.
        """
        family = FAMILIES.get(str(self._config().get("model_type")))
        # An unknown family is reported where the model is at hand to look into.
        return family.attention_for(self.attention) if family else self.attention or "sdpa"

    def _config(self) -> dict[str, Any]:
        path = self.folder() / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SubjectError(
                f"model {self.model!r}: config.json cannot be read: {error}"
            ) from None
        if not isinstance(config, dict):
            raise SubjectError(f"model {self.model!r}: config.json holds no table")
        return config

    def check_quantization(self) -> None:
        """Raise SubjectError for weights whose kernels have no gradients, or a missing package."""
        stored = self._config().get("quantization_config") or {}
        bits = [b for b in ("8bit", "4bit") if stored.get(f"load_in_{b}")]
        # Older files of bitsandbytes name no method.
        method = str(stored.get("quant_method") or ("bitsandbytes" if bits else ""))
        if stored and method not in DIFFERENTIABLE:
            method = method or "of no name"
            raise SubjectError(
                f"model {self.model!r} is quantized with {method!r}, whose kernels have no backward"
                " pass, and a recovery search needs gradients; use the unquantized model, or "
                'quantization = "8bit" or "4bit" (bitsandbytes)'
            )
        if bits and self.quantization not in (None, *bits):
            raise SubjectError(
                f"model {self.model!r}: quantization = {self.quantization!r} was asked for, and "
                f"its weights are stored in {bits[0]}; leave `quantization` out"
            )
        if (method or self.quantization) and find_spec("bitsandbytes") is None:
            raise SubjectError(
                f"model {self.model!r} needs bitsandbytes for its quantization: "
                "pip install bitsandbytes"
            )


def load_model(spec: SubjectSpec, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode without gradients, and its tokenizer.

    device: cpu, cuda, cuda:0, or auto, which spreads the blocks over all devices (accelerate).
    Raises SubjectError for damaged or incomplete files and DeviceError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours says what is going on
    spec.check_quantization()
    folder, placed = spec.folder(), _placement(spec, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attention_used(),
            use_safetensors=True,
            output_loading_info=True,
            **placed,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        # What transformers raises for damaged files differs by file and version.
        raise SubjectError(f"model {spec.model!r} cannot be loaded: {error}") from None
    # transformers fills what is missing with random weights and only logs it. Tied weights are
    # not among the missing.
    lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if lacking:
        raise SubjectError(
            f"model {spec.model!r}: its files lack {len(lacking)} weights of the architecture "
            f"(first: {lacking[:3]}); they would be random numbers"
        )
    from holdfast.organism.projected import attach_projection

    attach_projection(model, folder)
    if not placed:
        model.to(device)
    return at_rest(model), tokenizer


def at_rest(model: PreTrainedModel) -> PreTrainedModel:
    """The model as every pass needs it: no dropout, which would make each pass another one, no
    weight that asks for a gradient, and no layer that loses the gradient of what it is given."""
    for module in model.modules():
        # In its first pass without gradients bitsandbytes packs 4-bit weights, on CPUs with
        # AVX512-BF16, for a kernel that has no backward pass. Gradients are then silently wrong.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False)


def _placement(spec: SubjectSpec, device: str) -> dict[str, Any]:
    """How `from_pretrained` is told where weights go, and in which quantization."""
    placed: dict[str, Any] = {}
    if device == "auto" or spec.quantization:
        if find_spec("accelerate") is None:
            raise DeviceError(
                f"device {device!r} with quantization {spec.quantization!r} needs accelerate to "
                "place weights: pip install accelerate"
            )
        placed["device_map"] = "auto" if device == "auto" else {"": device}
    if spec.quantization:
        from transformers import BitsAndBytesConfig

        in_8bit = spec.quantization == "8bit"
        placed["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=in_8bit,
            load_in_4bit=not in_8bit,
            bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        )
    return placed
