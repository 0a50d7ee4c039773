"""The subject: a model, its tokenizer and its SAEs. The one live object; all else is data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.canonical import sha256_tree
from holdfast.config import Config, nearest
from holdfast.edits import Edit, Placed
from holdfast.errors import NonFiniteError, SAEError, SubjectError
from holdfast.families import Family, family_of
from holdfast.hooks import AttachedEdits
from holdfast.organism.assets import SHIPPED, resolve
from holdfast.saes.sae import SAE
from holdfast.saes.sources import SAESpec
from holdfast.saes.stored import StoredSAE
from holdfast.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


class SubjectSpec(Config):
    """What a study says of its subject.

    model: a shipped name, a folder, or a hub id (the only thing that reaches for the network).
    attention: transformers' attention implementation.
    """

    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    saes: tuple[SAESpec, ...] = Field(min_length=1)

    def folder(self) -> Path:
        """The folder the model is loaded from, downloaded first if it is a hub id.

        Raises SubjectError if the name is no shipped subject, no folder and no reachable hub id.
        """
        folder = resolve(self.model)
        if (folder / "config.json").is_file():
            return folder
        if folder.exists() or self.model.startswith((".", "/", "~")) or self.model in SHIPPED:
            raise SubjectError(
                f"model {self.model!r}: expected a folder with config.json and safetensors weights"
                f", found {'no config.json in it' if folder.exists() else 'nothing there'}"
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(
                snapshot_download(
                    self.model,
                    revision=self.revision,
                    allow_patterns=[*_WEIGHTS, "*.json", "*.model"],
                )
            )
        except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise SubjectError(
                f"model {self.model!r} is no shipped subject, no folder, and the hub gave "
                f"{type(error).__name__}. {nearest(self.model, SHIPPED)}"
            ) from None

    def weights_sha256(self) -> str:
        """Hash over the model's weights, configuration and tokenizer."""
        return sha256_tree(self.folder(), _WEIGHTS)


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer and SAEs on one device.

    batch_size: most rows in one full forward pass and most lanes in one step of a search; it
    changes memory and speed, not results. A replay keeps what it recorded of all its rows.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saes: Mapping[Site, SAE | StoredSAE]
    family: Family
    batch_size: int = 128

    @classmethod
    def load(cls, spec: SubjectSpec, device: str = "cpu", batch_size: int = 128) -> Subject:
        """Load model, tokenizer and SAEs. Raises SubjectError or SAEError."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # ours says what is going on
        folder = spec.folder()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, spec.dtype),
                attn_implementation=spec.attention,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            # What transformers raises for damaged files differs by file and version.
            raise SubjectError(f"model {spec.model!r} cannot be loaded: {error}") from None
        # transformers fills what is missing with random weights and only logs it. Tied weights are
        # not among the missing.
        lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
        if lacking:
            raise SubjectError(
                f"model {spec.model!r}: its files lack {len(lacking)} weights of the architecture "
                f"(first: {lacking[:3]}); they would be random numbers"
            )
        from holdfast.organism.projected import attach_projection

        attach_projection(model, folder)
        model.to(device).eval().requires_grad_(False)
        saes = {}
        for sae_spec in spec.saes:
            site = Site.parse(sae_spec.site)
            if site in saes:
                raise SAEError(f"two SAEs are named for {site}")
            saes[site] = sae_spec.source.load(site).to(device)
        return cls.of(spec.model, model, tokenizer, saes, batch_size)

    @classmethod
    def of(
        cls,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        saes: Mapping[Site, SAE | StoredSAE],
        batch_size: int = 128,
    ) -> Subject:
        """Put loaded parts together. Raises SAEError if an SAE does not fit the model."""
        family = family_of(model.config)
        n_blocks = len(family.blocks_of(model))
        for site, sae in saes.items():
            if site.depth > n_blocks:
                raise SAEError(f"{name} has {n_blocks} blocks, so there is no site {site}")
            if sae.d_model != model.config.hidden_size:
                raise SAEError(
                    f"the SAE at {site} reads d_model {sae.d_model}, {name} has "
                    f"{model.config.hidden_size}: it was trained on another model"
                )
        return cls(name, model, tokenizer, saes, family, batch_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def sae(self, site: Site) -> SAE | StoredSAE:
        if site not in self.saes:
            raise SAEError(
                f"no SAE at {site}: {self.name} was loaded with SAEs at "
                f"{', '.join(map(str, self.saes))}"
            )
        return self.saes[site]

    # ------------------------------------------------------------------ tokens

    def token_id(self, continuation: str) -> int:
        """The id of a continuation that must be a single token. Raises SubjectError otherwise."""
        ids = self.tokenizer.encode(continuation, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise SubjectError(
                f"{continuation!r} must be one token of {self.name}'s vocabulary, it is {ids}"
            )
        return ids[0]

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize, left-pad, and number positions from 0. Raises SubjectError on a doubled BOS."""
        bos = self.tokenizer.bos_token_id
        rows = [
            self.tokenizer.encode(example.text, add_special_tokens=example.special)
            for example in examples
        ]
        for example, row in zip(examples, rows, strict=True):
            if bos is not None and row[:2] == [bos, bos]:
                raise SubjectError(
                    f"prompt {example.id} begins with two BOS tokens: the text (or chat template) "
                    "already has one and the tokenizer adds another"
                )
            if not row:
                raise SubjectError(f"prompt {example.id} has no tokens")
        width = max((len(row) for row in rows), default=1)
        pad = self.tokenizer.pad_token_id or 0
        positions = torch.full((len(rows), width), -1, dtype=torch.long)
        tokens = torch.full((len(rows), width), pad, dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :] = torch.as_tensor(row)
            positions[i, width - len(row) :] = torch.arange(len(row))
        return Batch(
            ids=tuple(example.id for example in examples),
            clusters=tuple(example.cluster for example in examples),
            groups=tuple(example.group for example in examples),
            texts=tuple(example.text for example in examples),
            tokens=tokens,
            positions=positions,
            bos=torch.as_tensor([bos is not None and row[0] == bos for row in rows]),
            template=torch.as_tensor(
                [self._template(example, row) for example, row in zip(examples, rows, strict=True)]
            ),
            targets=torch.as_tensor([self.token_id(e.target) for e in examples]),
            rivals=torch.as_tensor([[self.token_id(r) for r in e.rivals] for e in examples]),
            alternatives=torch.as_tensor(
                [[self.token_id(a) for a in e.alternatives] for e in examples]
            ),
        ).to(self.device)

    def _template(self, example: Example, row: Sequence[int]) -> int:
        """The position of the first token that lies wholly in the example's suffix."""
        if not example.suffix:
            return len(row)
        if not example.text.endswith(example.suffix):
            raise SubjectError(f"prompt {example.id} does not end with its template's suffix")
        offsets = self.tokenizer(
            example.text, add_special_tokens=example.special, return_offsets_mapping=True
        )["offset_mapping"]
        start = len(example.text) - len(example.suffix)
        inside = [i for i, (begin, end) in enumerate(offsets) if begin >= start and end > begin]
        return inside[0] if inside else len(row)

    # ------------------------------------------------------------------ forward passes

    def outputs(self, batch: Batch, edits: Sequence[Edit] = (), keep: int = 1) -> Tensor:
        """Logits [b keep vocab] at the last `keep` prompt tokens, with `edits` on, no gradients.

        Edits act at absolute positions, in the tuple's order at one site. Raises
        EditNeverFiredError, PositionError, or NonFiniteError naming the prompts.
        """
        self._check_positions(batch, edits)
        logits = []
        with torch.no_grad(), AttachedEdits(self.family.blocks_of(self.model), edits) as attached:
            for chunk in batch.chunks(self.batch_size):
                attached.frame = chunk.frame()
                logits.append(self._forward(chunk, keep))
        out = torch.cat(logits)
        self.check_finite(out[:, -1], batch.ids)
        return out

    def forward_with_gradients(self, batch: Batch, edits: Sequence[Edit] = ()) -> Tensor:
        """Logits [b vocab] at the last prompt token, differentiable in what the edits insert."""
        self._check_positions(batch, edits)
        with AttachedEdits(self.family.blocks_of(self.model), edits) as attached:
            attached.frame = batch.frame()
            logits = self._forward(batch, 1)[:, -1]
        self.check_finite(logits.detach(), batch.ids)
        return logits

    def _forward(self, batch: Batch, keep: int) -> Tensor:
        return self.model(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            position_ids=batch.positions.clamp(min=0),
            use_cache=False,
            logits_to_keep=keep,
        ).logits.float()

    def generate(
        self, batch: Batch, edits: Sequence[Edit] = (), max_new_tokens: int = 32
    ) -> Tensor:
        """Greedy continuation [b n] under a KV cache with `edits` on at every step.

        The prompt is edited before its keys are cached and every new token is edited at its own
        absolute position, so that the result equals repeated full forward passes. Rows that ended
        are filled with the padding token.
        """
        self._check_positions(batch, edits, max_new_tokens)
        out = []
        with torch.no_grad(), AttachedEdits(self.family.blocks_of(self.model), edits) as attached:
            for chunk in batch.chunks(self.batch_size):
                out.append(self._generate(chunk, attached, max_new_tokens))
        pad = self.tokenizer.pad_token_id or 0
        width = max(tokens.shape[1] for tokens in out)
        return torch.cat(
            [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=pad) for t in out]
        )

    def _generate(self, batch: Batch, attached: AttachedEdits, max_new_tokens: int) -> Tensor:
        from transformers import DynamicCache

        pad, eos = self.tokenizer.pad_token_id or 0, self.tokenizer.eos_token_id
        cache = DynamicCache(config=self.model.config)
        tokens, positions, mask = batch.tokens, batch.positions, batch.mask
        done = torch.zeros(len(batch), dtype=torch.bool, device=self.device)
        made = []
        whole = batch.frame()
        for _ in range(max_new_tokens):
            attached.frame = replace(whole, positions=positions)
            logits = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            self.check_finite(logits, batch.ids)
            chosen = torch.where(done, pad, logits.argmax(-1))
            made.append(chosen)
            if eos is not None:
                done = done | (chosen == eos)
            if bool(done.all()):
                break
            tokens = chosen[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
        return torch.stack(made, 1)

    def check_finite(self, logits: Tensor, ids: Sequence[str]) -> None:
        """Raise NonFiniteError naming the rows of logits [b vocab] that are NaN or infinite."""
        bad = ~torch.isfinite(logits).all(-1)
        if bad.any():
            rows = [ids[i] for i in bad.nonzero().flatten().tolist()]
            raise NonFiniteError(
                f"{self.name} gave NaN or infinite logits for {len(rows)} of {len(ids)} prompts "
                f"(first: {rows[:3]}); check dtype (float16 overflows in many models), weights "
                "and the attention implementation"
            )

    def _check_positions(self, batch: Batch, edits: Sequence[Edit], n_generated: int = 0) -> None:
        for edit in edits:
            if isinstance(edit, Placed):
                edit.check_inside(batch, n_generated)
