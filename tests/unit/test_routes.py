"""By what route a vector reaches the answer, against passes put together by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast.attacks.residual import pose
from holdfast.batch import Batch, Example
from holdfast.batching import Batching
from holdfast.controls.none import NoControl
from holdfast.direct import Spot
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.lens import Lens
from holdfast.recovery import RecoverySpec
from holdfast.routes import FROZEN, routes
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import WORDS, tiny_batch, tiny_subject
from holdfast.variants import Recovered
from tests.families import CASES, CLAMPED, clamp, family_subject, prompts
from tests.unit.recovered import features_at, search, set_up
from tests.unit.test_forecast import Live

every_family = pytest.mark.parametrize(
    "subject", [pytest.param(case, id="-".join(case)) for case in CASES], indirect=True
)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return family_subject(*request.param)


def every(subject: Subject, where: str = "last_prompt", batch: Batch | None = None) -> Recovered:
    """All prompts, with a random vector for each."""
    batch, edit = prompts(subject) if batch is None else batch, clamp(subject)
    setting = set_up(subject, batch, features_at((CLAMPED,)), (edit,))
    fields = {"constraint": {"kind": "unconstrained"}, "perturb": {"positions": where}}
    spec = RecoverySpec.model_validate(fields | {"budget": {"relative": 1.0}})
    case = NoControl().case(setting, lambda: setting)
    problem = pose(spec, case)
    columns = problem.replay.columns
    there = problem.replay.frame.positions.gather(1, columns.clamp(min=0))
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(problem.shape, generator=generator) * problem.perturbed[..., None]
    rows = torch.arange(len(case.rows))
    positions = torch.where(columns >= 0, there, -1)
    return Recovered.of(setting, case, problem, spec, delta, positions, rows)


def final(found: Recovered, edits: tuple[object, ...]) -> Tensor:
    last = Capture(Site(found.case.subject.n_blocks))
    found.case.subject.outputs(found.case.batch, (*edits, last))
    return torch.cat([x[:, -1] for _, x in last.seen])


@every_family
def test_the_direct_route_is_the_residual_stream_alone(subject: Subject) -> None:
    """With nothing to answer it the vector arrives as it was added; in chunks too."""
    found = every(subject)
    small = replace(subject, batching=Batching(3))
    found = replace(found, case=replace(found.case, subject=small))
    made, batch = routes(found), found.case.batch
    arrives = final(found, found.case.edits) + found.delta[:, 0]
    by_hand = batch.margin(subject.family.unembed_of(subject.model, arrives).float())
    torch.testing.assert_close(made["direct"].float(), by_hand, atol=2e-5, rtol=1e-4)
    whole = batch.margin(subject.read(batch, found.edits(found.perturbation(found.delta))))
    suppressed = batch.margin(subject.read(batch, found.case.edits))
    for name in FROZEN:
        assert (made[name] - suppressed).abs().max() > 1e-4, f"{name}: nothing arrives"
        assert (made[name] - whole).abs().max() > 1e-4, f"{name}: nothing is kept"


@every_family
def test_what_is_kept_is_what_was_there(subject: Subject) -> None:
    """Without a vector every route is the pass itself, whatever implementation computes it."""
    found = every(subject)
    nothing = replace(found, delta=torch.zeros_like(found.delta))
    batch = found.case.batch
    suppressed = batch.margin(subject.read(batch, found.case.edits)).double()
    for name, margin in routes(nothing).items():
        torch.testing.assert_close(margin, suppressed, atol=2e-5, rtol=1e-4, msg=name)
    assert subject.model.config.get_text_config()._attn_implementation in subject.family.attention


@every_family
def test_only_attention_carries_from_one_token_to_another(subject: Subject) -> None:
    """A vector at earlier tokens alone: without attention nothing of it arrives, and with patterns
    kept it does."""
    found = every(subject, "all")
    last = found.positions == found.case.batch.positions[:, -1:]
    found = replace(found, delta=found.delta * ~last[..., None])
    batch, made = found.case.batch, routes(found)
    suppressed = batch.margin(subject.read(batch, found.case.edits)).double()
    for name in ("direct", "no attention"):
        torch.testing.assert_close(made[name], suppressed, atol=2e-5, rtol=1e-4)
    for name in ("no mlps", "no patterns"):
        assert (made[name] - suppressed).abs().max() > 1e-4


def test_few_rows_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = every(family_subject("llama", "sdpa"))
    whole = routes(found)
    monkeypatch.setattr("holdfast.routes._ENTRIES", 1)
    for name, margin in routes(found).items():
        torch.testing.assert_close(margin, whole[name], atol=1e-5, rtol=1e-5)


def test_after_the_last_block_there_is_one_route() -> None:
    site = Site(3)
    subject = tiny_subject(sites=(site,))
    features = features_at((site,))
    edit = FeatureEdit(FeatureBank.of(subject.sae(site), features), "set", 1.0)
    found = search(set_up(subject, tiny_batch(subject, 6), features, (edit,)))
    assert len(found) >= 4
    batch = found.case.batch
    whole = batch.margin(subject.read(batch, found.edits(found.perturbation(found.delta))))
    for margin in routes(found).values():
        torch.testing.assert_close(margin.float(), whole, atol=1e-5, rtol=1e-5)


@every_family
def test_the_lens_is_the_direct_route_with_the_norms_scale_held(subject: Subject) -> None:
    """For a small vector the scale hardly moves: the lens is the derivative of what arrives, less
    the norm's part; for any vector it is linear, and blind to other tokens."""
    found = every(subject)
    lens = Lens.of(found)
    double = lens(2 * found.delta)
    torch.testing.assert_close(double, 2 * lens(found.delta))
    batch = found.case.batch
    spot = Spot.of(batch, subject.read(batch, found.case.edits))
    x = final(found, found.case.edits)
    norm = subject.family.final_norm_of(subject.model)
    W = subject.model.get_output_embeddings().weight
    toward = (W[spot.target] - W[spot.rival]).double()
    # Two vectors whose difference leaves the norm's scale as it is: mirrored at the residual.
    radial = x / x.norm(dim=1, keepdim=True)
    push = found.delta[:, 0]
    push = push - (push * radial).sum(1, keepdim=True) * radial
    if norm(x + 1).sub(norm(x)).abs().max() < 1e-4:  # it centers: so does what keeps its scale
        push = push - push.mean(1, keepdim=True)
        inner = x - x.mean(1, keepdim=True)
        push = push - (push * inner).sum(1, keepdim=True) / inner.square().sum(1, keepdim=True) * (
            inner
        )
    moved = (norm(x + push) - norm(x - push)).double()
    scale = (norm(x + push) + norm(x - push)).double() - 2 * lens.frozen.bias
    own = 2 * lens.frozen(x.double())
    shrunk = (scale * own).sum(1) / own.square().sum(1)  # of both by the same factor
    by_hand = (moved * toward).sum(1) / 2 / shrunk
    torch.testing.assert_close(lens(push[:, None]), by_hand, atol=1e-4, rtol=1e-3)


def test_a_vector_at_another_token_is_not_seen_by_the_lens() -> None:
    subject = family_subject("llama", "sdpa")
    found = every(subject, "all")
    last = found.positions == found.case.batch.positions[:, -1:]
    lens = Lens.of(found)
    assert lens(found.delta * ~last[..., None]).abs().max() == 0
    torch.testing.assert_close(lens(found.delta), lens(found.delta * last[..., None]))
    assert lens(found.delta).abs().min() > 1e-3


def test_what_the_lens_holds_does_not_grow_with_the_prompts() -> None:
    """Beyond what it keeps of each: the residual and the logits of the token that is read."""
    subject = replace(family_subject("llama", "sdpa"), batching=Batching(2))
    text, peaks = " ".join(WORDS[:30]), []
    for n in (4, 24):
        made = [Example(f"p{i}", text, "w1", ("w2",), ("w3",), f"p{i}") for i in range(n)]
        found = every(subject, batch=subject.batch(made))
        with Live(list(subject.model.parameters())) as live:
            Lens.of(found)
        peaks.append(live.peak)
    assert peaks[1] - peaks[0] < found.case.batch.tokens[4:].numel() * subject.d_model * 4 / 2


def test_a_perturbation_of_several_sites_is_put_back_whole() -> None:
    """What is added at a later site is no later block's answer to what was added before."""
    subject = family_subject("llama", "sdpa")
    found = every(subject)
    later = Site(CLAMPED.depth + 1)
    push = Perturbation(
        found.case.batch.ids, found.positions, {CLAMPED: found.delta, later: 2 * found.delta}
    )
    whole = found.problem.replay
    both = replace(
        found,
        delta=torch.cat([found.delta, 2 * found.delta], 1),
        problem=replace(found.problem, replay=replace(whole, sites=(CLAMPED, later))),
    )
    assert set(both.perturbation(both.delta).deltas) == set(push.deltas)
    arrives = final(found, found.case.edits) + 3 * found.delta[:, 0]
    by_hand = found.case.batch.margin(subject.family.unembed_of(subject.model, arrives).float())
    torch.testing.assert_close(routes(both)["direct"].float(), by_hand, atol=2e-5, rtol=1e-4)
