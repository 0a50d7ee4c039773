"""Attention over a prefix kept apart equals attention over everything in one tensor."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, is_tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.batch import Example
from holdfast.prefix import ConstantCache, PrefixCache, attend, attending
from holdfast.replay import Replay
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import WORDS, tiny_model, tiny_subject, tiny_tokenizer

BEFORE, AFTER, HEADS, WIDTH = 5, 3, 4, 8


def usual(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, cap: float | None
) -> Tensor:
    """The formula over one tensor, head by head in float64."""
    shared = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query, dtype=torch.float64)
    for row, head in product(range(len(query)), range(query.shape[1])):
        k, v = key[row, head // shared].double(), value[row, head // shared].double()
        scores = query[row, head].double() @ k.T * scaling
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores[~allowed[row]] = -torch.inf
        out[row, head] = scores.softmax(-1) @ v
    return out.transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("additive", [True, False])
def test_it_equals_attention_over_one_tensor(
    groups: int, softcap: float | None, additive: bool
) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, HEADS, AFTER, WIDTH, requires_grad=True)
    key, value = torch.randn(2, 2, groups, BEFORE + AFTER, WIDTH).requires_grad_(True)
    allowed = torch.ones(2, AFTER, BEFORE + AFTER, dtype=torch.bool).tril(BEFORE)
    allowed[1, :, :2] = False  # a row with padding
    mask = allowed[:, None]
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    cache = PrefixCache([None, (key[:, :, :BEFORE].detach(), value[:, :, :BEFORE].detach())])
    module = nn.Module()
    module.layer_idx = 1  # type: ignore[assignment]
    with attending(tiny_subject().model, cache):
        got, _ = attend(
            module, query, key[:, :, BEFORE:], value[:, :, BEFORE:], mask, 0.3, softcap, dropout=0.0
        )
    expected = usual(query, key, value, allowed, 0.3, softcap)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)

    weight = torch.randn_like(got)
    mine = torch.autograd.grad((got * weight).sum(), (query, key, value))
    other = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    torch.testing.assert_close(mine[0], other[0], atol=1e-6, rtol=1e-4)
    for ours, theirs in zip(mine[1:], other[1:], strict=True):
        torch.testing.assert_close(ours[:, :, BEFORE:], theirs[:, :, BEFORE:], atol=1e-6, rtol=1e-4)
        assert not ours[:, :, :BEFORE].any(), "nothing is derived with respect to the prefix"


def test_rows_are_brought_from_where_the_prefix_waits_to_where_their_block_computes() -> None:
    keys, values = torch.randn(2, 3, 1, 2, 4)
    meta = torch.device("meta")  # the one device beside the host that every machine has
    own = PrefixCache([None, (keys, values)], [None, meta]).rows(torch.tensor([2, 0, 0, 1]))
    assert own.prefix[0] is None
    k, v = own.of(1)
    assert k.device == v.device == meta and k.shape == (4, 1, 2, 4)
    here = PrefixCache([None, (keys, values)]).rows(torch.tensor([2, 0]))
    assert torch.equal(here.of(1)[1], values[[2, 0]])
    assert isinstance(ConstantCache([(keys, values)]).rows(torch.tensor([0])), ConstantCache)


def test_the_model_attends_as_ever_afterwards() -> None:
    model = tiny_subject().model
    usual = model.config._attn_implementation
    cache = PrefixCache([(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))])
    with pytest.raises(RuntimeError, match="on the way"), attending(model, cache):
        assert model.config._attn_implementation != usual
        raise RuntimeError("on the way")
    assert model.config._attn_implementation == usual
    with attending(model, PrefixCache(())):
        assert model.config._attn_implementation == usual, "nothing to keep apart"


def test_rows_are_copied_when_a_block_asks_for_them_and_once() -> None:
    keys, values = torch.randn(2, 5, 1, 2, 4)
    whole = PrefixCache([(keys, values), (keys + 1, values + 1)])
    own = whole.rows(torch.tensor([4, 1, 1, 3]))
    first = own.of(0)
    assert own.of(0)[0] is first[0], "a step's blocks share what the step before has copied"
    kept = {t.data_ptr() for pair in vars(own)["_own"].values() for t in pair}
    assert kept == {t.data_ptr() for t in first}, "the other block has not asked"
    fewer = own.rows(torch.tensor([3, 0]))  # of one that was asked for, and of one that was not
    for layer in (0, 1):
        assert torch.equal(fewer.of(layer)[0], keys[[3, 4]] + layer)
        assert torch.equal(fewer.of(layer)[1], values[[3, 4]] + layer)
    alone = ConstantCache.like(fewer)
    assert isinstance(alone, ConstantCache) and alone.of(1)[0] is fewer.of(1)[0]


class Largest(TorchDispatchMode):
    """The most numbers of any one tensor that is made, views of others left out."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_tensor(t)}
        made = func(*args, **(kwargs or {}))
        for t in filter(is_tensor, tree_leaves(made)):
            if t.untyped_storage().data_ptr() not in given:
                self.n = max(self.n, t.numel())
        return made


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_neither_a_step_nor_its_backward_pass_copies_the_prefix(n_kv_heads: int) -> None:
    """Of the last of 100 tokens: nothing is made that is as large as one block's keys of them."""
    tokenizer: Any = tiny_tokenizer()
    model: Any = tiny_model(n_kv_heads=n_kv_heads)
    subject = Subject.of("tiny", model, tokenizer, {})
    texts = [" ".join(WORDS[(i + j) % 40] for j in range(99 - i % 2)) for i in range(6)]
    batch = subject.batch(
        [Example(f"p{i}", text, "w1", ("w2",), ("w3",), f"p{i}") for i, text in enumerate(texts)]
    )
    replay = Replay.record(subject, batch, Site(1), batch.positions[:, -1:])
    replay = replay.rows(torch.tensor([0, 1, 1, 2, 3, 4, 5, 5]))  # lanes, some of one prompt
    delta = torch.randn(8, 1, 32, requires_grad=True)
    replay.logits(delta)  # rows are brought when a block first asks for them
    keys = min(own[0].numel() for own in replay.prefix if own is not None)
    with Largest() as made:
        torch.autograd.grad(replay.logits(delta).sum(), delta)
    assert 0 < made.n < keys
