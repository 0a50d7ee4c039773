"""Where each model family keeps its parts: a table, one row a family.

Adding a family is adding a row: the dotted path of the decoder blocks, of the final norm, and of
the unembedding, and the name of the config field that holds the final logit soft-cap, if any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.config import nearest
from holdfast.errors import SubjectError


@dataclass(frozen=True)
class Family:
    """The parts of one model family, as dotted paths below the causal language model."""

    blocks: str
    final_norm: str
    unembed: str
    logit_softcap: str | None = None

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def unembed_of(self, model: nn.Module, resid: Tensor) -> Tensor:
        """Logits `[... vocab]` of a final residual `[... d_model]`: norm, unembed, soft-cap."""
        normed = model.get_submodule(self.final_norm)(resid)
        logits = model.get_submodule(self.unembed)(normed)
        cap = getattr(model.config, self.logit_softcap, None) if self.logit_softcap else None
        return logits if cap is None else torch.tanh(logits / cap) * cap


FAMILIES: dict[str, Family] = {
    "llama": Family(blocks="model.layers", final_norm="model.norm", unembed="lm_head"),
}


def family_of(config: Any) -> Family:
    """The row for a Hugging Face config. Raises SubjectError naming the known families."""
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise SubjectError(
            f"model family {model_type!r} is not in holdfast.families: "
            f"{nearest(str(model_type), FAMILIES)}. Adding a row to that table adds a family."
        )
    return FAMILIES[model_type]
