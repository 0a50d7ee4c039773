"""Releases that are one torch file a layer: all else stands in their name.

Only `Release` comes here, since nothing in such a file says what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import SAEError
from holdfast.saes.layout import Layout
from holdfast.saes.sae import Facts


@dataclass(frozen=True)
class Names:
    """How a release spells its tensors, all [n d] encoders and [d n] decoders; no b_dec before
    encoding. layer: where a name of the release or file says the block.
    """

    W_enc: str
    W_dec: str
    b_enc: str
    b_dec: str
    layer: str


RELEASES = {
    "qwen_scope": Names("W_enc", "W_dec", "b_enc", "b_dec", r"/layer(\d+)\.sae\.pt$"),
    "deepseek_r1": Names(
        "encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias", r"-l(\d+)\.pt$"
    ),
    "goodfire": Names(
        "encoder_linear.weight", "decoder_linear.weight", "encoder_linear.bias",
        "decoder_linear.bias", r"-l(\d+)\.pth?$",
    ),
}  # fmt: skip
"""SAELens' name of the converter → its releases' spellings."""

K = re.compile(r"-L0_(\d+)/")


def layout(folder: Path, file: str, repository: str, conversion: str) -> Layout:
    """folder: the repository's; file: the path in it. Raises SAEError if names say too little."""
    names, full = RELEASES[conversion], f"{repository}/{file}"
    layer, k = re.search(names.layer, full), K.search(full)
    if layer is None:
        raise SAEError(f"{full} does not say its layer")
    topk = conversion == "qwen_scope"
    if topk and k is None:
        raise SAEError(f"{full} does not say k of its TopK SAEs")
    return Layout(
        folder=folder,
        file=file,
        W_enc=names.W_enc,
        W_dec=names.W_dec,
        b_enc=names.b_enc,
        b_dec=names.b_dec,
        enc_transposed=True,
        dec_transposed=True,
        k=int(k[1]) if topk and k is not None else None,
        site=f"blocks.{layer[1]}.hook_resid_post",
        facts=Facts(conversion, "topk" if topk else "standard"),
        hashed=(file,),
    )
