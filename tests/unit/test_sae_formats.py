"""Every layout is read to the numbers its definition gives, and what it cannot be is refused.

The definitions stand in `tests/sae_files.py`, in float64 and without anything of ours; sae-lens is
a second opinion wherever it can hold or load the same SAE.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdfast.errors import SAEError
from holdfast.saes.formats import FORMATS
from holdfast.saes.sae import SAE
from holdfast.saes.sources import Folder
from holdfast.saes.stored import StoredSAE
from holdfast.sites import Site
from tests.sae_files import (
    CASES,
    GEMMA,
    GEMMA_2,
    SITE,
    Case,
    D,
    K,
    N,
    Reference,
    publish,
    weights,
    write_dictionary_learning,
    write_gemma_scope,
    write_llama_scope,
    write_saelens,
    write_sparsify,
)

TOLERANCE = 1e-6


def opened(folder: Path, site: str | None = None, **source: Any) -> StoredSAE:
    """Load the SAE of a folder at the site its files name, if they name one."""
    found = Folder(path=str(folder), **source)
    return found.load(Site.parse(site or found.layout().site or SITE))


def error(got: Tensor, wanted: Any) -> float:
    """Largest difference, relative to the largest number."""
    wanted = np.asarray(wanted, dtype=np.float64)
    return float(np.abs(got.double().numpy() - wanted).max() / np.abs(wanted).max())


def proven(*columns: str) -> list[Any]:
    """Every case, with the cells of the table that it proves."""
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.proves("sae formats", case.row, column) for column in columns],
        )
        for case in CASES
    ]


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", proven("read by folder", "encode and decode"))
def test_codes_and_reconstructions_are_as_defined(case: Case, tmp_path: Path) -> None:
    folder, reference = case(tmp_path)
    sae, x = opened(folder).full(), reference.residuals()
    z = reference.encode(x)
    active = (z > 0).sum(1)
    assert 1 <= active.mean() <= N / 4, "the SAE of the test is no reasonable one"
    assert error(sae.encode(x), z) <= TOLERANCE
    assert np.array_equal((sae.encode(x) > 0).numpy(), z > 0)
    back = reference.decode(z, x)
    assert error(sae.decode(torch.as_tensor(z).float(), x), back) <= TOLERANCE
    # Codes that are rounded move a reconstruction by no more than they are rounded.
    assert error(sae.decode(sae.encode(x), x), back) <= 2 * TOLERANCE
    left = ((x.double().numpy() - back) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert left < 0.5 or reference.norm, "the SAE of the test reconstructs nothing"


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_everything_is_computed_in_float32_or_above(case: Case, tmp_path: Path) -> None:
    folder, reference = case(tmp_path)
    stored = opened(folder)
    sae, x = stored.full(), reference.residuals(4)
    tensors = {name: t for name, t in vars(sae).items() if isinstance(t, Tensor)}
    # Matrices in half precision are kept as the file has them, and cast a block at a time.
    kept = {tensors.pop(name).dtype for name in ("W_enc", "W_dec")}
    assert kept <= {torch.float32, stored.layout.tensors[stored.layout.W_enc].dtype}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert sae.encode(x.bfloat16()).dtype == torch.float32
    assert sae.encode(x.double()).dtype == torch.float64
    assert error(sae.encode(x.double()), reference.encode(x)) <= TOLERANCE


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_the_format_can_be_named(case: Case, tmp_path: Path) -> None:
    folder, _ = case(tmp_path)
    said = opened(folder).facts.format
    assert opened(folder, format=said).facts.format == said
    other = next(name for name in FORMATS if name != said)
    with pytest.raises(SAEError, match=f"expected an SAE \\({other}: .*the folder holds"):
        Folder(path=str(folder), format=other).load(Site.parse(SITE))


def test_what_the_files_say_beside_the_weights(tmp_path: Path) -> None:
    write_saelens(tmp_path / "a", "topk", center=True)
    facts = opened(tmp_path / "a").facts
    assert (facts.model, facts.l0, facts.centered, facts.bos) == ("tiny", K, True, True)
    write_gemma_scope(tmp_path / GEMMA)
    facts = opened(tmp_path / GEMMA).facts
    assert (facts.model, facts.l0, facts.bos) == ("gemma-2-2b", 3.0, False)
    write_gemma_scope(tmp_path / "b", second=True, config={"l0": 60})
    assert opened(tmp_path / "b").facts.l0 == 60
    write_llama_scope(tmp_path / "Llama3_1-8B-Base-L1R-8x")
    facts = opened(tmp_path / "Llama3_1-8B-Base-L1R-8x").facts
    assert (facts.model, facts.l0) == ("meta-llama/Llama-3.1-8B", K)
    write_dictionary_learning(tmp_path / "c")
    facts = opened(tmp_path / "c").facts
    assert (facts.model, facts.l0) == ("some/tiny-model", K)
    assert facts.architecture == "batchtopk"


# --- Sites ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "site"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_59", "blocks.12.hook_resid_post"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "blocks.0.hook_resid_pre"),
        ("models--google--gemma-scope-9b-it-res/snapshots/0a/layer_9/width_16k/average_l0_47",
         "blocks.9.hook_resid_post"),
        ("clt/mine/gemma-scope-2b-pt-res/layer_2/width_16k/average_l0_5",
         "blocks.2.hook_resid_post"),
        ("my-sae", None),
        ("embedding/mine", None),
        ("layer_3/width_16k/average_l0_59", None),
    ],
)  # fmt: skip
def test_gemma_scope_belongs_where_its_path_says(
    tmp_path: Path, inside: str, site: str | None
) -> None:
    write_gemma_scope(tmp_path / inside)
    assert Folder(path=str(tmp_path / inside)).layout().site == site


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_71", r"blocks\.3\.hook_mlp_out'"),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_71", r"blocks\.3\.attn\.hook_z'"),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_76", "transcoder.*one point"),
    ],
)
def test_gemma_scope_of_another_point_is_refused(tmp_path: Path, inside: str, reason: str) -> None:
    write_gemma_scope(tmp_path / inside)
    with pytest.raises(SAEError, match=reason):
        opened(tmp_path / inside, SITE)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hf_hook_point_in": "model.layers.1.self_attn.o_proj.input",
          "hf_hook_point_out": "model.layers.1.self_attn.o_proj.input"}, "o_proj.input', which"),
        ({"hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output"}, "transcoder"),
        ({"type": "transcoder"}, "Gemma Scope 2 transcoder"),
        ({"type": "clt"}, "Gemma Scope 2 clt"),
        ({"type": "crosscoder"}, "Gemma Scope 2 crosscoder"),
        ({"architecture": "topk"}, "'topk' is not supported"),
        ({"hf_hook_point_in": None, "hf_hook_point_out": None}, "hf_hook_point_in"),
    ],
)  # fmt: skip
def test_gemma_scope_2_says_what_it_is(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    write_gemma_scope(tmp_path, second=True, config=config)
    with pytest.raises(SAEError, match=reason):
        opened(tmp_path, SITE)


@pytest.mark.parametrize("inside", ["transcoder_all/layer_1_width_16k_l0_big_affine", "clt/x"])
def test_gemma_scope_2_without_a_configuration_is_what_its_path_says(
    tmp_path: Path, inside: str
) -> None:
    write_gemma_scope(tmp_path / GEMMA_2, second=True)
    assert opened(tmp_path / GEMMA_2).site == Site.parse(SITE)
    write_gemma_scope(tmp_path / inside, second=True)
    with pytest.raises(SAEError, match=r"transcoder|clt"):
        opened(tmp_path / inside, SITE)


def test_a_skip_connection_makes_a_transcoder(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path, second=True, config={}, affine_skip_connection=torch.zeros(D, D))
    with pytest.raises(SAEError, match=r"skip connection.*reads one point and writes another"):
        opened(tmp_path, SITE)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.10", "blocks.10.hook_resid_post"),
        ("h.3", "blocks.3.hook_resid_post"),
        ("gpt_neox.layers.2", "blocks.2.hook_resid_post"),
        ("embed_tokens", "blocks.0.hook_resid_pre"),
        ("layers.23.mlp", "layers.23.mlp"),
        ("layers.0.self_attn", "layers.0.self_attn"),
        ("my sae", None),
        ("run_1", None),
    ],
)
def test_a_hookpoint_of_sparsify_is_read_literally(
    tmp_path: Path, name: str, site: str | None
) -> None:
    write_sparsify(tmp_path / name)
    source = Folder(path=str(tmp_path / name))
    assert source.layout().site == site
    if site is not None and "hook" not in site:
        with pytest.raises(SAEError, match=f"trained at '{site}', which is no point"):
            source.load(Site.parse(SITE))


@pytest.mark.parametrize(
    ("changes", "site"),
    [
        ({}, SITE),
        ({"submodule": None}, SITE),
        ({"submodule": None, "io": "in"}, "blocks.1.hook_resid_pre"),
        ({"submodule": "resid_pre_layer_1", "io": "in"}, "blocks.1.hook_resid_pre"),
        ({"submodule": "mlp_out_layer_1"}, "mlp_out_layer_1"),
    ],
)
def test_dictionary_learning_says_the_module(
    tmp_path: Path, changes: dict[str, Any], site: str
) -> None:
    write_dictionary_learning(tmp_path, **changes)
    assert Folder(path=str(tmp_path)).layout().site == site


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("abstopk", "'abstopk' is not supported.*signed.*known: standard"),
        ("matching_pursuit", "is not supported.*chosen before it"),
        ("temporal", "earlier tokens"),
        ("new_kind", "'new_kind' is not supported; known: standard, jumprelu, topk, gated"),
        ("transcoder", "it is a transcoder: it reads one point and writes another"),
        ("jumprelu_skip_transcoder", "it is a jumprelu_skip_transcoder"),
    ],
)
def test_another_architecture_of_saelens_is_refused(
    tmp_path: Path, architecture: str, reason: str
) -> None:
    write_saelens(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"architecture": architecture}))
    with pytest.raises(SAEError, match=reason):
        opened(tmp_path, SITE)


def test_an_sae_that_writes_another_point_is_a_transcoder(tmp_path: Path) -> None:
    written = {"hook_name": SITE, "hook_name_out": "blocks.1.hook_mlp_out"}
    write_saelens(tmp_path, metadata=written)
    with pytest.raises(SAEError, match=r"writes blocks\.1\.hook_mlp_out: it reads one point"):
        opened(tmp_path, SITE)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_an_unset_batch_topk_threshold_of_saelens_is_refused(
    tmp_path: Path, architecture: str
) -> None:
    write_saelens(tmp_path / "a", architecture, threshold=0.0)
    with pytest.raises(SAEError, match=r"threshold was never set.*depend on the batch"):
        opened(tmp_path / "a", SITE)
    # Saved for inference, it is a JumpReLU SAE whose thresholds are all 0.
    write_saelens(tmp_path / "b", "jumprelu", metadata={"training_architecture": architecture})
    saved = tmp_path / "b" / "sae_weights.safetensors"
    save_file(load_file(saved) | {"threshold": torch.zeros(N)}, saved)
    with pytest.raises(SAEError, match="threshold was never set"):
        opened(tmp_path / "b", SITE)


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_an_unset_batch_topk_threshold_of_dictionary_learning_is_refused(
    tmp_path: Path, dict_class: str, threshold: float
) -> None:
    write_dictionary_learning(tmp_path, dict_class, threshold=threshold)
    with pytest.raises(SAEError, match=f"never set \\(it is {threshold:g}\\).*depend on the batch"):
        opened(tmp_path)


def test_a_batch_topk_sae_of_before_thresholds_is_refused(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path)
    kept = torch.load(tmp_path / "ae.pt")
    torch.save({k: t for k, t in kept.items() if k != "threshold"}, tmp_path / "ae.pt")
    with pytest.raises(SAEError, match="it is not in the file"):
        opened(tmp_path)


def test_thresholds_that_are_all_negative_are_refused_before_any_slice(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path, threshold=torch.full((N,), -1.0))
    with pytest.raises(SAEError, match=r"all its thresholds are negative \(the first is -1\)"):
        opened(tmp_path).take([3])


def test_some_negative_thresholds_are_as_good_as_zero(tmp_path: Path) -> None:
    """Codes go through a ReLU: training a threshold directly can take it below 0."""
    threshold = torch.linspace(-0.2, 1.0, N)
    reference = write_gemma_scope(tmp_path, threshold=threshold)
    reference = Reference("jumprelu", {**reference.tensors, "threshold": threshold}, False)
    sae, x = opened(tmp_path).full(), reference.residuals()
    assert error(sae.encode(x), reference.encode(x)) <= TOLERANCE
    assert (sae.threshold >= 0).all() and (sae.encode(x) >= 0).all()


def test_thresholds_are_strict_and_compared_in_float32(tmp_path: Path) -> None:
    """A pre-activation that equals its threshold does not fire."""
    n, d = 4, 2
    write_gemma_scope(
        tmp_path, d=d, n=n, W_enc=torch.ones(d, n), b_enc=torch.zeros(n), b_dec=torch.zeros(d),
        W_dec=torch.ones(n, d),
        threshold=torch.tensor([1.0, 1.0 - 2.0**-20, 1.0 + 2.0**-20, 0.0]),
    )  # fmt: skip
    codes = opened(tmp_path).full().encode(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    assert codes.tolist() == [[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_a_factor_that_nothing_explains_is_refused(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path, scaling_factor=torch.ones(N))
    opened(tmp_path)
    write_gemma_scope(tmp_path, scaling_factor=torch.full((N,), 2.0))
    with pytest.raises(SAEError, match="scaling_factor that is not 1"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hook_point_out": "blocks.1.hook_mlp_out"}, "transcoder, from blocks.1.hook_resid_post"),
        ({"hook_point_in": "blocks.1.hook_attn_out", "hook_point_out": "blocks.1.hook_attn_out"},
         "hook_attn_out', which is no point"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"act_fn": "tanh"}, "act_fn 'tanh' is not supported; known: jumprelu"),
        ({"norm_activation": "batch-wise"}, "batch-wise.*depend on its batch"),
        ({"dataset_average_activation_norm": {"in": 2.0, "out": 3.0}}, "differs between input"),
        ({"dataset_average_activation_norm": {"in": 0.0, "out": 0.0}}, "positive number"),
        ({"dataset_average_activation_norm": ...}, "give it as `scale`"),
        ({"jump_relu_threshold": ...}, "does not say jump_relu_threshold"),
        ({"apply_decoder_bias_to_pre_encoder": ...}, "does not say apply_decoder_bias"),
    ],
)  # fmt: skip
def test_llama_scope_that_is_no_residual_sae_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_llama_scope(tmp_path)
    said = json.loads((tmp_path / "hyperparams.json").read_text()) | changes
    said = {key: value for key, value in said.items() if value is not ...}
    (tmp_path / "hyperparams.json").write_text(json.dumps(said))
    with pytest.raises(SAEError, match=reason):
        opened(tmp_path, SITE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dict_class": "CrossCoder"}, "it is a crosscoder"),
        ({"dict_class": "JumpAutoEncoder"}, "'JumpAutoEncoder' is not supported; known: AutoEnc"),
        ({"dict_class": ...}, "does not say dict_class"),
        ({"layer": [3, 4]}, r"must say layer as a whole number, it says \[3, 4\]"),
        ({"layer": 4}, "says layer 4 and submodule_name 'resid_post_layer_1'"),
        ({"k": 5}, "says k = 5, ae.pt has k = 4"),
        ({"more": {"var_encoder": torch.zeros(2)}}, r"holds \['var_encoder'\], which a BatchTopK"),
        ({"io": "in_and_out"}, "'in_and_out' of a module"),
    ],
)
def test_another_dictionary_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_dictionary_learning(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if "more" in changes or "io" in changes:
        write_dictionary_learning(tmp_path, **changes)
    else:
        trainer = config["trainer"] | changes
        config["trainer"] = {key: value for key, value in trainer.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SAEError, match=reason):
        opened(tmp_path, SITE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transcode": True}, "sparsify transcoder.*reads one point"),
        ({"skip_connection": True}, "transcoder"),
        ({"signed": True}, "signed"),
        ({"activation": "groupmax"}, "'groupmax' is not supported; known: topk"),
        ({"gram_lookup": True}, "gram_lookup"),
        ({"k": ...}, "does not say k"),
        ({"expansion_factor": 8}, f"says {8 * D} features of {D} numbers.*do not belong together"),
        ({"num_latents": 2 * D}, "do not belong together"),
    ],
)
def test_sparsify_that_is_no_topk_sae_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_sparsify(tmp_path / "layers.1", **changes)
    with pytest.raises(SAEError, match=reason):
        opened(tmp_path / "layers.1")


@pytest.mark.parametrize(
    "changes", [{"num_latents": N}, {"multi_topk": True}, {"num_latents": ...}]
)
def test_sparsify_s_other_spellings_mean_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = write_sparsify(tmp_path / "layers.1", **changes)
    x = reference.residuals()
    assert error(opened(tmp_path / "layers.1").full().encode(x), reference.encode(x)) <= TOLERANCE


# --- Llama Scope's threshold ----------------------------------------------------------------------


@pytest.mark.parametrize("unit", [False, True])
def test_llama_scope_fires_where_the_code_that_published_it_says(
    tmp_path: Path, unit: bool
) -> None:
    """Written as that code loads an SAE: normalize b_enc, then a decoder of norm 1, then compare.

    Its codes are ours in units of the residual and of a decoder of norm 1; `s` and `norm` convert.
    """
    average_norm, threshold = 3.0, 0.2
    reference = write_llama_scope(
        tmp_path, average_norm=average_norm, threshold=threshold, unit=unit
    )
    t = {name: tensor.double() for name, tensor in reference.tensors.items()}
    s = math.sqrt(D) / average_norm
    encoder, bias, decoder = t["W_enc"].T, t["b_enc"] / s, t["W_dec"].T
    norm = decoder.norm(dim=0)
    encoder, bias, decoder = encoder * norm[:, None], bias * norm, decoder / norm
    x = reference.residuals()
    hidden = x.double() @ encoder.T + bias
    acts = hidden.where(hidden > threshold, torch.tensor(0.0, dtype=torch.float64))
    sae = opened(tmp_path).full()
    assert error(sae.encode(x) * norm.float() / s, acts) <= TOLERANCE
    assert error(sae.decode(sae.encode(x), x), acts @ decoder.T + t["b_dec"] / s) <= 2 * TOLERANCE
    # In units of the normalized input, or without the decoder's norm, others would fire.
    p = x.double() * s @ t["W_enc"] + t["b_enc"]
    assert not torch.equal(p > threshold, acts > 0)
    assert torch.equal(p > threshold * s, acts > 0) is unit


def test_a_scale_given_in_the_source_moves_llama_scope_s_threshold_too(tmp_path: Path) -> None:
    reference = write_llama_scope(tmp_path, dataset_average_activation_norm=...)
    with pytest.raises(SAEError, match="√d_model / mean residual norm"):
        opened(tmp_path)
    sae, x = opened(tmp_path, scale=reference.scale).full(), reference.residuals()
    assert error(sae.encode(x), reference.encode(x)) <= TOLERANCE


@pytest.mark.parametrize(
    ("how", "norm"), [("token-wise", "constant_norm_rescale"), ("inference", None), ("none", None)]
)
def test_llama_scope_normalized_otherwise(tmp_path: Path, how: str, norm: str | None) -> None:
    """Then there is no dataset's norm to fold, and the threshold is as it is compared."""
    made = write_llama_scope(tmp_path, norm_activation=how, threshold=0.3).tensors
    made = {**made, "threshold": torch.full((N,), 0.3)}
    reference = Reference("jumprelu", made, False, norm=norm, gate_times_norm=True)
    sae, x = opened(tmp_path).full(), reference.residuals()
    z = reference.encode(x)
    assert error(sae.encode(x), z) <= TOLERANCE
    assert error(sae.decode(sae.encode(x), x), reference.decode(z, x)) <= 2 * TOLERANCE


def test_llama_scope_of_plain_relu_and_without_decoder_norms(tmp_path: Path) -> None:
    for changes in ({"act_fn": "relu"}, {"weighted": False}, {"subtract": True}):
        reference = write_llama_scope(tmp_path / str(changes), **changes)
        sae, x = opened(tmp_path / str(changes)).full(), reference.residuals()
        assert error(sae.encode(x), reference.encode(x)) <= TOLERANCE


def test_a_topk_sae_with_a_threshold_is_loaded_as_jumprelu(tmp_path: Path) -> None:
    """As the code that published them does, so that features do not depend on each other."""
    reference = write_llama_scope(tmp_path, threshold=0.2)
    said = json.loads((tmp_path / "hyperparams.json").read_text())
    (tmp_path / "hyperparams.json").write_text(json.dumps(said | {"act_fn": "topk"}))
    sae, x = opened(tmp_path), reference.residuals()
    assert sae.k is None and sae.facts.architecture == "jumprelu"
    assert error(sae.full().encode(x), reference.encode(x)) <= TOLERANCE


def test_the_successor_s_latest_names_are_read(tmp_path: Path) -> None:
    reference = write_llama_scope(tmp_path, successor=True)
    file = tmp_path / "sae_weights.safetensors"
    kept = load_file(file)
    names = {
        "encoder.weight": "W_E", "decoder.weight": "W_D",
        "encoder.bias": "b_E", "decoder.bias": "b_D",
        "log_jumprelu_threshold": "activation_function.log_jumprelu_threshold",
    }  # fmt: skip
    turned = {names.get(k, k): t.T.contiguous() if t.dim() == 2 else t for k, t in kept.items()}
    save_file(turned, file)
    sae, x = opened(tmp_path).full(), reference.residuals()
    assert error(sae.encode(x), reference.encode(x)) <= TOLERANCE


# --- sae-lens as a second opinion -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    return pytest.importorskip("sae_lens")


def held(sae_lens: Any, reference: Reference, norm: str = "none") -> Any:
    """The same SAE as an object of sae-lens, without its files and loaders."""
    made = {name: t.float() for name, t in reference.tensors.items()}
    kinds = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "Gated"}
    cls, config = (getattr(sae_lens, f"{kinds[reference.kind]}SAE{end}") for end in ("", "Config"))
    # Folding a scale into an SAE that rescales would divide its codes by it.
    rescale = reference.rescale and reference.kind == "topk" and reference.scale == 1
    more = {"k": reference.k, "rescale_acts_by_decoder_norm": rescale}
    if reference.kind != "topk":
        more = {}
    if reference.rescale and not rescale:
        lengths = torch.as_tensor(reference.lengths).float()
        made["W_enc"], made["b_enc"] = made["W_enc"] * lengths, made["b_enc"] * lengths
        made["W_dec"] = made["W_dec"] / lengths[:, None]
    if reference.gate_times_norm:
        made["threshold"] = made["threshold"] / torch.as_tensor(reference.lengths).float()
    n, d = made["W_dec"].shape
    theirs = cls(
        config(
            d_in=d, d_sae=n, apply_b_dec_to_input=reference.subtract, normalize_activations=norm,
            **more,
        )
    )  # fmt: skip
    if reference.kind == "gated":
        made["b_gate"] = made.pop("b_enc")
    theirs.load_state_dict(made)
    if reference.scale != 1:
        # The fold leaves the threshold alone, which is right: pre-activations stay what they are.
        theirs.fold_activation_norm_scaling_factor(reference.scale)
    return theirs


@pytest.mark.slow  # importing sae_lens takes 5 s
@pytest.mark.parametrize("case", proven("encode and decode"))
def test_sae_lens_computes_the_same(case: Case, tmp_path: Path, sae_lens: Any) -> None:
    folder, reference = case(tmp_path)
    ours, x = opened(folder).full(), reference.residuals()
    theirs = held(sae_lens, reference, reference.norm or "none")
    mean = x.mean(-1, keepdim=True) if reference.center else torch.zeros(len(x), 1)
    with torch.no_grad():
        z = theirs.encode(x - mean)
        back = theirs.decode(z) + mean
    assert torch.equal(ours.encode(x) > 0, z > 0)
    assert error(ours.encode(x), z) <= TOLERANCE
    # Both add up in float32, in another order.
    assert error(ours.decode(z, x), back) <= 2 * TOLERANCE


def trained(sae_lens: Any, architecture: str, **changes: Any) -> Any:
    """A training SAE of sae-lens with reasonable weights."""
    saes = sae_lens
    cls, config = {
        "topk": (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig),
        "batchtopk": (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig),
        "matryoshka_batchtopk": (
            saes.MatryoshkaBatchTopKTrainingSAE, saes.MatryoshkaBatchTopKTrainingSAEConfig,
        ),
        "standard": (saes.StandardTrainingSAE, saes.StandardTrainingSAEConfig),
        "jumprelu": (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig),
        "gated": (saes.GatedTrainingSAE, saes.GatedTrainingSAEConfig),
    }[architecture]  # fmt: skip
    if architecture == "matryoshka_batchtopk":
        changes["matryoshka_widths"] = [16, N]
    metadata = saes.saes.sae.SAEMetadata(hook_name=SITE, model_name="tiny")
    theirs = cls(config(d_in=D, d_sae=N, metadata=metadata, **changes))
    made = weights()
    made["b_gate"] = made["b_enc"]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(made[name])
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(0.4)
    return theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("architecture", "rescale"),
    [
        *((name, False) for name in ("standard", "jumprelu", "gated")),
        *((name, on) for name in ("topk", "batchtopk", "matryoshka_batchtopk") for on in (0, 1)),
    ],
)
def test_what_sae_lens_trains_and_saves_is_read(
    tmp_path: Path, sae_lens: Any, architecture: str, rescale: bool
) -> None:
    """Saved for inference, and as it is in training, which sae-lens itself does not read."""
    topk = "topk" in architecture
    changes = {"k": K, "rescale_acts_by_decoder_norm": bool(rescale)} if topk else {}
    theirs = trained(sae_lens, architecture, **changes)
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    x = Reference("standard", weights(), True).residuals()
    with torch.no_grad():
        z = loaded.encode(x)
        back = loaded.decode(z)
    assert 1 <= (z > 0).sum(1).float().mean() <= N / 4
    for name in ("inference", "training"):
        ours = opened(tmp_path / name).full()
        assert torch.equal(ours.encode(x) > 0, z > 0), name
        assert error(ours.encode(x), z) <= TOLERANCE
        assert error(ours.decode(z, x), back) <= TOLERANCE
        if topk:
            assert ours.facts.l0 == K


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "norm", ["layer_norm", "constant_norm_rescale", "expected_average_only_in"]
)
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_what_sae_lens_normalizes_is_normalized(
    tmp_path: Path, sae_lens: Any, architecture: str, norm: str
) -> None:
    reference = write_saelens(tmp_path, architecture, norm=norm)
    x, scale = reference.residuals() + 0.3, 1.7
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    given: dict[str, Any] = {}
    if norm == "expected_average_only_in":
        with pytest.raises(SAEError, match="give it as `scale`"):
            opened(tmp_path)
        given = {"scale": scale}
        theirs.fold_activation_norm_scaling_factor(scale)
    with torch.no_grad():
        z = theirs.encode(x)
        back = theirs.decode(z)
    ours = opened(tmp_path, **given).full()
    assert torch.equal(ours.encode(x) > 0, z > 0)
    assert error(ours.encode(x), z) <= TOLERANCE
    assert error(ours.decode(z, x), back) <= 2 * TOLERANCE


LOADERS: list[tuple[str, str, str, Any, dict[str, Any]]] = [
    ("gemma_2", "google/gemma-scope-2b-pt-res", "layer_1/width_16k/average_l0_3",
     write_gemma_scope, {}),
    ("gemma_3", "google/gemma-scope-2-1b-pt", "resid_post/layer_1_width_16k_l0_small",
     write_gemma_scope, {"second": True, "config": {}}),
    ("llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L1R-8x",
     write_llama_scope, {"unit": True}),
    ("dictionary_learning_1", "some/dictionaries", "resid_post_layer_1/trainer_0",
     write_dictionary_learning, {"dict_class": "BatchTopKSAE"}),
    ("dictionary_learning_1", "some/dictionaries", "resid_post_layer_1/trainer_1",
     write_dictionary_learning, {"dict_class": "GatedAutoEncoder"}),
    ("dictionary_learning_1", "some/dictionaries", "resid_post_layer_1/trainer_2",
     write_dictionary_learning, {"dict_class": "JumpReluAutoEncoder"}),
    ("dictionary_learning_1", "some/dictionaries", "resid_post_layer_1/trainer_3",
     write_dictionary_learning, {"dict_class": "AutoEncoderTopK"}),
    ("dictionary_learning_1", "some/dictionaries", "resid_post_layer_1/trainer_4",
     write_dictionary_learning, {"dict_class": "AutoEncoder"}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "repository", "inside", "write", "changes"), LOADERS,
    ids=[f"{row[0]} {row[4].get('dict_class', '')}" for row in LOADERS],
)  # fmt: skip
def test_sae_lens_own_loaders_agree_where_they_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sae_lens: Any,
    loader: str, repository: str, inside: str, write: Any, changes: dict[str, Any],
) -> None:  # fmt: skip
    """Through a made-up cache of the hub. (For sparsify and AutoEncoderNew they are wrong.)"""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    reference = write(tmp_path / "made", **changes)
    publish(tmp_path / "cache", repository, tmp_path / "made", inside)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        loaders, "get_safetensors_tensor_shapes",
        lambda *_: {"w_enc": [D, N], "w_dec": [N, D]},
    )  # fmt: skip
    overrides: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    if loader == "gemma_2":  # its shapes are hard-coded
        overrides |= {"d_in": D, "d_sae": N}
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](
        repository, inside, "cpu", False, overrides
    )
    cfg = loaders.handle_config_defaulting(cfg)
    theirs = sae_lens.SAE.from_dict(cfg)
    theirs.load_state_dict(state)
    x = reference.residuals()
    if loader == "llama_scope":
        theirs.fold_activation_norm_scaling_factor(reference.scale)
    with torch.no_grad():
        z = theirs.encode(x)
        back = theirs.decode(z)
    ours: SAE = opened(tmp_path / "made", SITE).full()
    assert Site.parse(cfg["metadata"]["hook_name"]) == Site.parse(SITE)
    assert torch.equal(ours.encode(x) > 0, z > 0)
    assert error(ours.encode(x), z) <= TOLERANCE
    assert error(ours.decode(z, x), back) <= 2 * TOLERANCE
