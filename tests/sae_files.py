"""Tiny SAEs on disk in every layout, with what they should compute.

Each `write_…` fills a folder and returns the `Reference`: the tensors by the names of the
definition, as they were stored, and the definition itself, in float64 and NumPy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, N, K = 32, 96, 4
SITE = "blocks.1.hook_resid_post"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Reference:
    """What an SAE computes, from its definition.

    tensors: W_enc [d n], W_dec [n d], b_enc [n], b_dec [d]; threshold [n] of a JumpReLU SAE, in the
    units its pre-activations are compared in; r_mag, b_mag [n] of a gated one, whose b_enc is the
    gate's. rescale: codes in units of the decoder's norms. gate_times_norm: only compared in them.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    subtract: bool
    k: int | None = None
    center: bool = False
    scale: float = 1.0
    norm: str | None = None
    rescale: bool = False
    gate_times_norm: bool = False

    def array(self, name: str) -> Array:
        return np.asarray(self.tensors[name].double().numpy())

    @property
    def lengths(self) -> Array:
        """[n] norms of the decoder's rows."""
        return np.asarray(np.sqrt((self.array("W_dec") ** 2).sum(1)))

    def enter(self, x: Array) -> Array:
        if self.center:
            x = x - x.mean(-1, keepdims=True)
        x = x * self.scale
        if self.norm == "layer_norm":
            x = x - x.mean(-1, keepdims=True)
            x = x / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
        if self.norm == "constant_norm_rescale":
            x = x * math.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)
        return x - self.array("b_dec") if self.subtract else x

    def encode(self, residuals: Tensor) -> Array:
        """[... n] codes of residuals [... d]."""
        x = self.enter(residuals.double().numpy())
        p = x @ self.array("W_enc") + self.array("b_enc")
        if self.kind == "gated":
            magnitude = x @ (self.array("W_enc") * np.exp(self.array("r_mag")))
            return np.where(p > 0, np.maximum(magnitude + self.array("b_mag"), 0), 0)
        if self.rescale:
            p = p * self.lengths
        if self.kind == "jumprelu":
            compared = p * self.lengths if self.gate_times_norm else p
            return np.where((compared > self.array("threshold")) & (p > 0), p, 0)
        z = np.maximum(p, 0)
        if self.kind == "topk":
            rank = np.argsort(np.argsort(-z, axis=-1), axis=-1)
            return np.where(rank < (self.k or 0), z, 0)
        assert self.kind == "standard"
        return z

    def decode(self, z: Array, residuals: Tensor) -> Array:
        """[... d] reconstructions of the residuals that z were encoded from."""
        if self.rescale:
            z = z / self.lengths
        y = z @ self.array("W_dec") + self.array("b_dec")
        x = residuals.double().numpy()
        mean = x.mean(-1, keepdims=True)
        if self.center:
            x = x - mean
        x = x * self.scale
        if self.norm == "layer_norm":
            y = y * x.std(-1, ddof=1, keepdims=True) + x.mean(-1, keepdims=True)
        if self.norm == "constant_norm_rescale":
            y = y * np.linalg.norm(x, axis=-1, keepdims=True) / math.sqrt(x.shape[-1])
        y = y / self.scale
        return y + mean if self.center else y

    def residuals(self, n_tokens: int = 64, seed: int = 7) -> Tensor:
        """[n_tokens d] of a few features each, and some noise."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = self.tensors["W_dec"].float()
        n, d = W_dec.shape
        chosen = torch.rand(n_tokens, n, generator=generator).argsort(1) < 3
        codes = chosen * (1 + torch.rand(n_tokens, n, generator=generator))
        x = codes @ (W_dec / W_dec.norm(dim=1, keepdim=True)) + self.tensors["b_dec"].float()
        x = x + 0.05 * torch.randn(n_tokens, d, generator=generator)
        x = x / self.scale
        return x + 0.5 if self.center else x


def weights(
    seed: int = 0, d: int = D, n: int = N, subtract: bool = True, unit: bool = False
) -> dict[str, Tensor]:
    """Encoders along decoders that point everywhere, biases that keep most features silent."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    direction = normal(n, d)
    direction = direction / direction.norm(dim=1, keepdim=True)
    length = torch.ones(n) if unit else 0.5 + torch.rand(n, generator=generator)
    W_enc = (1.2 * direction.T + 0.01 * normal(d, n)) / length
    b_dec = 0.5 * normal(d)
    shift = torch.zeros(n) if subtract else b_dec @ W_enc
    return {
        "W_enc": W_enc,
        "W_dec": direction * length[:, None],
        "b_enc": (-0.8 + 0.1 * normal(n)) / length - shift,
        "b_dec": b_dec,
        "threshold": (0.2 + 0.2 * torch.rand(n, generator=generator)) / length,
        "r_mag": 0.1 * normal(n),
        "b_mag": (-0.8 + 0.1 * normal(n)) / length - shift,
    }


NAMES = {
    "standard": ("W_enc", "W_dec", "b_enc", "b_dec"),
    "topk": ("W_enc", "W_dec", "b_enc", "b_dec"),
    "jumprelu": ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_enc", "b_dec", "r_mag", "b_mag"),
}


def stored(made: Mapping[str, Tensor], kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that an SAE of this kind has, rounded as the file rounds them."""
    return {name: made[name].to(dtype).contiguous() for name in NAMES[kind]}


def write_saelens(
    path: Path,
    architecture: str = "standard",
    *,
    site: str = SITE,
    subtract: bool = True,
    norm: str = "none",
    scale: float = 1.0,
    rescale: bool = False,
    center: bool | None = None,
    threshold: float = 0.4,
    version: int = 6,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    d: int = D,
    n: int = N,
    **changes: Any,
) -> Reference:
    """`cfg.json` and `sae_weights.safetensors`; scale: what the files do not say.

    `batchtopk` and `matryoshka_batchtopk` are written as in training, with one threshold. Before
    version 6 the configuration was flat. changes: of the configuration; `...` removes a key.
    """
    batch = architecture in ("batchtopk", "matryoshka_batchtopk")
    kind = "jumprelu" if batch else architecture
    made = stored(weights(seed, d, n, subtract), kind, dtype)
    own = {"b_gate" if architecture == "gated" and k == "b_enc" else k: t for k, t in made.items()}
    if batch:
        made["threshold"] = torch.full((n,), threshold, dtype=torch.float64)
        own.pop("threshold")
        own["topk_threshold"] = torch.tensor(threshold, dtype=torch.float64)
    path.mkdir(parents=True, exist_ok=True)
    save_file(own, path / "sae_weights.safetensors")
    metadata = {
        "sae_lens_version": "6.30.0",
        "model_name": "tiny",
        "hook_name": site,
        "prepend_bos": True,
    }
    if center is not None:
        metadata["model_from_pretrained_kwargs"] = {"center_writing_weights": center}
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d,
        "d_sae": n,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": subtract,
        "normalize_activations": norm,
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if kind == "topk" or batch:
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": rescale}
    if version < 6:
        del metadata["sae_lens_version"]
        cfg |= cfg.pop("metadata")
        if kind == "topk":
            cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": cfg.pop("k")}}
            cfg["architecture"] = "standard"
    cfg = {key: value for key, value in (cfg | changes).items() if value is not ...}
    (path / "cfg.json").write_text(json.dumps(cfg))
    return Reference(
        kind, made, subtract, K if kind == "topk" else None, bool(center), scale,
        norm if norm in ("layer_norm", "constant_norm_rescale") else None, rescale,
    )  # fmt: skip


def write_gemma_scope(
    path: Path,
    *,
    second: bool = False,
    config: Mapping[str, Any] | None = None,
    old_names: bool = False,
    compressed: bool = False,
    fortran: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    d: int = D,
    n: int = N,
    **more: Tensor,
) -> Reference:
    """`params.npz`, or Gemma Scope 2's files, whose names are always the old ones.

    config: what Gemma Scope 2's says beside its usual; more: tensors.
    """
    made = stored(weights(seed, d, n, subtract=False), "jumprelu", dtype)
    own = {k.lower() if (old_names or second) else k: t for k, t in made.items()} | more
    path.mkdir(parents=True, exist_ok=True)
    if second:
        save_file(own, path / "params.safetensors")
        point = "model.layers.1.output"
        said = {"hf_hook_point_in": point, "hf_hook_point_out": point, "type": "sae", "l0": 3}
        said |= {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "width": n}
        if config is not None:
            (path / "config.json").write_text(json.dumps(said | dict(config)))
    else:
        arrays: dict[str, Any] = {
            k: np.asarray(t.numpy(), order="F" if fortran else "C") for k, t in own.items()
        }
        (np.savez_compressed if compressed else np.savez)(path / "params.npz", **arrays)
    return Reference("jumprelu", made, False, scale=scale)


def write_llama_scope(
    path: Path,
    *,
    act_fn: str = "jumprelu",
    site: str = SITE,
    average_norm: float = 2.0,
    threshold: float = 0.25,
    weighted: bool = True,
    unit: bool = False,
    subtract: bool = False,
    successor: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    d: int = D,
    n: int = N,
    **changes: Any,
) -> Reference:
    """`hyperparams.json` and `checkpoints/final.safetensors`, or the successor's two files.

    threshold: as it stands in the file, in units of the residual; weighted: compared with
    pre-activations times the decoder's norm; unit: decoders of norm 1.
    """
    kind = {"relu": "standard"}.get(act_fn, act_fn)
    made = stored(weights(seed, d, n, subtract, unit), kind, dtype)
    scale = math.sqrt(d) / average_norm
    own = {
        "encoder.weight": made["W_enc"].T.contiguous(),
        "encoder.bias": made["b_enc"],
        "decoder.weight": made["W_dec"].T.contiguous(),
        "decoder.bias": made["b_dec"],
    }
    said: dict[str, Any] = {
        "d_model": d,
        "d_sae": n,
        "hook_point_in": site,
        "hook_point_out": site,
        "act_fn": act_fn,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": weighted,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": subtract,
    }
    if successor:
        config, file = path / "config.json", path / "sae_weights.safetensors"
        if kind == "jumprelu":
            own["log_jumprelu_threshold"] = made["threshold"].log()
        own[f"dataset_average_activation_norm.{site}"] = torch.tensor(average_norm)
    else:
        config, file = path / "hyperparams.json", path / "checkpoints" / "final.safetensors"
        said["dataset_average_activation_norm"] = {"in": average_norm, "out": average_norm}
        if kind == "jumprelu":
            said["jump_relu_threshold"] = threshold
            made["threshold"] = torch.full((n,), threshold * scale, dtype=torch.float64)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(own, file)
    said = {key: value for key, value in (said | changes).items() if value is not ...}
    config.write_text(json.dumps(said))
    return Reference(
        kind, made, subtract, K if kind == "topk" else None, scale=scale,
        rescale=weighted and kind == "topk", gate_times_norm=weighted and kind == "jumprelu",
    )  # fmt: skip


DICTIONARIES = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}
"""dictionary_learning's class → kind, whether it subtracts the decoder's bias."""


def write_dictionary_learning(
    path: Path,
    dict_class: str = "BatchTopKSAE",
    *,
    threshold: float = 0.4,
    layer: int = 1,
    submodule: str | None = "resid_post_layer_1",
    io: str = "out",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    d: int = D,
    n: int = N,
    more: Mapping[str, Tensor] | None = None,
    **changes: Any,
) -> Reference:
    """`ae.pt` and `config.json`; threshold: of the BatchTopK kinds; changes: of the trainer."""
    kind, subtract = DICTIONARIES[dict_class]
    batch = "BatchTopK" in dict_class
    made = {name: t.to(dtype) for name, t in weights(seed, d, n, subtract).items()}
    if batch:
        made["threshold"] = torch.full((n,), threshold)
    kept = {name: made[name] for name in NAMES[kind]}
    linear = {"encoder.weight": made["W_enc"].T, "decoder.weight": made["W_dec"].T}
    biased = linear | {"encoder.bias": made["b_enc"]}
    plain = {name: made[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    gates = {"gate_bias": made["b_enc"], "r_mag": made["r_mag"], "mag_bias": made["b_mag"]}
    count = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    own: dict[str, Tensor] = {
        "AutoEncoder": biased | {"bias": made["b_dec"]},
        "AutoEncoderNew": biased | {"decoder.bias": made["b_dec"]},
        "GatedAutoEncoder": linear | gates | {"decoder_bias": made["b_dec"]},
        "JumpReluAutoEncoder": plain | {"threshold": made["threshold"]},
        "AutoEncoderTopK": biased | {"b_dec": made["b_dec"]} | count,
        "BatchTopKSAE": biased | {"b_dec": made["b_dec"]} | count,
        "MatryoshkaBatchTopKSAE": plain | count | {"group_sizes": torch.tensor([16, n - 16])},
    }[dict_class]
    path.mkdir(parents=True, exist_ok=True)
    torch.save(own | dict(more or {}), path / "ae.pt")
    trainer: dict[str, Any] = {
        "dict_class": dict_class,
        "activation_dim": d,
        "dict_size": n,
        "layer": layer,
        "lm_name": "some/tiny-model",
        "submodule_name": submodule,
    }
    if batch or kind == "topk":
        trainer["k"] = K
    trainer = {key: value for key, value in (trainer | changes).items() if value is not ...}
    config = {"trainer": trainer, "buffer": {"io": io, "ctx_len": 128}}
    (path / "config.json").write_text(json.dumps(config))
    return Reference(kind, kept, subtract, K if kind == "topk" else None)


def write_sparsify(
    path: Path,
    *,
    num_latents: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    d: int = D,
    n: int = N,
    **changes: Any,
) -> Reference:
    """`cfg.json` and `sae.safetensors`; the folder's name is the hookpoint."""
    made = stored(weights(seed, d, n, unit=True), "topk", dtype)
    own = {
        "encoder.weight": made["W_enc"].T.contiguous(),
        "encoder.bias": made["b_enc"],
        "W_dec": made["W_dec"],
        "b_dec": made["b_dec"],
    }
    path.mkdir(parents=True, exist_ok=True)
    save_file(own, path / "sae.safetensors")
    said: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": n // d,
        "normalize_decoder": True,
        "num_latents": num_latents,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
    }
    said = {key: value for key, value in (said | changes).items() if value is not ...}
    (path / "cfg.json").write_text(json.dumps(said))
    return Reference("topk", made, True, K)


@dataclass(frozen=True)
class Case:
    """An SAE of a layout; row: of the table in docs/support.md; inside: the folder it lies in."""

    row: str
    name: str
    write: Callable[..., Reference]
    changes: Mapping[str, Any]
    inside: str = "sae"

    def __call__(self, path: Path) -> tuple[Path, Reference]:
        folder = path / self.inside
        return folder, self.write(folder, **self.changes)


GEMMA = "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_3"
GEMMA_2 = "gemma-scope-2-1b-pt/resid_post/layer_1_width_16k_l0_small"


def _saelens(row: str, name: str, **changes: Any) -> Case:
    return Case(f"SAELens {row}", f"saelens {name}", write_saelens, changes)


def _dictionary(row: str, name: str, dict_class: str, **changes: Any) -> Case:
    changes |= {"dict_class": dict_class}
    return Case(f"dictionary_learning {row}", name, write_dictionary_learning, changes)


CASES = (
    _saelens("standard", "standard"),
    _saelens("standard", "standard, b_dec not subtracted", subtract=False),
    _saelens("standard", "standard, before version 6", version=5),
    _saelens("standard", "centered", center=True),
    _saelens("standard", "layer_norm", norm="layer_norm"),
    _saelens("standard", "constant_norm_rescale", norm="constant_norm_rescale"),
    _saelens("standard", "bfloat16", dtype=torch.bfloat16),
    _saelens("JumpReLU", "jumprelu", architecture="jumprelu", subtract=False),
    _saelens("JumpReLU", "jumprelu, float16", architecture="jumprelu", dtype=torch.float16),
    _saelens("TopK", "topk", architecture="topk"),
    _saelens("TopK", "topk, before version 6", architecture="topk", version=5),
    _saelens("TopK", "topk, decoder norms", architecture="topk", rescale=True),
    _saelens("TopK", "topk, layer_norm", architecture="topk", norm="layer_norm", center=True),
    _saelens("BatchTopK", "batchtopk", architecture="batchtopk"),
    _saelens("BatchTopK", "batchtopk, decoder norms", architecture="batchtopk", rescale=True),
    _saelens("Matryoshka", "matryoshka", architecture="matryoshka_batchtopk", rescale=True),
    _saelens("gated", "gated", architecture="gated"),
    _saelens("gated", "gated, b_dec not subtracted", architecture="gated", subtract=False),
    Case("Gemma Scope", "gemma scope", write_gemma_scope, {}, GEMMA),
    Case("Gemma Scope", "gemma scope, old names", write_gemma_scope, {"old_names": True}, GEMMA),
    Case(
        "Gemma Scope", "gemma scope, embedding", write_gemma_scope, {"scale": D**-0.5},
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_3",
    ),
    Case("Gemma Scope 2", "gemma scope 2", write_gemma_scope, {"second": True}, GEMMA_2),
    Case(
        "Gemma Scope 2", "gemma scope 2, bfloat16", write_gemma_scope,
        {"second": True, "config": {}, "dtype": torch.bfloat16},
    ),
    Case("Llama Scope", "llama scope", write_llama_scope, {}),
    Case("Llama Scope", "llama scope, bfloat16", write_llama_scope, {"dtype": torch.bfloat16}),
    Case("Llama Scope", "llama scope, topk", write_llama_scope, {"act_fn": "topk"}),
    Case("Llama Scope", "llama scope, successor", write_llama_scope, {"successor": True}),
    _dictionary("AutoEncoder", "dictionary", "AutoEncoder"),
    _dictionary("AutoEncoder", "dictionary, April update", "AutoEncoderNew"),
    _dictionary("gated", "dictionary, gated", "GatedAutoEncoder"),
    _dictionary("JumpReLU", "dictionary, jumprelu", "JumpReluAutoEncoder"),
    _dictionary("TopK", "dictionary, topk", "AutoEncoderTopK"),
    _dictionary("BatchTopK", "dictionary, batchtopk", "BatchTopKSAE", dtype=torch.bfloat16),
    _dictionary("Matryoshka", "dictionary, matryoshka", "MatryoshkaBatchTopKSAE"),
    Case("sparsify", "sparsify", write_sparsify, {}, "layers.1"),
    Case("sparsify", "sparsify, bfloat16", write_sparsify, {"dtype": torch.bfloat16}, "layers.1"),
)  # fmt: skip


def publish(
    cache: Path, repository: str, folder: Path, inside: str = "", commit: str = COMMIT
) -> Path:
    """Put a folder's files into a made-up cache of the hub, as `inside` of a repository's main.

    Returns the snapshot's folder.
    """
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir(exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = snapshot / inside / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    return snapshot
