"""A slice of a stored SAE is the same as the whole, and costs what is in it."""

from __future__ import annotations

import gc
import json
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.batch import Frame
from holdfast.errors import FeatureError, SAEError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.saes import tensors
from holdfast.saes.bank import FeatureBank
from holdfast.saes.pieces import encoded
from holdfast.saes.sae import guarantee_of
from holdfast.saes.sources import Folder
from holdfast.saes.stored import StoredSAE
from holdfast.saes.tensors import InFile, read_tensors
from holdfast.sites import Site
from tests.sae_files import (
    CASES,
    SITE,
    Case,
    D,
    N,
    Reference,
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_saelens,
)

IDS = (5, 0, N - 1, 17, 40)


def opened(folder: Path) -> StoredSAE:
    source = Folder(path=str(folder))
    return source.load(Site.parse(source.layout().site or SITE))


def sliced() -> list[Any]:
    return [
        pytest.param(
            case, id=case.name, marks=pytest.mark.proves("sae formats", case.row, "sliced")
        )
        for case in CASES
    ]


def frame(n_rows: int, *groups: str) -> Frame:
    """A bank asks for the groups alone."""
    groups, nothing = groups or ("*",) * n_rows, torch.zeros(n_rows)
    return Frame(groups, groups, nothing[:, None], nothing, nothing, nothing)


@pytest.mark.parametrize("case", sliced())
def test_a_bank_of_a_stored_sae_computes_what_the_whole_does(case: Case, tmp_path: Path) -> None:
    folder, reference = case(tmp_path)
    sae, x = opened(folder), reference.residuals().reshape(4, 16, -1)
    entry = SiteFeatures(site=str(sae.site), ids=IDS)
    bank = FeatureBank.of(sae, FeatureSet(entries=(entry,), source="test"))
    z = reference.encode(x)
    assert (z[..., IDS] > 0).any(), "none of these features fires"
    ours = bank.activations(x, frame(4))
    assert np.abs(ours.numpy() - z[..., IDS]).max() <= 1e-6 * z.max()
    assert np.array_equal(ours.numpy() > 0, z[..., IDS] > 0)
    # A change of these codes changes the residual as it changes the reconstruction.
    moved = z.copy()
    moved[..., IDS] = moved[..., IDS] * 0.5 + 0.25
    wanted = reference.decode(moved, x) - reference.decode(z, x)
    change = bank.decode(torch.as_tensor(moved - z)[..., IDS].float(), x, frame(4))
    assert np.abs(change.numpy() - wanted).max() <= 2e-6 * np.abs(wanted).max()
    assert bank.guarantee == sae.guarantee == guarantee_of(sae.inputs, sae.k)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_a_slice_from_the_file_is_a_slice_of_the_whole(case: Case, tmp_path: Path) -> None:
    folder, _ = case(tmp_path)
    sae = opened(folder)
    one, two = sae.take(IDS), sae.full().take(IDS)
    for name, tensor in vars(one).items():
        other = getattr(two, name)
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, other), name
            assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        else:
            assert tensor == other == IDS


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_the_whole_in_pieces_encodes_as_it_does_at_once(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = case(tmp_path)
    sae, x = opened(folder), torch.as_tensor(reference.residuals()).reshape(64, -1).double()
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 64 * 10)
    for one in (sae, sae.full()):
        pieces = list(encoded(one, x))
        assert len(pieces) == -(-N // 10), "ten features at a time"
        assert [i for piece in pieces for i in piece.own.ids] == list(range(N))
        z = torch.cat([piece.z for piece in pieces], 1).numpy()
        wanted = reference.encode(reference.residuals()).reshape(64, -1)
        assert np.abs(z - wanted).max() <= 1e-6 * wanted.max()
        on = torch.cat([piece.p > piece.limit for piece in pieces], 1).numpy()
        assert (on >= (wanted > 0)).all(), "a feature that is on has passed its limit"
    assert not sae._taken, "they are read and not kept"


def test_groups_are_slices_of_their_own(tmp_path: Path) -> None:
    reference = write_saelens(tmp_path, "gated")
    x = reference.residuals().reshape(4, 16, -1)
    entries = tuple(
        SiteFeatures(site=SITE, group=group, ids=ids)
        for group, ids in (("a", (3, 8, 1)), ("b", (50,)))
    )
    bank = FeatureBank.of(opened(tmp_path), FeatureSet(entries=entries, source="test"))
    z = bank.activations(x, frame(4, "a", "b", "b", "a")).numpy()
    whole = reference.encode(x)
    for row, ids in ((0, (3, 8, 1)), (1, (50,)), (2, (50,)), (3, (3, 8, 1))):
        assert np.allclose(z[row, :, : len(ids)], whole[row][:, ids], atol=1e-6)
        assert (z[row, :, len(ids) :] == 0).all()


@pytest.mark.parametrize("ids", [(0, N), (-1,), (1, 2, 1)])
def test_ids_are_checked_before_anything_is_read(tmp_path: Path, ids: tuple[int, ...]) -> None:
    write_saelens(tmp_path)
    with pytest.raises(FeatureError, match=r"out of range|given twice"):
        opened(tmp_path).take(ids)


# --- How it is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("block", [1, 1000, 8 << 20])
def test_an_npz_may_be_compressed_and_of_either_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fortran: bool, compressed: bool, block: int
) -> None:
    monkeypatch.setattr(tensors, "BLOCK", block)
    reference = write_gemma_scope(tmp_path, compressed=compressed, fortran=fortran)
    stored = read_tensors(tmp_path / "params.npz")
    for name in ("W_enc", "W_dec"):
        wanted = reference.tensors[name]
        assert torch.equal(stored[name].read(), wanted)
        ids = [7, 0, 30, 7]
        assert torch.equal(stored[name].take(ids, 0), wanted[ids])
        assert torch.equal(stored[name].take(ids, 1), wanted[:, ids])
        for axis, some in ((0, wanted[5:9]), (1, wanted[:, 5:9])):
            assert torch.equal(stored[name].take(range(5, 9), axis), some)
    assert torch.equal(stored["b_dec"].read(), reference.tensors["b_dec"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [1, 700])
def test_safetensors_and_torch_files_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(tensors, "BLOCK", block)
    llama = write_llama_scope(tmp_path / "a", dtype=dtype)
    stored = read_tensors(tmp_path / "a" / "checkpoints" / "final.safetensors")
    write_dictionary_learning(tmp_path / "b", "AutoEncoder", dtype=dtype)
    other = read_tensors(tmp_path / "b" / "ae.pt")
    for tensor, wanted in (
        (stored["encoder.weight"], llama.tensors["W_enc"].T),
        (stored["decoder.weight"], llama.tensors["W_dec"].T),
        (other["encoder.weight"], torch.load(tmp_path / "b" / "ae.pt")["encoder.weight"]),
    ):
        assert tensor.dtype == dtype and tensor.shape == tuple(wanted.shape)
        assert torch.equal(tensor.read(), wanted)
        for axis in (0, 1):
            index = torch.tensor([3, 1, 2])
            assert torch.equal(tensor.take([3, 1, 2], axis), wanted.index_select(axis, index))


def test_tensors_of_torch_are_found_in_the_file_itself(tmp_path: Path) -> None:
    """However they lie in their storages, and where they do not, through a map of the file."""
    big = torch.arange(60.0).reshape(6, 10)
    kept = {
        "whole": big,
        "turned": big.T,
        "part": big[2:5],
        "again": big,
        "odd": big[:, ::3],
        "column": big[:, 1],
        "count": torch.tensor(7),
        "half": torch.arange(8).bfloat16(),
    }
    torch.save(kept | {"note": "text", "nested": {"more": torch.zeros(3)}}, tmp_path / "x.pt")
    stored = read_tensors(tmp_path / "x.pt")
    assert set(stored) == set(kept)
    for name, tensor in kept.items():
        assert torch.equal(stored[name].read(), tensor), name
        assert isinstance(stored[name], InFile) is (name not in ("odd", "column")), name
        for axis in range(tensor.dim() if tensor.dim() == 2 else 0):
            index = torch.tensor([2, 0])
            assert torch.equal(stored[name].take([2, 0], axis), tensor.index_select(axis, index))


def test_rows_of_a_decoder_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_saelens(tmp_path, n=4096)
    sae, read = opened(tmp_path), 0
    fill = InFile._fill

    def counted(self: InFile, file: Any, out: Tensor) -> None:
        nonlocal read
        read += out.nbytes
        fill(self, file, out)

    monkeypatch.setattr(InFile, "_fill", counted)
    sae.take(IDS)
    encoder, decoder, biases = 4 * D * 4096, 4 * D * len(IDS), 4 * (4096 + D)
    assert read == encoder + decoder + biases, "columns need the whole matrix, rows only themselves"
    read = 0
    sae.take(range(100, 200))
    assert read == 2 * 4 * D * 100 + biases, "but neighboring columns a piece of every row"


def test_the_whole_is_read_once_and_freed(tmp_path: Path) -> None:
    write_saelens(tmp_path, "topk")
    sae = opened(tmp_path)
    whole = sae.full()
    assert sae.full() is whole
    gone = weakref.ref(whole)
    del whole
    gc.collect()
    assert gone() is None
    assert torch.equal(sae.full().W_enc, sae.full().W_enc)


def test_a_slice_keeps_no_file_open(tmp_path: Path) -> None:
    """The files can be deleted, or replaced, after what is needed was read."""
    writers: dict[str, Callable[..., Reference]] = {
        "sae_weights.safetensors": write_saelens,
        "params.npz": write_gemma_scope,
        "ae.pt": write_dictionary_learning,
    }
    for file, write in writers.items():
        folder = tmp_path / file
        write(folder)
        sae = opened(folder)
        own, whole = sae.take(IDS), sae.full()
        before = own.W_enc.clone(), whole.W_dec.clone(), whole.b_dec.clone()
        (folder / file).write_bytes(b"\0" * (folder / file).stat().st_size)
        assert all(
            torch.equal(a, b)
            for a, b in zip(before, (own.W_enc, whole.W_dec, whole.b_dec), strict=True)
        )


def holes(path: Path, d: int, n: int) -> None:
    """A SAELens folder whose matrices are holes of the file, so that it costs no disk."""
    path.mkdir()
    shapes = {"W_enc": [d, n], "W_dec": [n, d], "b_enc": [n], "b_dec": [d]}
    header, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "sae_weights.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + begin)
    said = {"architecture": "standard", "apply_b_dec_to_input": True, "hook_name": SITE}
    (path / "cfg.json").write_text(json.dumps(said))


MEASURE = """
import sys
from holdfast.saes.sources import Folder
from holdfast.sites import Site

def resident(which):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) * 1024

Folder(path=sys.argv[2]).load(Site.parse(sys.argv[3])).take(range(16))  # what is imported late
open("/proc/self/clear_refs", "w").write("5")  # the peak begins again
before = resident("VmRSS")
sae = Folder(path=sys.argv[1]).load(Site.parse(sys.argv[3]))
own = sae.take(range(0, sae.n_features, sae.n_features // 16))
assert len(own.ids) == 16
print(resident("VmHWM") - before)
"""


@pytest.mark.slow  # processes of their own, with torch
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_width(tmp_path: Path) -> None:
    """1.2 GB of a 65k-wide SAE for a 2304-wide model, of which 16 features are 0.3 MB."""
    holes(tmp_path / "small", 2304, 1024)
    grown = {}
    for n in (16_384, 65_536):
        holes(tmp_path / str(n), 2304, n)
        command = [sys.executable, "-c", MEASURE]
        done = subprocess.run(
            [*command, str(tmp_path / str(n)), str(tmp_path / "small"), SITE],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown[n] = int(done.stdout)
    assert max(grown.values()) <= 32 << 20, grown
    assert abs(grown[65_536] - grown[16_384]) <= 8 << 20, grown


def test_a_threshold_never_set_is_found_in_a_slice_too(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path, threshold=torch.full((N,), -1.0))
    sae = opened(tmp_path)
    for read in (sae.full, lambda: sae.take([0])):
        with pytest.raises(SAEError, match="thresholds are negative"):
            read()


def test_slices_that_were_read_stay_until_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = CASES[0](tmp_path)
    sae = opened(folder)
    monkeypatch.setattr("holdfast.saes.stored.KEPT", 2)
    first = sae.take((1, 2))
    assert sae.take((1, 2)) is first
    assert sae.take((2, 1)) is not first and sae.take((2, 1)).ids == (2, 1)
    sae.take((3,))
    again = sae.take((1, 2))
    assert again is not first and torch.equal(again.W_enc, first.W_enc)
    assert sae.to("cpu").take((1, 2)) is not again, "each device has its own"
