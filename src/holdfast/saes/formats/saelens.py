"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and of those before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from holdfast.errors import SAEError
from holdfast.saes.formats import read_config
from holdfast.saes.inputs import Inputs
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Facts
from holdfast.saes.tensors import read_tensors

WEIGHTS = "sae_weights.safetensors"
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", *BATCH_TOPK)
PER_TOKEN: dict[str, Literal["layer_norm", "constant_norm_rescale"]] = {
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
}
NORMS = ("none", "expected_average_only_in", *PER_TOKEN)


def layout(folder: Path) -> Layout:
    cfg = read_config(folder / "cfg.json")
    return layout_from(folder, cfg)


def layout_from(folder: Path, cfg: dict[str, Any]) -> Layout:
    """The layout of a folder under a configuration that may have been completed by a registry."""
    old = "metadata" not in cfg
    meta = cfg if old else dict(cfg["metadata"])
    architecture = _architecture(cfg)
    tensors = read_tensors(folder / WEIGHTS)
    threshold = {"jumprelu": "threshold"}.get(architecture)
    if architecture in BATCH_TOPK:
        threshold = "topk_threshold"
        if threshold in tensors and float(tensors[threshold]) <= 0:
            raise SAEError(
                "its BatchTopK threshold was never set (it is "
                f"{float(tensors[threshold]):g}), so which features fire would depend on the "
                "batch; save it with save_inference_model after training"
            )
    gated = architecture == "gated"
    kwargs = meta.get("model_from_pretrained_kwargs") or {}
    return Layout(
        folder=folder,
        file=WEIGHTS,
        b_enc="b_gate" if gated else "b_enc",
        threshold=threshold,
        r_mag="r_mag" if gated else None,
        b_mag="b_mag" if gated else None,
        k=_k(cfg) if architecture == "topk" else None,
        subtract_b_dec=_subtracts(cfg, old),
        feature_scale=_feature_scale(cfg, tensors),
        rescale=bool(cfg.get("rescale_acts_by_decoder_norm", False)),
        inputs=_inputs(cfg, bool(kwargs.get("center_writing_weights"))),
        site=meta.get("hook_name") or meta.get("hook_point"),
        facts=Facts(
            format="saelens",
            architecture=architecture,
            model=meta.get("model_name"),
            l0=float(_k(cfg)) if architecture == "topk" else None,
            centered=kwargs.get("center_writing_weights"),
            bos=meta.get("prepend_bos"),
        ),
        hashed=("cfg.json", "*.safetensors"),
    )


def _architecture(cfg: dict[str, Any]) -> str:
    named = str(cfg.get("architecture", "standard" if "metadata" not in cfg else None))
    # Before SAELens 6 a TopK SAE was a "standard" one with another activation function.
    activation = str(cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu")
    if named == "standard" and activation == "topk":
        return "topk"
    if "transcoder" in named:
        raise SAEError(
            f"it is a {named}: it reads one point and writes another, so its features are not "
            "directions of one residual that could be clamped or held there"
        )
    if named not in ARCHITECTURES:
        raise SAEError(
            f"architecture {named!r} is not supported; known: {', '.join(ARCHITECTURES)}"
        )
    if activation != "relu" and named not in ("topk", *BATCH_TOPK):
        raise SAEError(f"activation function {activation!r} is not supported for {named!r}")
    return named


def _k(cfg: dict[str, Any]) -> int:
    k = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
    if not isinstance(k, int):
        raise SAEError(f"cfg.json must say k of a TopK SAE, it says {k!r}")
    return k


def _subtracts(cfg: dict[str, Any], old: bool) -> bool:
    """Whether the encoder reads x − b_dec: never guessed, since it moves every feature."""
    # Before the field existed SAELens always subtracted, and those files have no version either.
    value = cfg.get("apply_b_dec_to_input", True if old and _before_field(cfg) else None)
    if not isinstance(value, bool):
        raise SAEError(
            f"cfg.json must say apply_b_dec_to_input = true or false, it says {value!r}; ask "
            "whoever trained it (SAELens took true where it was missing)"
        )
    return value


def _before_field(cfg: dict[str, Any]) -> bool:
    return "hook_point" in cfg and "architecture" not in cfg


def _feature_scale(cfg: dict[str, Any], tensors: Any) -> str | None:
    if "scaling_factor" not in tensors:
        return None
    factor = tensors["scaling_factor"]
    if torch.allclose(factor, torch.ones_like(factor)):
        return None
    if not cfg.get("finetuning_scaling_factor"):
        raise SAEError(
            "it has a scaling_factor that is not 1 while cfg.json says no "
            "finetuning_scaling_factor; one of the two is wrong"
        )
    return "scaling_factor"


def _inputs(cfg: dict[str, Any], center: bool) -> Inputs:
    said = cfg.get("normalize_activations")
    norm = {None: "none", False: "none", True: "expected_average_only_in"}.get(said, said)
    if norm not in NORMS:
        raise SAEError(
            f"normalize_activations {norm!r} is not supported; known: {', '.join(NORMS)}"
        )
    if norm == "expected_average_only_in":
        # A scale of NaN asks the source for the number, which no file of this format holds.
        return Inputs(center=center, scale=float("nan"))
    return Inputs(center=center, norm=PER_TOKEN.get(norm))
