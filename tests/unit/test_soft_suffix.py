"""Soft suffixes: other embeddings of tokens put in, the clamp on there too, and an objective that
is what it says it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from holdfast.attacks import Attacked
from holdfast.attacks.soft_suffix import EMBEDDING, SoftSuffix
from holdfast.attacks.suffix_found import SuffixFound
from holdfast.attacks.suffix_search import Objective, climb
from holdfast.attacks.suffixed import Suffixed
from holdfast.batch import Batch, Example
from holdfast.batching import Batching
from holdfast.behaviors.observation import Observation
from holdfast.behaviors.refusal import Refusal
from holdfast.controls import Case
from holdfast.controls.none import NoControl
from holdfast.discovery.attribution import Attribution
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.errors import ContextError, StudyError, SubjectError
from holdfast.executor import Runtime
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.interventions.clamp import Clamp
from holdfast.loading import SubjectSpec
from holdfast.planning import Plan, plan
from holdfast.report import write_report
from holdfast.report.data import gather
from holdfast.run import open_run, run_study
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import Folder, SAESpec
from holdfast.setting import Data, Setting, prepare
from holdfast.sites import Site
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.tables.results import results_table
from holdfast.testing import WORDS, random_sae, tiny_batch, tiny_model, tiny_tokenizer
from holdfast.trial import Trial
from holdfast.verify import verify

SITE, IDS, K = Site(2), [1, 5, 9, 30], 3
FACTOR = 3.0


@pytest.fixture(scope="module")
def subject() -> Subject:
    """With plain ReLU features, so that nothing in a pass makes a step."""
    saes = {SITE: random_sae(SITE, jump=False)}
    return Subject.of("tiny", tiny_model(), tiny_tokenizer(), saes)  # type: ignore[arg-type]


def case_of(subject: Subject, batch: Batch) -> Case:
    """A clamp that multiplies four features of one site, at every token but BOS."""
    entry = SiteFeatures(site=str(SITE), ids=tuple(IDS), median_active=0.5)
    features = FeatureSet(entries=(entry,), source="test")
    clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "multiply", FACTOR)
    rows = torch.arange(len(batch))
    return Case(subject, (clamp,), features, rows, batch, torch.full((len(batch),), 4.0), {})


def posed(
    subject: Subject, n: int = 5, weight: float = 0.0, budget: float = 1.0
) -> tuple[Case, Suffixed, Objective]:
    case = case_of(subject, tiny_batch(subject, n))
    prompts = Suffixed.of(subject, case.batch, subject.token_id("w7"), K)
    problem = SoftSuffix(budget=budget).pose(case, prompts)
    return case, prompts, Objective.of(problem, prompts.monitored, weight)


def somewhere(objective: Objective, scale: float = 0.3) -> Tensor:
    base = objective.lanes.replay
    delta = torch.randn(len(objective), K, base.base.shape[-1])
    return delta * (scale * objective.radius / delta.norm(dim=(1, 2)))[:, None, None]


def by_hand(
    subject: Subject, batch: Batch, row: int, delta: Tensor, on: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Last logits [vocab] and last codes [k] of one prompt, without padding, holdfast's edits,
    hooks or replay: embeddings put together, the clamp written out. on: positions it acts at."""
    own = batch.positions[row] >= 0
    tokens = batch.tokens[row, own]
    n = len(tokens)
    embeds = subject.model.get_input_embeddings()(tokens)
    whole = torch.cat([embeds[: n - K], embeds[n - K :] + delta])[None]
    acting = torch.zeros(n, 1)
    acting[list(range(1, n)) if on is None else list(on)] = 1
    sae, seen = subject.sae(SITE).full(), []

    def clamp(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        z = sae.encode(x)[..., IDS]
        x = x + acting * ((FACTOR - 1) * z @ sae.W_dec[IDS])
        seen.append(sae.encode(x)[0, -1, IDS])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = subject.model.model.layers[SITE.layer].register_forward_hook(clamp)
    logits = subject.model(inputs_embeds=whole, use_cache=False).logits[0, -1]
    handle.remove()
    return logits, seen[-1]


def stated(objective: Objective, case: Case, prompts: Suffixed, row: int, delta: Tensor) -> Tensor:
    """The objective of one prompt as the docstring states it, of passes by hand."""
    logits, codes = by_hand(case.subject, prompts.batch, row, delta)
    with torch.no_grad():
        _, began = by_hand(case.subject, prompts.batch, row, torch.zeros_like(delta))
    batch = prompts.batch
    margin = logits[batch.targets[row]] - logits[batch.rivals[row]].max()
    drift = (codes - began).square().mean() / (began.square().mean() + 1e-6)
    return torch.minimum(margin, objective.goal[row]) - objective.weight * drift


# ------------------------------------------------------------------------------ the suffix


def test_added_vectors_are_other_embeddings_with_the_clamp_on(subject: Subject) -> None:
    """Ragged prompts in a padded batch and in the replay, each against itself by hand; with the
    clamp off at the suffix all would be otherwise."""
    case, prompts, objective = posed(subject)
    delta = somewhere(objective)
    push = Perturbation(prompts.batch.ids, prompts.slots, {EMBEDDING: delta})
    logits = subject.read(prompts.batch, (push, *case.edits))
    replayed = objective.lanes.replay.logits(delta)
    for row in range(len(prompts.batch)):
        n = int(prompts.batch.prompt_length[row])
        with torch.no_grad():
            own, _ = by_hand(subject, prompts.batch, row, delta[row])
            free, _ = by_hand(subject, prompts.batch, row, delta[row], on=range(1, n - K))
        torch.testing.assert_close(logits[row], own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(replayed[row], own, atol=1e-4, rtol=1e-4)
        assert (own - free).abs().max() > 1e-2


def test_tokens_go_in_where_the_text_says(subject: Subject) -> None:
    """As if the text had been written so, before the chat template's end; forced answers follow."""
    suffix = " w30 w31"
    made = [
        Example(f"e{i}", f"{' '.join(WORDS[: 3 + i])}{suffix}", "w5", ("w6",), ("w8",), f"e{i}",
                suffix=suffix)
        for i in range(3)
    ]  # fmt: skip
    said = [replace(e, text=f"{e.text.removesuffix(suffix)}{' w7' * K}{suffix}") for e in made]
    answers = [[10, 11], [12], [13, 14, 15]]
    batch, expected = (subject.batch(e).forcing(answers) for e in (made, said))
    found = Suffixed.of(subject, batch, subject.token_id("w7"), K)
    for name in ("tokens", "positions", "template", "prompt_length", "forced"):
        assert torch.equal(getattr(found.batch, name), getattr(expected, name)), name
    for row in range(3):
        own = {int(p): int(t) for p, t in zip(found.batch.positions[row], found.batch.tokens[row],
                                              strict=True)}  # fmt: skip
        before = {int(p): int(t) for p, t in zip(batch.positions[row], batch.tokens[row],
                                                 strict=True)}  # fmt: skip
        slots = found.slots[row].tolist()
        assert [own[p] for p in slots] == [subject.token_id("w7")] * K
        seen = [p for p in found.monitored[row].tolist() if p >= 0]
        assert seen == list(range(slots[-1] + 1, max(own) + 1)), "everything after the suffix"
        was = [p for p in found.original[row].tolist() if p >= 0]
        assert [own[p] for p in seen] == [before[p] for p in was]


def test_without_a_template_the_read_token_is_the_last_of_the_suffix(subject: Subject) -> None:
    _, prompts, _ = posed(subject)
    last = prompts.batch.prompt_length - 1
    assert torch.equal(prompts.slots[:, -1], last)
    assert torch.equal(prompts.monitored, last[:, None])
    assert torch.equal(prompts.original, last[:, None] - K)


# ------------------------------------------------------------------------------ the search


@pytest.mark.parametrize("weight", [0.0, 2.0, 50.0])
def test_the_gradient_is_that_of_the_stated_objective(subject: Subject, weight: float) -> None:
    """Against autograd through passes by hand, and against finite differences of them."""
    case, prompts, objective = posed(subject, weight=weight)
    delta = somewhere(objective).requires_grad_(True)
    value, _ = objective(delta)
    (gradient,) = torch.autograd.grad(value.sum(), delta)
    slopes = []
    for row in range(len(objective)):
        leaf = delta[row].detach().clone().requires_grad_(True)
        expected = stated(objective, case, prompts, row, leaf)
        torch.testing.assert_close(value[row], expected, atol=1e-3, rtol=1e-3)
        (own,) = torch.autograd.grad(expected, leaf)
        torch.testing.assert_close(gradient[row], own, atol=1e-3, rtol=1e-2)
        along = gradient[row] / gradient[row].norm()
        with torch.no_grad():
            up, down = (stated(objective, case, prompts, row, leaf + h * along)
                        for h in (1e-3, -1e-3))  # fmt: skip
        slopes.append(float((up - down) / 2e-3 / gradient[row].norm()))
    # A kink of the model may lie between the two points of one prompt.
    assert torch.tensor(slopes).median() == pytest.approx(1.0, abs=0.02)


def test_above_the_goal_the_margin_no_longer_counts(subject: Subject) -> None:
    _, _, objective = posed(subject)
    delta = somewhere(objective)
    low = replace(objective, goal=objective(delta)[1] - 1)
    value, _ = low(delta)
    torch.testing.assert_close(value, low.goal)


def test_a_heavier_monitor_sees_less_at_the_same_steps(subject: Subject) -> None:
    steps, drifts, margins = 30, [], []
    for weight in (0.0, 10.0, 1000.0):
        _, _, objective = posed(subject, n=8, weight=weight)
        ended = climb(objective, steps, lr=0.1)
        with torch.no_grad():
            drifts.append(float(objective.drift(ended.delta).mean()))
            began, _ = objective(torch.zeros_like(ended.delta))
            torch.testing.assert_close(objective(ended.delta)[0], ended.objective)
        margins.append(float(torch.minimum(ended.margin, objective.goal).mean()))
        assert (ended.objective >= began).all(), "no change is among the candidates"
        assert (ended.delta.norm(dim=(1, 2)) <= objective.radius * (1 + 1e-5)).all()
        assert (ended.step <= steps).all() and ended.step.any()
    assert drifts[0] > 2 * drifts[1] > 4 * drifts[2]
    assert margins[0] > margins[2]


def test_prompts_are_searched_as_if_alone(subject: Subject) -> None:
    _, _, objective = posed(subject, weight=5.0)
    together = climb(objective, 6, lr=0.1)
    for row in range(len(objective)):
        alone = climb(objective.rows(torch.tensor([row])), 6, lr=0.1)
        torch.testing.assert_close(alone.delta[0], together.delta[row], atol=1e-4, rtol=1e-3)
    small = replace(subject, batching=Batching(2))
    _, _, again = posed(small, weight=5.0)
    torch.testing.assert_close(climb(again, 6, 0.1).delta, together.delta, atol=1e-4, rtol=1e-3)


def test_drift_is_what_verify_calls_drift(subject: Subject) -> None:
    """Read at the suffix itself, where `verify` reads."""
    case, prompts, objective = posed(subject)
    push = Perturbation(prompts.batch.ids, prompts.slots, {EMBEDDING: somewhere(objective)})
    problem = objective.lanes.problem
    here = replace(prompts, monitored=prompts.slots, original=prompts.slots - K)
    nothing: Any = None
    seen = Observation(*(torch.zeros(len(prompts.batch), dtype=torch.bool),) * 2)
    found = SuffixFound(nothing, case, here, problem, push, nothing, nothing, nothing, seen)
    scale = {site: case.features.median_active(site) for site in problem.held}
    checks = verify(subject, prompts.batch, case.edits, push, problem.held, scale, False)
    drift = found.drifts["drift"]
    torch.testing.assert_close(drift.relative, checks.drift_relative)
    torch.testing.assert_close(drift.preactivation, checks.preactivation_drift)
    torch.testing.assert_close(found.norm_relative, checks.norm_relative)
    still = replace(found, perturbation=replace(push, deltas={EMBEDDING: torch.zeros_like(
        push.deltas[EMBEDDING])}))  # fmt: skip
    assert not still.drifts["drift"].relative.any()
    torch.testing.assert_close(
        still.drifts["drift_original"].relative, still.drifts["drift_placeholder"].relative
    )


# ------------------------------------------------------------------------------ bad input


def test_what_cannot_be_put_in(subject: Subject) -> None:
    case = case_of(subject, tiny_batch(subject, 3))
    for text in ("w1 w2", "unknown"):
        with pytest.raises(SubjectError, match=r"soft_suffix.*placeholder.*one token"):
            SoftSuffix(placeholder=text)._token(case)
    with pytest.raises(ContextError, match=r"n_tokens.*never cut"):
        Suffixed.of(subject, case.batch, 4, 121)
    for wrong in ({"n_tokens": 0}, {"weight": -1.0}, {"budget": 0.0}, {"placeholder": ""}):
        with pytest.raises(ValidationError):
            SoftSuffix(**wrong)  # type: ignore[arg-type]


def test_what_pools_tokens_is_refused_when_planned() -> None:
    with pytest.raises(StudyError, match="read from all tokens"):
        plan(parse(bundled("tpp"), ['audits.0.attacks=["soft_suffix"]']))


# ------------------------------------------------------------------------------ in a study


def test_text_is_generated_and_judged_with_the_suffix_in() -> None:
    """Every condition against the same words written into the prompt and asked as any other."""
    source = Folder(path="organism:saes/0")
    spec = SAESpec(site="blocks.0.hook_resid_post", source=source)
    organism = Subject.load(SubjectSpec(model="organism", saes=(spec,)))
    behavior = Refusal()
    setting: Setting = prepare(
        organism, behavior, Attribution(n_features=16),
        Clamp(mode="set", value=10.0, positions="prompt"), Data(fit=80, tune=8, test=6), seed=0,
    )  # fmt: skip
    case = NoControl().case(setting, lambda: setting)
    attack = SoftSuffix(n_tokens=2, steps=3)
    result = attack.run(Attacked(setting, case, None, seed=0))
    rows = {row["id"]: row for row in result.examples}
    assert set(rows) == set(setting.test.ids) and setting.observed
    asked = [setting.examples[row] for row in case.rows.tolist()]
    said = organism.batch(
        [replace(e, text=f"{e.text.removesuffix(e.suffix)} . .{e.suffix}") for e in asked]
    )
    for name, edits in (("without", ()), ("placeholder", case.edits)):
        seen = behavior.observe(organism, said, edits, setting.observed.replies)
        for example, label, reply in zip(said.ids, seen.labels, seen.replies, strict=True):
            assert rows[example][f"{name}_label"] == label
            assert rows[example][f"{name}_sha256"] == reply.sha256
    saved = Perturbation(
        said.ids, result.tensors["positions"], {EMBEDDING: result.tensors[str(EMBEDDING)]}
    )
    again = behavior.observe(organism, said, (saved, *case.edits), setting.observed.replies)
    for index, example in enumerate(said.ids):
        row = rows[example]
        assert row["recovered_sha256"] == again.replies[index].sha256
        assert row["recovered"] == (bool(again.shows[index]) and not row["placeholder_shows"])
    assert result.result["checks"]["replay_error"] < 1e-3
    # On the text it made: each prompt alone, from its own tokens, with that text after it.
    (entry,) = setting.features.entries
    sae, ids = organism.sae(Site(1)).full(), list(entry.ids)
    for index, example in enumerate(said.ids):
        codes = {}
        text = torch.tensor(list(again.tokens[index]))
        plain = case.batch.unforced().rows([index])
        own = said.rows([index])
        for name, prompt, edits in (
            ("found", own, (saved, *case.edits)), ("began", own, case.edits),
            ("asked", plain, case.edits),
        ):  # fmt: skip
            longer, read = prompt.forcing([[*text.tolist(), 0]]), Capture(Site(1))
            organism.read(longer, (*edits, read))
            (_, x) = read.seen[0]
            codes[name] = sae.encode(x[0, -len(text) :].double())[:, ids]
        for name, reference in (("generated", "began"), ("generated_original", "asked")):
            moved = (codes["found"] - codes[reference]).norm() / codes[reference].norm()
            assert rows[example][f"drift_{name}_relative"] == pytest.approx(float(moved), rel=1e-3)


WEIGHTS = (0.0, 5.0)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    folder = tmp_path_factory.mktemp("suffix") / "run"
    kinds = ", ".join(f"{{kind='soft_suffix', n_tokens=4, steps=5, weight={w}}}" for w in WEIGHTS)
    planned = plan(parse(bundled("soft-suffix"), [
        f"audits.0.attacks=[{kinds}]", "audits.0.controls=[]", "data.test=24", "recovery.steps=2",
        "recovery.refine_steps=1", "recovery.tolerance=0.5", "recovery.doublings=1",
        'grid={"recovery.constraint.kind"=["encoder_null"]}',
    ]))  # fmt: skip
    report = run_study(planned, folder, Runtime(workers=1))
    assert not report.failures
    return folder, planned


def test_a_sweep_of_the_weight_is_several_attacks(ran: tuple[Path, Plan]) -> None:
    folder, planned = ran
    suffixes = [trial for trial in planned.trials if trial.attack.kind == "soft_suffix"]
    assert len({trial.id for trial in suffixes}) == len(WEIGHTS)
    for trial in suffixes:
        assert Trial.model_validate(trial.canonical()).id == trial.id
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"] and not summary["attempts"]
    assert [row["suffix"]["weight"] for row in summary["suffixes"]] == list(WEIGHTS)
    (search,) = summary["trials"]
    store, again, complete = open_run(folder)
    assert complete and [t.id for t in again.trials] == [t.id for t in planned.trials]
    for row in summary["suffixes"]:
        assert row["n_valid"] == search["n_valid"] and "verdict" not in row
        audited = [each for each in store.examples(row["id"]) if each["outcome"]]
        assert len(audited) == row["n_valid"]
    assert run_study(planned, folder, Runtime(workers=1)).n_run == 0


def test_prompts_the_placeholder_brings_back_are_counted_apart(ran: tuple[Path, Plan]) -> None:
    folder, _ = ran
    store = open_run(folder)[0]
    for row in json.loads((folder / "summary.json").read_text())["suffixes"]:
        audited = [each for each in store.examples(row["id"]) if each["outcome"]]
        alone = [each for each in audited if each["placeholder_shows"]]
        assert 0 < len(alone) == row["n_placeholder"] < len(audited)
        assert not any(each["recovered"] for each in alone)
        assert row["n_searched"] == len(audited) - len(alone)
        assert row["n_recovered"] == sum(each["recovered"] for each in audited)
        assert row["recovery_rate"] == pytest.approx(row["n_recovered"] / row["n_searched"])
        for each in audited:
            if not each["placeholder_shows"]:
                assert each["recovered"] == (each["margin"] > 0)


def test_the_page_and_the_terminal_show_each_weight_beside_the_search(
    ran: tuple[Path, Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = ran
    store, planned, _ = open_run(folder)
    page = write_report(store, planned, folder / "report.html").read_text()
    section = page.partition('id="soft_suffix"')[2].partition("<section")[0]
    results_table(store.summary() or {})
    said = capsys.readouterr().out
    for weight in WEIGHTS:
        assert f"weight {weight:g}" in section and f"weight {weight:g}" in said
    assert "white box" in section and "a soft suffix in the same prompts" in said
    attacks = [t.attack for t in planned.trials if t.attack.kind == "soft_suffix"]
    for attack in attacks:
        assert f"<td>{attack.own_search.steps + 1}</td>" in section
    points = gather(store, planned).points
    for point in points[-1:]:  # the search that is set beside them
        took = point.main.measured("lane_steps")
        assert took and f"<td>{took['estimate']:.0f}</td>" in section
