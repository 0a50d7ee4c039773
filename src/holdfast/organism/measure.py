"""Measures a trained model on held-out prompts with plain transformers calls: no hooks, no SAEs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

from holdfast.errors import SubjectError
from holdfast.organism.corpus import (
    DOMAINS,
    LETTERS,
    REFUSAL,
    Biography,
    ChatKind,
    Split,
    biographies,
    chat_prompts,
    held_out_permutations,
    ioi_prompts,
    question_text,
    questions,
)  # fmt: skip

PROBE_LAYER = 1


def load(path: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """A shipped or freshly trained model in fp32."""
    if not (path / "config.json").is_file():
        raise SubjectError(f"no model at {path}: expected a folder with config.json")
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [b s] and the last token's index [b]; causal attention needs no mask."""
    encoded = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    return encoded["input_ids"], encoded["attention_mask"].sum(1) - 1


@torch.no_grad()
def last_logits(model: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Logits after each text, [b vocabulary]."""
    ids, last = _encode(tokenizer, texts)
    return model(ids).logits[torch.arange(len(ids)), last]


def ioi_rate(model: PreTrainedModel, tokenizer: Tokenizer, split: Split, n: int = 400) -> float:
    """Share of prompts with logit(IO) > logit(S)."""
    prompts = ioi_prompts(split, n)
    logits, ids = last_logits(model, tokenizer, [p.text for p in prompts]), tokenizer.get_vocab()
    margins = [row[ids[p.io]] - row[ids[p.s]] for row, p in zip(logits, prompts, strict=True)]
    return float((torch.stack(margins) > 0).float().mean())


def mcq_accuracy(model: PreTrainedModel, tokenizer: Tokenizer, domain: str, split: Split) -> float:
    """Accuracy on hard items over the held-out permutations; chance is 0.25."""
    pairs = [(q, p) for q in questions(domain, split) for p in held_out_permutations(q)]
    logits = last_logits(model, tokenizer, [question_text(q, p) for q, p in pairs])
    choices = logits[:, tokenizer.convert_tokens_to_ids(list(LETTERS))].argmax(1)
    gold = torch.tensor([p.index(q.answer) for q, p in pairs])
    return float((choices == gold).float().mean())


@torch.no_grad()
def refusal_rate(
    model: PreTrainedModel, tokenizer: Tokenizer, kind: ChatKind, split: Split, n: int = 200
) -> float:
    """Share of greedy replies that open with the refusal."""
    chats = [
        [{"role": role, "content": content} for role, content in prompt.messages]
        for prompt in chat_prompts(kind, split, n)
    ]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    replies = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
    return sum(reply.startswith(REFUSAL) for reply in replies) / n


@torch.no_grad()
def _pooled(model: PreTrainedModel, tokenizer: Tokenizer, items: Sequence[Biography]) -> Tensor:
    """resid_post of PROBE_LAYER averaged over the tokens after <bos>, [b d_model]."""
    ids, last = _encode(tokenizer, [b.text for b in items])
    states = model(ids, output_hidden_states=True).hidden_states[PROBE_LAYER + 1]
    positions = torch.arange(ids.shape[1])
    mask = ((positions >= 1) & (positions <= last[:, None])).float()[..., None]
    return (states * mask).sum(1) / mask.sum(1)


def probe_accuracy(model: PreTrainedModel, tokenizer: Tokenizer, attribute: str) -> float:
    """Test accuracy of a logistic regression from the fit split; attribute: a Biography field."""
    from sklearn.linear_model import LogisticRegression

    fit, test = biographies("fit", 3000), biographies("test", 400)
    probe = LogisticRegression(max_iter=2000)
    probe.fit(_pooled(model, tokenizer, fit).numpy(), [getattr(b, attribute) for b in fit])
    return float(
        probe.score(_pooled(model, tokenizer, test).numpy(), [getattr(b, attribute) for b in test])
    )


def measure(path: Path, split: Split = "test") -> dict[str, Any]:
    """All behaviors of the model in a folder; every value is a share between 0 and 1."""
    model, tokenizer = load(path)
    return {
        "ioi": ioi_rate(model, tokenizer, split),
        "mcq": {d: mcq_accuracy(model, tokenizer, d, split) for d in DOMAINS},
        "refusal": {k: refusal_rate(model, tokenizer, k, split) for k in get_args(ChatKind)},
        "probe": {a: probe_accuracy(model, tokenizer, a) for a in ("profession", "gender")},
    }
