"""Judge models from the hub or a folder: safetensors only, complete, and no code of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FieldSerializationInfo,
    field_serializer,
)
from safetensors import SafetensorError

from holdfast.batching import Batching
from holdfast.canonical import sha256_tree
from holdfast.config import in_identity
from holdfast.judges import JudgeError, JudgeKind
from holdfast.organism.assets import resolve
from holdfast.reply import Reply

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_PLACE = re.compile(r"\{(text|prompt)\}")
BATCH = 16
"""Rows a judge reads at once: of one length each, so that nothing is padded."""


def _template(value: Any) -> Any:
    """`{file = "judge.txt"}` stands for what the file holds."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"file"} or not isinstance(value["file"], str):
        raise ValueError(f'expected a text or a table {{ file = "…" }}, got {value!r}')
    try:
        return Path(value["file"]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template file {value['file']!r} cannot be read: {error}") from None


def _has_text(template: str) -> str:
    if "{text}" not in template:
        raise ValueError("expected {text} in the template, where the reply is put")
    return template


Template = Annotated[str, BeforeValidator(_template), AfterValidator(_has_text)]


class PretrainedJudge(JudgeKind):
    """A judge that asks a model.

    model: a folder or a hub id. revision: of the hub's. sha256: of the model's files; `identified`
    fills it in, and where it is given, other files are refused. template: what the judge reads,
    with {text} for the reply and {prompt} for what was asked; or `{ file = "…" }`. What a reply
    says is put there once and is never itself a template, but a judge that can be talked to can be
    talked over: read a sample yourself (`holdfast.audit_sheet`). max_characters: read no more of a
    reply than its first so many; without it a reply the judge has no room for is an error.
    """

    model: str | None
    revision: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    template: Template = "{text}"
    max_characters: int | None = Field(None, ge=1)

    @field_serializer("model")
    def _path(self, model: str | None, info: FieldSerializationInfo) -> str | None:
        """In a trial's identity what counts is the hash, once it is known."""
        known = self.sha256 is not None and in_identity(info)
        return None if known else model

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"judge {self.kind} {self.model or f'with sha256 {self.sha256}'}"

    def identified(self) -> Self:
        """With the hash of its files; one that is given stays, and is proven when they are loaded.

        Raises JudgeError if there are no files. What a record keeps is identified already.
        """
        if self.model is None and self.sha256 is not None:
            return self
        folder = self.folder()
        return self.model_copy(update={"sha256": self.sha256 or _hash(self.label, folder)})

    def folder(self) -> Path:
        """Where its files are, downloaded first if it is a hub id. Raises JudgeError."""
        if self.model is None:
            raise JudgeError(f"{self.label}: a record keeps no path; run the study it came from")
        folder = resolve(self.model)
        if (folder / "config.json").is_file():
            return folder
        if folder.exists() or self.model.startswith((".", "/", "~")):
            found = "no config.json in it" if folder.exists() else "nothing there"
            raise JudgeError(
                f"{self.label}: expected a folder with config.json, tokenizer and safetensors "
                f"weights, found {found}; give the folder that the judge was saved to, or a hub id"
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return Path(
                snapshot_download(self.model, revision=self.revision, allow_patterns=[*_FILES])
            )
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise JudgeError(
                f"{self.label}: is no folder, and the hub gave {type(error).__name__}; check the "
                "id, the network and whether its terms must be accepted first, or give a folder"
            ) from None

    def loaded(self, auto: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Its model, through transformers' class `auto`, and its tokenizer; loaded once."""
        return _load(self.label, auto, self.folder(), self.sha256, self.dtype, device)

    def asked(self, reply: Reply) -> str:
        """The template with a reply in it. Raises JudgeError if it wants a prompt it lacks."""
        text = reply.text if self.max_characters is None else reply.text[: self.max_characters]
        if "{prompt}" in self.template and reply.prompt is None:
            raise JudgeError(
                f"{self.label}: its template has {{prompt}}, and reply {reply.id} came without one"
            )
        filled = {"text": text, "prompt": reply.prompt or ""}
        return _PLACE.sub(lambda match: filled[match[1]], self.template)

    def check_room(self, reply: Reply, n_tokens: int, model: PreTrainedModel) -> None:
        """Raise JudgeError if the judge cannot read so many tokens."""
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # RoBERTa's positions begin after the padding's.
        if room is not None and model.config.model_type in ("roberta", "xlm-roberta"):
            room -= (model.config.pad_token_id or 0) + 1
        if room is not None and n_tokens > room:
            raise JudgeError(
                f"{self.label}: reply {reply.id} makes {n_tokens} tokens, the judge reads at most "
                f"{room}; set max_characters to judge the beginnings of replies"
            )

    def chosen(
        self,
        replies: Sequence[Reply],
        rows: Sequence[list[int]],
        scores: Callable[[Tensor], Tensor],
        model: PreTrainedModel,
        size: int = BATCH,
    ) -> list[int]:
        """The class with the largest score, of every reply: scores [b classes] of tokens [b s]."""
        batching, found = Batching(), dict[int, int]()

        def read(part: Tensor) -> dict[int, int]:
            own = part.tolist()
            told = scores(torch.tensor([rows[i] for i in own], device=model.device))
            check_finite(self.label, told, [replies[i] for i in own])
            return dict(zip(own, told.argmax(-1).tolist(), strict=True))

        with torch.no_grad():
            for same in in_batches(rows, size):
                for part in batching.over("passes", torch.tensor(same), read):
                    found |= part
        return [found[i] for i in range(len(rows))]


def check_finite(label: str, scores: Tensor, replies: Sequence[Reply]) -> None:
    """Raise JudgeError naming the replies for which scores [b n] are NaN or infinite."""
    bad = [r.id for r, row in zip(replies, scores, strict=True) if not torch.isfinite(row).all()]
    if bad:
        raise JudgeError(
            f"{label}: NaN or infinite scores for {len(bad)} replies (first: {bad[:3]}); check its "
            "dtype and weights"
        )


def in_batches(rows: Sequence[list[int]], size: int = BATCH) -> list[list[int]]:
    """Numbers of rows that have one length, at most `size` together."""
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row), []).append(i)
    return [
        same[start : start + size]
        for _, same in sorted(lengths.items())
        for start in range(0, len(same), size)
    ]


_LOADING = Lock()
"""Held while a judge is loaded: trials side by side share it, and loading is not made for that."""


def _load(*what: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _LOADING:
        return _loaded(*what)


@lru_cache(maxsize=4)
def _loaded(
    label: str, auto: str, folder: Path, sha256: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if sha256 is not None and _hash(label, folder) != sha256:
        raise JudgeError(
            f"{label}: its files changed: expected sha256 {sha256}, got {_hash(label, folder)}; "
            "put the old ones back, or take `sha256` out of the study to use these"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, loading = getattr(transformers, auto).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        model.to(device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        # What transformers raises for damaged or missing files differs by file and version.
        raise JudgeError(
            f"{label} cannot be loaded with {auto} on {device}: {error}; expected a model with "
            "safetensors weights and its tokenizer that needs no code of its own; save it so "
            "(save_pretrained of both), or name another"
        ) from None
    lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if lacking:
        raise JudgeError(
            f"{label}: its files lack {len(lacking)} weights (first: {lacking[:3]}), which would "
            "be random numbers: expected a model with the head that it judges with; name one "
            "that was trained to judge"
        )
    return model.eval().requires_grad_(False), tokenizer


def _hash(label: str, folder: Path) -> str:
    try:
        return sha256_tree(folder, _FILES)
    except OSError as error:
        raise JudgeError(f"{label}: its files cannot be read: {error}") from None
