"""What is forecast of every kind of work is what torch counts where it is done.

Every attack, constraint and option of comparisons is in here, and work that no stage has fails: so
nothing that is new goes without a forecast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import subject as subjects
from holdfast.ascent import Climb, ascend
from holdfast.attacks import ATTACKS
from holdfast.attacks.residual import pose
from holdfast.batch import Example
from holdfast.batching import Batching
from holdfast.constraints import CONSTRAINTS
from holdfast.controls.none import NoControl
from holdfast.edits import FeatureEdit
from holdfast.executor import Runtime, load_lab
from holdfast.forecast import forecast_study, on_gpu, scene_of
from holdfast.forecast.preparing import preparing
from holdfast.forecast.scene import Scene
from holdfast.forecast.searching import step
from holdfast.forecast.stages import stages_of
from holdfast.generality import between_orders
from holdfast.openly import openly
from holdfast.paths import follow
from holdfast.planning import plan
from holdfast.problem import Problem
from holdfast.recovery import RecoverySpec
from holdfast.saes.bank import FeatureBank
from holdfast.setting import Setting
from holdfast.sites import Site
from holdfast.study import load
from holdfast.subject import Subject
from holdfast.testing import WORDS, random_sae, tiny_batch, tiny_model, tiny_tokenizer
from holdfast.trial import run_trials
from holdfast.variants import PathSpec, Recovered
from tests.counted import by_stage, operations
from tests.e2e.cli import small_study, write
from tests.unit.recovered import features_at, search, set_up
from tests.unit.test_forecast import drafted, first, save_config
from tests.unit.test_openly import Quiz

FACTOR = 1.5
"""What a forecast may be off by, either way."""

N, TOKENS = 4, 6
SITES = (Site(1), Site(3))


def near(counted: float, least: float, most: float | None = None) -> bool:
    """Whether a count is in a forecast range, to the factor."""
    return least / FACTOR <= counted <= (least if most is None else most) * FACTOR


def tiny(sites: tuple[Site, ...], n_features: int) -> tuple[Subject, Setting]:
    """A subject with SAEs at some sites and a clamp at each of them, on N prompts."""
    saes = {site: random_sae(site, 64, n_features, seed=site.depth) for site in sites}
    subject = Subject.of("tiny", tiny_model(0, 64, 4), tiny_tokenizer(), saes, Batching(512))
    features = features_at(sites)
    clamps = tuple(
        FeatureEdit(FeatureBank.of(subject.sae(site), features), "set", 1.0) for site in sites
    )
    batch = tiny_batch(subject, N, ragged=False)
    examples = tuple(
        Example(i, text, WORDS[0], (WORDS[1],), (WORDS[1],), i)
        for i, text in zip(batch.ids, batch.texts, strict=True)
    )
    setting = set_up(subject, batch, features, clamps)
    fit = tiny_batch(subject, 8, seed=1)
    return subject, replace(setting, examples=examples, behavior=Quiz(), fit=fit)  # type: ignore[arg-type]


def on_paper(tmp_path: Path, subject: Subject, kind: str, where: str) -> Scene:
    """The same, as a forecast knows it."""
    saes, features = [], []
    for site, sae in subject.saes.items():
        source = f'{{kind="outline", n_features={sae.n_features}}}'
        saes.append(f'{{site="{site}", source={source}}}')
        features.append(f'{{site="{site}", ids=[1, 5, 9, 30]}}')
    sets = [
        f"subject.saes=[{', '.join(saes)}]",
        f"audits.0.discovery.features=[{', '.join(features)}]",
        f'recovery.constraint.kind="{kind}"',
        f'recovery.perturb.positions="{where}"',
    ]
    study = drafted(save_config(tmp_path / "model", subject.model.config), sets)
    found = scene_of(first(study), study.subject, 512, TOKENS)
    n = {"fit": 8, "tune": 4, "test": N}
    return replace(found, prompts=replace(found.prompts, n=n, answers=3))


# ---------------------------------------------------------------------- comparisons

NOTHING = PathSpec(
    scales=(1.0,), draws=1, margin_draws=1, top=1, groups=1, atoms=1, principal=2, likes=False,
    routes=False, heads=False,
)  # fmt: skip
"""As little as can be compared."""

MORE: dict[str, Any] = {
    "scales": (1.0, 2.0, 3.0), "draws": 4, "margin_draws": 40, "groups": 3, "atoms": 8,
    "part_scales": (1.0, 0.5), "likes": True, "routes": True, "heads": True, "orders": True,
    "openly": True,
}  # fmt: skip
"""Option → what asks for more work than `NOTHING`."""

FREE = {"top": "features are named, none is run", "principal": "a basis from passes already made",
        "every": "of which trials, not of what"}  # fmt: skip
"""Options that cost next to nothing, and why."""


def compared(found: Recovered, spec: PathSpec) -> int:
    def run() -> None:
        follow(found, spec, 0)
        if spec.orders:
            between_orders(found, spec.scales)
        if spec.openly:
            openly(found)

    return operations(run)


@pytest.fixture(scope="module")
def found() -> Recovered:
    """Of an SAE so wide that what meets all of it counts as much as passes do."""
    found = search(tiny((SITES[0],), 2048)[1])
    assert len(found) == N
    return found


@pytest.fixture(scope="module")
def least(found: Recovered) -> int:
    return compared(found, NOTHING)


def comparing_of(scene: Scene, spec: PathSpec) -> float:
    trial = scene.trial.model_copy(update={"paths": spec})
    (stage,) = [s for s in stages_of(replace(scene, trial=trial)) if s.name == "compare"]
    return stage.found.all_flops


def test_every_option_has_a_case() -> None:
    assert MORE.keys() | FREE.keys() == set(PathSpec.model_fields)


def test_the_least_that_is_compared(found: Recovered, least: int, tmp_path: Path) -> None:
    scene = on_paper(tmp_path, found.case.subject, "encoder_null", "last_prompt")
    assert near(least, comparing_of(scene, NOTHING))


@pytest.mark.parametrize("option", sorted(MORE.keys() - {"groups"}))
def test_every_option_of_comparisons(
    found: Recovered, least: int, tmp_path: Path, option: str
) -> None:
    spec = NOTHING.model_copy(update={option: MORE[option]})
    scene = on_paper(tmp_path, found.case.subject, "encoder_null", "last_prompt")
    forecast = comparing_of(scene, spec) - comparing_of(scene, NOTHING)
    assert near(compared(found, spec) - least, forecast)


def test_groups_of_positions(tmp_path: Path) -> None:
    perturb = {"positions": "all", "include_bos": True}
    everywhere = search(tiny((SITES[0],), 64)[1], perturb=perturb)
    scene = on_paper(tmp_path, everywhere.case.subject, "encoder_null", "all")
    specs = NOTHING, NOTHING.model_copy(update={"groups": MORE["groups"]})
    one, several = (compared(everywhere, spec) for spec in specs)
    forecast = [comparing_of(scene, spec) for spec in specs]
    assert near(several - one, forecast[1] - forecast[0])


# ---------------------------------------------------------------------- steps

ALONE = ("encoder_null",)
"""Constraints of one site."""


@pytest.mark.parametrize("kind", CONSTRAINTS.names())
def test_a_step_under_every_constraint(kind: str, tmp_path: Path) -> None:
    """With vectors at every token of every clamped site; a search's first steps beside it."""
    sites = SITES[:1] if kind in ALONE else SITES
    subject, setting = tiny(sites, 64)
    spec = RecoverySpec.model_validate(
        {"constraint": {"kind": kind}, "perturb": {"positions": "all"}}
    )
    case = NoControl().case(setting, lambda: setting)
    problem = pose(spec, case)
    whole = spec.constraint.acting(problem)
    feasible = spec.constraint.feasible(whole)

    def climbed(problem: Problem, steps: int) -> int:
        rows = torch.arange(N)
        goal, lr = torch.full((N,), 1e9), torch.full((N,), 0.1)
        climb = Climb(rows, torch.zeros(problem.shape), goal, problem.radius, lr)
        return operations(
            partial(ascend, problem, feasible, climb, steps, spec.constraint.stepper, trace=[])
        )

    counted = (climbed(whole, 7) - climbed(whole, 1)) / 6
    scene = on_paper(tmp_path, subject, kind, "all")
    assert near(counted, *(step(scene, N, at_least=least).all_flops for least in (True, False)))


# ---------------------------------------------------------------------- whole trials

ANSWERS = {"max_new_tokens": 16, "n_forced": 8, "second_opinions": []}
SHORT = {"steps": 10, "refine_steps": 4, "tolerance": 0.1}
FEW = {"fit": 20, "tune": 5, "test": 3}


@pytest.fixture
def to_the_end() -> Iterator[None]:
    """Answers are generated for as long as they may be, as forecasts take them to be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects.Behind, "read", lambda self, values: None)
        yield


def cut(audit: str, **changes: Any) -> dict[str, Any]:
    """A study of one audit of the bundled one, with fields of the audit replaced."""
    kind = changes.pop("constraint", {"kind": "encoder_null"})
    more = changes.pop("recovery", {})
    study = small_study((audit,), (kind["kind"],), (), paths=False)
    (own,) = study["audits"]
    own |= {"attacks": []} | changes
    own.pop("grid", None)
    if own["behavior"]["kind"] == "refusal":
        own["behavior"] |= ANSWERS
    study["recovery"] |= SHORT | {"constraint": kind} | more
    del study["grid"]
    return study | {"data": FEW | own.pop("data", {})}


def check(tmp_path: Path, study: dict[str, Any]) -> None:
    """Run its trials, and hold every stage of each to what was forecast, of as many prompts as were
    searched and recovered: that is not known before."""
    parsed = load(write(tmp_path / "study.toml", study))
    planned, runtime = plan(parsed), Runtime(workers=1)
    lab = load_lab(planned, planned.trials, runtime)
    forecasts = forecast_study(parsed, on_gpu("h100"), 512)
    for trial, one in zip(planned.trials, forecasts, strict=True):
        with by_stage() as counter:
            if trial.searches:
                (ended,) = run_trials([trial], lab)
            else:
                with counter.stage("attempt"):
                    (ended,) = run_trials([trial], lab)
        assert not isinstance(ended.result, Exception), ended.result
        counts = ended.result.result["outcome"]["counts"]
        scene, n = one.scene, one.scene.prompts.n
        searched = sum(counts.values())

        def of(rows: int, scene: Scene = scene, n: dict[Any, int] = n) -> dict[str, Any]:
            own = replace(scene, prompts=replace(scene.prompts, n={**n, "test": rows}))
            return {stage.name: stage for stage in stages_of(own)}

        foreseen = of(searched)
        if not one.prepared:
            foreseen["prepare"] = preparing(scene)
        foreseen |= {k: s for k, s in of(counts["recovered"]).items() if k in ("undo", "compare")}
        assert counter.flops.keys() <= foreseen.keys(), f"no stage has {counter.flops}"
        for name, stage in foreseen.items():
            some, none = stage.found.all_flops, stage.not_found.all_flops
            where = f"{trial.audit}, {trial.label}: {name}"
            if name == "search":
                assert near(counter.flops[name], min(some, none), max(some, none)), where
            else:
                assert near(counter.flops[name], some), where


ATTEMPTS = {
    "role_play": {}, "nested": {}, "multi_turn": {}, "prefill": {"n_tokens": [2, 4]},
    "sampling": {"n": 2}, "soft_suffix": {"n_tokens": 4, "steps": 5, "weight": 1.0},
}  # fmt: skip


def test_every_attack_has_a_case() -> None:
    assert ATTEMPTS.keys() | {"residual"} == set(ATTACKS.names())


@pytest.mark.slow
@pytest.mark.usefixtures("to_the_end")
def test_attacks_on_answers(tmp_path: Path) -> None:
    attacks = [{"kind": kind} | options for kind, options in ATTEMPTS.items()]
    check(tmp_path, cut("induced_refusal", attacks=attacks))


@pytest.mark.slow
@pytest.mark.usefixtures("to_the_end")
def test_answers_with_other_vectors(tmp_path: Path) -> None:
    little = {name: getattr(NOTHING, name) for name in ("draws", "atoms", "likes", "routes")}
    check(tmp_path, cut("induced_refusal", paths=little | {"scales": [1.0], "heads": False}))


def test_attacks_on_one_token(tmp_path: Path) -> None:
    attacks = [{"kind": kind} | ATTEMPTS[kind] for kind in ("sampling", "soft_suffix")]
    check(tmp_path, cut("soft_suffix", attacks=attacks, controls=["random_features"]))


@pytest.mark.usefixtures("to_the_end")
def test_a_clamp_that_decides_on_a_prompt(tmp_path: Path) -> None:
    gate = {"share": 0.0, "above": {"percentile": 50.0}}
    clamp = {"kind": "clamp", "mode": "set", "value": 12.0, "positions": "prompt"}
    check(tmp_path, cut("induced_refusal", intervention=clamp | {"condition": gate}))


@pytest.mark.usefixtures("to_the_end")
def test_a_search_of_stages(tmp_path: Path) -> None:
    stages = [
        {"steps": 6, "lr": 0.05, "at": "prompt"},
        {"steps": 6, "lr": 0.05, "at": "answer", "objective": {"kind": "cross_entropy"}},
    ]
    schedule = {"checkpoint": {"every": 2}, "stages": stages}
    perturb = {"positions": "last_prompt", "answer": 3}
    recovery = {"perturb": perturb, "schedule": schedule}
    for kind in ("unconstrained", "jacobian_probes"):
        check(tmp_path, cut("induced_refusal", constraint={"kind": kind}, recovery=recovery))


def test_texts_and_an_error_term(tmp_path: Path) -> None:
    texts = {"source": {"kind": "held_out", "sorts": ["questions", "lives"]}, "n": 20}
    study = cut("error_term", data={"texts": texts})
    study["audits"][0]["intervention"]["error_term"] = {"scale": 0.5}
    check(tmp_path, study)


def test_what_every_feature_does(tmp_path: Path) -> None:
    check(tmp_path, cut("ioi", constraint={"kind": "active_null"}))


def test_probes(tmp_path: Path) -> None:
    few = {"fit": 40, "tune": 10, "test": 8}
    check(tmp_path, cut("tpp", data=few, recovery={"perturb": {"positions": "all"}}))
