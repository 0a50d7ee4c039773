"""SAE folders: the right SAE at the right site, and every broken or foreign file is a message."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.errors import SAEError
from holdfast.saes.sources import Folder, SAESpec, Shape
from holdfast.saes.tensors import read_tensors
from holdfast.sites import Site
from tests.sae_files import (
    SITE,
    D,
    N,
    Reference,
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_saelens,
    write_sparsify,
)

WEIGHTS = "sae_weights.safetensors"
HERE = Site.parse(SITE)


def folder(path: Path, **changes: Any) -> Folder:
    usual: dict[str, Any] = {"architecture": "jumprelu", "subtract": False}
    write_saelens(path, **(usual | changes))
    return Folder(path=str(path))


def rewritten(path: Path, **changes: Tensor | None) -> Folder:
    """A folder whose tensors were changed after it was written; None removes one."""
    source = folder(path)
    kept = load_file(path / WEIGHTS) | changes
    save_file({name: t for name, t in kept.items() if t is not None}, path / WEIGHTS)
    return source


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write", [write_saelens, write_gemma_scope, write_llama_scope, write_dictionary_learning]
)
def test_the_first_features_are_an_sae_of_their_own(
    tmp_path: Path, write: Callable[..., Any]
) -> None:
    write(tmp_path)
    source = Folder(path=str(tmp_path))
    few = source.model_copy(update={"n_features": 5})
    sae, first = source.load(HERE).full(), few.load(HERE)
    x = torch.randn(7, D)
    assert first.n_features == 5 == first.full().n_features
    torch.testing.assert_close(first.full().preactivations(x), sae.preactivations(x, range(5)))
    torch.testing.assert_close(first.take((4, 1)).W_dec, first.full().take((4, 1)).W_dec)
    assert torch.equal(first.full().W_dec, sae.W_dec[:5])
    assert torch.equal(first.full().b_dec, sae.b_dec)
    assert few.sha256() != source.sha256(), "another SAE"
    assert few.shape() == Shape(5)
    with pytest.raises(SAEError, match=f"{N + 1} asks for more than the {N} features"):
        source.model_copy(update={"n_features": N + 1}).load(HERE)


def test_a_threshold_of_a_standard_sae_is_not_applied(tmp_path: Path) -> None:
    write_saelens(tmp_path, "standard")
    save_file(load_file(tmp_path / WEIGHTS) | {"threshold": torch.ones(N)}, tmp_path / WEIGHTS)
    sae = Folder(path=str(tmp_path)).load(HERE).full()
    assert torch.equal(sae.threshold, torch.zeros(N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_computed_with_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = folder(tmp_path, dtype=dtype).load(HERE).full()
    half = dtype.itemsize == 2
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        assert tensor.dtype == dtype
        as_stored = half and name in ("W_enc", "W_dec")
        assert getattr(sae, name).dtype == (dtype if as_stored else torch.float32)
        assert torch.equal(getattr(sae, name).float(), tensor.float())
    assert sae.encode(torch.ones(2, D, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_site_by_another_name_is_the_same_site(tmp_path: Path) -> None:
    assert folder(tmp_path / "a", site="blocks.2.hook_resid_pre").load(HERE).site == HERE
    old = folder(tmp_path / "b", version=5)  # before SAELens 6 it stood at the top
    assert old.load(HERE).site == HERE
    oldest = folder(tmp_path / "c", version=5, hook_name=..., hook_point=SITE)
    assert oldest.load(HERE).site == HERE


def test_the_hash_is_of_the_contents_and_not_of_the_path(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    assert one.sha256() == two.sha256()
    changed, retold = folder(tmp_path / "three", seed=1), folder(tmp_path / "four", subtract=True)
    assert len({one.sha256(), changed.sha256(), retold.sha256()}) == 3
    (tmp_path / "two" / "quality.json").write_text("{}")
    save_file({"sparsity": torch.zeros(N)}, tmp_path / "two" / "sparsity.safetensors")
    assert one.sha256() == two.sha256(), "notes beside the SAE are no part of it"


def test_how_residuals_enter_is_part_of_the_hash(tmp_path: Path) -> None:
    """It can be said beside the files: in the source, or, for Gemma's embeddings, by the path."""
    folder(tmp_path / "a")
    path = str(tmp_path / "a")
    sources = [
        Folder(path=path),
        Folder(path=path, center=True),
        Folder(path=path, scale=2.0),
        Folder(path=path, scale=2.0, center=True),
    ]
    assert len({source.sha256() for source in sources}) == 4
    assert Folder(path=path, center=False, scale=1.0).sha256() == sources[0].sha256()
    for inside in ("layer_0", "embedding"):
        write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / inside / "width_16k")
    block, embedding = (
        Folder(path=str(tmp_path / "gemma-scope-2b-pt-res" / inside / "width_16k"))
        for inside in ("layer_0", "embedding")
    )
    assert block.sha256() != embedding.sha256()


def test_what_the_source_says_of_the_input_wins(tmp_path: Path) -> None:
    folder(tmp_path, center=True)
    path = str(tmp_path)
    assert Folder(path=path).load(HERE).inputs.center
    assert not Folder(path=path, center=False).load(HERE).inputs.center
    scaled = Folder(path=path, scale=3.0).load(HERE)
    assert (scaled.inputs.center, scaled.inputs.scale) == (True, 3.0)


def test_a_spec_keeps_its_source_through_json(tmp_path: Path) -> None:
    spec = SAESpec.model_validate(
        {"site": "model.layers.1", "source": {"kind": "folder", "path": str(tmp_path)}}
    )
    assert spec.site == SITE
    again = SAESpec.model_validate(spec.model_dump(mode="json"))
    assert again == spec and isinstance(again.source, Folder)


def test_only_folders_and_releases_are_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'foldr'.*did you mean 'folder'"):
        SAESpec.model_validate({"site": SITE, "source": {"kind": "foldr", "path": "x"}})


# --- What is refused ------------------------------------------------------------------------------


def test_a_folder_without_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="architecture 'not said' is not supported"):
        folder(tmp_path, architecture="standard")
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        del cfg["architecture"]
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        Folder(path=str(tmp_path)).load(HERE)


def test_an_unfolded_scaling_factor_is_applied_or_refused(tmp_path: Path) -> None:
    """SAELens before 6 could keep a factor for every feature beside the weights."""
    factor = torch.linspace(0.5, 2.0, N)
    for said in (True, False):
        path = tmp_path / str(said)
        write_saelens(path, "standard", version=5, finetuning_scaling_factor=said)
        save_file(load_file(path / WEIGHTS) | {"scaling_factor": factor}, path / WEIGHTS)
    with pytest.raises(SAEError, match=r"scaling_factor that is not 1 while cfg.json says no"):
        Folder(path=str(tmp_path / "False")).load(HERE)
    reference = write_saelens(tmp_path / "plain", "standard")
    sae = Folder(path=str(tmp_path / "True")).load(HERE).full()
    x = reference.residuals()
    z = torch.as_tensor(reference.encode(x))
    assert torch.allclose(sae.encode(x).double(), z, atol=1e-5)  # codes are those before it
    back = (z * factor) @ reference.tensors["W_dec"].double() + reference.tensors["b_dec"]
    assert torch.allclose(sae.decode(sae.encode(x)).double(), back, atol=1e-5)


@pytest.mark.parametrize("how", ["covariance_whitening", "something"])
def test_inputs_normalized_otherwise_are_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(SAEError, match=f"normalize_activations '{how}' is not supported; known"):
        folder(tmp_path, norm=how).load(HERE)


def test_whether_b_dec_is_subtracted_is_never_guessed(tmp_path: Path) -> None:
    """SAELens 6 always says it; before 6 it was left out as long as there was no choice."""
    with pytest.raises(SAEError, match="does not say apply_b_dec_to_input"):
        folder(tmp_path / "new", apply_b_dec_to_input=...).load(HERE)
    old = folder(tmp_path / "old", architecture="standard", version=5, apply_b_dec_to_input=...)
    assert old.load(HERE).full().subtract_b_dec


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
@pytest.mark.parametrize("version", [5, 6])
def test_an_sae_of_another_site_is_refused(tmp_path: Path, site: str, version: int) -> None:
    with pytest.raises(SAEError, match=r"trained at blocks\.0\.hook_resid_post, asked"):
        folder(tmp_path, site=site, version=version).load(HERE)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SAEError, match=rf"lacks \['{name}'\]; it has"):
        rewritten(tmp_path, **{name: None}).load(HERE)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("W_dec", torch.randn(D, N), rf"expected W_dec \[{N}, {D}\], got \[{D}, {N}\]"),
        ("b_enc", torch.randn(N - 1), rf"expected b_enc \[{N}\], got \[{N - 1}\]"),
        ("threshold", torch.rand(2), rf"expected threshold \[{N}\], got \[2\]"),
        ("b_dec", torch.randn(N), rf"expected b_dec \[{D}\], got \[{N}\]"),
        ("W_enc", torch.randn(D), "W_enc is .*, not a matrix"),
        ("W_enc", torch.ones(D, N, dtype=torch.int8), "W_enc holds torch.int8.*quantized"),
    ],
)
def test_a_tensor_of_odd_shape_is_found_on_loading(
    tmp_path: Path, name: str, tensor: Tensor, reason: str
) -> None:
    with pytest.raises(SAEError, match=reason):
        rewritten(tmp_path, **{name: tensor}).load(HERE)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_nan_is_found_where_it_is_read(tmp_path: Path, name: str) -> None:
    tensor = load_file(folder(tmp_path).folder() / WEIGHTS)[name]
    tensor.reshape(-1)[0] = torch.nan
    sae = rewritten(tmp_path, **{name: tensor}).load(HERE)
    for read in (sae.full, lambda: sae.take([1, 0])):
        with pytest.raises(SAEError, match=f"{name} has NaN or infinite values"):
            read()


@pytest.mark.parametrize("name", ["cfg.json", WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    source = folder(tmp_path)
    (tmp_path / name).unlink()
    for asked in (source.sha256, lambda: source.load(HERE)):
        with pytest.raises(SAEError, match=r"expected an SAE \(saelens: cfg.json and sae_weights"):
            asked()


def test_no_folder_is_a_message(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SAEError, match=r"no such folder|the folder holds nothing"):
            Folder(path=str(path)).load(HERE)


# --- Files that are not what their name says ------------------------------------------------------


class Code:
    """What pickle would run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (pytest.fail, ("reading an SAE ran code from its file",))


def objects(path: Path) -> None:
    np.savez(path, W_enc=np.array([Code()], dtype=object))


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


WRITERS: dict[str, tuple[Callable[..., Reference], str]] = {
    "saelens": (write_saelens, WEIGHTS),
    "sparsify": (write_sparsify, "sae.safetensors"),
    "gemma_scope": (write_gemma_scope, "params.npz"),
    "llama_scope": (write_llama_scope, "checkpoints/final.safetensors"),
    "dictionary_learning": (write_dictionary_learning, "ae.pt"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        lambda path: path.write_bytes(bytes(range(256)) * 8),
    ],
    ids=["truncated", "empty", "text", "bytes"],
)
def test_a_damaged_file_is_a_message(
    tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    write, file = WRITERS[name]
    path = tmp_path / "layers.1"
    write(path)
    damage(path / file)
    with pytest.raises(SAEError, match=f"{Path(file).name} is no whole"):
        Folder(path=str(path)).load(HERE)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("data", [b"{", b"", b"\xff\xfe\x00", b"[]", b"null"])
def test_a_broken_configuration_is_a_message(tmp_path: Path, name: str, data: bytes) -> None:
    write, _ = WRITERS[name]
    path = tmp_path / "layers.1"
    write(path)
    for config in path.glob("*.json"):
        config.write_bytes(data)
        with pytest.raises(SAEError, match=f"{config.name} (cannot be read|holds a)"):
            Folder(path=str(path)).load(HERE)


ODD: tuple[Any, ...] = (None, "x", -1, 0, [], {}, True, False, 2.5, [1], {"a": 1})


def places(table: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a configuration, those of tables in it too."""
    here = [(*above, key) for key in table]
    inside = [places(v, (*above, k)) for k, v in table.items() if isinstance(v, dict)]
    return here + [place for found in inside for place in found]


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (write_saelens, {"architecture": "topk"}),
        (write_saelens, {"architecture": "topk", "version": 5}),
        (write_saelens, {"architecture": "batchtopk"}),
        (write_gemma_scope, {"second": True, "config": {}}),
        (write_llama_scope, {}),
        (write_llama_scope, {"act_fn": "topk"}),
        (write_llama_scope, {"successor": True}),
        (write_dictionary_learning, {}),
        (write_sparsify, {}),
    ],
)
def test_an_odd_value_in_a_configuration_is_a_message_or_changes_nothing(
    tmp_path: Path, write: Callable[..., Reference], changes: dict[str, Any]
) -> None:
    path = tmp_path / "layers.1"
    write(path, **changes)
    (config,) = path.glob("*.json")
    said = config.read_text()
    for *above, key in places(json.loads(said)):
        for value in ODD:
            changed = table = json.loads(said)
            for name in above:
                table = table[name]
            table[key] = value
            config.write_text(json.dumps(changed))
            try:
                Folder(path=str(path)).load(HERE).take([0])
            except SAEError as error:
                assert str(error).startswith(str(path))


@pytest.mark.parametrize(
    "save",
    [
        lambda path: torch.save({"W_enc": torch.zeros(2, 2), "extra": Code()}, path),
        lambda path: torch.save(Code(), path),
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
    ],
    ids=["beside tensors", "alone", "a module"],
)
def test_a_checkpoint_that_would_need_pickle_is_refused(
    tmp_path: Path, save: Callable[[Path], None]
) -> None:
    write_dictionary_learning(tmp_path)
    save(tmp_path / "ae.pt")
    with pytest.raises(SAEError, match=r"more than tensors.*run code.*convert it to safetensors"):
        Folder(path=str(tmp_path)).load(HERE)


def test_an_old_checkpoint_of_torch_is_refused(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path)
    kept = torch.load(tmp_path / "ae.pt")
    torch.save(kept, tmp_path / "ae.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(SAEError, match=r"ae.pt is no whole file.*zip form.*as safetensors"):
        Folder(path=str(tmp_path)).load(HERE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(torch.zeros(3), "holds a Tensor, not"), ({"model": {}}, r"no tensors by name, only \['mo")],
)
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, content: Any, reason: str
) -> None:
    write_dictionary_learning(tmp_path)
    torch.save(content, tmp_path / "ae.pt")
    with pytest.raises(SAEError, match=reason):
        Folder(path=str(tmp_path)).load(HERE)


def test_objects_in_an_npz_are_refused(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path)
    objects(tmp_path / "params.npz")
    with pytest.raises(SAEError, match=r"W_enc.npy holds Python objects, which would need pickle"):
        Folder(path=str(tmp_path)).load(HERE)


@pytest.mark.parametrize("array", [np.zeros((2, 2), ">f4"), np.array(["text"]), np.zeros(2, "c8")])
def test_other_arrays_in_an_npz_are_refused(tmp_path: Path, array: Any) -> None:
    write_gemma_scope(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=array)
    with pytest.raises(SAEError, match="not floating-point numbers"):
        Folder(path=str(tmp_path)).load(HERE)


def test_a_zip_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path)
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", "no array")
    with pytest.raises(SAEError, match="no whole npz file of plain arrays"):
        Folder(path=str(tmp_path)).load(HERE)


def test_a_precision_that_nothing_computes_in_is_refused(tmp_path: Path) -> None:
    source = rewritten(tmp_path, W_dec=torch.zeros(N, D).to(torch.float8_e4m3fn))
    with pytest.raises(SAEError, match="W_dec is stored as F8_E4M3; convert it to float32"):
        source.load(HERE)


def test_other_kinds_of_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "sae.pkl").write_bytes(b"")
    with pytest.raises(SAEError, match=r"expected one of .safetensors, .npz, .pt.*pickles never"):
        read_tensors(tmp_path / "sae.pkl")


def test_a_file_that_shrinks_after_it_was_opened_is_a_message(tmp_path: Path) -> None:
    sae = folder(tmp_path).load(HERE)
    truncated(tmp_path / WEIGHTS)
    with pytest.raises(SAEError, match="ends too early; fetch it again"):
        sae.take([N - 1])


def test_nothing_outside_the_folder_is_needed(tmp_path: Path) -> None:
    """A folder may be moved: no path is kept in any file."""
    folder(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert Folder(path=str(tmp_path / "b")).load(HERE).n_features == N
