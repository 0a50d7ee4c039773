"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, and its successor's files.

What the threshold is compared with is settled by the code that trained and published these SAEs
(OpenMOSS/Language-Model-SAEs, `sae.py` and `post_processing.py` of late 2024):

- loading folds the dataset's norm s = √d_model / norm into b_enc and the decoder, so that
  pre-activations are those of the normalized input divided by s; then it scales the decoder to
  norm 1 (`sparsity_include_decoder_norm`), and pre-activations with it;
- `jump_relu_threshold` was chosen on the pre-activations of an SAE loaded that way, as the value
  that lets `top_k` features fire on average.

So the condition is `p · ‖W_dec‖ / s > threshold` with p of the normalized input, which is what our
codes are: `p · ‖W_dec‖ > threshold · s`. The published numbers agree: .202 at s = 10.1 (layer 8),
.330 at 5.92 (layer 15), .754 at 2.20 (layer 24) are 2.05, 1.95 and 1.66 after the factor, and
differ fourfold before it. SAELens multiplies by s too (its pull request 483, by an author of Llama
Scope), and leaves ‖W_dec‖ out, which is the same where decoders have norm 1.

The successor (`config.json`, `sae_weights.safetensors`) trains a threshold a feature on the
normalized input, so there is no factor; the decoder's norm counts as above. The norm stands in the
weights file, or has to be given as `scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import SAEError
from holdfast.saes.formats import Said, read_config, transcoder
from holdfast.saes.inputs import Inputs
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Facts
from holdfast.saes.tensors import Stored, read_tensors

NORM = "dataset_average_activation_norm"


def layout(folder: Path) -> Layout:
    if (folder / "hyperparams.json").is_file():
        return _layout(folder, "hyperparams.json", "checkpoints/final.safetensors")
    return _layout(folder, "config.json", "sae_weights.safetensors")


def _layout(folder: Path, config: str, file: str) -> Layout:
    said = read_config(folder / config)
    if (sort := said.get("sae_type", str) or "sae") != "sae":
        raise transcoder(sort)
    if said.flag("use_glu_encoder"):
        raise SAEError("its encoder is gated by a second one (use_glu_encoder), not supported")
    site = said.needed("hook_point_in", str)
    written = said.get("hook_point_out", str) or site
    if written != site:
        raise transcoder(f"Llama Scope transcoder, from {site} to {written}")
    architecture = _architecture(said)
    topk = architecture == "topk"
    tensors = read_tensors(folder / file)
    inputs = _inputs(said, site, tensors)
    # The successor's are trained, one a feature, as logarithms and on the normalized input.
    own = next((name for name in tensors if name.endswith("log_jumprelu_threshold")), None)
    threshold: str | float | None = None
    if architecture == "jumprelu":
        threshold = own or said.needed("jump_relu_threshold", float)
    weighted = said.get("sparsity_include_decoder_norm", bool) is not False
    short = "W_E" in tensors  # the latest versions keep [d n] and [n d] under short names
    b_dec = "b_D" if short else "decoder.bias"
    biased = b_dec in tensors
    named = any("Llama3_1-8B-Base" in part for part in folder.absolute().parts)
    return Layout(
        folder=folder,
        file=file,
        W_enc="W_E" if short else "encoder.weight",
        W_dec="W_D" if short else "decoder.weight",
        b_enc="b_E" if short else "encoder.bias",
        b_dec=b_dec if biased else None,
        enc_transposed=not short,
        dec_transposed=not short,
        threshold=threshold,
        log_threshold=own is not None,
        gate_times_norm=weighted and architecture == "jumprelu",
        threshold_times_scale=own is None,
        rescale=weighted and topk,
        k=said.count("top_k") if topk else None,
        subtract_b_dec=biased and said.needed("apply_decoder_bias_to_pre_encoder", bool),
        inputs=inputs,
        site=site,
        facts=Facts(
            "llama_scope",
            architecture,
            model="meta-llama/Llama-3.1-8B" if named else None,
            l0=said.get("top_k", float),
        ),
        hashed=(config, file),
    )


def _architecture(said: Said) -> str:
    named = said.needed("act_fn", str).lower()
    # Loading for inference turns a TopK SAE that has a threshold into a JumpReLU SAE.
    if named == "topk" and (said.get("jump_relu_threshold", float) or 0) > 0:
        named = "jumprelu"
    known = {"jumprelu": "jumprelu", "topk": "topk", "relu": "standard"}
    if named not in known:
        raise SAEError(f"act_fn {named!r} is not supported; known: {', '.join(known)}")
    return known[named]


def _inputs(said: Said, site: str, tensors: Mapping[str, Stored]) -> Inputs:
    """How the residual is normalized before it is encoded."""
    how = said.needed("norm_activation", str)
    if how == "token-wise":
        return Inputs(norm="constant_norm_rescale")
    if how in ("none", "inference"):
        return Inputs()
    if how != "dataset-wise":
        why = ": a token's features would depend on its batch" if how == "batch-wise" else ""
        raise SAEError(f"norm_activation {how!r} is not supported{why}")
    norms = said.table(NORM)
    if f"{NORM}.{site}" in tensors:
        norms = Said({"in": float(tensors[f"{NORM}.{site}"].read())}, said.file)
    if not norms.values:
        return Inputs(scale=math.nan)  # the source is asked for it
    norm = norms.needed("in", float)
    if not norm > 0:
        raise SAEError(f"{said.file}: {NORM} must be a positive number, it says {norm:g}")
    if norms.get("out", float) not in (None, norm):
        raise SAEError(f"{said.file}: {NORM} differs between input and output of one point")
    return Inputs(scale=math.sqrt(said.count("d_model")) / norm)
