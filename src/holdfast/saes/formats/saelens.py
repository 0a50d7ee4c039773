"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from holdfast.errors import SAEError
from holdfast.saes.formats import Said, read_config, transcoder
from holdfast.saes.inputs import Inputs
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Facts
from holdfast.saes.tensors import Stored, read_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", *BATCH_TOPK)
OTHERS = {
    "abstopk": "its codes are signed: the k largest by magnitude keep their sign",
    "matching_pursuit": "a feature's code depends on which features were chosen before it",
    "temporal": "its codes depend on earlier tokens",
}
PER_TOKEN: dict[str, Literal["layer_norm", "constant_norm_rescale"]] = {
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
}
NORMS = ("none", "expected_average_only_in", *PER_TOKEN)


def layout(folder: Path) -> Layout:
    return layout_under(folder, {})


def layout_under(folder: Path, overrides: Mapping[str, Any]) -> Layout:
    """The layout of a folder; overrides: what a registry says in place of its configuration."""
    said = read_config(folder / CONFIG)
    cfg = said | overrides
    old = "metadata" not in said.values
    meta = (said if old else said.table("metadata")) | overrides
    architecture = _architecture(cfg, meta, old)
    tensors = read_tensors(folder / WEIGHTS)
    threshold = "threshold" if architecture == "jumprelu" else None
    if (meta.get("training_architecture", str) or architecture) in BATCH_TOPK:
        threshold = "topk_threshold" if architecture in BATCH_TOPK else "threshold"
        _check_threshold(tensors, threshold)
    gated, topk = architecture == "gated", architecture == "topk"
    centered = meta.table("model_from_pretrained_kwargs").get("center_writing_weights", bool)
    return Layout(
        folder=folder,
        file=WEIGHTS,
        b_enc="b_gate" if gated else "b_enc",
        threshold=threshold,
        r_mag="r_mag" if gated else None,
        b_mag="b_mag" if gated else None,
        k=_k(cfg) if topk else None,
        subtract_b_dec=_subtracts(cfg, old),
        feature_scale=_feature_scale(cfg, tensors),
        rescale=cfg.flag("rescale_acts_by_decoder_norm"),
        inputs=_inputs(cfg, bool(centered)),
        site=meta.get("hook_name", str) or meta.get("hook_point", str),
        facts=Facts(
            format="saelens",
            architecture=architecture,
            model=meta.get("model_name", str),
            l0=_l0(cfg, meta, architecture),
            centered=centered,
            bos=meta.get("prepend_bos", bool),
        ),
        hashed=(CONFIG, WEIGHTS),
    )


def _architecture(cfg: Said, meta: Said, old: bool) -> str:
    named = cfg.get("architecture", str) or ("standard" if old else "not said")
    # Before SAELens 6 a TopK SAE was a "standard" one with another activation function.
    activation = cfg.get("activation_fn_str", str) or cfg.get("activation_fn", str) or "relu"
    if named == "standard" and activation == "topk":
        return "topk"
    written = meta.get("hook_name_out", str)
    if "transcoder" in named or written not in (None, meta.get("hook_name", str)):
        raise transcoder(f"{named} that writes {written}" if written else named)
    if named not in ARCHITECTURES:
        why = f" ({OTHERS[named]})" if named in OTHERS else ""
        raise SAEError(
            f"architecture {named!r} is not supported{why}; known: {', '.join(ARCHITECTURES)}"
        )
    if activation != "relu" and named not in ("topk", *BATCH_TOPK):
        raise SAEError(f"activation function {activation!r} is not supported for {named!r}")
    return named


def _k(cfg: Said) -> int:
    old = cfg.table("activation_fn_kwargs")  # of before SAELens 6
    return (old if old.values else cfg).count("k")


def _l0(cfg: Said, meta: Said, architecture: str) -> float | None:
    """Features active per token: k, of an SAE trained with one."""
    if architecture == "topk":
        return float(_k(cfg))
    trained = meta.table("training_architecture_details")
    return (cfg if architecture in BATCH_TOPK else trained).get("k", float)


def _check_threshold(tensors: Mapping[str, Stored], name: str) -> None:
    """Raise SAEError for a BatchTopK SAE whose threshold is still what it began with."""
    if name in tensors and bool((tensors[name].read() <= 0).all()):
        raise SAEError(
            "its BatchTopK threshold was never set (it is 0): which features fire would depend on "
            "the batch; save it with save_inference_model after training"
        )


def _subtracts(cfg: Said, old: bool) -> bool:
    """Whether the encoder reads x − b_dec: never guessed, since it moves every feature."""
    # SAELens before 6 wrote the field from the version on that made it a choice, and subtracted
    # before. Version 6 always writes it.
    value = cfg.get("apply_b_dec_to_input", bool)
    if value is None and not old:
        raise SAEError(
            f"{CONFIG} does not say apply_b_dec_to_input; ask whoever trained it (SAELens takes "
            "true where it is missing)"
        )
    return value is not False


def _feature_scale(cfg: Said, tensors: Mapping[str, Stored]) -> str | None:
    if "scaling_factor" not in tensors:
        return None
    factor = tensors["scaling_factor"].read()
    if torch.allclose(factor, torch.ones_like(factor)):
        return None
    if not cfg.flag("finetuning_scaling_factor"):
        raise SAEError(
            f"it has a scaling_factor that is not 1 while {CONFIG} says no "
            "finetuning_scaling_factor; one of the two is wrong"
        )
    return "scaling_factor"


def _inputs(cfg: Said, center: bool) -> Inputs:
    if isinstance(cfg.values.get("normalize_activations"), bool):  # its type at first
        norm = "expected_average_only_in" if cfg.flag("normalize_activations") else "none"
    else:
        norm = cfg.get("normalize_activations", str) or "none"
    if norm not in NORMS:
        raise SAEError(
            f"normalize_activations {norm!r} is not supported; known: {', '.join(NORMS)}"
        )
    if norm == "expected_average_only_in":
        # A scale of NaN asks the source for the number, which no file of this format holds.
        return Inputs(center=center, scale=math.nan)
    return Inputs(center=center, norm=PER_TOKEN.get(norm))
