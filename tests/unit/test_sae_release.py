"""SAEs by the names of releases: offline, through a made-up cache of the hub, and by nothing else.

The registry is sae-lens' own file, so what is tested here is what its installed version says.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]

from holdfast.errors import SAEError
from holdfast.saes import release
from holdfast.saes.release import Release, close, entry_of
from holdfast.saes.sources import Folder, SAESpec
from holdfast.sites import Site
from tests.sae_files import (
    CASES,
    COMMIT,
    SITE,
    Case,
    Reference,
    publish,
    weights,
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_saelens,
)

OWN = "someone/tiny-saes"
GPT2 = ("gpt2-small-res-jb", "jbloom/GPT2-Small-SAEs-Reformatted")
SCOPE = ("gemma-scope-2b-pt-res", "google/gemma-scope-2b-pt-res")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, with the hub's offline switch on."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    release._fetch.cache_clear()
    return tmp_path / "cache"


def agrees(source: Release, reference: Reference, site: str = SITE) -> None:
    sae, x = source.load(Site.parse(site)).full(), reference.residuals()
    z = reference.encode(x)
    back = reference.decode(z, x)
    for ours, wanted in ((sae.encode(x), z), (sae.decode(torch.as_tensor(z).float(), x), back)):
        assert np.abs(ours.numpy() - wanted).max() <= 1e-6 * np.abs(wanted).max()


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=pytest.mark.proves("sae formats", case.row, "read by release name"),
        )
        for case in CASES
    ],
)
def test_every_layout_is_read_from_a_repository(case: Case, tmp_path: Path, cache: Path) -> None:
    folder, reference = case(tmp_path)
    publish(cache, OWN, folder, case.inside)
    source = Release(release=OWN, sae_id=case.inside)
    site = source.layout().site or SITE
    agrees(source, reference, site)
    assert source.sha256() == Folder(path=str(folder)).sha256(), "the same files, another way there"


def test_an_sae_that_is_a_repository_of_its_own(tmp_path: Path, cache: Path) -> None:
    reference = write_saelens(tmp_path / "sae")
    publish(cache, OWN, tmp_path / "sae")
    agrees(Release(release=OWN, sae_id="."), reference)


def test_gpt2_saes_of_centered_residuals_get_the_centering(tmp_path: Path, cache: Path) -> None:
    """Their files do not say it, the registry does; also if the repository is named instead."""
    old: dict[str, Any] = {
        "version": 5, "hook_name": ..., "hook_point": "blocks.2.hook_resid_pre",
        "architecture": "standard", "apply_b_dec_to_input": ..., "dtype": torch.float32,
    }  # fmt: skip
    reference = write_saelens(tmp_path / "sae", **old)
    publish(cache, GPT2[1], tmp_path / "sae", "blocks.2.hook_resid_pre")
    centered = Reference(reference.kind, reference.tensors, subtract=True, center=True)
    for name in GPT2:
        source = Release(release=name, sae_id="blocks.2.hook_resid_pre")
        agrees(source, centered)
        facts = source.load(Site.parse(SITE)).facts
        assert (facts.centered, facts.l0, facts.model) == (True, 18.0, "gpt2-small")
    assert source.sha256() != Folder(path=str(tmp_path / "sae")).sha256()
    # Centering is a step of its own: it holds for slices, and for residuals of any mean.
    x = centered.residuals()
    own = source.load(Site.parse(SITE)).take([3, 1])
    z = (x @ own.W_enc + own.b_enc).relu()
    assert np.allclose(z, centered.encode(x)[:, [3, 1]], atol=1e-6)
    assert torch.allclose((x + 5) @ own.W_enc, x @ own.W_enc, atol=1e-5)


def test_gemma_scope_by_name(tmp_path: Path, cache: Path) -> None:
    path = "layer_3/width_16k/average_l0_59"
    reference = write_gemma_scope(tmp_path / "sae")
    publish(cache, SCOPE[1], tmp_path / "sae", path)
    source = Release(release=SCOPE[0], sae_id=path)
    agrees(source, reference, "blocks.3.hook_resid_post")
    facts = source.load(Site(4)).facts
    assert (facts.model, facts.l0, facts.bos) == ("gemma-2-2b", 59.0, False)
    with pytest.raises(SAEError, match=r"trained at blocks\.3\.hook_resid_post, asked for at"):
        source.load(Site(3))


def test_a_canonical_id_means_another_path(tmp_path: Path, cache: Path) -> None:
    reference = write_gemma_scope(tmp_path / "sae")
    publish(cache, SCOPE[1], tmp_path / "sae", "layer_0/width_16k/average_l0_105")
    source = Release(release=f"{SCOPE[0]}-canonical", sae_id="layer_0/width_16k/canonical")
    agrees(source, reference, "blocks.0.hook_resid_post")
    assert source.load(Site(1)).facts.l0 == 105


def test_gemma_scope_2_by_name(tmp_path: Path, cache: Path) -> None:
    name = "layer_13_width_16k_l0_big"
    point = "model.layers.13.output"
    config = {"hf_hook_point_in": point, "hf_hook_point_out": point}
    reference = write_gemma_scope(tmp_path / "sae", second=True, config=config)
    publish(cache, "google/gemma-scope-2-1b-pt", tmp_path / "sae", f"resid_post/{name}")
    source = Release(release="gemma-scope-2-1b-pt-res", sae_id=name)
    agrees(source, reference, "blocks.13.hook_resid_post")
    assert source.load(Site(14)).facts.l0 == 150


def test_llama_scope_by_name(tmp_path: Path, cache: Path) -> None:
    site = "blocks.8.hook_resid_post"
    reference = write_llama_scope(tmp_path / "sae", site=site)
    folder = "Llama3_1-8B-Base-L8R-8x"
    publish(cache, "fnlp/Llama3_1-8B-Base-LXR-8x", tmp_path / "sae", folder)
    source = Release(release="llama_scope_lxr_8x", sae_id="l8r_8x")
    agrees(source, reference, site)
    assert source.load(Site(9)).facts.model == "meta-llama/Llama-3.1-8B"


def test_a_scale_that_only_the_registry_knows_is_taken_from_it(tmp_path: Path, cache: Path) -> None:
    """Of the SAELens format, the one layer of gemma-2b-res-jb that was trained on scaled inputs."""
    site, scale = "blocks.12.hook_resid_post", 0.21381938399317255
    name, repository = "gemma-2b-res-jb", "jbloom/Gemma-2b-Residual-Stream-SAEs"
    reference = write_saelens(
        tmp_path / "sae", site=site, norm="expected_average_only_in", scale=scale, version=5
    )
    publish(cache, repository, tmp_path / "sae", "gemma_2b_blocks.12.hook_resid_post_16384")
    agrees(Release(release=name, sae_id=site), reference, site)
    given = Release(release=name, sae_id=site, scale=1.0).load(Site.parse(site))
    assert given.inputs.scale == 1.0


def test_a_normalization_that_the_registry_corrects(tmp_path: Path, cache: Path) -> None:
    site = "blocks.8.hook_resid_pre"
    reference = write_saelens(tmp_path / "sae", site=site, version=5)
    repository = "JoshEngels/Mistral-7B-Residual-Stream-SAEs"
    publish(cache, repository, tmp_path / "sae", "mistral_7b_layer_8")
    normed = Reference("standard", reference.tensors, True, norm="constant_norm_rescale")
    agrees(Release(release="mistral-7b-res-wg", sae_id=site), normed, site)


def test_dictionaries_by_name(tmp_path: Path, cache: Path) -> None:
    reference = write_dictionary_learning(
        tmp_path / "sae", "MatryoshkaBatchTopKSAE", layer=12, submodule="resid_post_layer_12"
    )
    name = "saebench_gemma-2-2b_width-2pow12_date-0108"
    path = "MatryoshkaBatchTopK_gemma-2-2b__0108/resid_post_layer_12/trainer_0"
    publish(cache, f"adamkarvonen/{name}", tmp_path / "sae", path)
    source = Release(release=name, sae_id="blocks.12.hook_resid_post__trainer_0")
    agrees(source, reference, "blocks.12.hook_resid_post")


@pytest.mark.parametrize(
    ("name", "sae_id", "repository", "file", "spelling", "layer"),
    [
        ("qwen-scope-3-1.7b-base-w32k-l50", "layer7", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
         "layer7.sae.pt", "{0}", 7),
        ("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post",
         "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
         "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "{1}.{2}", 19),
        ("goodfire-llama-3.1-8b-instruct", "layer_19", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
         "Llama-3.1-8B-Instruct-SAE-l19.pth", "{1}_linear.{2}", 19),
    ],
)  # fmt: skip
@pytest.mark.proves("sae formats", "one torch file a layer", "read by release name")
@pytest.mark.proves("sae formats", "one torch file a layer", "encode and decode")
def test_releases_of_one_torch_file_a_layer(
    tmp_path: Path, cache: Path, name: str, sae_id: str, repository: str, file: str,
    spelling: str, layer: int,
) -> None:  # fmt: skip
    kind = "topk" if name.startswith("qwen") else "standard"
    made = weights(n=128, subtract=False)
    parts = {
        "W_enc": ("encoder", "weight"), "W_dec": ("decoder", "weight"),
        "b_enc": ("encoder", "bias"), "b_dec": ("decoder", "bias"),
    }  # fmt: skip
    folder = tmp_path / "sae"
    folder.mkdir()
    turned = {key: made[key].mT if made[key].dim() == 2 else made[key] for key in parts}
    torch.save({spelling.format(key, *parts[key]): t for key, t in turned.items()}, folder / file)
    publish(cache, repository, folder)
    source = Release(release=name, sae_id=sae_id)
    k = 50 if kind == "topk" else None
    agrees(source, Reference(kind, made, False, k), f"blocks.{layer}.hook_resid_post")
    whole = source.load(Site(layer + 1))
    assert whole.facts.architecture == kind and whole.facts.model is not None


def test_a_revision_names_a_snapshot(tmp_path: Path, cache: Path) -> None:
    first = write_saelens(tmp_path / "a", seed=1)
    second = write_saelens(tmp_path / "b", seed=2)
    publish(cache, OWN, tmp_path / "a", "sae", commit="a" * 40)
    publish(cache, OWN, tmp_path / "b", "sae", commit=COMMIT)
    agrees(Release(release=OWN, sae_id="sae"), second)
    agrees(Release(release=OWN, sae_id="sae", revision="a" * 40), first)
    agrees(Release(release=OWN, sae_id="sae", revision=COMMIT), second)


def test_a_spec_keeps_its_source_through_json() -> None:
    said = {"kind": "release", "release": SCOPE[0], "sae_id": "x", "revision": "main"}
    spec = SAESpec.model_validate({"site": SITE, "source": said})
    again = SAESpec.model_validate(spec.model_dump(mode="json"))
    assert again == spec and isinstance(again.source, Release)
    with pytest.raises(ValueError, match=r"unknown key 'sae'.*did you mean .*'sae_id'"):
        SAESpec.model_validate({"site": SITE, "source": said | {"sae": "x"}})


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt at the network, which fails."""
    attempts: list[str] = []

    def refuse(*where: Any, **_: Any) -> None:
        attempts.append(str(where))
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def test_an_unknown_release_lists_the_nearest_and_reaches_for_nothing(reached: list[str]) -> None:
    with pytest.raises(SAEError) as told:
        Release(release="gemma-scope-2b-pt-rez", sae_id="x").load(Site(1))
    message = str(told.value)
    assert "unknown release 'gemma-scope-2b-pt-rez': did you mean" in message
    assert "'gemma-scope-2b-pt-res'" in message
    assert re.search(r"\d{3} releases are known$", message) and len(message) < 400
    with pytest.raises(SAEError, match=r"unknown release 'zzz': \d{3} releases are known, for ex"):
        Release(release="zzz", sae_id="x").sha256()
    assert reached == []


def test_an_unknown_id_lists_the_nearest_and_reaches_for_nothing(reached: list[str]) -> None:
    for asked, near in (
        ("layer_3/width_16k", "layer_3/width_16k/average_l0_"),
        ("layer_3/width_16k/average_l0_60", "layer_3/width_16k/average_l0_59"),
    ):
        with pytest.raises(SAEError) as told:
            Release(release=SCOPE[0], sae_id=asked).load(Site(4))
        message = str(told.value)
        assert f"unknown sae_id {asked!r}: did you mean" in message and near in message
        assert message.endswith(f"SAEs of {SCOPE[0]} are known") and len(message) < 500
    assert reached == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma-scope-2b-pt-transcoders", "it is a .*transcoder.*reads one point and writes"),
        ("gemma-scope-2-1b-pt-transcoders", "transcoder.*reads one point and writes another"),
        ("mwhanna-qwen3-4b-transcoders", "it is a mwhanna_transcoder"),
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "it is a mntss_clt_layer_transcoder"),
        ("temporal-sae-gemma-2-2b", "earlier tokens"),
        ("gpt2-small-hook-z-kk", "heads of an attention layer"),
        ("gemma-scope-2b-pt-mlp", r"trained at blocks\.\d+\.hook_mlp_out"),
        ("gemma-scope-9b-pt-att-canonical", r"trained at blocks\.\d+\.attn\.hook_z"),
        ("llama_scope_lxa_8x", r"trained at attention's output, which is no point"),
        ("llama_scope_lxm_32x", r"trained at the MLP's output"),
        ("gemma-scope-2-1b-it-mlp", r"trained at blocks\.\d+\.hook_mlp_out"),
    ],
)
def test_what_is_no_residual_sae_is_refused_before_anything_is_fetched(
    name: str, reason: str, reached: list[str]
) -> None:
    sae_id = yaml.safe_load(release._releases()[name])[name]["saes"][0]["id"]
    with pytest.raises(SAEError, match=reason):
        Release(release=name, sae_id=sae_id).load(Site(1))
    assert reached == []


def test_every_registered_release_is_read_or_refused_for_a_reason() -> None:
    """The refused ones are those that are no residual SAEs, whatever sae-lens adds later."""
    refused = {}
    for name, text in release._releases().items():
        first = release._block(text)["saes"][0]
        try:
            entry = entry_of(name, str(first["id"]))
        except SAEError as error:
            refused[name] = str(error)
        else:
            assert entry.repository and entry.path
    others = re.compile(r"transcoder|clt|-mlp|-att|lxa|lxm|temporal|hook-z")
    assert [name for name in refused if not others.search(name)] == []
    assert len(refused) < len(release._releases()) / 2


def test_a_converter_that_is_new_to_us_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "r:\n  conversion_func: new_scope\n  repo_id: a/b\n  saes:\n  - id: x\n    path: x\n"
    monkeypatch.setattr(release, "_releases", lambda: {"r": text})
    with pytest.raises(SAEError, match=r"converts it by 'new_scope'.*known: .*gemma_2"):
        entry_of("r", "x")


@pytest.mark.parametrize("text", ["r: [", "r: 1\n", "r:\n  saes: []\n"])
def test_a_registry_in_another_form_is_a_message(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(release, "_releases", lambda: {"r": text})
    with pytest.raises(SAEError, match="not in the form this version knows"):
        entry_of("r", "x")


def test_without_sae_lens_the_command_is_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "find_spec", lambda name: None)
    release._releases.cache_clear()
    with pytest.raises(SAEError, match="not installed: pip install sae-lens"):
        Release(release="gpt2-small-res-jb", sae_id="x").load(Site(1))
    release._releases.cache_clear()


@pytest.mark.parametrize("sae_id", ["../other", "/etc", "", "a/../../b"])
def test_an_id_cannot_lead_out_of_its_repository(sae_id: str, reached: list[str]) -> None:
    with pytest.raises(SAEError, match="is no path inside a repository"):
        Release(release=OWN, sae_id=sae_id).load(Site(1))
    assert reached == []


def test_what_was_never_fetched_says_how_to_fetch_it(cache: Path) -> None:
    source = Release(release=SCOPE[0], sae_id="layer_3/width_16k/average_l0_59", revision="v1")
    with pytest.raises(SAEError) as told:
        source.load(Site(4))
    assert (
        "hf download google/gemma-scope-2b-pt-res --revision v1 --include "
        "'layer_3/width_16k/average_l0_59/params.npz'"
    ) in str(told.value)


def test_a_folder_that_a_repository_does_not_have(tmp_path: Path, cache: Path) -> None:
    write_saelens(tmp_path / "sae")
    publish(cache, OWN, tmp_path / "sae", "here")
    with pytest.raises(SAEError, match=r"someone/tiny-saes has no folder there at revision main"):
        Release(release=OWN, sae_id="there").load(Site(2))


def test_a_half_fetched_folder_names_what_is_missing(tmp_path: Path, cache: Path) -> None:
    write_saelens(tmp_path / "sae")
    (tmp_path / "sae" / "sae_weights.safetensors").unlink()
    publish(cache, OWN, tmp_path / "sae", "sae")
    with pytest.raises(SAEError, match=r"expected an SAE .*the folder holds cfg.json"):
        Release(release=OWN, sae_id="sae").load(Site(2))


@pytest.mark.parametrize("name", ["a//b", "a/b/c", "a/b c", "/x"])
def test_a_name_that_is_no_repository_is_a_message(name: str, cache: Path) -> None:
    with pytest.raises(SAEError, match=r"is no name of a repository"):
        Release(release=name, sae_id="sae").load(Site(2))


# --- The network ----------------------------------------------------------------------------------


def test_only_a_name_of_the_hub_reaches_for_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: list[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    release._fetch.cache_clear()
    for case in CASES[::6]:
        folder, _ = case(tmp_path / case.name)
        source = Folder(path=str(folder))
        source.load(Site.parse(source.layout().site or SITE)).full()
        source.sha256()
    entry_of(*GPT2[:1], "blocks.2.hook_resid_pre")
    assert reached == []
    with pytest.raises(SAEError, match=r"out of reach|fetching .* failed"):
        Release(release=OWN, sae_id="sae").load(Site(2))
    assert reached != []


def test_nothing_but_the_folder_s_own_files_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(repository: str, **how: Any) -> str:
        asked.append({"repository": repository} | how)
        return "/nowhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name, sae_id in (
        (SCOPE[0], "layer_3/width_16k/average_l0_59"),
        ("qwen-scope-3-1.7b-base-w32k-l50", "layer7"),
        (OWN, "odd[1]"),
    ):
        release._fetch.cache_clear()
        with pytest.raises(SAEError):
            Release(release=name, sae_id=sae_id, revision="v2").load(Site(4))
    scope, qwen, own = asked
    path = "layer_3/width_16k/average_l0_59"
    assert scope == {
        "repository": SCOPE[1],
        "revision": "v2",
        "allow_patterns": [
            f"{path}/{n}" for n in ("params.npz", "params.safetensors", "config.json")
        ],
    }
    assert qwen["allow_patterns"] == ["layer7.sae.pt"]
    assert all(pattern.startswith("odd[[]1]/") for pattern in own["allow_patterns"])
    release._fetch.cache_clear()


@pytest.mark.slow  # a process of its own, with torch
def test_names_are_looked_up_without_importing_sae_lens() -> None:
    program = (
        "import sys\n"
        "from holdfast.saes.release import entry_of\n"
        f"print(entry_of({SCOPE[0]!r}, 'layer_3/width_16k/average_l0_59').path)\n"
        "assert not {'sae_lens', 'transformer_lens', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "layer_3/width_16k/average_l0_59"


def test_near_names_of_many() -> None:
    known = [f"layer_{i}/width_16k/l0_{j}" for i in range(40) for j in range(30)]
    assert close("layer_7/width_16k/l0_99", known, "SAEs") == (
        "did you mean 'layer_7/width_16k/l0_9' or 'layer_7/width_16k/l0_0' or "
        "'layer_7/width_16k/l0_1' or 'layer_7/width_16k/l0_10' or 'layer_7/width_16k/l0_11'? "
        "1200 SAEs are known"
    )
    assert "did you mean 'layer_7/width_16k/l0_9'" in close("ayer_7/width_16k/l0_9", known, "SAEs")
