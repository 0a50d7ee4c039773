"""Attention over a prefix kept apart equals attention over everything in one tensor."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from holdfast.prefix import ConstantCache, PrefixCache, attend, attending
from holdfast.testing import tiny_subject

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
