"""The k-th value of a TopK, wherever its encoder lies; products with half-precision matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.capacity import total_bytes
from holdfast.errors import SAEError
from holdfast.saes import encoders, products, tensors
from holdfast.saes.encoders import Held, Streamed, kept
from holdfast.saes.inputs import Inputs
from holdfast.saes.products import product
from holdfast.saes.rivals import Rivals
from holdfast.saes.sources import Folder
from holdfast.saes.stored import StoredSAE
from holdfast.sites import Site
from tests.sae_files import CASES, SITE, Case, write_saelens
from tests.unit.test_forecast import Live

HERE = Site.parse(SITE)
ALL, SOME, NONE = 1.0, 0.75, 0.0
"""Shares of a memory that holds the encoder in float32: it, a half-precision one, nothing."""


def opened(folder: Path) -> StoredSAE:
    """Anew, so that nothing of it is in memory."""
    source = Folder(path=str(folder))
    return source.load(Site.parse(source.layout().site or SITE))


def laid(folder: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> Rivals:
    stored = opened(folder)
    exact = float(4 * stored.d_model * stored.n_features)
    monkeypatch.setattr(encoders, "total_bytes", lambda device: exact)
    monkeypatch.setattr(encoders, "SHARE", share)
    return stored.rivals()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_the_kth_value_is_the_same_wherever_the_encoder_lies(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = case(tmp_path)
    if opened(folder).k is None:
        with pytest.raises(AssertionError, match="only in a TopK"):
            opened(folder).rivals()
        return
    x = reference.residuals(32).float()
    sae = opened(folder).full()
    expected, half = sae.kth(x), sae.W_enc.dtype.itemsize == 2
    stored = opened(folder).layout.tensors[opened(folder).layout.W_enc].dtype
    kinds = {ALL: Held, SOME: Held if stored.itemsize == 2 else Streamed, NONE: Streamed}
    assert half <= (stored.itemsize == 2)
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 300)  # so that there are several blocks
    for share, kind in kinds.items():
        rivals = laid(folder, share, monkeypatch)
        assert type(rivals.encoder) is kind
        if isinstance(rivals.encoder, Held):
            assert rivals.encoder.W.dtype == (torch.float32 if share == ALL else stored)
        torch.testing.assert_close(rivals.limit(x), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rivals.limit(x.double()).float(), expected, rtol=1e-5, atol=1e-6)


def test_some_of_the_features_are_as_many_rivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first n of a Matryoshka SAE are an SAE of their own; the others do not compete."""
    write_saelens(tmp_path, "topk")
    source = Folder(path=str(tmp_path), n_features=30)
    x = torch.randn(20, source.load(HERE).d_model)
    for share in (ALL, NONE):
        monkeypatch.setattr(encoders, "SHARE", share)
        expected = source.load(HERE).full().kth(x)
        rivals = source.load(HERE).rivals()
        assert rivals.encoder.shape[1] == 30
        torch.testing.assert_close(rivals.limit(x), expected, rtol=1e-6, atol=1e-6)


def test_what_is_streamed_is_never_whole_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it is opened nor when a limit is computed, whatever the width."""
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 4096)
    monkeypatch.setattr(tensors, "BLOCK", 16_384)
    peaks = []
    for n in (4096, 16_384):
        write_saelens(tmp_path / str(n), "topk", n=n)
        with Live() as live:
            rivals = laid(tmp_path / str(n), NONE, monkeypatch)
            rivals.limit(torch.randn(5, opened(tmp_path / str(n)).d_model))
        peaks.append(live.peak - 4 * 4 * n)  # biases, which are one number a feature
    assert peaks[1] < max(1.1 * peaks[0], 80_000)


@pytest.mark.parametrize("share", [ALL, NONE])
@pytest.mark.parametrize("name", ["W_enc", "b_enc"])
def test_rivals_that_are_no_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, name: str
) -> None:
    write_saelens(tmp_path, "topk")
    path = tmp_path / "sae_weights.safetensors"
    held = load_file(path)
    held[name].view(-1)[-1] = torch.nan
    save_file(held, path)
    with pytest.raises(SAEError, match=f"{name} has NaN or infinite values"):
        laid(tmp_path, share, monkeypatch)


def test_an_sae_in_memory_is_not_read_again(tmp_path: Path) -> None:
    write_saelens(tmp_path, "topk")
    stored = opened(tmp_path)
    whole = stored.full()
    rivals = stored.rivals()
    assert isinstance(rivals.encoder, Held) and rivals.encoder.W is whole.W_enc


def test_how_an_encoder_is_kept() -> None:
    """A quarter of the memory: 1M x 2304 in bfloat16 on 80, 23 and 16 GB."""
    d, n = 2304, 1 << 20
    assert [kept(d, n, 2, gb * 1e9) for gb in (80, 23, 16)] == [4, 2, 0]
    assert [kept(d, n, 4, gb * 1e9) for gb in (80, 23, 16)] == [4, 0, 0]
    assert total_bytes("cpu") > 1e8


# ---------------------------------------------------------------------- columns and rows of files


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_run_of_rows_or_columns_is_that_of_the_whole(case: Case, tmp_path: Path) -> None:
    folder, _ = case(tmp_path)
    layout = opened(folder).layout
    for name in (layout.W_enc, layout.W_dec):
        stored = layout.tensors[name]
        whole = stored.read()
        for axis, n in enumerate(whole.shape):
            for own in (slice(0, 1), slice(3, n - 2), slice(0, n)):
                if stored.in_parts:
                    expected = whole[own] if axis == 0 else whole[:, own]
                    assert torch.equal(stored.between(own, axis), expected)


def test_a_file_that_ends_inside_of_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(bytes(40))
    stored = tensors.InFile(path, 0, (3, 5), torch.float32)
    assert torch.equal(stored.between(slice(0, 2), 0), torch.zeros(2, 5))
    for own in (slice(0, 1), slice(1, 5)):
        with pytest.raises(SAEError, match="ends too early"):
            stored.between(own, 1)


# ---------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 90), (90, 7)])
def test_a_product_is_that_of_the_cast_matrix_with_its_derivatives(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(products, "CACHED", 64)  # several blocks
    W = torch.randn(shape).to(dtype)
    x = torch.randn(3, 2, shape[0], dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, shape[1], dtype=torch.float64, requires_grad=True)
    made, expected = product(x, W), x @ W.double()
    torch.testing.assert_close(made, expected)
    # A gradient, what it is multiplied by, and many of them at once.
    (pulled,) = torch.autograd.grad(made, x, y, create_graph=True)
    torch.testing.assert_close(pulled, y @ W.double().T)
    (pushed,) = torch.autograd.grad(pulled, y, x.detach())
    torch.testing.assert_close(pushed, expected.detach())
    ys = torch.randn(4, *y.shape, dtype=torch.float64)
    (many,) = torch.autograd.grad(product(x, W), x, ys, is_grads_batched=True)
    torch.testing.assert_close(many, ys @ W.double().T)


def test_a_product_keeps_no_cast_matrix_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CACHED", 4096)
    W = torch.randn(32, 50_000).bfloat16()
    x = torch.randn(4, 32, requires_grad=True)
    with Live(W, x) as live:
        product(x, W).sum().backward()
    codes = 4 * 50_000 * 4
    assert live.peak < 4 * codes < 2 * W.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kth_value_casts_no_more_than_stays_in_a_cache(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Also in float64, of one token, whose pre-activations would leave room for every column."""
    monkeypatch.setattr(products, "CACHED", 4096)
    n, x = 50_000, torch.randn(1, 32, dtype=torch.float64)
    W, zeros = torch.randn(n, 32).to(dtype), torch.zeros(n)
    rivals = Rivals(Held(W.T), zeros, torch.zeros(32), False, 5, Inputs())
    with Live(W, x, zeros) as live:
        limit = rivals.limit(x)
    assert live.peak < W.nbytes
    top = (x @ W.T.double()).topk(6).values[:, 4:]
    torch.testing.assert_close(limit, top.mean(-1, keepdim=True))


def test_nothing_is_computed_in_half_precision() -> None:
    with pytest.raises(AssertionError, match=r"computed in torch\.bfloat16"):
        product(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(2, 3))
