"""What an SAE's width costs: nothing in a step, blocks of codes where all features are run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.discovery.attribution import Attribution
from holdfast.discovery.tpp_effect import mean_codes
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.forecast.memory import CODES
from holdfast.saes import tensors
from holdfast.saes.bank import FeatureBank
from holdfast.saes.encoders import Held
from holdfast.saes.inputs import Inputs
from holdfast.saes.rivals import Rivals
from holdfast.saes.sae import SAE, blocks_of, is_finite, kth_limit
from holdfast.saes.sources import Folder
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import random_sae
from tests.sae_files import SITE as SITE_NAME
from tests.sae_files import write_dictionary_learning, write_gemma_scope, write_llama_scope
from tests.unit.test_forecast import Live

SITE = Site(2)
IDS = (1, 5, 9)
SMALL = 4096
"""Codes held at a time, in these tests."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.chunks.ENTRIES", SMALL)


def kinds(n: int = 64) -> Iterator[SAE]:
    plain = random_sae(SITE, n_features=n)
    yield plain
    yield random_sae(SITE, n_features=n, jump=False)
    yield replace(random_sae(SITE, n_features=n, jump=False), k=7)
    yield replace(plain, inputs=Inputs(scale=3.0))
    yield replace(plain, gain=torch.rand(n) + 0.5, offset=torch.randn(n))


def bank_of(sae: SAE) -> FeatureBank:
    entry = SiteFeatures(site=str(SITE), ids=IDS)
    return FeatureBank.of(sae, FeatureSet(entries=(entry,), source="test"))


@pytest.mark.parametrize(("n", "tokens"), [(1, 1), (10, 1), (10, 999), (4097, 3), (4096, 0)])
def test_blocks_are_all_features_once_and_no_larger_than_said(
    small: None, n: int, tokens: int
) -> None:
    found = [i for own in blocks_of(n, tokens) for i in range(own.start, own.stop)]
    assert found == list(range(n))
    assert all((own.stop - own.start - 1) * tokens < SMALL for own in blocks_of(n, tokens))


@pytest.mark.parametrize("k", [1, 3, 20, 99])
@pytest.mark.parametrize("entries", [1, 60, 1000])
def test_the_kth_value_in_blocks_is_that_of_a_sort(
    monkeypatch: pytest.MonkeyPatch, k: int, entries: int
) -> None:
    """Whole numbers, so that there is no rounding, and many ties."""
    monkeypatch.setattr("holdfast.chunks.ENTRIES", entries)
    generator = torch.Generator().manual_seed(k)
    x, W, b = (
        torch.randint(-2, 4, shape, generator=generator).double()
        for shape in ((2, 3, 4), (4, 100), (100,))
    )
    p = (x @ W + b).sort(-1, descending=True).values
    expected = (p[..., k - 1].clamp_min(0) + p[..., k].clamp_min(0)) / 2
    rivals = Rivals(Held(W), b, torch.zeros(4), False, k, Inputs())
    assert torch.equal(rivals.limit(x).squeeze(-1), expected)
    assert torch.equal(kth_limit(x @ W + b, k).squeeze(-1), expected)


def test_blocks_change_no_code_and_no_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 11, 32)
    for sae in kinds():
        whole = sae.encode(x)
        expected = sae.decode(whole, x)
        monkeypatch.setattr("holdfast.chunks.ENTRIES", 300)
        kth = sae.kth(x)
        parts = [sae.encode(x, own, kth) for own in sae.blocks(55)]
        assert len(parts) > 10
        torch.testing.assert_close(torch.cat(parts, -1), whole)
        torch.testing.assert_close(torch.cat([z for _, z in sae.codes(x)], -1), whole)
        torch.testing.assert_close(sae.encode(x, IDS), whole[..., list(IDS)])
        torch.testing.assert_close(sae.reconstruct(x), expected)
        leaf = x.clone().requires_grad_(True)
        torch.testing.assert_close(sae.reconstruct(leaf), expected)
        assert sae.reconstruct(leaf).requires_grad
        monkeypatch.undo()


def test_blocks_change_no_attribution(
    subject: Subject, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(sae: SAE) -> list[Tensor]:
        kind = Attribution()
        return [
            kind.scores(subject, batch, sae),
            kind.firing_rate(subject, batch, sae),
            mean_codes(subject, batch, sae),
        ]

    for sae in kinds():
        expected = found(sae)
        monkeypatch.setattr("holdfast.chunks.ENTRIES", 300)
        for one, two in zip(found(sae), expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        monkeypatch.undo()


# ---------------------------------------------------------------------- bytes

WIDTHS = (4 * SMALL, 16 * SMALL)


def held_by(record: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in vars(record).values() if isinstance(t, Tensor))


@pytest.mark.parametrize("k", [None, 20])
def test_a_clamp_takes_the_same_whatever_the_width(
    small: None, batch: Batch, k: int | None
) -> None:
    """Only |S| columns and rows are there; for the k-th value of a TopK the encoder, once, and
    a block of pre-activations at a time."""
    x, frame, peaks, held = torch.randn(*batch.tokens.shape, 32), batch.frame(), [], []
    for n in WIDTHS:
        sae = replace(random_sae(SITE, n_features=n, jump=False), k=k)
        bank = bank_of(sae)
        held.append(held_by(bank))
        if bank.rivals is not None:
            assert isinstance(bank.rivals.encoder, Held)
            assert bank.rivals.encoder.W is sae.W_enc
            assert held_by(bank.rivals) == 4 * (n + 32)
        edit = FeatureEdit(bank, "set", 1.0)
        leaf = x.clone().requires_grad_(True)
        with Live(leaf, *vars(bank).values(), *vars(sae).values()) as live:
            torch.autograd.grad(edit.apply(SITE, leaf, frame).sum(), leaf)
        peaks.append(live.peak)
    assert held[0] == held[1] == 4 * (2 * 3 * 32 + 4 * 3) + 3
    assert peaks[0] == peaks[1]
    assert peaks[0] < 10 * x.nbytes + (6 * 4 * SMALL if k else 0)


def test_attribution_holds_a_block_of_codes_and_a_score_of_every_feature(
    small: None, subject: Subject, batch: Batch
) -> None:
    """As forecast: beside the graph of the pass, which has no width."""
    beside = []
    for n in WIDTHS:
        sae = random_sae(SITE, n_features=n)
        known = [*vars(sae).values(), *subject.model.parameters(), *subject.model.buffers()]
        with Live(*known, *vars(batch).values()) as live:
            scores = Attribution().scores(subject, batch, sae)
        assert scores.shape == (len(batch), n)
        beside.append(live.peak - 2 * scores.nbytes)
    tokens = batch.tokens.numel()
    assert tokens * WIDTHS[0] > 50 * SMALL, "all codes at once would be much more"
    assert max(beside) < CODES * 4 * SMALL + 400 * 32 * 4 * tokens
    assert max(beside) < 4 * tokens * WIDTHS[0]


@pytest.mark.parametrize(
    ("write", "settings"),
    [
        (write_gemma_scope, {}), (write_gemma_scope, {"fortran": True}),
        (write_gemma_scope, {"compressed": True}), (write_llama_scope, {}),
        (write_dictionary_learning, {}), (write_dictionary_learning, {"dtype": torch.bfloat16}),
        (write_gemma_scope, {"dtype": torch.float16}),
    ],
)  # fmt: skip
def test_the_whole_is_read_with_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, settings: Any
) -> None:
    """Turned or not, and checked for NaN: what is held is the SAE, and small blocks. Matrices in
    half precision take no more than in their file."""
    n = 32_768
    write(tmp_path, n=n, **settings)
    source = Folder(path=str(tmp_path))
    monkeypatch.setattr(tensors, "BLOCK", 50_000)
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 2048)
    stored = source.load(Site.parse(source.layout().site or SITE_NAME))
    with Live() as live:
        sae = stored.full()
    some = 12 * 4 * n + 8 * 4096 * sae.d_model  # vectors, and rows whose lengths are taken
    assert live.peak < held_by(sae) + some
    assert some < 4 * sae.W_enc.numel(), "a matrix in float32 beside it would be seen"
    assert sae.W_enc.dtype == settings.get("dtype", torch.float32)
    monkeypatch.undo()
    ids = range(0, n, 100)
    own = source.load(stored.site).take(ids)
    torch.testing.assert_close(own.W_dec * sae.inputs.scale, sae.rows(torch.as_tensor(ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(3, 5000), (9000, 2), (9000,), (2, 2), (1, 1)])
def test_every_number_is_looked_at_and_none_copied(
    dtype: torch.dtype, bad: float, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape).to(dtype)
    for place in (0, tensor.numel() // 2, tensor.numel() - 1):
        with Live(tensor) as live:
            assert is_finite(tensor) and is_finite(tensor.T if tensor.ndim == 2 else tensor)
        assert live.peak < 100
        made = tensor.clone()
        made.view(-1)[place] = bad
        assert not is_finite(made)
        assert not is_finite(made.T if made.ndim == 2 else made)
    assert is_finite(torch.zeros(0, 3))
