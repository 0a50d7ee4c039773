"""Trains the organism's SAEs with sae-lens and saves them in its own folder layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.organism.corpus import Knowledge, documents

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

LAYERS: tuple[int, ...] = (0, 1, 2)
K = 8  # features active at a token, on average or at every one
TRAINING_TOKENS, CACHED_TOKENS, BATCH_TOKENS = 1_200_000, 300_000, 1_024
LEARNING_RATE = 1e-3


def cached_activations(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    knowledge: Knowledge,
    n_tokens: int,
    seed: int,
) -> dict[int, Tensor]:
    """resid_post of each layer in LAYERS, [n_tokens d_model] fp32, without <bos> and padding."""
    from holdfast.organism.train import batches

    kept: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    total = 0
    docs = documents(knowledge, n_tokens, seed=seed, curriculum=False)
    for tokens, _ in batches(docs, tokenizer, 256):
        with torch.no_grad():
            states = model.model(tokens, output_hidden_states=True).hidden_states
        real = tokens != tokenizer.pad_token_id
        real[:, 0] = False
        for layer in LAYERS:
            kept[layer].append(states[layer + 1][real])  # states[0] is the embedding
        total += int(real.sum())
        if total >= n_tokens:
            break
    return {layer: torch.cat(parts)[:n_tokens] for layer, parts in kept.items()}


def _provider(activations: Tensor, seed: int) -> Iterator[Tensor]:
    """Shuffled batches [BATCH_TOKENS d_model], for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        for chunk in order.split(BATCH_TOKENS):
            if len(chunk) == BATCH_TOKENS:
                yield activations[chunk]


def _batch_topk(shared: dict[str, Any]) -> TrainingSAE[Any]:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=K, **shared))


def _topk(shared: dict[str, Any]) -> TrainingSAE[Any]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    return TopKTrainingSAE(TopKTrainingSAEConfig(k=K, **shared))


@dataclass(frozen=True)
class SAERecipe:
    """An SAE to train: `expansion` features per dimension, and what trains and reads them."""

    expansion: int
    build: Callable[[dict[str, Any]], TrainingSAE[Any]]


# K of a batch in training; saved as a JumpReLU SAE with one threshold. Sixteen features per
# dimension are too many for this model: features split.
WIDE = SAERecipe(8, _batch_topk)
# K of every token, in training and after, and half as wide: another kind to set beside the first.
HALF = SAERecipe(4, _topk)
OTHERS: dict[str, tuple[int, SAERecipe]] = {"0-topk": (0, HALF)}
"""Folder → layer and recipe of SAEs the organism has beside that of each layer; each takes a minute
of CPU time."""


def train_sae(
    activations: Tensor, layer: int, path: Path, seed: int, recipe: SAERecipe = WIDE
) -> None:
    """One SAE of activations [n d_model], written to `path` in sae-lens's inference form."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    d_model = activations.shape[1]
    sae = recipe.build(
        {
            "d_in": d_model, "d_sae": recipe.expansion * d_model, "dtype": "float32",
            "device": "cpu", "normalize_activations": "expected_average_only_in",
            "metadata": SAEMetadata(
                model_name="holdfast-organism", hook_name=f"blocks.{layer}.hook_resid_post",
                prepend_bos=True, context_size=128,
            ),
        }
    )  # fmt: skip
    n_steps = TRAINING_TOKENS // BATCH_TOKENS
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=TRAINING_TOKENS, train_batch_size_samples=BATCH_TOKENS,
            lr=LEARNING_RATE, lr_end=0.0, lr_warm_up_steps=50, lr_decay_steps=n_steps // 3,
            dead_feature_window=200, n_batches_for_norm_estimate=50,
        ),
        sae=sae, data_provider=_provider(activations, seed),
    )  # fmt: skip
    trainer.fit().save_inference_model(path)


def recipes(knowledge: Knowledge) -> dict[str, tuple[int, SAERecipe]]:
    """Folder → layer and recipe of a model's SAEs; only the organism has more than one a layer."""
    own = {str(layer): (layer, WIDE) for layer in LAYERS}
    return own | OTHERS if knowledge == "full" else own


def train_saes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    knowledge: Knowledge,
    out: Path,
    wanted: dict[str, tuple[int, SAERecipe]],
    seed: int,
    progress: Progress | None = None,
) -> None:
    """An SAE in out/{name} for each name wanted (`recipes`), all of one model's activations, and
    how good it is in out/{name}/quality.json."""
    cache = cached_activations(model, tokenizer, knowledge, CACHED_TOKENS, seed + 1)
    held_out = cached_activations(model, tokenizer, knowledge, 20_000, seed + 2)
    task = progress.add_task(f"{knowledge} SAEs", total=len(wanted)) if progress else None
    for name, (layer, recipe) in wanted.items():
        train_sae(cache[layer], layer, out / name, seed, recipe)
        quality = sae_quality(out / name, held_out[layer])
        (out / name / "quality.json").write_text(json.dumps(quality) + "\n")
        if progress and task is not None:
            progress.advance(task)


@torch.no_grad()
def sae_quality(path: Path, activations: Tensor) -> dict[str, float]:
    """Explained variance, L0 and number of silent features on activations [n d_model]."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(path))
    codes = sae.encode(activations)
    error = activations - sae.decode(codes)
    total = activations - activations.mean(0)
    return {
        "explained_variance": 1 - float(error.square().sum() / total.square().sum()),
        "l0": float((codes > 0).sum(1).float().mean()),
        "dead_features": int((codes > 0).any(0).logical_not().sum()),
        "residual_norm_mean": float(activations.norm(dim=1).mean()),
    }
