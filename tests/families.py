"""One tiny random model a family, with everything that makes the family hard switched on.

Windows are shorter than the prompts, soft-caps are low enough to bend, queries are grouped, norms
and biases are not at their initial ones and zeros. `BITES` lists settings whose loss must show in
the logits: a parity test on a model in which the window never bites would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from holdfast.batch import Batch, Example
from holdfast.edits import FeatureEdit
from holdfast.families import FAMILIES
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import WORDS, random_sae, tiny_tokenizer

D_MODEL, N_LAYERS, WINDOW = 32, 4, 4
SITES = tuple(Site(depth) for depth in range(N_LAYERS + 1))
CLAMPED = Site(2)

_COMMON: dict[str, Any] = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
_SLIDING_FIRST = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _config(name: str, *parts: dict[str, Any], **fields: Any) -> Callable[[], PreTrainedConfig]:
    def make() -> PreTrainedConfig:
        settings = dict(_COMMON)
        for part in (*parts, fields):
            settings |= part
        return getattr(transformers, name)(**settings)

    return make


def _with_images() -> PreTrainedConfig:
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**TINY["gemma3_text"]().to_dict(), "final_logit_softcapping": None}
    return transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=43,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": _config("GPT2Config"),
    "gpt_neox": _config("GPTNeoXConfig", intermediate_size=64),
    "llama": _config("LlamaConfig", _GATED),
    "mistral": _config("MistralConfig", _GATED, head_dim=8, sliding_window=WINDOW),
    "mixtral": _config(
        "MixtralConfig", _GATED, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "qwen2": _config("Qwen2Config", _GATED, _SLIDING_FIRST, use_sliding_window=True),
    "qwen3": _config("Qwen3Config", _GATED, _SLIDING_FIRST, use_sliding_window=True, head_dim=16),
    "qwen3_moe": _config(
        "Qwen3MoeConfig", _GATED, _EXPERTS, num_experts=4, head_dim=16, norm_topk_prob=True,
        use_sliding_window=True, sliding_window=WINDOW,
    ),
    "phi3": _config("Phi3Config", _GATED, sliding_window=WINDOW, partial_rotary_factor=0.5),
    "gemma2": _config(
        "Gemma2Config", _GATED, _SLIDING_FIRST, head_dim=16, query_pre_attn_scalar=4,
        attn_logit_softcapping=0.5, final_logit_softcapping=3.0,
    ),
    "gemma3_text": _config(
        "Gemma3TextConfig", _GATED, _SLIDING_FIRST, head_dim=16, query_pre_attn_scalar=4,
        final_logit_softcapping=3.0,
    ),
    "gemma3": _with_images,
}  # fmt: skip

OFF: dict[str, float] = {
    "sliding_window": 10_000,  # longer than any prompt
    "attn_logit_softcapping": 1e4,  # higher than any logit
    "final_logit_softcapping": 1e4,
}
BITES: dict[str, tuple[str, ...]] = {
    "mistral": ("sliding_window",),
    "mixtral": ("sliding_window",),
    "qwen2": ("sliding_window",),
    "qwen3": ("sliding_window",),
    "qwen3_moe": ("sliding_window",),
    "phi3": ("sliding_window",),
    "gemma2": ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("sliding_window", "final_logit_softcapping"),
    "gemma3": ("sliding_window",),
}

CASES = tuple((name, attention) for name in TINY for attention in FAMILIES[name].attention)


def model_of(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """Random weights, the same for every setting that changes no shape; nothing is downloaded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@cache
def family_subject(name: str, attention: str) -> Subject:
    model = model_of(TINY[name](), attention)
    saes = {CLAMPED: random_sae(CLAMPED, D_MODEL)}
    return Subject.of(f"tiny {name}", model, tiny_tokenizer(), saes)


def prompts(subject: Subject, lengths: tuple[int, ...] = (5, 14, 8, 11)) -> Batch:
    """Random prompts of these many tokens, BOS included."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for row, length in enumerate(lengths):
        drawn = torch.randint(len(WORDS), (length - 1,), generator=generator).tolist()
        examples.append(
            Example(
                id=f"prompt:{row}",
                text=" ".join(WORDS[i] for i in drawn),
                target="w1",
                rivals=("w2",),
                alternatives=("w3",),
                cluster=f"prompt:{row}",
            )
        )
    return subject.batch(examples)


def clamp(subject: Subject, where: Any = "all", site: Site = CLAMPED) -> FeatureEdit:
    """Four features held at 3, at the middle site if no other is named."""
    features = FeatureSet(entries=(SiteFeatures(site=str(site), ids=(1, 5, 9, 30)),), source="test")
    return FeatureEdit(FeatureBank.of(subject.sae(site), features), "set", 3.0, where=where)
