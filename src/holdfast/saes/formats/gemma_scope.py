"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors`, `config.json`).

JumpReLU, one threshold a feature, no b_dec before encoding. The first Gemma Scope keeps no
configuration: what an SAE belongs to stands only in its path,
`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_59`. Its SAEs were not trained on BOS.

Embedding SAEs read the embedding as it is stored. The residual there is √d_model times that, so
their input is scaled by 1/√d_model and their reconstruction, bias included, is scaled back.
(SAELens scales W_enc and W_dec, and leaves b_dec as it is.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath

import torch

from holdfast.errors import SAEError
from holdfast.saes.formats import Said, read_config, transcoder
from holdfast.saes.inputs import Inputs
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Facts
from holdfast.saes.tensors import read_tensors

FIRST, SECOND = "params.npz", "params.safetensors"
REPOSITORY = re.compile(
    r".*gemma-scope-(?P<size>\d+[bm])-(?P<tuned>pt|it)-(?P<kind>res|mlp|att|transcoders)\b.*"
)
KIND = re.compile(r"(?P<kind>resid_post|attn_out|mlp_out|transcoder|clt|crosscoder)(_all)?")
LAYER = re.compile(r"layer_(?P<layer>\d+)(_width_.*)?")
L0 = re.compile(r"average_l0_(?P<l0>\d+)")
POINTS = {
    "res": "blocks.{}.hook_resid_post",
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.attn.hook_z",
}


@dataclass(frozen=True)
class Place:
    """What a path says of an SAE; None where it says nothing."""

    site: str | None = None
    embedding: bool = False
    l0: float | None = None
    model: str | None = None


def place_of(path: PurePath) -> Place:
    """Read a path. Raises SAEError if it is one of a transcoder."""
    parts = path.parts[::-1]
    own = parts[:3]  # an SAE lies at most this deep in its repository

    def nearest(pattern: re.Pattern[str], among: tuple[str, ...] = own) -> re.Match[str] | None:
        return next((match for part in among if (match := pattern.fullmatch(part))), None)

    repository = nearest(REPOSITORY, parts)
    kind, layer, l0 = nearest(KIND) or repository, nearest(LAYER), nearest(L0)
    if kind is not None and kind["kind"] not in POINTS:
        raise transcoder(f"Gemma Scope {kind['kind'].removesuffix('s')}")
    embedding = any(
        part == "embedding" and inner.startswith("width_") for inner, part in pairwise(own)
    )
    site = None
    if embedding:
        site = "blocks.0.hook_resid_pre"
    elif kind is not None and layer is not None:
        site = POINTS[kind["kind"]].format(layer["layer"])
    model = None
    if repository is not None:
        model = f"gemma-2-{repository['size']}" + ("-it" if repository["tuned"] == "it" else "")
    return Place(site, embedding, None if l0 is None else float(l0["l0"]), model)


def layout(folder: Path) -> Layout:
    return _first(folder) if (folder / FIRST).is_file() else _second(folder)


def _first(folder: Path) -> Layout:
    place = place_of(folder.absolute())
    tensors = read_tensors(folder / FIRST)
    if "scaling_factor" in tensors:
        factor = tensors["scaling_factor"].read()
        if not torch.allclose(factor, torch.ones_like(factor)):
            raise SAEError(
                f"{FIRST} has a scaling_factor that is not 1, and nothing says where it is applied"
            )
    inputs = Inputs()
    if place.embedding:
        shape = tensors["b_dec"].shape if "b_dec" in tensors else (1,)
        inputs = Inputs(scale=shape[0] ** -0.5)
    old = "w_enc" in tensors
    return Layout(
        folder=folder,
        file=FIRST,
        W_enc="w_enc" if old else "W_enc",
        W_dec="w_dec" if old else "W_dec",
        threshold="threshold",
        inputs=inputs,
        site=place.site,
        facts=Facts("gemma_scope", "jumprelu", model=place.model, l0=place.l0, bos=False),
        hashed=(FIRST,),
    )


def _second(folder: Path) -> Layout:
    if (folder / "config.json").is_file():
        place = _said(read_config(folder / "config.json"))
    else:
        place = place_of(folder.absolute())
    if "affine_skip_connection" in read_tensors(folder / SECOND):
        raise transcoder("Gemma Scope 2 transcoder with a skip connection")
    return Layout(
        folder=folder,
        file=SECOND,
        W_enc="w_enc",
        W_dec="w_dec",
        threshold="threshold",
        site=place.site,
        facts=Facts("gemma_scope", "jumprelu", model=place.model, l0=place.l0),
        hashed=(SECOND, "config.json"),
    )


def _said(config: Said) -> Place:
    """What Gemma Scope 2's configuration says."""
    architecture, kind = config.get("architecture", str), config.get("type", str) or "sae"
    if architecture != "jump_relu":
        raise SAEError(f"architecture {architecture!r} is not supported; known: jump_relu")
    read, written = config.get("hf_hook_point_in", str), config.get("hf_hook_point_out", str)
    if kind != "sae" or written not in (None, read):
        raise transcoder(f"Gemma Scope 2 {kind if kind != 'sae' else 'transcoder'}")
    if read is None:
        raise SAEError("config.json does not say hf_hook_point_in, the point it was trained at")
    output = re.fullmatch(r"(model\.layers\.\d+)\.output", read)
    return Place(
        site=output[1] if output else read,
        l0=config.get("l0", float),
        model=config.get("model_name", str),
    )
