"""dictionary_learning: `ae.pt` (weights only) and `config.json`, whose `dict_class` says the rest.

Codes are what the library's `encode` returns on the weights as saved. (Its loader rescales an
`AutoEncoder` to a decoder of norm 1, and between September and December 2024 gated and JumpReLU
codes were multiplied by decoder norms; which features fire, and what is reconstructed, is the
same.) Scales of normalized training are folded into biases and thresholds when it saves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from holdfast.errors import SAEError
from holdfast.saes.formats import Said, read_config, transcoder
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Facts
from holdfast.saes.tensors import Stored, read_tensors

CONFIG, WEIGHTS = "config.json", "ae.pt"
SUBTRACTS = {
    "AutoEncoder": True,
    "AutoEncoderNew": False,
    "GatedAutoEncoder": True,
    "JumpReluAutoEncoder": False,
    "AutoEncoderTopK": True,
    "BatchTopKSAE": True,
    "MatryoshkaBatchTopKSAE": True,
}
"""Class → whether its encoder reads x minus the decoder's bias."""

ARCHITECTURES = {
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
}
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
SPELLINGS = {
    "W_enc": ("encoder.weight", "W_enc"),
    "W_dec": ("decoder.weight", "W_dec"),
    "b_enc": ("encoder.bias", "b_enc", "gate_bias"),
    "b_dec": ("b_dec", "bias", "decoder_bias", "decoder.bias"),
}
OTHERS = ("r_mag", "mag_bias", "threshold", "k", "group_sizes")
RESIDUAL = re.compile(r"resid_(?P<stream>pre|post)_layer_(?P<layer>\d+)")


def layout(folder: Path) -> Layout:
    config = read_config(folder / CONFIG)
    trainer = config.table("trainer")
    named = trainer.needed("dict_class", str)
    if named == "CrossCoder":
        raise transcoder("crosscoder")
    if named not in SUBTRACTS:
        raise SAEError(f"dict_class {named!r} is not supported; known: {', '.join(SUBTRACTS)}")
    architecture = ARCHITECTURES.get(named, "standard")
    tensors = read_tensors(folder / WEIGHTS)
    own = {name: _spelled(tensors, spellings) for name, spellings in SPELLINGS.items()}
    strange = sorted(set(tensors) - set(own.values()) - set(OTHERS))
    if strange:
        raise SAEError(
            f"{WEIGHTS} holds {strange}, which a {named} does not have: it is of another kind, or "
            "of a changed copy of the library"
        )
    gated = architecture == "gated"
    k = _k(trainer, tensors) if architecture in ("topk", *BATCH_TOPK) else None
    if architecture in BATCH_TOPK:
        _check_threshold(tensors)
    return Layout(
        folder=folder,
        file=WEIGHTS,
        W_enc=own["W_enc"],
        W_dec=own["W_dec"],
        b_enc=own["b_enc"],
        b_dec=own["b_dec"],
        enc_transposed=own["W_enc"] == "encoder.weight",
        dec_transposed=own["W_dec"] == "decoder.weight",
        threshold="threshold" if architecture in ("jumprelu", *BATCH_TOPK) else None,
        r_mag="r_mag" if gated else None,
        b_mag="mag_bias" if gated else None,
        k=k if architecture == "topk" else None,
        subtract_b_dec=SUBTRACTS[named],
        site=_site(trainer, config.table("buffer").get("io", str) or "out"),
        facts=Facts(
            "dictionary_learning",
            architecture,
            model=trainer.get("lm_name", str),
            l0=None if k is None else float(k),
        ),
        hashed=(CONFIG, WEIGHTS),
    )


def _spelled(tensors: Mapping[str, Stored], spellings: tuple[str, ...]) -> str:
    """Which of the names is there; the first if none is, for the message about what is missing."""
    return next((name for name in spellings if name in tensors), spellings[0])


def _k(trainer: Said, tensors: Mapping[str, Stored]) -> int:
    said, kept = trainer.get("k", int), int(tensors["k"].read()) if "k" in tensors else None
    if said is not None and kept is not None and said != kept:
        raise SAEError(f"{CONFIG} says k = {said}, {WEIGHTS} has k = {kept}; one of them is wrong")
    k = said if kept is None else kept
    if k is None:
        raise SAEError(f"neither {CONFIG} nor {WEIGHTS} says k, which changes what the codes are")
    return k


def _check_threshold(tensors: Mapping[str, Stored]) -> None:
    if "threshold" in tensors and (value := float(tensors["threshold"].read())) > 0:
        return
    state = f"is {value:g}" if "threshold" in tensors else "is not in the file"
    raise SAEError(
        f"its BatchTopK threshold was never set (it {state}): which features fire would depend on "
        "the batch; the library sets it after threshold_start_step steps of training"
    )


def _site(trainer: Said, io: str) -> str:
    """Where it was trained: the output of a block, unless the submodule's name says otherwise.

    io: whether the module's input or output was read.
    """
    layer, named = trainer.needed("layer", int), trainer.get("submodule_name", str)
    if io not in ("in", "out"):
        raise transcoder(f"dictionary trained on {io!r} of a module")
    if named is None:
        return f"blocks.{layer}.hook_resid_{'post' if io == 'out' else 'pre'}"
    residual = RESIDUAL.fullmatch(named)
    if residual is None:
        return named
    if int(residual["layer"]) != layer:
        raise SAEError(f"{CONFIG} says layer {layer} and submodule_name {named!r}; one is wrong")
    return f"blocks.{layer}.hook_resid_{residual['stream']}"
