"""SAE folders: what SAELens writes is read to the same numbers, and the unknown is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from holdfast.errors import SAEError
from holdfast.saes.sources import Folder, SAESpec
from holdfast.sites import Site

SITE = Site.parse("blocks.1.hook_resid_post")
D, N = 16, 48


def tensors(seed: int = 0, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made: dict[str, torch.Tensor | None] = {
        "W_enc": normal(D, N),
        "W_dec": normal(N, D),
        "b_enc": normal(N),
        "b_dec": normal(D),
        "threshold": normal(N).abs(),
    }
    made |= changes
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def config(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.30.0", "hook_name": str(SITE)},
    }
    made |= changes
    return {key: value for key, value in made.items() if value is not ...}


def folder(
    path: Path, cfg: dict[str, Any] | None = None, weights: dict[str, torch.Tensor] | None = None
) -> Folder:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config() if cfg is None else cfg))
    save_file(tensors() if weights is None else weights, path / "sae_weights.safetensors")
    return Folder(path=str(path))


X = torch.randn(64, D, generator=torch.Generator().manual_seed(7))


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("subtracted", [False, True])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_codes_and_reconstructions_are_as_defined(
    tmp_path: Path, architecture: str, subtracted: bool
) -> None:
    cfg = config(architecture=architecture, apply_b_dec_to_input=subtracted)
    sae = folder(tmp_path, cfg).load(SITE)
    t = {name: tensor.double() for name, tensor in tensors().items()}
    p = (X.double() - subtracted * t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    limit = t["threshold"] if architecture == "jumprelu" else torch.zeros(N)
    z = torch.where(p > limit, p, 0.0)
    assert sae.subtract_b_dec is subtracted
    assert torch.allclose(sae.encode(X).double(), z, rtol=1e-5, atol=1e-5)
    back = sae.decode(z.float())
    assert torch.allclose(back.double(), z @ t["W_dec"] + t["b_dec"], rtol=1e-5, atol=1e-4)


def test_a_threshold_of_a_standard_sae_is_not_applied(tmp_path: Path) -> None:
    sae = folder(tmp_path, config(architecture="standard")).load(SITE)
    assert torch.equal(sae.threshold, torch.zeros(N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_computed_with_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    sae = folder(tmp_path, config(dtype=str(dtype).removeprefix("torch.")), saved).load(SITE)
    for name, tensor in saved.items():
        assert getattr(sae, name).dtype == torch.float32
        assert torch.equal(getattr(sae, name), tensor.float())
    assert sae.encode(X.to(torch.bfloat16)).dtype == torch.float32


def test_a_site_by_another_name_is_the_same_site(tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.30.0", "hook_name": "blocks.2.hook_resid_pre"}
    assert folder(tmp_path, config(metadata=metadata)).load(SITE).site == SITE
    old = config(metadata=..., hook_name=str(SITE))  # before SAELens 6 it stood at the top
    assert folder(tmp_path, old).load(SITE).site == SITE


def test_the_hash_is_of_the_contents_and_not_of_the_path(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    assert one.sha256() == two.sha256()
    changed = folder(tmp_path / "three", weights=tensors(seed=1))
    retold = folder(tmp_path / "four", config(apply_b_dec_to_input=True))
    assert len({one.sha256(), changed.sha256(), retold.sha256()}) == 3
    (tmp_path / "two" / "quality.json").write_text("{}")
    assert one.sha256() == two.sha256(), "notes beside the SAE are no part of it"


def test_a_spec_keeps_its_source_through_json(tmp_path: Path) -> None:
    spec = SAESpec.model_validate(
        {"site": "model.layers.1", "source": {"kind": "folder", "path": str(tmp_path)}}
    )
    assert spec.site == str(SITE)
    again = SAESpec.model_validate(spec.model_dump(mode="json"))
    assert again == spec and isinstance(again.source, Folder)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["topk", "gated", "batchtopk", "matching_pursuit"])
def test_another_architecture_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    source = folder(tmp_path, config(architecture=architecture))
    with pytest.raises(SAEError, match=f"{architecture!r} is not supported.*standard, jumprelu"):
        source.load(SITE)


def test_a_folder_without_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="architecture"):
        folder(tmp_path, config(architecture=...)).load(SITE)


def test_topk_by_its_old_name_is_refused(tmp_path: Path) -> None:
    """Before SAELens 6 a TopK SAE was a `standard` one with another activation function."""
    old = config(
        architecture="standard", metadata=..., hook_name=str(SITE),
        activation_fn_str="topk", activation_fn_kwargs={"k": 4},
    )  # fmt: skip
    with pytest.raises(SAEError, match="topk"):
        folder(tmp_path, old).load(SITE)


def test_an_unfolded_scaling_factor_is_refused(tmp_path: Path) -> None:
    """SAELens before 6 could keep a factor for every feature beside the weights."""
    old = config(architecture="standard", finetuning_scaling_factor=True)
    weights = tensors(threshold=None, scaling_factor=torch.full((N,), 2.0))
    with pytest.raises(SAEError, match="scaling_factor"):
        folder(tmp_path, old, weights).load(SITE)


@pytest.mark.parametrize("how", ["layer_norm", "expected_average_only_in", "constant_norm_rescale"])
def test_normalized_inputs_are_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(SAEError, match=f"normalize_activations is {how!r}"):
        folder(tmp_path, config(normalize_activations=how)).load(SITE)


def test_whether_b_dec_is_subtracted_is_never_guessed(tmp_path: Path) -> None:
    """SAELens subtracts where the key is missing: reading it the other way moves every feature."""
    source = folder(tmp_path, config(apply_b_dec_to_input=...))
    try:
        sae = source.load(SITE)
    except SAEError as error:
        assert "apply_b_dec_to_input" in str(error)
    else:
        assert sae.subtract_b_dec


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_an_sae_of_another_site_is_refused(tmp_path: Path, hook: str) -> None:
    for cfg in (config(metadata={"hook_name": hook}), config(metadata=..., hook_name=hook)):
        with pytest.raises(SAEError, match=r"trained at blocks\.0\.hook_resid_post, asked"):
            folder(tmp_path, cfg).load(SITE)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SAEError, match=rf"lacks \['{name}'\]"):
        folder(tmp_path, weights=tensors(**{name: None})).load(SITE)


def test_a_transposed_decoder_is_refused(tmp_path: Path) -> None:
    weights = tensors(W_dec=torch.randn(D, N))
    with pytest.raises(SAEError, match=rf"expected W_dec \[{N}, {D}\], got \[{D}, {N}\]"):
        folder(tmp_path, weights=weights).load(SITE)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    source = folder(tmp_path)
    (tmp_path / name).unlink()
    for asked in (source.folder, source.sha256, lambda: source.load(SITE)):
        with pytest.raises(SAEError, match=f"{name} is not there"):
            asked()


@pytest.mark.parametrize(
    "name, data",
    [
        ("cfg.json", b"{"),
        ("cfg.json", b""),
        ("cfg.json", b"\xff\xfe\x00"),
        ("cfg.json", b"[]"),
        ("sae_weights.safetensors", b""),
        ("sae_weights.safetensors", b"not safetensors at all"),
    ],
)
def test_a_broken_file_is_a_message(tmp_path: Path, name: str, data: bytes) -> None:
    source = folder(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SAEError):
        source.load(SITE)


# --- SAELens itself -------------------------------------------------------------------------------


@pytest.mark.slow  # importing sae_lens takes 5 s
def test_what_sae_lens_saves_is_read_to_the_same_numbers(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=str(SITE))
    for architecture, subtracted in (
        ("standard", True), ("standard", False), ("jumprelu", True), ("jumprelu", False),
    ):  # fmt: skip
        names = {"standard": "StandardSAE", "jumprelu": "JumpReLUSAE"}
        make, configure = (getattr(sae_lens, names[architecture] + end) for end in ("", "Config"))
        theirs = make(
            configure(d_in=D, d_sae=N, apply_b_dec_to_input=subtracted, metadata=metadata)
        )
        with torch.no_grad():
            for name, tensor in tensors().items():
                if hasattr(theirs, name):
                    getattr(theirs, name).copy_(tensor)
        path = tmp_path / f"{architecture}_{subtracted}"
        theirs.save_model(path)
        ours = Folder(path=str(path)).load(SITE)
        with torch.no_grad():
            z = theirs.encode(X)
            back = theirs.decode(z)
        assert z.count_nonzero() > 100
        assert torch.equal(ours.encode(X) > 0, z > 0)
        for mine, reference in ((ours.encode(X), z), (ours.decode(z), back)):
            error = (mine - reference).abs().max() / reference.abs().max()
            assert error <= 1e-6, f"{architecture}, b_dec subtracted {subtracted}: {error:.1e}"
