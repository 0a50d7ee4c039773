"""On CUDA: the same numbers as on the CPU, to the precision of another order of summation."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.ascent import Climb, _ascend
from holdfast.batching import Batching
from holdfast.constraints import CONSTRAINTS
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.executor import Runtime
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.planning import plan
from holdfast.problem import Problem
from holdfast.recovery import Budget, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.run import run_study
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.testing import (
    random_sae,
    tiny_batch,
    tiny_model,
    tiny_problem,
    tiny_subject,
    tiny_tokenizer,
)
from holdfast.verdict import MAX_OVER_FLOOR
from holdfast.verify import verify
from holdfast.waiting import Behind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

SITE = Site(2)
FEATURES = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(1, 5, 9)),), source="test")


def on_cuda(dtype: torch.dtype = torch.float32, sites: tuple[Site, ...] = (SITE,)) -> Subject:
    model: Any = tiny_model()
    tokenizer: Any = tiny_tokenizer()
    saes = {site: random_sae(site) for site in sites}
    return Subject.of("tiny", model.to("cuda", dtype), tokenizer, saes)


def test_outputs_generation_and_replay_equal_the_cpu() -> None:
    here, there = tiny_subject(), on_cuda()
    batch, same = tiny_batch(here, 6), tiny_batch(there, 6)
    delta = torch.randn(6, 1, 32)
    positions = batch.prompt_length[:, None] - 1
    for subject, b in ((here, batch), (there, same)):
        device = subject.device
        clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), FEATURES), "set", 2.0)
        push = Perturbation(b.ids, positions.to(device), {SITE: delta.to(device)})
        full = subject.outputs(b, (clamp, push))[:, -1]
        replay = Replay.record(subject, b, SITE, positions.to(device), before=(clamp,))
        torch.testing.assert_close(replay.logits(delta.to(device)), full, rtol=1e-4, atol=1e-4)
        if subject is here:
            expected, made = full, subject.generate(b, (clamp,), 6)
        else:
            torch.testing.assert_close(full.cpu(), expected, rtol=1e-3, atol=1e-3)
            assert torch.equal(subject.generate(b, (clamp,), 6).cpu(), made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_constraint_holds_on_the_gpu(dtype: torch.dtype) -> None:
    subject = on_cuda(dtype)
    batch = tiny_batch(subject, 24)
    bank = FeatureBank.of(subject.sae(SITE), FEATURES)
    spec = RecoverySpec(constraint=EncoderNull(), steps=20, doublings=1, budget=Budget(relative=1))
    found = recover(tiny_problem(subject, batch, bank), spec, seed=0)
    push = Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {SITE: found.delta})
    checks = verify(subject, batch, (), push, {SITE: bank}, {SITE: {"*": 1.0}}, True)
    if dtype == torch.float32:
        assert checks.preactivation_drift.max() < 1e-6
    else:
        floor = checks.rounding_floor.mean()
        assert checks.preactivation_drift.mean() <= MAX_OVER_FLOOR * floor


def test_a_replayed_step_does_not_wait_for_the_gpu() -> None:
    """CUDA itself says when the host waits: it raises."""
    subject = on_cuda()
    batch = tiny_batch(subject, 6)
    clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), FEATURES), "set", 2.0)
    replay = Replay.record(subject, batch, SITE, batch.positions[:, -2:], before=(clamp,))
    answers = torch.tensor([[5, 6]] * 6, device="cuda")

    def step(delta: torch.Tensor) -> torch.Tensor:
        scores = replay.logits(delta, answers)
        return torch.autograd.grad((scores[:, 0] - scores[:, 1]).sum(), delta)[0]

    delta = torch.randn(6, 2, 32, device="cuda", requires_grad=True)
    step(delta)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient = step(delta)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gradient.abs().max() > 0


AT_ONE = ("unconstrained", "gradient_projection", "random_subspace", "encoder_null", "active_null",
          "one_sided", "feature_floor", "jacobian_null")  # fmt: skip
AT_SEVERAL = (
    "feature_hold", "one_sided", "feature_floor", "decoder_null", "undo_null", "jacobian_null",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "several"), [*((k, False) for k in AT_ONE), *((k, True) for k in AT_SEVERAL)]
)
def test_no_step_of_a_search_waits_for_the_gpu(kind: str, several: bool) -> None:
    """Counted by CUDA itself, which does not count answers to what was asked a step before;
    `tests/unit/test_waiting.py` counts what is known to wait."""
    sites = (SITE, Site(3)) if several else (SITE,)
    subject = on_cuda(sites=sites)
    batch = tiny_batch(subject, 6)
    constraint = CONSTRAINTS.parse({"kind": kind})
    entries = tuple(SiteFeatures(site=str(site), ids=(1, 5, 9)) for site in sites)
    features = FeatureSet(entries=entries, source="test")
    held = {site: FeatureBank.of(subject.sae(site), features) for site in sites}
    replay = Replay.record(subject, batch, sites, batch.positions[:, -1:], watch=sites)
    norm = replay.residual().norm(dim=(1, 2))
    problem = Problem(replay, batch, torch.full_like(norm, 1e9), held, norm, 0.3 * norm)
    problem = constraint.acting(problem)
    sets, stepper = constraint.feasible(problem), constraint.stepper
    rows, lr = torch.arange(6, device="cuda"), torch.full((6,), 0.1, device="cuda")
    climb = Climb(rows, torch.zeros(problem.shape, device="cuda"), problem.goal, problem.radius, lr)

    def waits(steps: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                _ascend(problem, sets, climb, steps, stepper, 1.0, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    waits(2)  # what is worked out once
    assert waits(24) == waits(8)


def test_answers_come_a_round_later() -> None:
    behind = Behind()
    asked = [torch.tensor([i, i + 1], device="cuda") for i in range(4)]
    assert behind.read(asked[0]) is None
    assert [behind.read(x).tolist() for x in asked[1:]] == [x.tolist() for x in asked[:-1]]


def test_a_prefix_of_more_rows_than_a_step_takes_waits_on_the_host() -> None:
    subject = on_cuda()
    batch = tiny_batch(subject, 7)
    positions = batch.positions[:, -1:]
    whole = Replay.record(subject, batch, SITE, positions)
    pieces = Replay.record(replace(subject, batching=Batching(3)), batch, SITE, positions)
    assert {t.device.type for own in whole.prefix if own for t in own} == {"cuda"}
    assert {t.device.type for own in pieces.prefix if own for t in own} == {"cpu"}
    rows = torch.tensor([6, 0, 0], device="cuda")
    picked = pieces.rows(rows)
    assert {t.device.type for own in picked.prefix if own for t in own} == {"cuda"}
    delta = torch.randn(7, 1, 32, device="cuda")
    expected = whole.logits(delta)
    torch.testing.assert_close(picked.logits(delta[rows]), expected[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces.logits(delta), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_demo_comes_to_the_same_verdicts(tmp_path: Path) -> None:
    study = parse(bundled("demo"), limit=24)
    verdicts = {}
    for device in ("cpu", "cuda"):
        report = run_study(plan(study), tmp_path / device, Runtime(device))
        verdicts[device] = {
            (row["audit"], row["constraint"]): row["verdict"]
            for row in report.summary["trials"]
            if row["control"] == "none" and row["constraint"] == "encoder_null"
        }
    assert verdicts["cpu"] == verdicts["cuda"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_gives_the_same_search(tmp_path: Path) -> None:
    """What `tests/unit/test_cards.py` pretends, with accelerate and two cards."""
    from transformers import AutoModelForCausalLM

    plain: Any = tiny_model()
    plain.save_pretrained(tmp_path)
    places = {
        "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1,
        "model.layers.2": 1, "model.norm": 1, "lm_head": 1,
    }  # fmt: skip
    apart = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, dtype=torch.float32
    ).requires_grad_(False)
    spec = RecoverySpec(constraint=EncoderNull(), steps=5, doublings=1, budget=Budget(relative=1))
    found = []
    for model in (plain, apart):
        tokenizer: Any = tiny_tokenizer()
        subject = Subject.of("tiny", model, tokenizer, {SITE: random_sae(SITE)})
        batch = tiny_batch(subject, 6)
        bank = FeatureBank.of(subject.sae(SITE), FEATURES)
        problem = tiny_problem(subject, batch, bank)
        recovery = recover(problem, spec, seed=0)
        positions = batch.prompt_length[:, None] - 1
        push = Perturbation(batch.ids, positions, {SITE: recovery.delta})
        checks = verify(subject, batch, (), push, {SITE: bank}, {SITE: {"*": 1.0}}, True)
        assert checks.preactivation_drift.max() < 1e-6
        found.append(recovery.delta.cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)
