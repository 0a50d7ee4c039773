"""Models from files: precision, quantization, placement, attention, BOS: as the study says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import loading
from holdfast.batch import Example
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.edits import Perturbation
from holdfast.errors import DeviceError, SubjectError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.loading import SubjectSpec, load_model
from holdfast.planning import identify
from holdfast.recovery import Budget, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import Folder, SAESpec
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import random_sae, tiny_batch, tiny_model, tiny_problem, tiny_tokenizer
from tests.families import family_subject

SITE = Site(2)


def saved(path: Path, model: Any, **config: Any) -> Path:
    model.save_pretrained(path)
    tokenizer: Any = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    told = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(told))
    return path


def spec(path: Path, **fields: Any) -> SubjectSpec:
    source = Folder(path="organism:saes/1")  # never read here
    return SubjectSpec(model=str(path), saes=(SAESpec(site=str(SITE), source=source),), **fields)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("llama"), tiny_model())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_precision_asked_for(llama: Path, dtype: Any) -> None:
    model, _ = load_model(spec(llama, dtype=dtype), "cpu")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_quantization_without_gradients_is_refused_with_the_reason(
    tmp_path: Path, method: str
) -> None:
    path = saved(tmp_path / "m", tiny_model(), quantization_config={"quant_method": method})
    with pytest.raises(SubjectError, match=rf"'{method}'.*no backward pass.*bitsandbytes"):
        load_model(spec(path), "cpu")


def test_an_unknown_quantization_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    """Also one that names no method; the refusal comes from config.json alone."""
    path = saved(tmp_path / "m", tiny_model())
    (path / "model.safetensors").unlink()
    told = json.loads((path / "config.json").read_text())
    for said, named in (({"quant_method": "hqq"}, "hqq"), ({"bits": 4}, "of no name")):
        (path / "config.json").write_text(json.dumps(told | {"quantization_config": said}))
        with pytest.raises(SubjectError, match=rf"quantized with '{named}'.*unquantized model"):
            load_model(spec(path), "cpu")


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "bitsandbytes_8bit"},
        {"load_in_8bit": True},
        {"load_in_4bit": True},
    ],
)
def test_a_stored_bitsandbytes_quantization_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any]
) -> None:
    """Older files name no method and say only how many bits."""
    path = saved(tmp_path / "m", tiny_model(), quantization_config=stored)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    spec(path).check_quantization()
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(SubjectError, match=r"needs bitsandbytes.*pip install bitsandbytes"):
        load_model(spec(path), "cpu")


def test_a_model_that_is_quantized_already_is_not_quantized_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path = saved(tmp_path / "m", tiny_model(), quantization_config=stored)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    spec(path, quantization="4bit").check_quantization()
    with pytest.raises(SubjectError, match=r"'8bit'.*stored in 4bit"):
        spec(path, quantization="8bit").check_quantization()


class Rounded(torch.nn.Module):
    """A linear map as a quantized one is: integer weights without a gradient, which its own
    autograd turns into numbers for forward and backward; not a Linear."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.step = linear.weight.abs().amax(1, keepdim=True) / 127
        codes = (linear.weight / self.step).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Dequantized.apply(x, self.weight, self.step)


class Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, step: torch.Tensor) -> Any:
        ctx.of = codes, step
        return x @ (codes * step).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        codes, step = ctx.of
        return gradient @ (codes * step), None, None


def test_a_search_goes_through_quantized_layers_and_asks_nothing_of_their_weights() -> None:
    """The same as with the numbers that they stand for; no weight ever has a gradient."""
    found = []
    for quantized in (True, False):
        model: Any = tiny_model()
        for block in model.model.layers:
            for module in list(block.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        own = Rounded(child)
                        if quantized:
                            setattr(module, name, own)
                        else:
                            child.weight.data = own.weight * own.step
        tokenizer: Any = tiny_tokenizer()
        subject = Subject.of("tiny", model, tokenizer, {SITE: random_sae(SITE)})
        batch = tiny_batch(subject, 4)
        features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(1, 5)),), source="test")
        bank = FeatureBank.of(subject.sae(SITE), features)
        spec_ = RecoverySpec(
            constraint=EncoderNull(), steps=5, doublings=1, budget=Budget(relative=1)
        )
        found.append(recover(tiny_problem(subject, batch, bank), spec_, seed=0).delta)
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


class Packing(torch.nn.Linear):
    """What bitsandbytes' 4-bit layer does on some CPUs: in a pass without gradients it takes to a
    kernel that has no backward pass, and stays with it."""

    support_avx512bf16_for_cpu = True
    packed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.packed |= self.support_avx512bf16_for_cpu and not x.requires_grad
        return super().forward(x.detach() if self.packed else x)


def test_no_layer_takes_to_a_kernel_that_has_no_backward_pass() -> None:
    gradients = []
    for packing in (True, False):
        model: Any = tiny_model()
        for block in model.model.layers:
            if packing:
                block.mlp.down_proj.__class__ = Packing
        tokenizer: Any = tiny_tokenizer()
        subject = Subject.of("tiny", model, tokenizer, {SITE: random_sae(SITE)})
        batch = tiny_batch(subject, 4)
        replay = Replay.record(subject, batch, Site(1), batch.prompt_length[:, None] - 1)
        delta = torch.zeros(4, 1, 32, requires_grad=True)
        gradients.append(torch.autograd.grad(replay.logits(delta)[:, 5].sum(), delta)[0])
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_gradients_through_bitsandbytes_are_those_of_its_numbers(
    tmp_path: Path, quantization: Any
) -> None:
    """Where it is installed: the direction a search goes is that of the same weights in float32."""
    bnb = pytest.importorskip("bitsandbytes")
    path = saved(tmp_path / "m", tiny_model(d_model=64))
    found = []
    for dequantized in (False, True):
        model, tokenizer = load_model(spec(path, quantization=quantization), "cpu")
        for module in list(model.modules()) if dequantized else []:
            for name, child in list(module.named_children()):
                if isinstance(child, bnb.nn.Linear4bit):
                    W = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                elif isinstance(child, bnb.nn.Linear8bitLt):
                    W = child.weight.CB * child.weight.SCB[:, None] / 127
                else:
                    continue
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight.data = W.float()
                setattr(module, name, plain)
        subject = Subject.of("tiny", model, tokenizer, {SITE: random_sae(SITE, 64)})
        batch = tiny_batch(subject, 6)
        replay = Replay.record(subject, batch, Site(1), batch.prompt_length[:, None] - 1)
        delta = torch.zeros(6, 1, 64, requires_grad=True)
        logits = replay.logits(delta)
        found.append(torch.autograd.grad((logits[:, 5] - logits[:, 6]).sum(), delta)[0])
    cosine = torch.nn.functional.cosine_similarity(*(g.flatten(1) for g in found))
    assert cosine.min() > 0.95  # 8-bit rounds the activations too


def test_bitsandbytes_is_let_through_or_says_what_to_install(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(SubjectError, match="pip install bitsandbytes"):
        spec(llama, quantization="8bit").check_quantization()
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    for stored in ({"quant_method": "bitsandbytes"}, None):
        monkeypatch.setattr(
            SubjectSpec, "_config", lambda self, stored=stored: {"quantization_config": stored}
        )
        spec(llama, quantization="4bit").check_quantization()


def test_the_quantization_reaches_transformers(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes itself needs its own kernels; what it is asked for is checked here."""
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    for asked, wanted in (("8bit", (True, False)), ("4bit", (False, True))):
        placed = loading._placement(spec(llama, quantization=asked, dtype="bfloat16"), "cuda:0")
        config = placed["quantization_config"]
        assert (config.load_in_8bit, config.load_in_4bit) == wanted
        assert config.bnb_4bit_compute_dtype == torch.bfloat16
        assert placed["device_map"] == {"": "cuda:0"}


def test_placement_needs_accelerate_and_says_so(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="pip install accelerate"):
        load_model(spec(llama), "auto")


def test_blocks_spread_over_devices_give_the_same_search(llama: Path, tmp_path: Path) -> None:
    """accelerate wraps every block and moves its weights in and out: edits, replay and search must
    not notice. Here the places are this machine's memory and its disk."""
    from transformers import AutoModelForCausalLM

    places: dict[str, Any] = {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
        "model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "disk",
    }  # fmt: skip
    spread = AutoModelForCausalLM.from_pretrained(
        llama, device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    ).requires_grad_(False)
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    whole, tokenizer = load_model(spec(llama), "cpu")
    results = []
    for model in (whole, spread):
        sae = random_sae(SITE)
        subject = Subject.of("tiny", model, tokenizer, {SITE: sae})
        batch = tiny_batch(subject, 6)
        features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(1, 5, 9)),), source="test")
        bank = FeatureBank.of(subject.sae(SITE), features)
        found = recover(
            tiny_problem(subject, batch, bank),
            RecoverySpec(constraint=EncoderNull(), steps=5, doublings=1, budget=Budget(relative=1)),
            seed=0,
        )
        edit = Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {SITE: found.delta})
        results.append((found.delta, subject.outputs(batch, (edit,)), subject.generate(batch)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_auto_places_a_model_that_fits_in_one_piece(llama: Path) -> None:
    model, tokenizer = load_model(spec(llama), "auto")
    subject = Subject.of("tiny", model, tokenizer, {SITE: random_sae(SITE)})
    plain, _ = load_model(spec(llama), "cpu")
    other = Subject.of("tiny", plain, tokenizer, {SITE: random_sae(SITE)})
    batch = tiny_batch(subject, 4)
    torch.testing.assert_close(subject.outputs(batch).cpu(), other.outputs(batch))


def test_gemma_2_gets_eager_attention_unless_asked_for_what_is_wrong(tmp_path: Path) -> None:
    path = saved(tmp_path / "gemma", family_subject("gemma2", "eager").model)
    assert spec(path).attention_used() == "eager"
    model, _ = load_model(spec(path), "cpu")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(SubjectError, match=r"'sdpa'.*'eager'.*soft-caps"):
        load_model(spec(path, attention="sdpa"), "cpu")


def test_what_changes_numbers_is_part_of_the_identity(llama: Path) -> None:
    own = identify(spec(llama))
    assert own.attention == "sdpa", "the one used, where the study names none"
    assert identify(spec(llama, attention="sdpa")) == own
    for changed in (
        {"dtype": "bfloat16"}, {"attention": "eager"}, {"quantization": "8bit"},
        {"prepend_bos": True},
    ):  # fmt: skip
        assert identify(spec(llama, **changed)) != own, changed


def test_bos_is_prepended_once_where_asked(llama: Path) -> None:
    model, tokenizer = load_model(spec(llama), "cpu")
    saes = {SITE: random_sae(SITE)}
    asked = Subject.of("tiny", model, tokenizer, saes, prepend_bos=True)
    plain = replace(asked, prepend_bos=False)
    with_own = Example("a", "w1 w2", "w3", ("w4",), ("w5",), "a")
    without = replace(with_own, id="b", special=False)
    bos = tokenizer.bos_token_id
    assert asked.encode(with_own) == plain.encode(with_own)
    assert asked.encode(without) == [bos, *plain.encode(without)]
    assert asked.encode(without).count(bos) == 1
    tokenizer.bos_token = None
    with pytest.raises(SubjectError, match="no BOS token"):
        Subject.of("tiny", model, tokenizer, saes, prepend_bos=True)
