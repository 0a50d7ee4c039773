"""Forecasts: what is counted on paper is what the code does, and grows with what it should."""

from __future__ import annotations

import json
import runpy
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from holdfast.ascent import Climb, ascend
from holdfast.attacks.residual import MOST_ROWS, packed, pose
from holdfast.batching import MOST, WORK, Sizes
from holdfast.canonical import digest
from holdfast.capability import MOST_LOGITS
from holdfast.chunks import ENTRIES
from holdfast.constraints.active_null import ActiveNull
from holdfast.constraints.in_place import MAX_ROUNDS
from holdfast.constraints.jacobian_probes import JacobianProbes
from holdfast.controls.none import NoControl
from holdfast.controls.random_features import RandomFeatures
from holdfast.discovery.attribution import Attribution
from holdfast.discovery.forget_retain import ForgetRetain
from holdfast.discovery.minimal import Minimal
from holdfast.edits import FeatureEdit
from holdfast.errors import DeviceError, SAEError, StudyError, SubjectError
from holdfast.executor import Runtime, load_lab
from holdfast.forecast import Forecast, forecast, forecast_study, on_device, on_gpu, scene_of
from holdfast.forecast.architecture import Architecture, Block
from holdfast.forecast.comparing import n_pieces, n_variants
from holdfast.forecast.device import GPUS, gpu, probe
from holdfast.forecast.memory import memory_of, recorded_row
from holdfast.forecast.passes import Passes
from holdfast.forecast.preparing import preparing
from holdfast.forecast.prompts import Prompts
from holdfast.forecast.scene import Scene
from holdfast.forecast.searching import forwards, searching, step
from holdfast.forecast.show import amount, as_json, lasting, rests_on, rows_of
from holdfast.forecast.subject import outlined
from holdfast.objectives.vocabulary import Vocabulary
from holdfast.paths import follow
from holdfast.planning import plan, sketch
from holdfast.predicted import NODES
from holdfast.problem import Problem
from holdfast.recovery import RecoverySpec
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import Shape
from holdfast.setting import Data
from holdfast.sites import Site
from holdfast.study import Study, load, parse
from holdfast.subject import Subject
from holdfast.testing import random_sae, tiny_batch, tiny_subject, tiny_tokenizer
from holdfast.trial import Trial, run_trial
from holdfast.variants import PathSpec
from tests.e2e.cli import holdfast, small_study, write
from tests.families import TINY, family_subject, prompts
from tests.unit.recovered import features_at, search, set_up

DOCS = Path(__file__).parents[2] / "docs"
SITE = Site(2)
ON_PAPER = {
    "gemma-2-9b": 9_241_705_984,  # published: 9.24 billion
    "llama-3.1-70b": 70_553_706_496,  # published: 70.6 billion
}

TEXT = """
schema = 1
name = "paper"
[subject]
model = "{model}"
dtype = "{dtype}"
[[subject.saes]]
site = "blocks.1.hook_resid_post"
source = {{ kind = "outline", n_features = {width} }}
[recovery]
constraint = {{ kind = "encoder_null" }}
[[audits]]
name = "only"
behavior = {{ kind = "ioi" }}
discovery = {{ kind = "given", features = [{{ site = "blocks.1.hook_resid_post", ids = [1, 2] }}] }}
intervention = {{ kind = "clamp", mode = "set", value = 0.0 }}
"""


def save_config(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    return folder


def drafted(
    folder: Path, sets: list[str] | None = None, width: int = 64, dtype: str = "float32"
) -> Study:
    return parse(TEXT.format(model=folder, width=width, dtype=dtype), sets or [])


def first(study: Study) -> Trial:
    return sketch(study, outlined).trials[0]


def scene(tmp_path: Path, config: Any, tokens: int = 12, rows: int = 4, **options: Any) -> Scene:
    study = drafted(save_config(tmp_path / "model", config), **options)
    found = scene_of(first(study), study.subject, 512, tokens)
    return replace(found, prompts=replace(found.prompts, n={"fit": 8, "tune": 4, "test": rows}))


@pytest.fixture
def paper(tmp_path: Path) -> Scene:
    return scene(tmp_path, TINY["llama"]())


# ---------------------------------------------------------------------- shapes


def test_a_block_counted_by_hand() -> None:
    d, ff, heads, kv, size = 32, 48, 4, 2, 8
    block = Architecture.of(TINY["llama"]()).blocks[0]
    attention = 2 * d * heads * size + 2 * d * kv * size
    assert block.active == attention + 3 * d * ff
    assert block.parameters == block.active + 2 * d  # two norms
    assert block.outputs == heads * size + 2 * kv * size + d + 2 * ff + d
    assert (block.queries, block.keys, block.window) == (heads * size, kv * size, None)


def test_only_some_experts_are_active() -> None:
    model = Architecture.of(TINY["mixtral"]())
    expert = 3 * 32 * 48
    everything = sum(4 * expert for _ in model.blocks)
    used = sum(2 * expert for _ in model.blocks)
    dense = sum(block.active for block in model.blocks) - used
    assert model.parameters > everything + dense > used + dense


@pytest.mark.parametrize("name", sorted(TINY))
def test_parameters_of_every_family(name: str) -> None:
    model = AutoModelForCausalLM.from_config(TINY[name]())
    assert Architecture.of(TINY[name]()).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ON_PAPER)
def test_the_configs_on_paper_add_up_to_the_published_parameters(name: str) -> None:
    config = transformers.AutoConfig.from_pretrained(DOCS / "cost" / name)
    assert Architecture.of(config).parameters == ON_PAPER[name]


def test_windows_bound_what_a_replay_sees() -> None:
    windows = [block.window for block in Architecture.of(TINY["gemma2"]()).blocks]
    assert windows == [4, None, 4, None]
    block = Architecture.of(TINY["gemma2"]()).blocks[0]
    assert block.seen(100, 1) == 4 and block.seen(3, 1) == 3


# ---------------------------------------------------------------------- operations


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral"])
def test_operations_are_those_that_torch_counts(name: str, tmp_path: Path) -> None:
    subject = family_subject(name, "eager")
    batch = prompts(subject, (12, 12, 12, 12))
    scene_ = scene(tmp_path, TINY[name]())
    with FlopCounterMode(display=False) as full:
        subject.outputs(batch)
    assert scene_.passes.full(4, 12).flops == pytest.approx(full.get_total_flops(), rel=0.05)

    replay = Replay.record(subject, batch, SITE, batch.prompt_length[:, None] - 1)
    delta = torch.zeros(4, 1, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counted:
        torch.autograd.grad(replay.logits(delta).sum(), delta)
    every = replace(scene_, prompts=replace(scene_.prompts, answers=scene_.model.vocabulary))
    assert step(every, 4).flops == pytest.approx(counted.get_total_flops(), rel=0.05)

    answers = torch.tensor([[3, 5]]).expand(4, -1)  # in play, where no answer is forced
    with FlopCounterMode(display=False) as counted:
        torch.autograd.grad(replay.logits(delta, answers).sum(), delta)
    assert step(scene_, 4).flops == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_generated_tokens_are_those_that_torch_counts(tmp_path: Path) -> None:
    subject = family_subject("llama", "eager")
    batch = prompts(subject, (12, 12, 12, 12))
    with FlopCounterMode(display=False) as counted:
        made = subject.generate(batch, max_new_tokens=5)
    assert made.shape[1] == 5  # nothing ended before
    passes = scene(tmp_path, TINY["llama"]()).passes
    assert passes.generate(4, 12, 5).flops == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_a_step_in_closed_form() -> None:
    block = Block(parameters=110, active=100, outputs=30, heads=2, queries=8, keys=4, window=None)
    model = Architecture(d_model=10, vocabulary=50, parameters=1000, blocks=(block,) * 3)
    passes = Passes(model, weight_bytes=2, cache_bytes=2, batch_size=8)
    assert passes.replay(5, 1, 1, 20, 50).flops == 5 * (2 * (200 + 4 * 20 * 8) + 2 * 500)
    launched = passes.launches(1)
    assert (launched.calls, launched.bytes) == (2 + 4, 2 * 2 * 110 * 2)
    full = passes.full(9, 20, back_to=1)  # two batches
    assert full.flops == 9 * ((3 + 2) * 20 * (200 + 4 * 20 * 8) + 2 * 2 * 500)
    assert full.calls == 2 * (3 + 2 * 2)


@pytest.mark.parametrize(
    "positions, columns", [('"last_prompt"', 1), ('"all"', 12), ("[3, 5]", 9), ('"template"', 8)]
)
def test_columns_that_a_step_runs(tmp_path: Path, positions: str, columns: int) -> None:
    found = scene(tmp_path, TINY["llama"](), sets=[f"recovery.perturb.positions={positions}"])
    assert found.columns == columns


def test_forced_answers_are_read_at_every_token(tmp_path: Path) -> None:
    forced = 'audits.0.behavior={kind="refusal", n_forced=5, max_new_tokens=9}'
    found = scene(tmp_path, TINY["llama"](), sets=[forced])
    assert (found.tokens, found.columns) == (12 + 4, 5)


# ---------------------------------------------------------------------- what it grows with


def test_the_search_does_not_feel_the_width_of_an_elementwise_sae(paper: Scene) -> None:
    for width in (64, 1 << 20):
        wide = replace(paper, saes={SITE: Shape(width)})
        assert searching(wide) == searching(paper)
        assert memory_of(wide) == memory_of(paper)


def test_what_needs_the_whole_sae_grows_with_it(paper: Scene) -> None:
    found = paper.trial.model_copy(update={"discovery": Attribution()})
    clamp = paper.trial.intervention.model_copy(update={"error_term": "drop"})
    device = gpu("h100", "float32")
    for changed, k in (
        (found, None),
        (paper.trial.model_copy(update={"intervention": clamp}), None),
        (paper.trial, 4),
    ):
        narrow, wide = (
            replace(paper, trial=changed, saes={SITE: Shape(n, k)}) for n in (1 << 10, 1 << 20)
        )
        less, more = (forecast(each, device, [each]) for each in (narrow, wide))
        assert more.found.flops32 > 100 * less.found.flops32
        assert more.peak >= less.peak + (2**20 - 2**10) * 32 * 4


def test_of_a_topk_what_is_kept_of_its_encoder_counts(paper: Scene) -> None:
    """In float32, as its file has it, or a block of it, by the memory of the device."""
    numbers, block = 32 << 20, 4 * ENTRIES
    few = memory_of(replace(paper, saes={SITE: Shape(1 << 20)})).saes
    topk = replace(paper, saes={SITE: Shape(1 << 20, 4, stored=2)})
    for gigabytes, expected in ((1.0, 4 * numbers), (0.4, 2 * numbers + block), (0.2, block)):
        assert memory_of(topk, gigabytes * 1e9).saes - few == expected
    exact = replace(paper, saes={SITE: Shape(1 << 20, 4)})
    assert memory_of(exact, 0.4e9).saes - few == block


@pytest.mark.parametrize(("scaled", "size"), [(False, 2), (True, 4)])
def test_a_whole_sae_is_counted_as_it_is_kept(paper: Scene, scaled: bool, size: int) -> None:
    clamp = paper.trial.intervention.model_copy(update={"error_term": "drop"})
    trial = paper.trial.model_copy(update={"intervention": clamp})
    shape = Shape(1 << 20, stored=2, scaled=scaled)
    held = memory_of(replace(paper, trial=trial, saes={SITE: shape})).saes - memory_of(paper).saes
    assert held == 2 * size * (32 << 20) + (4 * ENTRIES if size == 2 else 0)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": Prompts.assumed(Data(fit=8, tune=4, test=4), 24)},
        {"prompts": Prompts.assumed(Data(fit=8, tune=4, test=8), 12)},
    ],
    ids=["longer prompts", "more prompts"],
)
def test_more_costs_more(paper: Scene, change: dict[str, Any]) -> None:
    def cost(of: Scene) -> Forecast:
        return forecast(of, gpu("h100", "float32"), [of])

    less, more = cost(paper), cost(replace(paper, **change))
    assert more.found.flops > less.found.flops and more.not_found.flops > less.not_found.flops
    assert more.peak > less.peak
    for one in (less, more):
        assert one.if_found[0] < one.if_not_found[0] and one.if_found[0] < one.if_found[1]


def test_a_site_further_up_costs_less(tmp_path: Path) -> None:
    up = [
        "subject.saes.0.site=blocks.2.hook_resid_post",
        "audits.0.discovery.features.0.site=blocks.2.hook_resid_post",
    ]
    lower, upper = (scene(tmp_path, TINY["llama"](), sets=s) for s in ([], up))
    assert step(upper, 4).flops < step(lower, 4).flops


def test_holding_several_sites_runs_the_blocks_between_them_again(tmp_path: Path) -> None:
    at = [f"blocks.{depth}.hook_resid_post" for depth in (0, 2)]
    features = ", ".join(f'{{site="{site}", ids=[1]}}' for site in at)
    source = 'source={kind="outline", n_features=64}'
    saes = ", ".join(f'{{site="{site}", {source}}}' for site in at)
    sets = [
        f"subject.saes=[{saes}]",
        f"audits.0.discovery.features=[{features}]",
    ]
    free, held = (
        scene(tmp_path, TINY["llama"](), sets=[*sets, f'recovery.constraint.kind="{kind}"'])
        for kind in ("unconstrained", "feature_hold")
    )
    between = free.passes.replay(4, 1, 1, 12, last=3).flops
    assert between > 0
    least, most = (step(held, 4, at_least=fewest).flops - step(free, 4).flops for fewest in (1, 0))
    assert (least, most) == pytest.approx((2 * between, (1 + MAX_ROUNDS) * between))
    assert searching(held).found.calls > searching(free).found.calls
    assert memory_of(held).lane == memory_of(free).lane


def test_the_batch_that_fits_fits(paper: Scene) -> None:
    held = memory_of(paper)
    for rows in (3, 300):
        memory = (held.weights + held.saes + held.replay + rows * held.row) / 0.85
        sizes = held.fit(memory)
        assert 0 < sizes.smallest < MOST.smallest, sizes
        assert held.peak(10**6, 10**6, 10**6, sizes) <= memory
        more = Sizes(**{work: sizes.of(work) + 1 for work in WORK})
        assert memory < 1.3 * held.peak(10**6, 10**6, 10**6, more)
    assert held.fit(1e12) == MOST
    assert held.fit(held.weights) == Sizes.every(0)


def test_probed_rows_of_the_jacobian_are_passes_of_their_own(tmp_path: Path) -> None:
    """Counted on real steps, beside those without a constraint."""
    subject = tiny_subject(sites=(SITE, Site(3)))
    features = features_at((SITE, Site(3)))
    clamps = tuple(FeatureEdit(FeatureBank.of(subject.sae(s), features), "set", 1.0)
                   for s in features.sites)  # fmt: skip
    setting = set_up(subject, tiny_batch(subject, 4), features, clamps)
    case = NoControl().case(setting, lambda: setting)

    def counted(kind: str) -> tuple[float, Problem]:
        spec = RecoverySpec.model_validate(
            {"constraint": {"kind": kind}, "perturb": {"sites": [str(SITE)]}}
        )
        problem, rows = pose(spec, case), torch.arange(4)
        goal, lr = torch.full((4,), 1e9), torch.full((4,), 0.1)
        climb = Climb(rows, torch.zeros(problem.shape), goal, problem.radius, lr)
        feasible = spec.constraint.feasible(problem)
        flops = []
        for steps in (1, 5):
            with FlopCounterMode(display=False) as found:
                ascend(problem, feasible, climb, steps, spec.constraint.stepper)
            flops.append(found.get_total_flops())
        return (flops[1] - flops[0]) / 4, problem  # of a step, without the start

    (free, problem), (probed, _) = counted("unconstrained"), counted("jacobian_probes")
    with FlopCounterMode(display=False) as between, torch.no_grad():
        problem.replay.suffix(torch.zeros(problem.shape), [Site(3)])
    least, most = JacobianProbes().repeats(1)
    assert least == most
    # A little is for the codes themselves.
    assert (probed - free) / between.get_total_flops() == pytest.approx(most, rel=0.1)


def test_every_variant_of_a_recovery_is_counted(tmp_path: Path) -> None:
    subject = tiny_subject(sites=(SITE,))
    features = features_at((SITE,))
    clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "set", 1.0)
    setting = set_up(subject, tiny_batch(subject, 4), features, (clamp,))
    setting = replace(setting, fit=tiny_batch(subject, 8, seed=1))
    few = PathSpec(scales=(1.0, 3.0), draws=3, groups=2, margin_draws=1)
    many = PathSpec(
        draws=1, groups=3, part_scales=(0.5, 1.0), margin_draws=1, likes=False, heads=False
    )
    for kind, spec in (("encoder_null", few), ("unconstrained", many)):
        for where in ("last_prompt", "all"):
            found = search(setting, kind, perturb={"positions": where})
            record = follow(found, spec, 0).record
            run = sum(row["draws"] for row in record["baselines"] + record["variants"])
            sets = [f'recovery.constraint.kind="{kind}"', f'recovery.perturb.positions="{where}"']
            paper = scene(tmp_path, TINY["llama"](), sets=sets)
            trial = paper.trial.model_copy(update={"paths": spec})
            assert n_variants(replace(paper, trial=trial)) == run
            foreseen = record["predicted"]["variants"]
            assert n_pieces(replace(paper, trial=trial)) == len(foreseen)


def test_what_is_compared_costs_where_something_is_recovered(paper: Scene) -> None:
    device = gpu("h100", "float32")
    specs = (None, PathSpec(routes=False, heads=False), PathSpec(heads=False), PathSpec())
    trials = [paper.trial.model_copy(update={"paths": spec}) for spec in specs]
    alone, added, routed, whole = (forecast(replace(paper, trial=t), device, []) for t in trials)
    one = paper.passes.full(paper.rows, paper.tokens).flops
    # Of every vector that is made of the one found: both ends of its way, and its nodes.
    pieces = n_pieces(added.scene)
    gradients = (2 + NODES * pieces) * step(paper, paper.rows).flops
    gradients += (1 + 2 * pieces) * forwards(paper, paper.rows).flops
    # A hundred random directions for their margins, anywhere and inside; the clamp and the vector.
    margins = forwards(paper, paper.rows).flops * 202
    many = one * n_variants(added.scene) + gradients + margins
    assert added.found.flops - alone.found.flops == pytest.approx(many, rel=0.2)
    # Two passes that keep what is then kept in four, and the lens; clean, suppressed, recovered,
    # once for what is written and once for where attention looks, and whom it is read against.
    assert (routed.found.flops - added.found.flops) / one == pytest.approx(7, rel=0.1)
    assert (whole.found.flops - routed.found.flops) / one == pytest.approx(7, rel=0.1)
    assert whole.not_found == added.not_found
    # Where recoveries are compared, verifying looks at every feature of the SAE.
    assert whole.not_found.flops == alone.not_found.flops
    assert whole.not_found.flops32 > alone.not_found.flops32


def test_probes_are_read_where_they_are_and_no_further(tmp_path: Path) -> None:
    texts = """audits.0.behavior={kind="tpp", target="baker"}"""
    found = scene(tmp_path, TINY["llama"](), sets=[texts])
    assert (found.read_at, found.columns, found.n_logits) == (SITE, 12, 0)
    assert step(found, 4).flops == 0  # no block lies between
    assert memory_of(found).lane < memory_of(scene(tmp_path, TINY["llama"]())).lane


def test_an_objective_over_the_vocabulary_reads_it_at_every_step(paper: Scene) -> None:
    assert paper.trial.recovery is not None
    spec = paper.trial.recovery.model_copy(update={"objective": Vocabulary()})
    wide = replace(paper, trial=paper.trial.model_copy(update={"recovery": spec}))
    assert wide.n_logits == paper.model.vocabulary > paper.n_logits
    assert searching(wide).found.flops > searching(paper).found.flops


def test_a_filter_runs_the_fit_prompts_again_for_every_candidate(paper: Scene) -> None:
    few, many = (Minimal(of=Attribution(n_features=n)).passes(tuple(paper.saes)) for n in (8, 16))
    assert many == 2 * few == 48 * len(paper.saes)
    plain, filtered = (
        preparing(
            replace(paper, trial=paper.trial.model_copy(update={"discovery": discovery}))
        ).found.flops
        for discovery in (Attribution(n_features=8), Minimal(of=Attribution(n_features=8)))
    )
    once = paper.passes.full(paper.prompts.n["fit"], paper.prompts.width).flops
    assert filtered - plain == pytest.approx(few * once)


def test_random_features_are_measured_anew(paper: Scene) -> None:
    trial = paper.trial.model_copy(update={"control": RandomFeatures()})
    drawn = forecast(replace(paper, trial=trial), gpu("h100", "float32"), [])
    assert [stage.name for stage in drawn.stages] == [
        "other features", "record", "search", "verify", "undo"
    ]  # fmt: skip
    wide = replace(drawn.scene, saes={SITE: Shape(1 << 20)})
    assert memory_of(wide).whole == 2**20 * 8 * 32 and memory_of(paper).whole == 0


def test_corpora_are_run_up_to_the_site_and_encoded(paper: Scene) -> None:
    corpus = {"kind": "invented", "domains": ["hazard"]}

    def counting(n: int, tokens: int) -> Scene:
        kind = ForgetRetain(forget=corpus, retain=corpus, n_sequences=n, n_tokens=tokens)
        return replace(paper, trial=paper.trial.model_copy(update={"discovery": kind}))

    one, two, three = (preparing(counting(n, 10)).found for n in (50, 100, 150))
    rows, block = 2 * 50, paper.passes.replay(1, 0, 10, 10, last=SITE.depth)
    for less, more in ((one, two), (two, three)):
        assert more.flops - less.flops == pytest.approx(rows * block.flops)
        assert more.flops32 - less.flops32 == 2 * 32 * 64 * rows * 10
    assert memory_of(counting(50, 10)).whole == 64 * 8 * 32


# ---------------------------------------------------------------------- attempts

ATTEMPTED = [
    'attacks=["role_play", "multi_turn"]',
    'audits.0.behavior={kind="refusal", n_forced=5, max_new_tokens=9}',
    'grid={"recovery.steps"=[10, 20]}',
]


def test_attempts_generate_answers_and_search_nothing(tmp_path: Path) -> None:
    study = drafted(save_config(tmp_path / "model", TINY["llama"]()), ATTEMPTED)
    made = forecast_study(study, on_gpu("h100"), 512, 12)
    assert [one.scene.trial.label for one in made] == [
        "encoder_null", "encoder_null", "role_play", "multi_turn"
    ]  # fmt: skip
    said, talked = made[2:]
    assert [stage.name for stage in said.stages] == ["attempt"] and said.found == said.not_found
    turns = said.scene.trial.attack.turns
    assert turns == (1,) * len(turns)
    rows, passes = said.scene.rows, said.scene.passes
    once = passes.generate(2 * rows, 12, 9).flops
    assert said.found.flops == pytest.approx(len(turns) * once)
    longest = max(talked.scene.trial.attack.turns)
    assert longest > 1 and talked.scene.longest == longest * (12 + 9)
    assert talked.peak > said.peak
    held = memory_of(talked.scene)
    assert held.lane == held.replay == 0
    assert held.peak(10**6, 10**6, 10**6, held.fit(1e8)) <= 1e8


def test_answers_are_counted_by_how_many_are_made(tmp_path: Path) -> None:
    """Those of one token by passes, whatever their number."""
    folder = save_config(tmp_path / "model", TINY["llama"]())

    def attempt(attack: str, *sets: str) -> Forecast:
        study = drafted(folder, [f"attacks=[{attack}]", *sets])
        return forecast_study(study, on_gpu("h100"), 512, 12)[-1]

    text = 'audits.0.behavior={kind="refusal", n_forced=5, max_new_tokens=9}'
    begun = attempt("{kind='prefill', n_tokens=[1, 2]}", text)
    drawn = attempt("{kind='sampling', n=4}", text)
    rows, passes = begun.scene.rows, begun.scene.passes
    clamp = attempt("{kind='prefill', n_tokens=[1]}", text)
    assert begun.found.flops == pytest.approx(2 * clamp.found.flops)
    once = passes.generate(rows, 12, 9).flops
    assert drawn.found.flops == pytest.approx(
        8 * once + passes.full(8 * rows, 21, 9).flops, rel=0.01
    )
    options = [attempt(f"{{kind='sampling', n={n}}}").found.flops for n in (2, 20)]
    assert options[0] == options[1] == pytest.approx(2 * passes.full(rows, 12).flops, rel=0.05)


def test_rows_say_which_point_they_are_of(tmp_path: Path) -> None:
    study = drafted(save_config(tmp_path / "model", TINY["llama"]()), ATTEMPTED)
    made = forecast_study(study, on_gpu("h100"), 512, 12)
    assert [row.cells[1] for row in rows_of(made)[:-1]] == [
        "encoder_null, steps=10", "encoder_null, steps=20", "role_play", "multi_turn"
    ]  # fmt: skip
    assert as_json(made)["trials"][1]["point"] == {"recovery.steps": 20}
    said = rests_on(made)
    assert sum(sentence.startswith("only: ") for sentence in said) == 1
    assert sum(sentence.startswith("multi_turn: turns of (3, 2, 2)") for sentence in said) == 1


@pytest.mark.parametrize("name", ["demo", "sweeps", "refusal", "tpp", "error-term"])
def test_a_sketch_has_the_trials_of_the_plan(name: str) -> None:
    """Whatever the subjects are known by, and without a judge's files."""
    study = load(name)
    drawn, planned = sketch(study, outlined), plan(study)

    def said(trial: Trial) -> dict[str, Any]:
        return trial.model_dump(mode="json", exclude={"subject", "twin"})

    assert [said(t) for t in drawn.trials] == [said(t) for t in planned.trials]
    assert list(drawn.points.values()) == list(planned.points.values())
    own = [drawn.specs[digest(t.subject.model_dump(mode="json"))] for t in drawn.trials]
    assert own == [planned.specs[digest(t.subject.model_dump(mode="json"))] for t in planned.trials]


# ---------------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """Bytes of tensors that were made inside and are still there, and their peak."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in tree_iter(known) if isinstance(t, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


WIDE = {
    "vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = {"intermediate_size": 1024, "num_key_value_heads": 2, "head_dim": 32}


@pytest.mark.parametrize("where", ["last_prompt", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [lambda: transformers.GPT2Config(**WIDE), lambda: transformers.LlamaConfig(**WIDE, **GATED),
     lambda: transformers.Gemma2Config(**WIDE, **GATED)],
    ids=["gpt2", "llama", "gemma2"],
)  # fmt: skip
def test_the_peak_of_a_step_is_within_a_factor_of_two(
    tmp_path: Path, config: Callable[[], Any], dtype: str, where: str
) -> None:
    tokens, n = 64, 8
    sets = [f'recovery.perturb.positions="{where}"']
    scene_ = scene(tmp_path, config(), tokens, n, sets=sets, dtype=dtype)
    model = AutoModelForCausalLM.from_config(
        config(),
        dtype=getattr(torch, dtype),
        attn_implementation="eager" if scene_.eager else "sdpa",
    )
    model.eval().requires_grad_(False)
    subject = Subject.of("wide", model, tiny_tokenizer(), {SITE: random_sae(SITE, 256)})
    # Ragged, as prompts are, so that attention has a mask.
    batch = prompts(subject, (tokens, tokens - 5) * (n // 2))
    positions = batch.positions[:, -1:] if where == "last_prompt" else batch.positions
    known = [t for t in vars(batch).values() if isinstance(t, Tensor)], _storages(model)
    with Live(*known, positions) as recorded:
        replay = Replay.record(subject, batch, SITE, positions)
    expected = memory_of(scene_)
    assert 0.5 < (expected.replay + n * recorded_row(scene_)) / recorded.peak < 2

    delta, answers = torch.zeros(n, positions.shape[1], 256), torch.tensor([[3, 5]] * n)
    kept = [replay.base, *(t for t in tree_iter(replay.calls) if isinstance(t, Tensor))]
    kept += [t for pair in replay.prefix if pair for t in pair]
    with Live(*known, kept, delta, positions) as stepped:
        lanes = replay.rows(torch.arange(n))
        leaf = delta.requires_grad_(True)
        torch.autograd.grad(lanes.logits(leaf, answers).sum(), leaf)
    assert 0.5 < n * expected.lane / stepped.peak < 2


def test_texts_and_bases_of_every_slot_are_held(paper: Scene) -> None:
    texts = replace(paper, prompts=replace(paper.prompts, texts=10, text_tokens=20))
    assert memory_of(texts).texts == 10 * 20 * paper.model.vocabulary * (4 + 4 + 4)
    many = replace(paper, prompts=replace(paper.prompts, texts=10**6, text_tokens=20))
    assert memory_of(many).texts == MOST_LOGITS * 12, "no more at a time"
    assert memory_of(paper).texts == 0 and memory_of(many).peak(1, 1, 1, MOST) >= MOST_LOGITS * 12

    spec = paper.search.model_copy(update={"constraint": ActiveNull()})
    trial = paper.trial.model_copy(update={"recovery": spec})
    seen = replace(paper, trial=trial, saes={SITE: Shape(64, k=10)})
    held = 4 * 32 * (10 + 2)  # what is on, and what is clamped, at the one slot
    plain = replace(paper, saes=seen.saes)
    assert memory_of(seen).lane - memory_of(plain).lane == held
    assert memory_of(seen).replay - memory_of(plain).replay == held * paper.rows


def _storages(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


# ---------------------------------------------------------------------- time


def test_a_trial_of_the_organism_takes_what_was_forecast() -> None:
    """CPU time, which a busy machine does not stretch as it does the clock. The bounds are wide:
    how long lanes go on searching is not known before they have."""
    study = parse(
        'schema = 1\nname = "one"\nseed = 0\n'
        '[subject]\nmodel = "organism-second-route"\n'
        "[[subject.saes]]\nsite = 'blocks.1.hook_resid_post'\n"
        "source = { kind = 'folder', path = 'organism:saes/1' }\n"
        "[data]\nfit = 20\ntune = 1\ntest = 40\n"
        "[recovery]\nconstraint = { kind = 'encoder_null' }\nbudget = { relative = 0.5 }\n"
        "stop = { clean_margin = 0.3 }\nsteps = 50\nrefine_steps = 20\n"
        "[[audits]]\nname = 'only'\nbehavior = { kind = 'ioi', templates = 'all' }\n"
        "discovery = { kind = 'given', file = 'organism-second-route:features.json' }\n"
        "intervention = { kind = 'clamp', mode = 'set_where_active', value = -5.0 }\n"
    )
    planned = plan(study)
    trial, runtime = planned.trials[0], Runtime(workers=1)
    lab = load_lab(planned, [trial], runtime)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (made,) = forecast_study(study, on_device("cpu"), 512)
        start = time.process_time()
        counts = run_trial(trial, lab).result["outcome"]["counts"]
        took = time.process_time() - start
    finally:
        torch.set_num_threads(before)
    assert counts["recovered"] > 0 and counts["not_recovered"] == counts["undecided"] == 0
    assert made.scene.prompts.measured and made.scene.prompts.n["test"] == 40
    assert made.if_found[0] / 3 < took < made.if_found[1] * 3


def test_time_is_the_longer_of_computing_and_reading() -> None:
    from holdfast.forecast.work import Work

    h100 = gpu("h100", "bfloat16")
    slow = h100.seconds(Work(flops=1e15))
    assert slow == pytest.approx((1 / (0.989 * 0.4), 1 / (0.989 * 0.1)))
    reading = h100.seconds(Work(flops=1e9, bytes=3.35e12))
    assert reading == pytest.approx((1 / 0.8, 1 / 0.4))
    assert h100.seconds(Work(calls=1000)) == pytest.approx((0.2, 1.0))
    assert gpu("h100", "float32").flops < h100.flops


def test_several_gpus_add_memory_and_not_speed() -> None:
    one, four = gpu("h100", "bfloat16"), gpu("4xH100", "bfloat16")
    assert four.memory == 4 * one.memory and four.flops == one.flops and four.count == 4
    assert gpu("NVIDIA RTX 4090", "bfloat16").memory == 24e9
    assert all(sheet.half > sheet.single and sheet.source for sheet in GPUS.values())


def test_this_device_is_measured() -> None:
    here = probe("cpu", "float32", 64, seconds=0.002)
    for low, high in (here.flops, here.flops32, here.bandwidth, here.launch):
        assert 0 < low <= high
    assert here.memory > 1e8


# ---------------------------------------------------------------------- mistakes


def test_an_unknown_gpu_names_near_ones() -> None:
    with pytest.raises(DeviceError, match="h100"):
        on_gpu("h10")
    with pytest.raises(DeviceError, match="a100-40gb"):
        on_gpu("a100")
    with pytest.raises(DeviceError, match="cuda:99"):
        on_device("cuda:99")


def test_a_folder_without_a_config_says_what_to_do(tmp_path: Path) -> None:
    study, on = drafted(tmp_path), on_gpu("h100")
    with pytest.raises(SubjectError, match=r"config\.json.*no weights are needed"):
        forecast_study(study, on, 8)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(SubjectError, match="cannot be read"):
        forecast_study(study, on, 8)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 32}')
    with pytest.raises(SubjectError, match="families"):
        forecast_study(study, on, 8)


def test_a_site_above_the_model(tmp_path: Path) -> None:
    config = TINY["llama"]()
    config.num_hidden_layers = 1
    with pytest.raises(StudyError, match="1 blocks"):
        _ = scene(tmp_path, config).sites


def test_an_outline_cannot_be_run(tmp_path: Path) -> None:
    spec = drafted(tmp_path).subject.saes[0]
    with pytest.raises(SAEError, match="holdfast plan"):
        spec.source.load(Site.parse(spec.site))


def test_widths_are_read_from_published_ids() -> None:
    from holdfast.saes.release import Release

    def width(sae_id: str) -> int | None:
        shape = Release(release="gemma-scope-2b-pt-res", sae_id=sae_id).shape()
        return None if shape is None else shape.n_features

    assert width("layer_3/width_16k/average_l0_59") == 16384
    assert width("layer_3/width_131k/average_l0_59") == 131072
    assert width("layer_3/width_1m/average_l0_59") == 1048576
    assert width("blocks.3.hook_resid_post") is None


def test_an_unknown_width_is_asked_for(tmp_path: Path) -> None:
    sets = ['subject.saes.0.source={kind="release", release="gpt2-small-res-jb", sae_id="x"}']
    study = drafted(save_config(tmp_path / "model", TINY["llama"]()), sets)
    trial, spec = first(study), study.subject
    with pytest.raises(SAEError, match="--sae-width"):
        scene_of(trial, spec, 8)
    assert scene_of(trial, spec, 8, sae_width=99).saes == {SITE: Shape(99)}


# ---------------------------------------------------------------------- for people


@pytest.mark.parametrize(
    "value, unit, said",
    [(0, "B", "0 B"), (999, "B", "999 B"), (1e3, "B", "1 kB"), (9.241e9, "", "9.24 G"),
     (7.05e15, "FLOP", "7.05 PFLOP"), (999.6, "B", "1 kB")],
)  # fmt: skip
def test_amounts(value: float, unit: str, said: str) -> None:
    assert amount(value, unit) == said


def test_durations() -> None:
    assert [lasting(s) for s in (0.5, 59, 90, 7200, 200_000)] == [
        "0.5 s", "59 s", "1.5 min", "2 h", "2.3 d",
    ]  # fmt: skip


def test_the_page_says_what_the_code_says() -> None:
    script = runpy.run_path(str(DOCS / "cost" / "write.py"))
    assert script["page"]() == (DOCS / "cost.md").read_text(), "run python docs/cost/write.py"


def test_the_command(tmp_path: Path) -> None:
    folder = save_config(tmp_path / "model", TINY["llama"]())
    study = tmp_path / "study.toml"
    study.write_text(TEXT.format(model=folder, width=1 << 20, dtype="bfloat16"))
    said = holdfast("plan", study, "--gpu", "h100", "--prompt-tokens", "32")
    assert said.code == 0 and "1,048,576 features" in said.out and "as assumed" in said.out
    asked = ("plan", study, "--gpu", "h100", "--json", "--limit", "7", "--set", "data.fit=9")
    made = json.loads(holdfast(*asked).out)
    (trial,) = made["trials"]
    assert trial["prompts"] == {"fit": 9, "tune": 100, "test": 7, "neighbors": 0}
    assert made["seconds_if_found"] == trial["seconds_if_found"]
    assert not (tmp_path / "runs").exists()

    wrong = holdfast("plan", study, "--gpu", "h1000")
    assert wrong.code == 2 and "h100" in wrong.err and not wrong.out
    (folder / "config.json").unlink()
    wrong = holdfast("plan", study, "--gpu", "h100")
    assert wrong.code == 2 and "config.json" in wrong.err
    assert holdfast("plan", tmp_path / "none.toml").code == 2


@pytest.mark.parametrize("given", [("--prompt-tokens", "64"), ()])
@pytest.mark.parametrize("name", ["gemma-2-2b-it-wmdp", "gemma-2-2b-tpp"])
def test_a_study_of_a_real_model_needs_no_data(
    name: str, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither prompts nor weights are looked for where the length of prompts is given, and where
    it is not a dataset that cannot be read is named and does without."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = f"subject.model={DOCS}/cost/gemma-2-9b"
    said = holdfast("plan", name, "--gpu", "h100", "--set", model, *given)
    assert said.code == 0 and "Of all operations: " in said.out + said.err
    noted = said.out + said.err
    assert ("Not all datasets could be read" in noted) is (not given)
    assert given or ("--prompt-tokens" in said.err and "the hub gave" in said.err)
    asked = holdfast("plan", name, "--gpu", "h100", "--set", model, "--json", *given)
    assert json.loads(asked.out)["trials"], "whatever is noted is no part of it"
    wrong = holdfast("plan", name, "--set", model, "--set", "recovery.budget.relative=-1")
    assert wrong.code == 2 and "budget" in wrong.err and "the hub gave" not in wrong.err


def test_controls_share_a_setting_and_a_twin_has_its_own(tmp_path: Path) -> None:
    study = small_study(constraints=("encoder_null",), controls=("wrong_target", "ignorant"))
    made = forecast_study(load(write(tmp_path / "s.toml", study)), on_gpu("h100"), 512)
    names = [[stage.name for stage in one.stages] for one in made]
    rest = ["record", "search", "verify", "undo"]
    assert names == [["prepare", *rest, "compare"], rest, ["prepare", *rest]]
    assert [one.prepared for one in made] == [False, True, False]


@pytest.mark.e2e
def test_a_record_holds_forecast_and_measured_beside_each_other(tmp_path: Path) -> None:
    small = small_study(audits=("bottleneck",), controls=(), paths=False)
    study = write(tmp_path / "s.toml", small)
    assert holdfast("run", study, "--out", tmp_path / "run").code == 0
    (record,) = (tmp_path / "run" / "trials").glob("*/record.json")
    run = json.loads(record.read_text())["run"]
    seen = run["forecast"]
    assert run["seconds"] > 0 and run["peak_memory_of"] == "the process so far"
    assert seen["memory_bytes"] < run["peak_memory_bytes"] < 1e11, "with all that Python loads"
    assert 0 < seen["seconds_if_found"][0] < seen["seconds_if_not_found"][1]
    assert seen["flops_if_found"] < seen["flops_if_not_found"]
    assert seen["prompts"]["test"] == 16 and seen["prompts_counted"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert {"prepare", "search", "verify", "undo"} <= seen["stages"].keys()
    assert "forecast if all is found" in page and "peak of the process so far" in page


# --- Searched together ----------------------------------------------------------------------------


def forecast_of(tmp_path: Path, n: int, kinds: Sequence[str]) -> list[Forecast]:
    folder = save_config(tmp_path / "model", TINY["llama"]())
    text = TEXT.format(model=folder, width=1024, dtype="float32")
    grid = f"[grid]\n'recovery.constraint.kind' = {json.dumps(list(kinds))}\n"
    study = parse(text + grid, ['controls=["wrong_target"]', f"data.test={n}"])
    return forecast_study(study, on_gpu("h100"), 0, prompt_tokens=12)


def test_memory_is_that_of_the_batch_and_operations_are_the_trials_own(tmp_path: Path) -> None:
    alone = forecast_of(tmp_path, 30, ["encoder_null"])
    together = forecast_of(tmp_path, 30, ["unconstrained", "encoder_null"])
    assert [one.scene.searched for one in alone] == [60] * 2, "an audit and its wrong target"
    assert [one.scene.searched for one in together] == [120] * 4
    few, many = alone[1], together[3]
    assert many.memory.replay == 2 * few.memory.replay > 0
    assert many.memory.lane == few.memory.lane and many.peak > few.peak
    assert many.as_dict()["rows_searched_together"] == 120
    assert many.found == few.found and many.not_found == few.not_found
    assert many.if_found == few.if_found


def test_a_batch_is_as_large_as_a_run_makes_it(tmp_path: Path) -> None:
    kinds = ["unconstrained", "encoder_null", "gradient_projection"]
    made = forecast_of(tmp_path, 200, kinds)
    assert [one.scene.searched for one in made] == [400] * 6, "two of 200 rows, and no third"
    assert packed([200] * 6) == [[0, 1], [2, 3], [4, 5]]
    assert packed([MOST_ROWS + 1, 1, MOST_ROWS - 1, 1]) == [[0], [1, 2], [3]]
    assert packed([]) == []
