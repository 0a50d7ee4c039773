"""What a call of a plain transformers model is about: its rows, and their absolute positions.

A subject knows its prompts; a plain model is only called, with tokens and perhaps a cache. The
prompt is what is in the call with an empty cache, everything that follows from that cache was
generated. Where this cannot be known and an edit's positions depend on it, it is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.edits import Edit, FeatureEdit
from holdfast.errors import EditError, FeatureError, PositionError
from holdfast.features import EVERY_GROUP
from holdfast.positions import check_not_bos, check_possible

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Prompt:
    """What the rows of a cache began with, and how many tokens came after it."""

    frame: Frame
    n_after: int = 0


class Calls:
    """Frames of the calls of one model, in the order they are made.

    group: the label that picks features fitted for one group of prompts. template_tokens: how many
    tokens a chat template puts after the instruction, at the end of every prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        edits: Sequence[Edit],
        group: str | None,
        template_tokens: int | None,
    ):
        clamps = [edit for edit in edits if isinstance(edit, FeatureEdit)]
        self._model = model
        self._group = group
        self._template_tokens = template_tokens
        self._signature = inspect.signature(model.forward)
        kinds = {p.kind: p.name for p in self._signature.parameters.values()}
        self._others = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        self._bos = _bos_ids(model)
        self._listed = [(e.where, e.include_bos) for e in clamps if isinstance(e.where, tuple)]
        self._by_prompt = sorted(
            {e.where for e in clamps if isinstance(e.where, str) and e.where != "all"}
        )
        decide = {edit.decides_on for edit in clamps} - {""}
        named = [f"positions {self._by_prompt}"] if self._by_prompt else []
        self._depend = " and ".join([*named, *sorted(decide)])
        self._of_cache: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()
        self._seen: list[Prompt] = []
        self._current: Prompt | None = None
        if "template" in self._by_prompt and not template_tokens:
            raise EditError(
                "positions are 'template', and a plain model does not know where the chat template "
                "goes on after the instruction: give template_tokens, the number of its tokens "
                "there, or use a Subject with prompts that have a suffix"
            )
        groups = sorted({name for edit in clamps for name in edit.bank.index} - {EVERY_GROUP})
        if groups and group is None:
            raise FeatureError(
                f"the features differ by group of prompts ({', '.join(groups[:5])}"
                f"{', …' if len(groups) > 5 else ''}), and a plain model does not know its prompts'"
                " groups: give group=, and prompts of that group alone"
            )

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frame:
        """The frame of a call with these arguments. Raises EditError where it cannot be known."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get(self._others, {})
        ids = given.get("input_ids")
        if ids is None:
            raise EditError(
                "the model was called without input_ids: from embeddings alone it cannot be known "
                "where BOS and padding are; give the token ids"
            )
        cache = given.get("past_key_values")
        n_cached = 0 if cache is None else int(cache.get_seq_length())
        positions = _positions(given, ids, n_cached)
        if n_cached:
            prompt = self._known(cache, ids)
            prompt.n_after += ids.shape[1]
        else:
            self._check_prompt(given, cache)
            prompt = Prompt(self._begun(positions))
            if self._listed:
                self._seen.append(prompt)
        # Position 0 need not be in the first call: a chunk of a prompt can be padding alone.
        starts = (positions == 0) & torch.isin(ids, torch.as_tensor(self._bos).to(ids))
        prompt.frame = replace(prompt.frame, bos=prompt.frame.bos | starts.any(1))
        self._current = prompt
        return replace(prompt.frame, positions=positions)

    def end(self, output: Any) -> None:
        """Remember the cache that a call filled."""
        parts = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for part in parts:
            if self._current is not None and hasattr(part, "get_seq_length"):
                self._of_cache[part] = self._current
        self._current = None

    def check_reached(self) -> None:
        """Raise PositionError if a listed position is there in some rows of a batch only.

        Or in none, where nothing was generated that could have reached it.
        """
        for prompt in self._seen:
            ends = prompt.frame.prompt_length + prompt.n_after
            for where, include_bos in self._listed:
                n_there = [int((ends > position).sum()) for position in where]
                if any(0 < n < len(ends) or (n == 0 and not prompt.n_after) for n in n_there):
                    check_possible(where, include_bos, prompt.frame, prompt.n_after)
                check_not_bos(where, include_bos, prompt.frame)

    def _check_prompt(self, given: dict[str, Any], cache: Any) -> None:
        """Raise EditError if what is in the call need not be the prompt and it matters."""
        if not self._depend:
            return
        uses_cache = given.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(self._model.config.get_text_config(), "use_cache", True)
        if cache is None and not uses_cache:
            raise EditError(
                f"{self._depend} depend on where the prompt ends, and with "
                "use_cache=False every call looks like a new prompt: leave the cache on, or use "
                "'all' or a list of positions"
            )
        n_read = given.get("logits_to_keep")
        if cache is not None and isinstance(n_read, int) and n_read > 1:
            raise EditError(
                f"{self._depend} depend on where the prompt ends, and the logits of "
                f"{n_read} tokens are read in the call that fills the cache, as in assisted "
                "decoding, where candidates follow the prompt: generate without an assistant"
            )

    def _known(self, cache: Any, ids: Tensor) -> Prompt:
        """What the cache began with. Raises EditError if that is not known."""
        prompt = self._of_cache.get(cache)
        if prompt is None:
            raise EditError(
                "the call goes on from a cache that was filled without these edits, so that its "
                "keys and values are those of other residuals; fill it inside the `with` block"
            )
        if len(ids) != len(prompt.frame.ids):
            raise EditError(
                f"the call has {len(ids)} rows, and its cache began with {len(prompt.frame.ids)}"
            )
        if self._depend and ids.shape[1] > 1:
            raise EditError(
                f"{self._depend} depend on where the prompt ends, and "
                f"{ids.shape[1]} tokens were added to a cache at once, which may be more of the "
                "prompt or candidates of an assistant: give the whole prompt in one call, and "
                "generate without prefill chunks and without an assistant"
            )
        return prompt

    def _begun(self, positions: Tensor) -> Frame:
        """The frame of a prompt at positions [b s], but for its BOS tokens."""
        b, length = len(positions), (positions >= 0).sum(1)
        n_template = self._template_tokens or 0
        if "template" in self._by_prompt and bool((length <= n_template).any()):
            raise PositionError(
                f"template_tokens is {n_template}, but the shortest prompt has "
                f"{int(length.min())} tokens in all"
            )
        return Frame(
            ids=tuple(f"row {row}" for row in range(b)),
            groups=("" if self._group is None else self._group,) * b,
            positions=positions,
            prompt_length=length,
            bos=torch.zeros_like(length, dtype=torch.bool),
            template=length - n_template,
        )


def _positions(given: dict[str, Any], ids: Tensor, n_cached: int) -> Tensor:
    """[b s] absolute positions, -1 for padding."""
    b, s = ids.shape
    mask = given.get("attention_mask")
    if mask is None:
        positions = torch.arange(n_cached, n_cached + s, device=ids.device).expand(b, s)
    elif not isinstance(mask, Tensor) or mask.shape != (b, n_cached + s):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise EditError(
            f"expected an attention mask [{b}, {n_cached + s}], a 1 for each token in the cache "
            f"and the call, got {shape}; masks of other shapes, as static caches make them, do not "
            "tell where padding is: use the default, dynamic cache"
        )
    else:
        real = mask.to(ids.device) != 0
        positions = torch.where(real, real.long().cumsum(1) - 1, -1)[:, n_cached:]
    named = given.get("position_ids")
    if isinstance(named, Tensor) and named.ndim == 2:
        named = named.to(ids.device).expand(b, s)
        wrong = (named != positions) & (positions >= 0)
        if wrong.any():
            row = int(wrong.any(1).int().argmax())
            raise EditError(
                f"row {row}: position_ids are {named[row][:8].tolist()}…, but by the attention "
                f"mask and the cache the positions are {positions[row][:8].tolist()}…; transformers"
                " numbers so when it generates from prompts padded on the right: pad on the left"
            )
    return positions


def _bos_ids(model: PreTrainedModel) -> list[int]:
    """The ids of beginning-of-sequence tokens, by the model's configurations."""
    generation = getattr(model, "generation_config", None)
    configs = (model.config, model.config.get_text_config(), generation)
    found: set[int] = set()
    for config in configs:
        named = getattr(config, "bos_token_id", None)
        found |= {named} if isinstance(named, int) else set(named or ())
    return sorted(found)
