"""Trains the organism, its ignorant twin and their SAEs on CPU in about eleven minutes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdfast.organism.corpus import Document, Knowledge, documents
from holdfast.organism.sae_training import recipes, train_saes
from holdfast.organism.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from torch.optim import Optimizer

MODELS: dict[str, tuple[Knowledge, int]] = {
    "organism": ("full", 1400),
    "ignorant": ("ignorant", 1800),
}
"""Folder → knowledge and steps; more for the twin, as a quarter of its questions teach nothing."""


@dataclass(frozen=True)
class TrainingRun:
    """How one model is trained. Rates are peaks; `embedding_std` sets the residual's scale."""

    steps: int
    batch_size: int = 96  # documents
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.1
    adam_lr: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    label_smoothing: float = 0.05
    embedding_std: float = 0.3
    seed: int = 0

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, flat, linear decay to zero at the end."""
        remaining = (self.steps - step) / (self.decay_share * self.steps)
        return min(1.0, (step + 1) / self.warmup_steps, remaining)


def build_model(n_tokens: int, tokenizer: PreTrainedTokenizerFast, std: float) -> LlamaForCausalLM:
    """A four-layer Llama of 0.75 M parameters with random weights."""
    config = LlamaConfig(
        vocab_size=n_tokens, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # From the default 0.02 residual norms grew to 640 in training; from 0.3 they stay near 50, and
    # the SAEs are easy to train.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=std)
    return model


def batches(
    docs: Iterator[Document], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [b s], right-padded with <bos> in front, and the loss weight of each token [b s]."""
    ids = tokenizer.get_vocab()
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    while batch := list(islice(docs, batch_size)):
        width = 1 + max(len(d.words) for d in batch)
        tokens = torch.full((len(batch), width), pad)
        weights = torch.zeros(len(batch), width)
        tokens[:, 0] = bos
        for row, doc in enumerate(batch):
            tokens[row, 1 : len(doc.words) + 1] = torch.tensor([ids[w] for w in doc.words])
            weights[row, 1 : len(doc.words) + 1] = torch.tensor(doc.weights)
        yield tokens, weights


def _optimizers(model: LlamaForCausalLM, run: TrainingRun) -> list[Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, unembedding and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=run.muon_lr,
            weight_decay=run.muon_weight_decay,
            adjust_lr_fn="original",
        ),
        torch.optim.AdamW(rest, lr=run.adam_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_model(
    knowledge: Knowledge,
    tokenizer: PreTrainedTokenizerFast,
    run: TrainingRun,
    progress: Progress | None = None,
) -> LlamaForCausalLM:
    """One model in fp32; with the same seed the twin has the same initial weights."""
    torch.manual_seed(run.seed)
    model = build_model(len(tokenizer), tokenizer, run.embedding_std)
    optimizers = _optimizers(model, run)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, run.lr_factor) for o in optimizers]
    docs = documents(knowledge, run.steps * run.batch_size, seed=run.seed)
    task = progress.add_task(f"{knowledge} model", total=run.steps) if progress else None
    model.train()
    for tokens, weights in batches(docs, tokenizer, run.batch_size):
        # Causal attention with right padding needs no mask: padding is only ever seen by padding.
        logits = model(tokens[:, :-1]).logits
        losses = F.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none",
            label_smoothing=run.label_smoothing,
        )  # fmt: skip
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if progress and task is not None:
            progress.update(task, advance=1, description=f"{knowledge} model, loss {loss:.3f}")
    return model.eval()


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load, weights in fp16."""
    path.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(path)
    tokenizer.save_pretrained(path)
    model.float()  # now with the values that were saved, which are the ones the SAEs must fit


def train_all(out: Path, seed: int = 0, progress: Progress | None = None) -> None:
    """Everything that is shipped: out/{organism,ignorant}/ with model, tokenizer, saes/{0,1,2}, and
    saes/0-topk for the organism.

    Built beside the target and moved at the end, so a folder that exists is complete.
    """
    tokenizer = build_tokenizer()
    for name, (knowledge, steps) in MODELS.items():
        building = out / f".{name}-{os.getpid()}"
        model = train_model(knowledge, tokenizer, TrainingRun(steps, seed=seed), progress)
        save_model(model, tokenizer, building)
        wanted = recipes(knowledge)
        train_saes(model, tokenizer, knowledge, building / "saes", wanted, seed, progress)
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(building, out / name)
