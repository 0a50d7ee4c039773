"""What a model computes with, from its configuration alone: no weights, no row per family.

The model is put together on torch's meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from holdfast.errors import SubjectError
from holdfast.families import context_of, d_model_of, family_of


@dataclass(frozen=True)
class Block:
    """One decoder block.

    parameters: all it holds; active: weights that one token is multiplied with (of the experts,
    those it is sent to); outputs: numbers per token that these products give; heads: of queries;
    queries, keys: heads × their size, of queries, and of keys as of values; window: how far it
    sees, None for everything.
    """

    parameters: int
    active: int
    outputs: int
    heads: int
    queries: int
    keys: int
    window: int | None

    def seen(self, keys: int, columns: int) -> int:
        """Keys that a replay of `columns` keeps of `keys`: a window's cache is cut to it."""
        return keys if self.window is None else min(keys, self.window - 1 + columns)


@dataclass(frozen=True)
class Architecture:
    """A model's shapes. parameters: all of it, tied ones once; context: how many positions it has,
    None where its configuration sets no limit."""

    d_model: int
    vocabulary: int
    parameters: int
    blocks: tuple[Block, ...]
    context: int | None = None

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def in_blocks(self) -> int:
        """Parameters that quantization makes smaller; embeddings and norms stay as they are."""
        return sum(block.parameters for block in self.blocks)

    @property
    def unembedding(self) -> int:
        return self.d_model * self.vocabulary

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Of a Hugging Face config. Raises SubjectError for a family or a config that cannot be."""
        from transformers import AutoModelForCausalLM, DynamicCache

        family = family_of(config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
            # What transformers raises for a config that contradicts itself differs by family.
            raise SubjectError(f"no model can be made of this config: {error}") from None
        text = config.get_text_config()
        windows = [
            getattr(layer, "sliding_window", None) if layer.is_sliding else None
            for layer in DynamicCache(config=config).layers
        ]
        blocks = family.blocks_of(model)
        return cls(
            d_model=d_model_of(config),
            vocabulary=model.get_output_embeddings().weight.shape[0],
            parameters=sum(p.numel() for p in model.parameters()),
            blocks=tuple(
                _block(block, text, window)
                for block, window in zip(blocks, windows or [None] * len(blocks), strict=True)
            ),
            context=context_of(config),
        )


def _block(block: nn.Module, text: Any, window: int | None) -> Block:
    from transformers.pytorch_utils import Conv1D

    active = outputs = 0.0
    for module in block.modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim == 2:
                active += weight.numel()
                outputs += weight.shape[1 if isinstance(module, Conv1D) else 0]
            elif weight.ndim == 3:  # [experts out in]
                n_used = min(int(text.num_experts_per_tok), len(weight))
                active += weight[0].numel() * n_used
                outputs += weight.shape[1] * n_used
    heads = int(text.num_attention_heads)
    size = getattr(text, "head_dim", None) or d_model_of(text) // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Block(
        parameters=sum(p.numel() for p in block.parameters()),
        active=int(active),
        outputs=int(outputs),
        heads=heads,
        queries=heads * size,
        keys=int(kv_heads) * size,
        window=window,
    )
