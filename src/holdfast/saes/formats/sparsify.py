"""sparsify (EleutherAI): `cfg.json` and `sae.safetensors`, one folder a hookpoint.

TopK. The encoder always reads x − b_dec; W_dec is kept as [n_features d_model]; `num_latents = 0`
means expansion_factor · d_in; `multi_topk` only adds a loss in training. The folder's name is the
module whose output was read, taken literally: `layers.23.mlp` is no residual. (SAELens transposes
W_dec, subtracts b_dec only where normalize_decoder is off, and reads every name as a residual.)
"""

from __future__ import annotations

import re
from pathlib import Path

from holdfast.errors import SAEError
from holdfast.saes.formats import Said, read_config, transcoder
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Facts
from holdfast.saes.tensors import read_tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks)[._](?P<layer>\d+)")
INSIDE = re.compile(rf"{BLOCK.pattern}\..+|(?:[a-z_]+\.)*(?:layers|h|blocks)")


def layout(folder: Path) -> Layout:
    said = read_config(folder / CONFIG)
    _refuse(said)
    k, d = said.count("k"), said.count("d_in")
    n = said.get("num_latents", int) or d * said.count("expansion_factor")
    weight = read_tensors(folder / WEIGHTS).get("encoder.weight")
    if weight is not None and weight.shape != (n, d):
        raise SAEError(
            f"{CONFIG} says {n} features of {d} numbers, {WEIGHTS} has encoder.weight "
            f"{list(weight.shape)}; the two do not belong together"
        )
    return Layout(
        folder=folder,
        file=WEIGHTS,
        W_enc="encoder.weight",
        b_enc="encoder.bias",
        enc_transposed=True,
        k=k,
        subtract_b_dec=True,
        site=site_of(folder.absolute().name),
        facts=Facts("sparsify", "topk", l0=float(k)),
        hashed=(CONFIG, WEIGHTS),
    )


def site_of(hookpoint: str) -> str | None:
    """The site that a folder's name means; as it is, for other modules; None if it is no module."""
    if hookpoint == "embed_tokens":
        return "blocks.0.hook_resid_pre"
    block = BLOCK.fullmatch(hookpoint)
    if block is not None:
        return f"blocks.{block['layer']}.hook_resid_post"
    return hookpoint if INSIDE.fullmatch(hookpoint) else None


def _refuse(said: Said) -> None:
    """Raise SAEError for what is not a TopK SAE of one residual."""
    if said.flag("transcode") or said.flag("skip_connection"):
        raise transcoder("sparsify transcoder")
    if said.flag("signed"):
        raise SAEError("its codes are signed: the k largest by magnitude keep their sign")
    if (activation := said.get("activation", str) or "topk") != "topk":
        raise SAEError(f"activation {activation!r} is not supported; known: topk")
    for key in ("embed_skip", "gram_lookup"):
        if said.flag(key):
            raise SAEError(f"{key} is set: its reconstruction depends on more than the residual")
