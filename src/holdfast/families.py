"""Where each model family keeps its parts: a table, one row a family.

Adding a family is adding a row. Nothing else in the package knows a family by name.
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
    """The parts of one model family.

    blocks, final_norm: dotted paths below the causal language model; logit_softcap: the field of
    its text config that holds the final logit soft-cap, if it has one; attention: the attention
    implementations that compute what the family was trained with, the first by default; moe:
    whether a router sends each token to some experts. Routing is discrete: gradients see only the
    experts that were chosen, so a search over perturbations cannot see past a change of route.

    heads, attends, mlp: dotted paths below a block. heads: the linear map that attention's heads,
    side by side, go through; attends, mlp: the modules whose output is what attention and MLP add
    to the residual, a norm after them included. A block adds nothing else.

    The unembedding is what transformers names the model's output embeddings: its path changes
    between versions (GPT-NeoX), that name does not.
    """

    blocks: str
    final_norm: str
    logit_softcap: str | None = None
    attention: tuple[str, ...] = ("sdpa", "eager")
    moe: bool = False
    heads: str = "self_attn.o_proj"
    attends: str = "self_attn"
    mlp: str = "mlp"

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks. Raises SubjectError saying what is there instead and what to add."""
        blocks = _descend(model, self.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise SubjectError(
                f"{type(model).__name__} keeps no decoder blocks at {self.blocks!r}: "
                f"{_where_it_ends(model, self.blocks)}. {_what_to_add(model)}"
            )
        return blocks

    def unembed_of(self, model: Any, resid: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits `[... vocab]` of a final residual `[... d_model]`: norm, unembed, soft-cap.

        tokens [n m]: only theirs are computed, `[n m]` of a residual `[n d_model]`. With a large
        vocabulary all of them cost as much as several blocks.
        """
        norm = self.final_norm_of(model)
        logits = _unembedded(model.get_output_embeddings(), norm(resid), tokens)
        cap = self.softcap_of(model)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def final_norm_of(self, model: nn.Module) -> nn.Module:
        """The norm before the unembedding. Raises SubjectError saying what is there instead."""
        norm = _descend(model, self.final_norm)
        if norm is None:
            raise SubjectError(
                f"{type(model).__name__} keeps no final norm at {self.final_norm!r}: "
                f"{_where_it_ends(model, self.final_norm)}. Correct `final_norm` in the family's "
                "row of holdfast/families.py"
            )
        return norm

    def softcap_of(self, model: Any) -> float | None:
        """What logits are bent to stay below, None where they are not."""
        text = model.config.get_text_config()
        return getattr(text, self.logit_softcap, None) if self.logit_softcap else None

    @property
    def norms_attention(self) -> bool:
        """Whether a norm stands between attention and what it adds to the residual."""
        return not self.heads.startswith(f"{self.attends}.")

    def inside(self, model: nn.Module, path: str) -> list[nn.Module]:
        """The module at a path of this row (`heads`, `attends`, `mlp`) in every block, in order.

        Raises SubjectError saying what is there instead.
        """
        found = []
        for block in self.blocks_of(model):
            # A block may stand inside another one, as in the known-answer subjects.
            own = [m for name, m in block.named_modules() if f".{name}".endswith(f".{path}")]
            module = own[0] if len(own) == 1 else _descend(block, path)
            if module is None:
                raise SubjectError(
                    f"a block of {type(model).__name__} has nothing at {path!r}: "
                    f"{_where_it_ends(block, path)}. Correct `heads`, `attends` and `mlp` in the "
                    "family's row of holdfast/families.py"
                )
            found.append(module)
        return found

    def attention_for(self, asked: str | None = None) -> str:
        """The attention implementation to use. Raises SubjectError if it gets the family wrong."""
        if asked is not None and asked not in self.attention:
            raise SubjectError(
                f"attention {asked!r} does not compute this family as it was trained: expected "
                f"{' or '.join(map(repr, self.attention))} (sdpa leaves out attention soft-caps)"
            )
        return asked or self.attention[0]


def d_model_of(config: Any) -> int:
    """The width of the residual stream; a config of several modalities nests that of its text."""
    return int(config.get_text_config().hidden_size)


def context_of(config: Any) -> int | None:
    """How many positions a model has, None where its configuration sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", "transformer.ln_f", heads="attn.c_proj", attends="attn"),
    "gpt_neox": Family("gpt_neox.layers", "gpt_neox.final_layer_norm",
                       heads="attention.dense", attends="attention"),
    "llama": Family("model.layers", "model.norm"),
    "mistral": Family("model.layers", "model.norm"),
    "mixtral": Family("model.layers", "model.norm", moe=True),
    "qwen2": Family("model.layers", "model.norm"),
    "qwen3": Family("model.layers", "model.norm"),
    "qwen3_moe": Family("model.layers", "model.norm", moe=True),
    "phi3": Family("model.layers", "model.norm"),
    "gemma2": Family("model.layers", "model.norm", "final_logit_softcapping",
                     ("eager",), attends="post_attention_layernorm",
                     mlp="post_feedforward_layernorm"),
    "gemma3_text": Family("model.layers", "model.norm", "final_logit_softcapping",
                          attends="post_attention_layernorm", mlp="post_feedforward_layernorm"),
    # The wrapper that also sees images applies no soft-cap to its logits.
    "gemma3": Family("model.language_model.layers", "model.language_model.norm",
                     attends="post_attention_layernorm", mlp="post_feedforward_layernorm"),
}  # fmt: skip


def family_of(config: Any, model: nn.Module | None = None) -> Family:
    """The row for a Hugging Face config. Raises SubjectError naming the known families and, given
    the model, what its row could say."""
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise SubjectError(
            f"model family {model_type!r} is not in holdfast.families: "
            f"{nearest(str(model_type), FAMILIES)}. {_what_to_add(model, str(model_type))}"
        )
    return FAMILIES[model_type]


def _unembedded(unembed: nn.Module, resid: Tensor, tokens: Tensor | None) -> Tensor:
    """Logits, of some tokens where their rows can be read: not those of a matrix that is quantized,
    or that accelerate brings in for its call."""
    if tokens is None:
        return unembed(resid)
    if type(unembed) is not nn.Linear or hasattr(unembed, "_hf_hook"):
        logits = unembed(resid)
        return logits.gather(-1, tokens.to(logits.device))
    some = torch.einsum("nmd,nd->nm", unembed.weight[tokens], resid)
    return some if unembed.bias is None else some + unembed.bias[tokens]


def _descend(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path; None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _where_it_ends(model: nn.Module, path: str) -> str:
    """A sentence on how far a dotted path leads and what is there."""
    found, here = "", model
    for name in path.split("."):
        children = dict(here.named_children())
        if name not in children:
            return f"{found or 'it'} has {', '.join(children) or 'no parts'}, and no {name!r}"
        here, found = children[name], f"{found}.{name}".lstrip(".")
    return f"{path} is a {type(here).__name__}"


def _what_to_add(model: nn.Module | None, model_type: str = "the model's type") -> str:
    """A sentence on the row that is missing, with the places where blocks could be."""
    sentence = (
        f"Adding the family is one row in holdfast/families.py: {model_type!r}: "
        'Family("path.of.the.blocks", "path.of.the.final_norm")'
    )
    lists = [
        f"{path} ({len(module)} × {type(module[0]).__name__})"
        for path, module in ([] if model is None else model.named_modules())
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    return sentence + (f"; its lists of modules are {', '.join(lists[:4])}" if lists else "")
