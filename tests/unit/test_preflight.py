"""Preflight finds every planted mistake, names the right one, and is silent where all is well.

A mutation plants one mistake in a set-up that has no failed finding; the findings that fail then
are given exactly. Where a mistake has symptoms beside its diagnosis, the diagnosis comes first.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import holdfast.preflight
from holdfast.batch import Batch, Example, Frame
from holdfast.batching import Batching
from holdfast.behaviors import Behavior, BehaviorKind
from holdfast.behaviors.ioi import IOI as IOIKind
from holdfast.canonical import digest
from holdfast.edits import Capture
from holdfast.errors import PreflightError
from holdfast.executor import Runtime, load_lab, threads_for
from holdfast.families import Family
from holdfast.finding import Finding, tally
from holdfast.loading import SubjectSpec
from holdfast.organism.assets import resolve
from holdfast.planning import Plan, plan
from holdfast.positions import selected
from holdfast.preflight import preflight, prompts, require, saes
from holdfast.preflight.model import Nudge, Witness
from holdfast.preflight.readings import Fit, fit, readings
from holdfast.preflight.scene import Rounding, Scene, spread
from holdfast.saes.inputs import Inputs
from holdfast.saes.sae import SAE
from holdfast.saes.sources import Folder, SAESpec
from holdfast.saes.stored import StoredSAE
from holdfast.sites import Site
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.testing import WORDS, check_edit, fitted_sae, random_sae, tiny_tokenizer
from holdfast.trial import Lab, SubjectIdentity, Trial

SITE, NEXT = Site(1), Site(2)
IOI = {"kind": "ioi"}


class Words(BehaviorKind):
    """Random words of the tiny tokenizer; the splits share none, unless they `overlap`."""

    kind: Literal["words"] = "words"
    overlap: bool = False

    def examples(self, tokenizer: Any, split: Any, n: int, seed: int) -> list[Example]:
        start = 0 if self.overlap else {"fit": 0, "tune": 10**6, "test": 2 * 10**6}[split]
        return [self._example(start + i) for i in range(n)]

    def _example(self, i: int) -> Example:
        generator = torch.Generator().manual_seed(i)
        words = [WORDS[j] for j in torch.randperm(len(WORDS), generator=generator).tolist()]
        text, answers = " ".join(words[: 6 + i % 9]), words[-3:]
        return Example(f"words:{i}", text, answers[0], (answers[1],), (answers[2],), f"words:{i}")


class Fronted(BehaviorKind):
    """Another behavior's prompts with something in front of every text."""

    kind: Literal["fronted"] = "fronted"
    of: Behavior
    front: str

    def examples(self, tokenizer: Any, split: Any, n: int, seed: int) -> list[Example]:
        inner = self.of.examples(tokenizer, split, n, seed)
        return [replace(example, text=self.front + example.text) for example in inner]


class Ending(BehaviorKind):
    """Another behavior's prompts with an end that counts as a chat template's; without one, the
    last letter of the text does."""

    kind: Literal["ending"] = "ending"
    of: Behavior
    suffix: str

    def examples(self, tokenizer: Any, split: Any, n: int, seed: int) -> list[Example]:
        inner = self.of.examples(tokenizer, split, n, seed)
        return [
            replace(e, text=e.text + self.suffix, suffix=self.suffix or e.text[-1]) for e in inner
        ]


@dataclass(frozen=True)
class Setup:
    """What is checked: an audit on a subject."""

    subject: Subject
    behavior: Any
    intervention: Any
    constraint: str = "encoder_null"

    @property
    def sae(self) -> SAE:
        (sae,) = self.subject.saes.values()
        return sae.full()

    def with_sae(self, sae: SAE) -> Setup:
        return replace(self, subject=replace(self.subject, saes={sae.site: sae}))

    def with_clamp(self, **changes: Any) -> Setup:
        return replace(self, intervention=self.intervention | changes)


CLAMP = {"kind": "clamp", "mode": "set_where_active", "value": [-2.0, -5.0]}


def checked(setup: Setup, **changes: Any) -> list[Finding]:
    """Every finding, as `holdfast check` makes them."""
    identity = SubjectIdentity(
        name=setup.subject.name, weights_sha256="0" * 64, dtype="float32", attention="sdpa", saes=()
    )
    trial = Trial.model_validate(
        {
            "audit": "audit", "seed": 0, "subject": identity, "twin": None,
            "data": {"fit": 40, "tune": 4, "test": 24}, "behavior": setup.behavior,
            "discovery": {"kind": "attribution"}, "intervention": setup.intervention,
            "recovery": {"constraint": {"kind": setup.constraint}, "budget": {"relative": 0.5}},
            "control": {"kind": "none"},
        } | changes
    )  # fmt: skip
    lab = Lab({digest(identity.model_dump(mode="json")): setup.subject})
    with threads_for(lab, Runtime()):
        return preflight(Plan(parse(bundled("demo")), (trial,), {}), lab)[trial.id]


def failed(findings: Sequence[Finding]) -> dict[str, str]:
    """Check without its site → level, of those that failed."""
    return {f.check.split(" at blocks.")[0]: f.level for f in findings if not f.passed}


# --- Set-ups in which all is well -----------------------------------------------------------------


def load(name: str, *layers: int, dtype: Any = "float32") -> Subject:
    specs = tuple(
        SAESpec(site=f"blocks.{i}.hook_resid_post", source=Folder(path=f"{name}:saes/{i}"))
        for i in layers
    )
    return Subject.load(SubjectSpec(model=name, dtype=dtype, saes=specs))


@pytest.fixture(scope="session")
def organism() -> Setup:
    return Setup(load("organism", 0), IOI, CLAMP)


@pytest.fixture(scope="session")
def chat() -> Setup:
    """Instructions in the organism's chat template, complied with or refused."""
    return Setup(load("organism", 0), {"kind": "refusal"}, CLAMP | {"positions": "prompt"})


def tiny_gpt2() -> GPT2LMHeadModel:
    """Learned positions, and a residual with a mean over d_model, as GPT-2's has."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 4, n_embd=32, n_layer=4, n_head=4, n_positions=64,
        initializer_range=0.25, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    model.transformer.wpe.weight += 1.0
    return model


def words_read(subject: Subject, site: Site) -> Tensor:
    """[tokens d_model] of many random prompts, without BOS."""
    capture = Capture(site)
    subject.outputs(subject.batch([Words()._example(10**7 + i) for i in range(200)]), (capture,))
    return torch.cat([x[frame.positions > 0] for frame, x in capture.seen])


@pytest.fixture(scope="session")
def gpt2() -> Setup:
    """An SAE of centered residuals on a model whose residuals are not."""
    subject = Subject.of("tiny", tiny_gpt2(), tiny_tokenizer(), {})
    x = words_read(subject, NEXT)
    sae = fitted_sae(NEXT, x - x.mean(-1, keepdim=True))
    return Setup(replace(subject, saes={NEXT: centered(sae, True)}), Words(), CLAMP)


def centered(sae: SAE, center: bool) -> SAE:
    return replace(sae, inputs=replace(sae.inputs, center=center))


def scaled(sae: SAE, scale: float) -> SAE:
    """The same SAE in other units: it reads residuals times `scale`."""
    return replace(
        sae, inputs=Inputs(scale=scale), b_enc=scale * sae.b_enc, b_dec=scale * sae.b_dec,
        threshold=scale * sae.threshold,
    )  # fmt: skip


@pytest.fixture(scope="session")
def setups(organism: Setup, chat: Setup, gpt2: Setup) -> dict[str, Setup]:
    """Correct set-ups by name: of every kind of SAE, policy of positions and intervention."""
    sae, x = organism.sae, words_read(gpt2.subject, NEXT)
    return {
        "organism": organism,
        "chat": chat,
        "another site": replace(organism, subject=load("organism", 1)),
        "two sites": replace(organism, subject=load("organism", 0, 2), constraint="unconstrained"),
        "BOS prepended": replace(
            organism,
            subject=replace(organism.subject, tokenizer=without_bos(), prepend_bos=True),
        ),
        "gated": organism.with_sae(
            replace(
                sae, b_enc=sae.b_enc - sae.threshold, gain=torch.ones_like(sae.b_enc),
                offset=sae.threshold, threshold=torch.zeros_like(sae.b_enc),
            )
        ),
        "scaled": organism.with_sae(scaled(sae, 8.0)),
        "scaled down": organism.with_sae(scaled(sae, 0.05)),
        "top-k": replace(organism.with_sae(top_k(sae)), constraint="unconstrained"),
        "normalized": replace(
            gpt2.with_sae(
                replace(
                    fitted_sae(NEXT, main_directions(x / x.norm(dim=1, keepdim=True) * 32**0.5)),
                    inputs=Inputs(norm="constant_norm_rescale"),
                )
            ),
            constraint="unconstrained",
        ),
        "centered": gpt2,
        "float16": replace(organism, subject=load("organism", 0, dtype="float16")),
        "as they are": gpt2.with_sae(fitted_sae(NEXT, main_directions(x))),
        "prompt": gpt2.with_clamp(positions="prompt"),
        "last_prompt": gpt2.with_clamp(positions="last_prompt"),
        "generated too": gpt2.with_clamp(positions="all", include_bos=True),
        "listed": gpt2.with_clamp(positions=(1, 3)),
        "template": chat.with_clamp(positions="template"),
        "condition": gpt2.with_clamp(
            mode="set", value=3.0, condition={"feature": 0, "above": 0.1}
        ),
        "mean": gpt2.with_clamp(mode="mean", value=None),
        "error dropped": gpt2.with_clamp(error_term="drop"),
        "several": replace(
            gpt2,
            intervention={
                "kind": "several",
                "of": [CLAMP, CLAMP | {"features": [{"site": str(NEXT), "ids": [5]}]}],
            },
        ),
    }  # fmt: skip


def main_directions(x: Tensor, n: int = 20) -> Tensor:
    """x [tokens d_model] without what varies least: an SAE of it leaves something unexplained."""
    mean = x.mean(0)
    Vh = torch.linalg.svd(x - mean, full_matrices=False).Vh[:n]
    return mean + (x - mean) @ Vh.T @ Vh


def without_bos() -> Any:
    """The organism's tokenizer with its template lost: it adds no BOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(resolve("organism"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    return tokenizer


def top_k(sae: SAE) -> SAE:
    return replace(sae, k=8, threshold=torch.zeros_like(sae.threshold))


NAMES = (
    "organism", "chat", "another site", "two sites", "BOS prepended", "gated", "scaled",
    "scaled down", "top-k", "normalized", "centered", "as they are", "float16", "prompt",
    "last_prompt",
    "generated too", "listed", "template", "condition", "mean", "error dropped", "several",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_false_alarm(setups: dict[str, Setup], name: str) -> None:
    findings = checked(setups[name])
    assert [f.sentence for f in findings if not f.passed] == []
    assert len(findings) >= 18


@pytest.fixture(scope="session")
def demo() -> tuple[Plan, Lab]:
    planned = plan(parse(bundled("demo")))
    return planned, load_lab(planned, planned.trials, Runtime())


def test_no_false_alarm_in_the_demo(demo: tuple[Plan, Lab]) -> None:
    """Every audit of the bundled study, and the twins of those that have one."""
    with threads_for(demo[1], Runtime()):
        made = preflight(*demo)
    assert set(made) == {trial.id for trial in demo[0].trials}
    assert [f.sentence for found in made.values() for f in found if not f.passed] == []
    places = {f.where for found in made.values() for f in found}
    assert places >= {"ioi on organism", "ioi on organism-ignorant", "mcq on organism"}


# --- Mutations ------------------------------------------------------------------------------------

Plant = Callable[[dict[str, Setup], pytest.MonkeyPatch], Setup]
MUTATIONS: dict[str, tuple[Plant, dict[str, str]]] = {}


def plants(*faults: str, cautions: Sequence[str] = ()) -> Callable[[Plant], Plant]:
    """A mutation by its function's name, and exactly what fails then: the diagnosis first."""

    def keep(plant: Plant) -> Plant:
        # What cannot be checked at all is called by what it is of: the prompts, the SAE.
        expected = {name: "error" if name.startswith("the ") else "fault" for name in faults}
        expected |= dict.fromkeys(cautions, "caution")
        MUTATIONS[plant.__name__] = plant, expected
        return plant

    return keep


@plants("reconstruction", "active features")
def sae_of_the_ignorant_twin(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["organism"].with_sae(load("organism-ignorant", 0).saes[SITE].full())


@plants("reconstruction", "active features")
def sae_of_random_numbers(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["organism"].with_sae(random_sae(SITE, 128, 1024))


@plants("site of the SAE")
def sae_one_site_too_low(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["organism"].with_sae(replace(setups["another site"].sae, site=SITE))


@plants("site of the SAE")
def sae_one_site_too_high(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["organism"].with_sae(replace(setups["organism"].sae, site=NEXT))


@plants("centering of the SAE", "reconstruction")
def centering_left_out(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["centered"].with_sae(centered(setups["centered"].sae, False))


@plants("centering of the SAE")
def centered_without_need(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["as they are"].with_sae(centered(setups["as they are"].sae, True))


@plants("scale of the SAE", "reconstruction")
def scale_left_out(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["scaled"].with_sae(replace(setups["scaled"].sae, inputs=Inputs()))


@plants("scale of the SAE", "active features")
def scale_left_out_of_large_residuals(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["scaled down"].with_sae(replace(setups["scaled down"].sae, inputs=Inputs()))


@plants("scale of the SAE", "active features")
def scale_applied_twice(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    sae = setups["scaled"].sae
    return setups["scaled"].with_sae(replace(sae, inputs=Inputs(scale=sae.inputs.scale**2)))


@plants("activation function of the SAE", "reconstruction", "active features")
def top_k_read_as_relu(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["top-k"].with_sae(replace(setups["top-k"].sae, k=None))


@plants("activation function of the SAE", "reconstruction", "active features")
def thresholds_lost(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    sae = setups["organism"].sae
    return setups["organism"].with_sae(replace(sae, threshold=torch.zeros_like(sae.threshold)))


@plants("activation function of the SAE", "reconstruction", "active features")
def gate_lost(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    sae = setups["gated"].sae
    assert sae.offset is not None
    magnitude = replace(sae, b_enc=sae.b_enc + sae.offset, gain=None, offset=None)
    return setups["gated"].with_sae(magnitude)


@plants("active features")
def another_published_l0(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    sae = setups["organism"].sae
    return setups["organism"].with_sae(replace(sae, facts=replace(sae.facts, l0=64.0)))


@plants("decoder bias of the SAE")
def decoder_bias_not_subtracted(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["organism"].with_sae(replace(setups["organism"].sae, subtract_b_dec=False))


@plants(cautions=["base model of the SAE"])
def sae_of_a_model_of_another_name(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    sae = setups["centered"].sae
    facts = replace(sae.facts, model="gpt2-small")
    return setups["centered"].with_sae(replace(sae, facts=facts))


@plants("beginning of sequence")
def bos_missing(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    setup = setups["organism"]
    return replace(setup, subject=replace(setup.subject, tokenizer=without_bos()))


@plants("BOS once")
def bos_doubled(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return replace(setups["organism"], behavior=Fronted(of=IOI, front="<bos> "))


@plants("BOS once", cautions=["reconstruction of template tokens"])
def bos_inside(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return replace(setups["organism"], behavior=Fronted(of=IOI, front="the <bos> "))


@plants("splits")
def splits_that_overlap(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return replace(setups["centered"], behavior=Words(overlap=True))


@plants("the prompts")
def answers_of_several_tokens(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return replace(setups["organism"], behavior=Words())


@plants("chat template")
def chat_template_of_another_tokenizer(
    setups: dict[str, Setup], patch: pytest.MonkeyPatch
) -> Setup:
    tokenizer = AutoTokenizer.from_pretrained(resolve("organism"))
    tokenizer.chat_template = (
        "{{ '<bos>' }}{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }}"
        " <|im_end|> {% endfor %}<|im_start|> assistant"
    )
    setup = setups["chat"]
    return replace(setup, subject=replace(setup.subject, tokenizer=tokenizer))


@plants(cautions=["chat template"])
def chat_template_of_words(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    """The tokenizer has no special tokens for chats: it may be meant so."""
    return replace(setups["centered"], behavior=Ending(of=Words(), suffix=" <|assistant|>"))


@plants("chat turn")
def chat_template_without_a_token(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return replace(setups["centered"], behavior=Ending(of=Words(), suffix=""))


@plants("padding")
def position_ids_ignored(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return forwarding(setups["centered"], lambda call: call | {"position_ids": None})


@plants("padding")
def attention_mask_ignored(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    def change(call: dict[str, Any]) -> dict[str, Any]:
        return call | {"attention_mask": torch.ones_like(call["attention_mask"])}

    return forwarding(setups["organism"], change)


@plants("cache")
def cache_ignored(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    def change(call: dict[str, Any]) -> dict[str, Any]:
        mask = call["attention_mask"][:, -call["input_ids"].shape[1] :]
        return call | {"past_key_values": None, "use_cache": False, "attention_mask": mask}

    return forwarding(setups["organism"], change)


def forwarding(setup: Setup, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Setup:
    """The set-up with a model that calls itself with other arguments than it was given."""
    model = copy.deepcopy(setup.subject.model)
    forward = model.forward

    def changed(**call: Any) -> Any:
        return forward(**change(call))

    model.forward = changed
    return replace(setup, subject=replace(setup.subject, model=model))


@plants("residual stream")
def blocks_of_a_copy(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    model = copy.deepcopy(setups["organism"].subject.model)
    model.model.shadow = copy.deepcopy(model.model.layers)
    family = Family("model.shadow", "model.norm")
    subject = replace(setups["organism"].subject, model=model, family=family)
    return replace(setups["organism"], subject=subject)


@plants("residual stream")
def blocks_whose_output_nobody_reads(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    model = copy.deepcopy(setups["organism"].subject.model)
    layers = model.model.layers
    model.model.taps = nn.ModuleList(nn.Identity() for _ in layers)
    for layer, tap in zip(layers, model.model.taps, strict=True):
        layer.register_forward_hook(lambda module, args, out, tap=tap: only_look(tap, out))
    family = Family("model.taps", "model.norm")
    subject = replace(setups["organism"].subject, model=model, family=family)
    return replace(setups["organism"], subject=subject)


def only_look(tap: nn.Module, out: Any) -> None:
    tap(out[0] if isinstance(out, tuple) else out)


@plants("range of float16")
def float16_overflows(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return louder(setups["float16"], 3e4)


@plants("range of float16")
def float16_nearly_overflows(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return louder(setups["float16"], 2500.0)


def louder(setup: Setup, factor: float) -> Setup:
    """What the third block adds to the residual, many times as large."""
    model = copy.deepcopy(setup.subject.model)
    model.model.layers[2].mlp.down_proj.weight *= factor
    return replace(setup, subject=replace(setup.subject, model=model))


@plants("range of float32")
def weights_of_nan(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    model = copy.deepcopy(setups["organism"].subject.model)
    model.model.norm.weight[0] = torch.nan
    return replace(setups["organism"], subject=replace(setups["organism"].subject, model=model))


@plants("positions of the clamp (set_where_active)", "cache under the intervention")
def columns_counted_for_positions(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    """The published mistake: under a cache the one new column counts as the last of the prompt."""

    def by_columns(where: Any, include_bos: bool, frame: Frame) -> Tensor:
        b, s = frame.positions.shape
        columns = torch.arange(s).expand(b, s)
        length = torch.full_like(frame.prompt_length, s)
        return selected(where, True, replace(frame, positions=columns, prompt_length=length))

    patch.setattr("holdfast.edits.selected", by_columns)
    return setups["last_prompt"]


@plants("positions of the clamp (set_where_active)")
def bos_edited_although_left_out(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    patch.setattr(
        "holdfast.edits.selected", lambda where, include_bos, frame: selected(where, True, frame)
    )
    return setups["organism"]


@plants("positions of the clamp (set_where_active)", "cache under the intervention")
def first_generated_token_left_out(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:

    def short(where: Any, include_bos: bool, frame: Frame) -> Tensor:
        first = frame.positions == frame.prompt_length[:, None]
        return selected(where, include_bos, frame) & ~(first & (frame.positions.shape[1] == 1))

    patch.setattr("holdfast.edits.selected", short)
    return setups["organism"]


@plants("encoder_null")
def exact_constraint_on_normalized_inputs(
    setups: dict[str, Setup], patch: pytest.MonkeyPatch
) -> Setup:
    return replace(setups["normalized"], constraint="encoder_null")


@plants(cautions=["encoder_null"])
def exact_constraint_on_top_k(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return replace(setups["top-k"], constraint="encoder_null")


@plants("the intervention")
def features_the_sae_does_not_have(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return setups["organism"].with_clamp(features=[{"site": str(SITE), "ids": [10**6]}])


@plants(cautions=["gates"])
def bfloat16_flips_gates(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return replace(setups["organism"], subject=load("organism", 0, dtype="bfloat16"))


@plants(cautions=["attention sinks under the clamp"])
def clamp_on_an_attention_sink(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    return sink(setups["organism"]).with_clamp(include_bos=True)


def sink(setup: Setup) -> Setup:
    """BOS gets a residual a hundred times as long, as many models have it."""
    model = copy.deepcopy(setup.subject.model)
    model.model.embed_tokens.weight[setup.subject.tokenizer.bos_token_id] *= 1e3
    return replace(setup, subject=replace(setup.subject, model=model))


@plants(cautions=["behavior"])
def behavior_that_is_not_there(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    model = copy.deepcopy(setups["organism"].subject.model)
    model.lm_head.weight[:] = model.lm_head.weight[0].clone()
    return replace(setups["organism"], subject=replace(setups["organism"].subject, model=model))


@plants(cautions=["reconstruction of template tokens"])
def template_tokens_the_sae_never_saw(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    setup = setups["chat"]
    model = copy.deepcopy(setup.subject.model)
    generator = torch.Generator().manual_seed(1)
    for token in setup.subject.tokenizer.convert_tokens_to_ids(["<end>", "<assistant>"]):
        model.model.embed_tokens.weight[token] = 4 * torch.randn(128, generator=generator)
    return replace(setup, subject=replace(setup.subject, model=model))


@plants(cautions=["mixture of experts"])
def experts(setups: dict[str, Setup], patch: pytest.MonkeyPatch) -> Setup:
    family = replace(setups["organism"].subject.family, moe=True)
    return replace(setups["organism"], subject=replace(setups["organism"].subject, family=family))


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_found_and_named(
    setups: dict[str, Setup], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, expected = MUTATIONS[name]
    findings = checked(plant(setups, monkeypatch))
    assert failed(findings) == expected, [f.sentence for f in findings if not f.passed]
    assert all(f.remedy for f in findings if not f.passed and not f.check.startswith("the "))


# --- What is made of findings ---------------------------------------------------------------------


def finding(passed: bool, level: Literal["error", "fault", "caution"] = "fault") -> Finding:
    return Finding(check="moon", passed=passed, level=level, expected="full", measured="new",
                   remedy="wait", where="here")  # fmt: skip


def test_only_faults_stop_a_run() -> None:
    require([finding(True), finding(False, "caution")])
    with pytest.raises(PreflightError) as caught:
        require([finding(False), finding(False), finding(True)])
    said = str(caught.value)
    assert "a mistake" in said and "--despite-faults" in said
    assert said.count("here: moon: expected full; measured new. To do: wait") == 1
    require([finding(False)], despite_faults=True)


def test_an_error_stops_a_run_whatever_is_said_to_it() -> None:
    """Its sentence is the message of what went wrong, and no way round it is offered."""
    with pytest.raises(PreflightError) as caught:
        require([finding(False, "error"), finding(False)], despite_faults=True)
    assert str(caught.value).endswith("nothing was searched:\n  here: moon: new")


def test_tally() -> None:
    good, caution, fault = finding(True), finding(False, "caution"), finding(False)
    assert tally([]) == "0 checks, all passed"
    assert tally([good]) == "1 check, all passed"
    assert tally([good, caution, fault, fault]) == "4 checks, 2 faults, 1 caution"


def test_a_check_that_cannot_be_made_is_an_error_and_keeps_none_from_being_made(
    organism: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(scene: Scene, sae: SAE) -> Iterator[Finding]:
        raise PreflightError("no")
        yield

    monkeypatch.setattr(saes, "active", broken)
    monkeypatch.setattr(saes, "reading", broken)
    findings = checked(organism)
    assert failed(findings) == {"the SAE": "error"}
    assert any(f.check == "cache under the intervention" for f in findings)


def test_the_twin_is_not_asked_for_the_behavior(organism: Setup) -> None:
    """It would be a caution on every good twin."""
    mute = behavior_that_is_not_there({"organism": organism}, pytest.MonkeyPatch())
    scene = Scene(mute.subject, mute.behavior, {}, ignorant=True)
    assert list(prompts.behavior(scene)) == []


# --- Cost -----------------------------------------------------------------------------------------


def test_a_grid_of_clamps_checks_the_subject_once(
    demo: tuple[Plan, Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, lab = demo
    trial = next(t for t in planned.trials if t.audit == "ioi" and t.control.kind == "none")
    values = (-1.0, -2.0, -3.0)
    trials = [
        trial.model_copy(
            update={"intervention": trial.intervention.model_copy(update={"value": value})}
        )
        for value in values
    ]
    counts = {"set_scene": 0, "set_stage": 0}

    def counting(module: Any, name: str) -> None:
        made = getattr(module, name)

        def call(*args: Any, **named: Any) -> Any:
            counts[name] += 1
            return made(*args, **named)

        monkeypatch.setattr(module, name, call)

    counting(holdfast.preflight, "set_scene")
    counting(holdfast.preflight.intervention, "set_stage")
    out = preflight(planned, lab, trials)
    assert counts == {"set_scene": 1, "set_stage": len(values)}
    assert set(out) == {t.id for t in trials} and all(len(found) > 15 for found in out.values())


def test_one_sae_is_whole_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[SAE]] = []
    most = 0
    full = StoredSAE.full

    def counted(self: StoredSAE) -> SAE:
        nonlocal most
        sae = full(self)
        if all(known() is not sae for known in alive):
            alive.append(weakref.ref(sae))
        most = max(most, sum(known() is not None for known in alive))
        return sae

    monkeypatch.setattr(StoredSAE, "full", counted)
    setup = Setup(load("organism", 0, 1, 2), IOI, CLAMP, "unconstrained")
    assert failed(checked(setup)) == {}
    assert most == 1 and len(alive) == 3, "and each is read once"


def test_wide_saes_are_tried_on_fewer_tokens() -> None:
    x = torch.arange(4096.0)[:, None].expand(4096, 2304)
    for n_features, n in ((1_024, 512), (16_384, 56), (65_536, 32), (1_048_576, 32)):
        some = spread(x, SimpleNamespace(n_features=n_features, d_model=2304))  # type: ignore[arg-type]
        assert len(some) == n
        assert some[0, 0] == 0 and some[-1, 0] == 4095, "from the first to the last"


# --- Readings -------------------------------------------------------------------------------------


def test_a_fit_is_what_it_says(organism: Setup) -> None:
    sae = organism.sae
    x = 3 * torch.randn(700, 128) + 1
    error = x - sae.decode(sae.encode(x), x)
    variance = (x - x.mean(0)).square().sum(1).mean()
    got = fit(sae, x)
    assert got.explained == pytest.approx(float(1 - error.square().sum(1).mean() / variance))
    assert got.mean_error == pytest.approx(float(error.mean(0).square().sum() / variance), rel=1e-4)


def test_another_reading_must_explain_more_and_be_less_biased() -> None:
    own = Fit(0.8, 0.02)
    assert own.beaten_by(Fit(0.85, 0.002))
    assert not own.beaten_by(Fit(0.85, 0.019)), "a simpler residual explains more, and is biased"
    assert not own.beaten_by(Fit(0.801, 0.0)), "no conclusion changes"
    assert not Fit(-3.0, 5.0).beaten_by(Fit(0.4, 0.001)), "nor does that one explain the residuals"
    assert not Fit(0.5, 0.2).beaten_by(Fit(0.6, 0.1)), "unlike anything it was trained on"
    assert not own.beaten_by(Fit(float("nan"), float("nan")))


def test_training_leaves_no_mean_error(organism: Setup) -> None:
    """Why the mean error tells readings apart: the shipped SAEs were trained with this one."""
    subject, sae = organism.subject, organism.sae
    examples = organism_prompts(subject, "fit", 200)
    scene = Scene(subject, Words(), {"fit": examples})
    tried = readings(scene, sae)
    assert tried.right is None
    assert all(other.fit.mean_error > 1.5 * tried.own.mean_error for other in tried.others
               if other.what != "scale" or not 0.7 < other.sae.inputs.scale < 1.5)  # fmt: skip


def organism_prompts(subject: Subject, split: Any, n: int) -> list[Example]:
    return IOIKind().examples(subject.tokenizer, split, n, 0)


# --- Edits the checks are made with ---------------------------------------------------------------


@pytest.mark.parametrize("edit", [Rounding(NEXT), Nudge(NEXT), Witness(NEXT)])
def test_edits_keep_the_contract(edit: Any, batch: Batch) -> None:
    check_edit(edit, batch, 32)


def test_rounding_is_rounding(batch: Batch) -> None:
    frame = batch.frame()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(*frame.positions.shape, 32, dtype=dtype)
        change = (Rounding(NEXT).apply(NEXT, x, frame) - x).abs() / x.abs()
        there = frame.positions >= 0
        assert 0 < change[there].max() <= torch.finfo(dtype).eps
        assert (change[there] > 0).float().mean() > 0.1


def test_noise_flips_about_as_many_gates_as_a_lower_precision(organism: Setup) -> None:
    """What a float32 model would have said cannot be asked of a large model; of the organism it
    can."""
    low = load("organism", 0, dtype="bfloat16")
    drawn = {"fit": organism_prompts(low, "fit", 40)}
    scenes = [Scene(subject, Words(), drawn) for subject in (low, organism.subject)]
    seen = [scene.some(scene.residuals[SITE], organism.sae) for scene in scenes]
    seen.append(scenes[0].some(scenes[0].rounded[SITE], organism.sae))
    bf16, f32, noisy = (organism.sae.encode(x) > 0 for x in seen)
    n_true, n_noise = int((bf16 != f32).sum()), int((bf16 != noisy).sum())
    assert n_true > 10
    assert 0.5 <= n_noise / n_true <= 2.5


@pytest.mark.parametrize("size", [3, 100])
def test_residuals_are_those_of_a_whole_capture(organism: Setup, size: int) -> None:
    """The same tokens, in pieces of any size, and how long all of them are."""
    subject = replace(organism.subject, batching=Batching(size))
    scene = Scene(subject, Words(), {"fit": organism_prompts(subject, "fit", 9)})
    read = Capture(SITE)
    subject.outputs(scene.batch, (read,))
    there = [frame.positions >= 0 for frame, _ in read.seen]
    every = [x[own] for own, (_, x) in zip(there, read.seen, strict=True)]
    no_bos = [
        x[own & (frame.positions > 0)] for own, (frame, x) in zip(there, read.seen, strict=True)
    ]
    sample = scene.residuals[SITE]
    assert torch.equal(scene.some(sample, organism.sae), spread(torch.cat(no_bos), organism.sae))
    norm = sample.norm[scene.batch.positions >= 0]
    torch.testing.assert_close(norm, torch.cat(every).norm(dim=-1))


def test_what_a_scene_holds_does_not_grow_with_its_prompts(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.preflight.scene.N_TOKENS", 40)
    own, held = replace(subject, batching=Batching(2)), []
    for length in (30, 120):
        texts = [" ".join(WORDS[(i + j) % 40] for j in range(length)) for i in range(12)]
        made = [Example(f"p{i}", text, "w1", ("w2",), ("w3",), "c") for i, text in enumerate(texts)]
        scene = Scene(own, Words(), {"fit": made})
        held.append({site: len(sample.x) for site, sample in scene.residuals.items()})
        assert len(scene.some(scene.residuals[NEXT], own.sae(NEXT).full())) == 40
    assert held[0].keys() == held[1].keys()
    assert all(n <= 4 * 40 for n in held[1].values()), "of each SAE about, and of special tokens"
