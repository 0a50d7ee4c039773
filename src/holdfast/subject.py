"""The subject: a model, its tokenizer and its SAEs. The one live object; all else is data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from holdfast.batch import Batch, Example, Frame
from holdfast.batching import Batching, Work
from holdfast.begun import Beginnings, first_perturbed
from holdfast.edits import Edit, EveryToken, Placed
from holdfast.errors import NonFiniteError, SAEError, SplitError, SubjectError
from holdfast.families import Family, context_of, d_model_of, family_of
from holdfast.hooks import AttachedEdits
from holdfast.loading import SubjectSpec, at_rest, load_model
from holdfast.positions import check_fits
from holdfast.readouts import Readout
from holdfast.readouts.logits import LOGITS
from holdfast.saes.sae import SAE
from holdfast.saes.stored import StoredSAE
from holdfast.sampling import Choice, greedy
from holdfast.sites import Site
from holdfast.waiting import Behind

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer and SAEs on one device.

    batching: how many rows go through it at once; it changes memory and speed, not results. A
    replay keeps what it recorded of all its rows. fitted: readouts that were fitted to it, by the
    hash of what they were fitted on; counted: tensors that were measured of the model without any
    edit, by the hash of what asked for them, so that the points of a grid measure them once; begun:
    prompts that were run up to where they are perturbed, for texts that go on from there.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    saes: Mapping[Site, SAE | StoredSAE]
    family: Family
    batching: Batching = field(default_factory=Batching, repr=False, compare=False)
    prepend_bos: bool = False
    fitted: dict[str, Readout] = field(default_factory=dict, repr=False, compare=False)
    counted: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    begun: Beginnings = field(default_factory=Beginnings, repr=False, compare=False)

    @classmethod
    def load(
        cls, spec: SubjectSpec, device: str = "cpu", batching: Batching | None = None
    ) -> Subject:
        """Load model, tokenizer and SAEs. Raises SubjectError, DeviceError or SAEError."""
        saes = {}
        for sae_spec in spec.saes:  # before the model, which takes longer to load
            site = Site.parse(sae_spec.site)
            if site in saes:
                raise SAEError(f"two SAEs are named for {site}")
            saes[site] = sae_spec.source.load(site)
        model, tokenizer = load_model(spec, device)
        return cls.of(spec.model, model, tokenizer, saes, batching, spec.prepend_bos)

    @classmethod
    def of(
        cls,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        saes: Mapping[Site, SAE | StoredSAE],
        batching: Batching | None = None,
        prepend_bos: bool = False,
    ) -> Subject:
        """Put loaded parts together; SAEs go where their site's residual is.

        The model is put `at_rest`: in evaluation mode, its weights frozen.

        Raises SAEError if an SAE does not fit the model, SubjectError for an unknown family, an
        attention implementation that computes it wrong, or a tokenizer without a BOS to prepend.
        """
        family = family_of(model.config, model)
        blocks, d_model = family.blocks_of(model), d_model_of(model.config)
        family.attention_for(getattr(model.config, "_attn_implementation", None))
        placed = {}
        for site, sae in saes.items():
            if site.depth > len(blocks):
                raise SAEError(f"{name} has {len(blocks)} blocks, so there is no site {site}")
            if sae.d_model != d_model:
                raise SAEError(
                    f"the SAE at {site} reads d_model {sae.d_model}, {name} has {d_model}: it was "
                    "trained on another model"
                )
            placed[site] = sae.to(_device_of(blocks[max(site.layer, 0)]))
        if prepend_bos and tokenizer.bos_token_id is None:
            raise SubjectError(f"prepend_bos: the tokenizer of {name} has no BOS token")
        at_rest(model)
        return cls(name, model, tokenizer, placed, family, batching or Batching(), prepend_bos)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return d_model_of(self.model.config)

    @property
    def n_blocks(self) -> int:
        return len(self.family.blocks_of(self.model))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def sae(self, site: Site) -> SAE | StoredSAE:
        if site not in self.saes:
            raise SAEError(
                f"no SAE at {site}: {self.name} was loaded with SAEs at "
                f"{', '.join(map(str, self.saes))}; add one for that site under [[subject.saes]], "
                "or leave it out of features and circuit"
            )
        return self.saes[site]

    @property
    def context(self) -> int | None:
        """How many positions the model has, None where its configuration sets no limit."""
        return context_of(self.model.config)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end of sequence, and what the model's own
        generation settings add to it (the end of a chat turn)."""
        told = getattr(self.model.generation_config, "eos_token_id", None)
        several = told if isinstance(told, list) else [told]
        return frozenset(
            token for token in (self.tokenizer.eos_token_id, *several) if token is not None
        )

    # ------------------------------------------------------------------ tokens

    def token_id(self, continuation: str) -> int:
        """The id of a continuation that must be a single token. Raises SubjectError otherwise."""
        ids = self.tokenizer.encode(continuation, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise SubjectError(
                f"{continuation!r}: expected one token of {self.name}'s vocabulary, got {len(ids)} "
                f"({ids}); ask for answers that this tokenizer has as single tokens"
            )
        return ids[0]

    def encode(self, example: Example) -> list[int]:
        """The token ids of a prompt, with BOS in front if the subject is to prepend it."""
        row = self.tokenizer.encode(example.text, add_special_tokens=example.special)
        bos = self.tokenizer.bos_token_id
        return [bos, *row] if self.prepend_bos and row[:1] != [bos] else row

    def batch(self, examples: Sequence[Example], readout: Readout = LOGITS) -> Batch:
        """Tokenize, left-pad, and number positions from 0.

        Raises SplitError on an example id that is there twice, SubjectError on a doubled BOS or for
        an answer that the readout does not score, ContextError on a prompt longer than the
        model reads.
        """
        twice = [name for name, n in Counter(example.id for example in examples).items() if n > 1]
        if twice:
            raise SplitError(f"example ids must be unique, these are not: {sorted(twice)[:5]}")
        bos = self.tokenizer.bos_token_id
        rows = [self.encode(example) for example in examples]
        for example, row in zip(examples, rows, strict=True):
            if bos is not None and row[:2] == [bos, bos]:
                raise SubjectError(
                    f"prompt {example.id} begins with two BOS tokens: the text (or chat template) "
                    "already has one and the tokenizer adds another"
                )
            if not row:
                raise SubjectError(f"prompt {example.id} has no tokens")
        tokens, positions = self._padded(rows)
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
            targets=torch.as_tensor([readout.answer(self, e.target) for e in examples]),
            rivals=torch.as_tensor([[readout.answer(self, r) for r in e.rivals] for e in examples]),
            alternatives=torch.as_tensor(
                [[readout.answer(self, a) for a in e.alternatives] for e in examples]
            ),
            readout=readout,
        ).to(self.device)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Tokens and absolute positions [b s] of token ids, padded on the left."""
        width = max((len(row) for row in rows), default=1)
        pad = self.tokenizer.pad_token_id or 0
        positions = torch.full((len(rows), width), -1, dtype=torch.long)
        tokens = torch.full((len(rows), width), pad, dtype=torch.long)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :] = torch.as_tensor(row)
            positions[i, width - len(row) :] = torch.arange(len(row))
        return tokens, positions

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
        prepended = len(row) - len(offsets)
        return inside[0] + prepended if inside else len(row)

    # ------------------------------------------------------------------ forward passes

    def outputs(
        self, batch: Batch, edits: Sequence[Edit] = (), keep: int = 1, work: Work = "passes"
    ) -> Tensor:
        """Logits [b keep vocab] at the last `keep` prompt tokens, with `edits` on, no gradients.

        Edits act at absolute positions, in the tuple's order at one site. work: what a row is for
        memory's sake, where an edit holds more than the pass. Raises EditNeverFiredError,
        PositionError, OutOfMemoryError, or ContextError or NonFiniteError naming the prompts.
        """
        self._check_positions(batch, edits)
        with torch.no_grad(), AttachedEdits(self.family.blocks_of(self.model), edits) as attached:

            def forward(rows: Tensor) -> Tensor:
                own = batch.rows(rows)
                attached.frame = own.frame()
                return self._forward(own, keep)

            logits = self.batching.over(work, torch.arange(len(batch)), forward, attached.mark)
        out = torch.cat(logits)
        self.check_finite(out[:, -1], batch.ids)
        return out

    def residual(self, site: Site, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """What texts are at a site, [b s d_model], and their tokens [b s], -1 for padding.

        rows: token ids, read as they are. No gradients, and no block above the site is run. Raises
        ContextError for a text longer than the model reads.
        """
        names = [f"text {index}" for index in range(len(rows))]
        check_fits(self.name, self.context, names, [len(row) for row in rows], 0)
        tokens, positions = (each.to(self.device) for each in self._padded(rows))
        begins = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        n = (positions >= 0).sum(1)
        frame = Frame(tuple(names), ("",) * len(rows), positions, n, begins, n)
        reader = _Last(site)
        with torch.no_grad(), AttachedEdits(self.family.blocks_of(self.model), (reader,)) as at:
            at.frame = frame
            try:
                self.model(
                    input_ids=tokens,
                    attention_mask=(positions >= 0).long(),
                    position_ids=positions.clamp(min=0),
                    use_cache=False,
                    logits_to_keep=1,
                )
            except _Enough as enough:
                return enough.x, torch.where(positions >= 0, tokens, -1)
        raise AssertionError(f"no residual came by at {site}")

    def read(self, batch: Batch, edits: Sequence[Edit] = ()) -> Tensor:
        """Scores of a whole pass as the batch's readout reads them.

        Of logits: [b vocab] at the last prompt token, or [b t vocab] at the tokens that a forced
        answer follows.
        """
        return batch.readout.read(self.outputs, batch, edits)

    def forward_with_gradients(self, batch: Batch, edits: Sequence[Edit] = ()) -> Tensor:
        """The same scores, differentiable in what the edits insert."""
        return batch.readout.read(self._outputs_with_gradients, batch, edits)

    def _outputs_with_gradients(self, batch: Batch, edits: Sequence[Edit], keep: int) -> Tensor:
        self._check_positions(batch, edits)
        with AttachedEdits(self.family.blocks_of(self.model), edits) as attached:
            attached.frame = batch.frame()
            logits = self._forward(batch, keep)
        self.check_finite(logits[:, -1].detach(), batch.ids)
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
        self,
        batch: Batch,
        edits: Sequence[Edit] = (),
        max_new_tokens: int = 32,
        choose: Choice = greedy,
    ) -> Tensor:
        """Continuation [b n] under a KV cache with `edits` on at every step.

        The prompt is edited before its keys are cached and every new token is edited at its own
        absolute position, so that the result equals repeated full forward passes; tokens before a
        perturbation are run once for all that is added (`begun.py`). A batch that is read for
        forced answers goes on after all but their last token. Rows that ended are filled with the
        padding token. Raises ContextError where prompt and answer do not fit, OutOfMemoryError.
        """
        self._check_positions(batch, edits, max_new_tokens)
        start = first_perturbed(batch, edits)
        with torch.no_grad(), AttachedEdits(self.family.blocks_of(self.model), edits) as attached:

            def continued(rows: Tensor) -> Tensor:
                own, cache = batch.rows(rows), None
                if start and 2 * len(rows) <= self.batching.sizes.generation:
                    run = partial(self._prefix, own, attached)
                    cache = self.begun.of(own, edits, start, attached, run).again()
                return self._generate(own, attached, max_new_tokens, choose, cache, start)

            out = self.batching.over(
                "generation", torch.arange(len(batch)), continued, attached.mark
            )
        pad = self.tokenizer.pad_token_id or 0
        width = max(tokens.shape[1] for tokens in out)
        return torch.cat(
            [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=pad) for t in out]
        )

    def _prefix(self, batch: Batch, attached: AttachedEdits, columns: slice) -> DynamicCache:
        """Keys and values of every block, of a pass over some of the first columns."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        attached.frame = batch.frame().columns(columns)
        self.model(
            input_ids=batch.tokens[:, columns],
            attention_mask=batch.mask[:, columns],
            position_ids=batch.positions[:, columns].clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache

    def _generate(
        self,
        batch: Batch,
        attached: AttachedEdits,
        max_new_tokens: int,
        choose: Choice,
        cache: DynamicCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """cache: of the columns before `start`, where these have been run."""
        from transformers import DynamicCache

        pad = self.tokenizer.pad_token_id or 0
        ends = torch.as_tensor(sorted(self.ends), dtype=torch.long, device=self.device)
        if cache is None:
            cache, start = DynamicCache(config=self.model.config), 0
        tokens, positions, mask = batch.tokens[:, start:], batch.positions[:, start:], batch.mask
        done, bad = torch.zeros(2, len(batch), dtype=torch.bool, device=self.device)
        made, length = [], torch.zeros(len(batch), dtype=torch.long, device=self.device)
        whole, behind = batch.frame(), Behind()
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
            bad = bad | (~_finite(logits) & ~done.all())
            chosen = torch.where(done, pad, choose(batch.ids, logits))
            made.append(chosen)
            length = length + ~done
            done = done | (chosen[:, None] == ends).any(1)
            known = behind.read(torch.stack([done.all(), bad.any()]))
            if known is not None and known.any():
                break
            tokens = chosen[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
        self._check_none(bad, batch.ids)
        # Without a token that was made before it was known that the last row had ended.
        return torch.stack(made, 1)[:, : int(length.max())]

    def check_finite(self, logits: Tensor, ids: Sequence[str]) -> None:
        """Raise NonFiniteError naming the rows of logits [b vocab] that are NaN or infinite."""
        self._check_none(~_finite(logits), ids)

    def _check_none(self, bad: Tensor, ids: Sequence[str]) -> None:
        """Raise NonFiniteError naming the rows [b] that are `bad`."""
        if bad.any():
            rows = [ids[i] for i in bad.nonzero().flatten().tolist()]
            raise NonFiniteError(
                f"{self.name} gave NaN or infinite logits for {len(rows)} of {len(ids)} prompts "
                f"(first: {rows[:3]}); check dtype (float16 overflows in many models), weights "
                "and the attention implementation"
            )

    def _check_positions(self, batch: Batch, edits: Sequence[Edit], n_generated: int = 0) -> None:
        lengths = (batch.positions[:, -1] + 1).tolist()
        check_fits(self.name, self.context, batch.ids, lengths, n_generated)
        for edit in edits:
            if isinstance(edit, Placed):
                edit.check_inside(batch, n_generated)


class _Enough(Exception):
    """Ends a pass whose rest nobody reads, with the residual x [b s d_model] it was run for."""

    def __init__(self, x: Tensor):
        super().__init__("the pass was read where it was needed")
        self.x = x


@dataclass(frozen=True)
class _Last(EveryToken):
    """An edit that ends the pass at its site."""

    site: Site

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        raise _Enough(x)

    def check_fired(self, site: Site, n_fired: int) -> None:
        """It ends the pass, so that one which ends by itself has not come by."""


def _finite(logits: Tensor) -> Tensor:
    """[b] of [b vocab]."""
    return torch.isfinite(logits).all(-1)


def _device_of(block: nn.Module) -> torch.device:
    """Where a block computes: with accelerate's offloading that is not where its weights lie."""
    hook = getattr(block, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(block.parameters()).device
