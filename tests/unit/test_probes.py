"""Probes on pooled residuals: as scikit-learn has them, read alike everywhere, and linear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.batching import Batching
from holdfast.closed_form import ClosedForm
from holdfast.constraints import ConstraintKind
from holdfast.constraints.active_null import ActiveNull
from holdfast.constraints.encoder_null import EncoderNull
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.constraints.gradient_projection import GradientProjection
from holdfast.constraints.unconstrained import Unconstrained
from holdfast.controls import aim_elsewhere
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.errors import StudyError, SubjectError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.positions import selected
from holdfast.probes import Labelled, fit_probe
from holdfast.problem import Lanes, Problem
from holdfast.readouts.probes import NONE, Probes, pool
from holdfast.recovery import RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.strata import by_depth
from holdfast.subject import Subject
from holdfast.subspace import NullSpacePerSlot
from holdfast.testing import WORDS, random_sae, tiny_model, tiny_tokenizer

SITE = Site(2)
CLASSES = ("oak", "ash", "elm")


def probes(d: int, site: Site = SITE, size: float = 1.0) -> Probes:
    generator = torch.Generator().manual_seed(3)
    weight = size * torch.randn(len(CLASSES), d, generator=generator)
    return Probes(site, CLASSES, weight, size * torch.tensor([-0.5, 0.25, 0.0]))


def texts(subject: Subject, readout: Probes, lengths: Sequence[int] = (3, 7, 5, 4)) -> Batch:
    """Texts of different lengths, each to be named by the first probe."""
    return subject.batch(
        [
            Example(
                id=f"text:{row}",
                text=" ".join(WORDS[(row + 3 * i) % len(WORDS)] for i in range(length)),
                target="oak", rivals=(NONE,), alternatives=("ash", "elm"), cluster=f"text:{row}",
            )
            for row, length in enumerate(lengths)
        ],
        readout,
    )  # fmt: skip


def bank_of(subject: Subject, ids: Sequence[int], site: Site = SITE) -> FeatureBank:
    entry = SiteFeatures(site=str(site), ids=tuple(ids))
    return FeatureBank.of(subject.sae(site), FeatureSet(entries=(entry,), source="test"))


def every_token(batch: Batch) -> Tensor:
    """[b p] the positions of all tokens but BOS, -1 where a row has fewer."""
    mask = selected("all", False, batch.frame())
    return torch.where(mask, batch.positions, -1).sort(1, descending=True).values.flip(1)


def posed(
    subject: Subject,
    batch: Batch,
    ids: Sequence[int],
    clamp: FeatureEdit | None = None,
    reach: float = 3.0,
) -> Problem:
    """Raise every margin by `reach` with vectors at all tokens, after the clamp."""
    edits = () if clamp is None else (clamp,)
    replay = Replay.record(subject, batch, SITE, every_token(batch), before=edits)
    reference = replay.residual().norm(dim=(1, 2))
    return Problem(
        replay=replay,
        batch=batch,
        goal=batch.margin(subject.read(batch, edits)) + reach,
        held={SITE: bank_of(subject, ids)},
        reference_norm=reference,
        radius=4 * reference,
    )


# --- fitting --------------------------------------------------------------------------------------


def separable(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Residuals whose directions differ widely in scale; classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, d)
    shift = 0.7 * torch.ones(d)
    own, other = (torch.randn(n, d, generator=generator) + s for s in (shift, -shift))
    return own * scale + 5, other * scale + 5


def test_a_probe_is_the_pipeline_that_scikit_learn_has_for_it() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, held = Labelled.of(*separable(60, 12, 0)), Labelled.of(*separable(40, 12, 1))
    probe = fit_probe(train, held, [0.1], "oak")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000, tol=1e-6))
    model.fit(*train.arrays())
    x, y = held.arrays()
    ours = x @ probe.weight.double().numpy() + probe.bias
    np.testing.assert_allclose(ours, model.decision_function(x), rtol=1e-4, atol=1e-4)
    assert probe.validation == pytest.approx(model.score(x, y))


def test_regularization_is_chosen_by_accuracy_on_other_texts_the_strongest_of_a_tie() -> None:
    train, held = Labelled.of(*separable(20, 30, 0)), Labelled.of(*separable(200, 30, 1))
    penalties = [10.0, 1e-3, 0.1]
    accuracy = {c: fit_probe(train, held, [c], "oak").validation for c in penalties}
    best = min(c for c in penalties if accuracy[c] == max(accuracy.values()))
    chosen = fit_probe(train, held, penalties, "oak")
    assert chosen.penalty == best and chosen.validation == max(accuracy.values())
    far, near = torch.full((5, 3), 10.0), torch.full((5, 3), -10.0)
    easy = Labelled.of(far + torch.rand(5, 3), near + torch.rand(5, 3))
    assert fit_probe(easy, easy, penalties, "oak").penalty == 1e-3


def test_sides_are_balanced_and_an_empty_one_is_refused() -> None:
    both = Labelled.of(torch.ones(7, 2), torch.zeros(3, 2))
    assert both.y.sum() == 3 and len(both.y) == 6
    with pytest.raises(StudyError, match="tune split"):
        fit_probe(both, Labelled.of(torch.ones(3, 2), torch.ones(0, 2)), [1.0], "oak")


def test_a_direction_that_never_varies_gets_no_weight() -> None:
    own, other = separable(40, 5, 0)
    own[:, 2] = other[:, 2] = 3.0
    probe = fit_probe(Labelled.of(own, other), Labelled.of(own, other), [1.0], "oak")
    assert probe.weight[2] == 0 and torch.isfinite(probe.weight).all()


# --- reading --------------------------------------------------------------------------------------


def test_pooled_is_the_mean_of_the_tokens_after_bos_whatever_the_padding(subject: Subject) -> None:
    readout = probes(subject.d_model)
    batch = texts(subject, readout)
    pooled = readout.pooled(subject.outputs, batch)
    for row in range(len(batch)):
        alone, capture = batch.rows([row]), Capture(SITE)
        subject.outputs(alone, (capture,))
        mean = capture.seen[0][1][0, 1:].mean(0)
        torch.testing.assert_close(pooled[row], mean, rtol=1e-5, atol=1e-5)
    by_hand = pooled @ readout.weight.T + readout.bias
    scores = subject.read(batch)
    torch.testing.assert_close(scores[:, :3], by_hand)
    assert (scores[:, 3] == 0).all()
    torch.testing.assert_close(batch.margin(scores), by_hand[:, 0])


def test_bos_is_pooled_where_a_prompt_has_none(subject: Subject) -> None:
    batch = texts(subject, probes(subject.d_model))
    x = torch.randn(*batch.positions.shape, 4)
    frame = replace(batch.frame(), bos=torch.zeros(len(batch), dtype=torch.bool))
    there = (frame.positions >= 0)[..., None]
    torch.testing.assert_close(pool(x, frame), (x * there).sum(1) / there.sum(1))


def test_chunks_change_nothing(subject: Subject) -> None:
    readout = probes(subject.d_model)
    batch = texts(subject, readout, (3, 7, 5, 4, 6))
    small = replace(subject, batching=Batching(2))
    torch.testing.assert_close(small.read(batch), subject.read(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("site", [SITE, Site(3)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["every token", "last token"])
def test_replay_reads_what_a_whole_pass_does(
    subject: Subject, clamp: FeatureEdit, site: Site, last: bool
) -> None:
    """At the perturbed site and behind blocks; also of tokens before the first perturbed one."""
    readout = probes(subject.d_model, site)
    batch = texts(subject, readout)
    positions = batch.prompt_length[:, None] - 1 if last else every_token(batch)
    replay = Replay.record(subject, batch, SITE, positions, before=(clamp,))
    delta = torch.randn(*positions.shape, subject.d_model) * (positions >= 0)[..., None]
    push = Perturbation(batch.ids, positions, {SITE: delta})
    whole = subject.read(batch, (clamp, push))
    torch.testing.assert_close(readout.replayed(replay, delta), whole, rtol=1e-5, atol=1e-5)
    rows = torch.tensor([2, 0, 2])
    picked = readout.replayed(replay.rows(rows), delta[rows])
    torch.testing.assert_close(picked, whole[rows], rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_whole_pass_is_that_of_the_replay(subject: Subject) -> None:
    from holdfast.discovery.attribution import Leaf

    readout = probes(subject.d_model)
    batch = texts(subject, readout, (4, 6))
    leaf = Leaf(SITE)
    margin = batch.margin(subject.forward_with_gradients(batch, (leaf,)))
    (whole,) = torch.autograd.grad(margin.sum(), leaf.seen)
    counts = selected("all", False, batch.frame()).sum(1)
    inside = selected("all", False, batch.frame())[..., None]
    expected = torch.where(inside, readout.weight[0] / counts[:, None, None], 0.0)
    torch.testing.assert_close(whole, expected)


def test_probes_that_nothing_can_reach_are_refused(subject: Subject) -> None:
    readout = probes(subject.d_model, Site(1))
    batch = texts(subject, readout)
    replay = Replay.record(subject, batch, SITE, every_token(batch))
    with pytest.raises(StudyError, match=r"blocks\.0.*before blocks\.1"):
        readout.replayed(replay, torch.zeros(*every_token(batch).shape, subject.d_model))


def test_an_unknown_class_is_named_with_the_nearest(subject: Subject) -> None:
    with pytest.raises(SubjectError, match=r"'oka'.*'oak'"):
        probes(subject.d_model).answer(subject, "oka")


# --- closed form ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> Subject:
    """d_model 640, an SAE of 1,024 features of which 500 can be held at once."""
    model = tiny_model(d_model=640, n_layers=2)
    saes = {SITE: random_sae(SITE, 640, 1024)}
    return Subject.of("wide", model, tiny_tokenizer(), saes)


EXACTLY = {"tolerance": 1e-5, "refine_steps": 60, "steps": 60}


def analytic(problem: Problem, weight: Tensor, free: Tensor) -> Tensor:
    """deficit · √T / ‖Pw‖ in float64, P [d d] from a pseudo-inverse."""
    T = (problem.replay.columns >= 0).sum(1)
    start = Lanes.of(problem, torch.arange(len(problem))).margin(torch.zeros(problem.shape))
    deficit = (problem.goal - start.detach()).double()
    return deficit * T.sqrt() / (free @ weight.double()).norm()


def projector(problem: Problem) -> Tensor:
    A = problem.held[SITE].W_enc[0].double()
    return torch.eye(len(A), dtype=torch.float64) - A @ torch.linalg.pinv(A)


@pytest.mark.parametrize(
    ("constraint", "held"),
    [(Unconstrained(), 4), (EncoderNull(), 4), (FeatureHold(), 4), (EncoderNull(), 500)],
    ids=["unconstrained", "encoder_null", "feature_hold", "encoder_null of 500"],
)
def test_the_search_reaches_the_closed_form_within_1e_4_and_never_beats_it(
    subject: Subject, wide: Subject, constraint: ConstraintKind, held: int
) -> None:
    who = wide if held == 500 else subject
    readout = probes(who.d_model)
    batch = texts(who, readout)
    clamp = FeatureEdit(bank_of(who, range(held)), "set", 0.0)
    # Residuals are float32: a deficit has to be large beside what their rounding makes of a logit.
    pooled = readout.pooled(who.outputs, batch)
    reach = 0.2 * float(readout.weight[0].norm() * pooled.norm(dim=1).median())
    problem = posed(who, batch, range(held), clamp, reach)
    free = torch.eye(who.d_model, dtype=torch.float64)
    if constraint.exact:
        free = projector(problem)
        assert round(float(free.trace())) == who.d_model - held
    oracle = analytic(problem, readout.weight[0], free)
    found = recover(problem, RecoverySpec(constraint=constraint, **EXACTLY), seed=0)
    torch.testing.assert_close(found.closed_form.norm.double(), oracle, rtol=2e-5, atol=0)
    share = (free @ readout.weight[0].double()).norm() / readout.weight[0].norm()
    torch.testing.assert_close(
        found.closed_form.share.double(), share.expand(len(batch)), rtol=1e-4, atol=0
    )
    assert set(found.outcomes) == {"recovered"}
    ratio = found.smallest_norm.double() / oracle
    assert (ratio <= 1 + 1e-4).all(), f"found {float(ratio.max()) - 1:.1e} above the optimum"
    assert (ratio >= 1 - 2e-5).all(), f"beats the optimum by {1 - float(ratio.min()):.1e}"


def test_where_every_token_has_a_set_of_its_own_the_closed_form_is_the_searchs_too(
    subject: Subject,
) -> None:
    """Under `active_null` the gradient is projected token by token."""
    readout = probes(subject.d_model)
    batch = texts(subject, readout)
    clamp = FeatureEdit(bank_of(subject, range(4)), "set", 0.0)
    pooled = readout.pooled(subject.outputs, batch)
    reach = 0.2 * float(readout.weight[0].norm() * pooled.norm(dim=1).median())
    problem = posed(subject, batch, range(4), clamp, reach)
    feasible = ActiveNull().feasible(problem)
    assert isinstance(feasible, NullSpacePerSlot) and len(feasible.free.unique()) > 2
    found = recover(problem, RecoverySpec(constraint=ActiveNull(), **EXACTLY), seed=0)
    there = problem.perturbed
    gradient = torch.where(there[..., None], readout.weight[0] / there.sum(1)[:, None, None], 0.0)
    length = feasible.retract(gradient).double().norm(dim=(1, 2))
    start = Lanes.of(problem, torch.arange(len(batch))).margin(torch.zeros(problem.shape))
    oracle = (problem.goal - start).double() / length
    torch.testing.assert_close(found.closed_form.norm.double(), oracle, rtol=2e-4, atol=0)
    assert set(found.outcomes) == {"recovered"}
    ratio = found.smallest_norm.double() / oracle
    assert ((ratio <= 1 + 1e-3) & (ratio >= 1 - 2e-4)).all()


def test_the_direction_is_the_projected_probe_alike_at_every_token(subject: Subject) -> None:
    """So the pooled vector moves by ε/√T, which is all that a budget ε on tokens can buy."""
    readout = probes(subject.d_model)
    problem = posed(subject, texts(subject, readout), range(4))
    found = recover(problem, RecoverySpec(constraint=EncoderNull(), **EXACTLY), seed=0)
    direction = (projector(problem) @ readout.weight[0].double()).float()
    T = problem.perturbed.sum(1)
    for row, delta in enumerate(found.delta):
        own = delta[problem.perturbed[row]]
        cosines = torch.nn.functional.cosine_similarity(own, direction[None])
        assert (cosines > 1 - 1e-5).all()
        pooled = own.sum(0) / T[row]
        torch.testing.assert_close(pooled.norm(), found.norm[row] / T[row].sqrt(), rtol=1e-4,
                                   atol=0)  # fmt: skip


def test_scaling_a_probe_scales_its_logits_and_no_norm(subject: Subject) -> None:
    once, tenfold = probes(subject.d_model), probes(subject.d_model, size=10.0)
    norms = []
    for readout, reach in ((once, 2.0), (tenfold, 20.0)):
        problem = posed(subject, texts(subject, readout), range(4), reach=reach)
        found = recover(problem, RecoverySpec(constraint=EncoderNull(), **EXACTLY), seed=0)
        norms += [found.smallest_norm, found.closed_form.norm]
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=2e-4, atol=0)


def test_a_budget_below_the_closed_form_is_not_enough(subject: Subject) -> None:
    readout = probes(subject.d_model)
    problem = posed(subject, texts(subject, readout), range(4))
    closed = ClosedForm.of(problem, EncoderNull().feasible(problem)).norm
    factor = torch.tensor([0.99, 1.01, 0.9, 1.1])
    found = recover(
        replace(problem, radius=factor * closed),
        RecoverySpec(constraint=EncoderNull(), steps=40, doublings=1),
        seed=0,
    )
    assert torch.equal(~found.smallest_norm.isnan(), factor > 1)


def test_there_is_no_closed_form_where_the_margin_bends_or_nothing_is_promised(
    subject: Subject, batch: Batch, bank: FeatureBank
) -> None:
    from holdfast.testing import tiny_problem

    logits = tiny_problem(subject, batch, bank)
    above = posed(subject, texts(subject, probes(subject.d_model, Site(3))), range(4))
    own = posed(subject, texts(subject, probes(subject.d_model)), range(4))
    rivals = replace(own, batch=own.batch.aimed(own.batch.targets, own.batch.alternatives))
    late = replace(own, replay=replace(own.replay, after=(FeatureEdit(bank, "set", 0.0),)))
    for problem, constraint in (
        (logits, EncoderNull()), (above, EncoderNull()), (rivals, EncoderNull()),
        (late, EncoderNull()), (own, GradientProjection()),
    ):  # fmt: skip
        closed = ClosedForm.of(problem, constraint.feasible(problem))
        assert closed.norm.isnan().all() and closed.share.isnan().all()


def test_a_rival_named_twice_is_no_corner_and_rows_beside_it_change_nothing(
    subject: Subject,
) -> None:
    """So rows with one rival can stand in a stack beside rows with several."""
    own = posed(subject, texts(subject, probes(subject.d_model)), range(4))
    twice = own.batch.rivals[:, :1].repeat(1, 2)
    several = own.batch.alternatives[:, :2].clone()
    assert (several[:, 0] != several[:, 1]).all(), "the fixture: two rivals"
    rivals = torch.where(torch.arange(len(own))[:, None] % 2 == 0, twice, several)
    mixed = replace(own, batch=own.batch.aimed(own.batch.targets, rivals))
    feasible = EncoderNull().feasible(own)
    alone, closed = ClosedForm.of(own, feasible), ClosedForm.of(mixed, feasible)
    torch.testing.assert_close(closed.norm[::2], alone.norm[::2])
    torch.testing.assert_close(closed.share[::2], alone.share[::2])
    assert closed.norm[1::2].isnan().all() and closed.share[1::2].isnan().all()


def test_where_all_directions_are_held_no_norm_is_enough(subject: Subject) -> None:
    problem = posed(subject, texts(subject, probes(subject.d_model)), range(40))
    closed = ClosedForm.of(problem, EncoderNull().feasible(problem))
    assert closed.norm.isinf().all() and (closed.share == 0).all()
    met = replace(problem, goal=problem.goal - 10)
    assert (ClosedForm.of(met, EncoderNull().feasible(met)).norm == 0).all()


# --- wrong targets, and strata --------------------------------------------------------------------


def test_a_wrong_target_of_probes_is_another_class_that_need_not_beat_the_right_one(
    subject: Subject,
) -> None:
    """The right class has to exceed 0, so the wrong one has to as well, and no more."""
    batch = texts(subject, probes(subject.d_model), range(2, 26))
    given = torch.full((len(batch),), CLASSES.index("ash"))
    aimed = aim_elsewhere(batch, given)
    assert (aimed.targets == CLASSES.index("elm")).all(), "neither right nor given"
    assert (aimed.rivals == len(CLASSES)).all(), "the threshold is the only rival"
    scores = torch.tensor([[5.0, 0.0, 0.3, 0.0]]).repeat(len(batch), 1)
    torch.testing.assert_close(aimed.margin(scores), torch.full((len(batch),), 0.3))
    anywhere = aim_elsewhere(batch, torch.full((len(batch),), len(CLASSES)))
    assert set(anywhere.targets.tolist()) == {1, 2}


def test_strata_are_thirds_from_the_nearest_to_the_deepest() -> None:
    suppressed = -torch.arange(10.0)[torch.randperm(10)]
    depth = (-suppressed).long()
    recovered = depth < 4
    smallest = torch.where(depth < 7, depth.double(), torch.nan)
    found = {m.name: m for m in by_depth(suppressed, recovered, smallest, list("abcdefghij"))}
    assert found["recovery_rate.near"].estimate == 1.0 and found["recovery_rate.near"].n == 4
    assert found["recovery_rate.middle"].n == found["recovery_rate.deep"].n == 3
    assert found["recovery_rate.middle"].estimate == 0.0
    assert found["suppressed_margin.near"].estimate == -1.5
    assert found["smallest_norm_relative.middle"].estimate == 5.0
    assert found["smallest_norm_relative.deep"].estimate is None, "never reached is infinite"
    assert math.isclose(found["suppressed_margin.deep"].estimate or 0, -8.0)
    assert by_depth(suppressed[:8], recovered[:8], smallest[:8], list("abcdefgh")) == []
