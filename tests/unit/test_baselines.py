"""Baselines: their norms, their sets, what is known of them beforehand, and how they are asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from holdfast.baselines import baselines, noise
from holdfast.baselines import inside as bring_inside
from holdfast.batch import Batch
from holdfast.behaviors import BehaviorKind
from holdfast.behaviors.observation import Observation
from holdfast.edits import Capture, FeatureEdit
from holdfast.errors import StudyError
from holdfast.many_draws import FIRST, many_draws
from holdfast.paths import _rows, follow
from holdfast.planning import plan
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.variants import PathSpec, Performed, Recovered, Variant, perform
from tests.unit.recovered import features_at, search, set_up

SITE = Site(2)
FEATURES = features_at((SITE,))
INSIDE = {
    "random_inside", "undo_inside", "transfer_inside", "answer_mean_inside", "gradient_inside"
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    found: Recovered
    clean: torch.Tensor


def make(
    subject: Subject, order: str = "clamp_then_perturbation", kind: str = "encoder_null"
) -> Made:
    """A clamp at the last prompt token alone, so that taking it back there takes back all of it."""
    batch = tiny_batch(subject, 6)
    bank = FeatureBank.of(subject.sae(SITE), FEATURES)
    clamp = FeatureEdit(bank, "set", 2.0, where="last_prompt")
    fit = tiny_batch(subject, 10, seed=3)
    setting = set_up(subject, batch, FEATURES, (clamp,))
    targets = setting.test.targets[torch.arange(10) % 3]
    setting = replace(setting, fit=fit.aimed(targets, fit.rivals))
    found = search(setting, kind, order=order)
    assert len(found) >= 4
    return Made(found, found.case.batch.margin(subject.read(found.case.batch)).double())


@pytest.fixture(scope="module")
def made() -> Made:
    return make(tiny_subject())


@pytest.fixture(scope="module")
def variants(made: Made) -> dict[str, Variant]:
    return {v.name: v for v in baselines(made.found, PathSpec(scales=(1.0, 2.0)), seed=0)}


def test_each_has_the_norm_it_is_named_for(made: Made, variants: dict[str, Variant]) -> None:
    for name, variant in variants.items():
        if " x" not in name:
            continue
        scale = float(name.rpartition("x")[2])
        for delta in variant.draws:
            own = delta.norm(dim=(1, 2))[variant.there]
            torch.testing.assert_close(
                own, scale * made.found.length[variant.there], rtol=1e-5, atol=0
            )
            assert (delta[~variant.there] == 0).all()


def test_those_inside_hold_the_features_and_the_others_move_them(
    made: Made, variants: dict[str, Variant]
) -> None:
    performed = {p.name: p for p in perform(made.found, list(variants.values()))}
    for kind in INSIDE:
        drift = performed[f"{kind} x2"].preactivation_drift
        assert drift[~drift.isnan()].max() < 1e-6, kind
    for kind in ("random", "undo"):
        assert performed[f"{kind} x1"].preactivation_drift.min() > 1e-4, kind


def test_the_clamp_alone_and_the_clamp_taken_back_are_known(
    made: Made, variants: dict[str, Variant]
) -> None:
    """Where the clamp acts at the perturbed token only, adding its displacement back undoes it."""
    case = made.found.case
    suppressed = case.batch.margin(case.subject.read(case.batch, case.edits)).double()
    nothing, undo = perform(made.found, [variants["nothing"], variants["undo"]])
    assert torch.equal(nothing.margin, suppressed)
    torch.testing.assert_close(undo.margin, made.clean, atol=1e-4, rtol=1e-4)
    assert (undo.margin - nothing.margin).abs().min() > 1e-3, "the clamp does something"


def test_one_gradient_step_goes_up(made: Made, variants: dict[str, Variant]) -> None:
    small = baselines(made.found, PathSpec(scales=(0.02,)), seed=0)
    by_name = {v.name: v for v in small}
    nothing, step, noise = perform(
        made.found, [by_name["nothing"], by_name["gradient_inside x0.02"], by_name["random x0.02"]]
    )
    assert (step.margin > nothing.margin).all()
    assert (step.margin > noise.margin).all(), "nothing climbs faster than the gradient"


def test_random_directions_are_drawn_by_id(made: Made, variants: dict[str, Variant]) -> None:
    rows = torch.tensor([3, 1])
    found = made.found
    part = Recovered.of(
        found.setting, found.case, found.problem, found.spec, found.delta, found.positions, rows
    )
    again = {v.name: v for v in baselines(part, PathSpec(scales=(1.0, 2.0)), seed=0)}
    for name in ("random x1", "random_inside x2"):
        for ours, theirs in zip(again[name].draws, variants[name].draws, strict=True):
            torch.testing.assert_close(ours, theirs[rows], rtol=1e-5, atol=1e-6)
    first, second = variants["random x1"].draws
    assert not torch.allclose(first, second), "draws differ"
    other = {v.name: v for v in baselines(found, PathSpec(), seed=1)}
    assert not torch.allclose(other["random x1"].draws[0], first), "seeds differ"


def test_a_transferred_vector_is_anothers_of_another_cluster(made: Made) -> None:
    found, n = made.found, len(made.found)
    clusters = tuple("ab"[row % 2] for row in range(n))
    batch = replace(found.case.batch, clusters=clusters)
    grouped = replace(found, case=replace(found.case, batch=batch))
    spec = PathSpec(scales=(1.0,))
    by_name = {v.name: v for v in baselines(grouped, spec, seed=0)}
    variant = by_name["transfer x1"]
    unit = found.delta / found.delta.norm(dim=(1, 2), keepdim=True)
    assert variant.there.all()
    for row in range(n):
        (delta,) = variant.draws
        own = delta[row] / delta[row].norm()
        (donor,) = [o for o in range(n) if torch.allclose(unit[o], own, atol=1e-5)]
        assert clusters[donor] != clusters[row]
    alone = replace(found, case=replace(found.case, batch=replace(batch, clusters=("a",) * n)))
    lonely = next(v for v in baselines(alone, spec, seed=0) if v.name == "transfer x1")
    assert not lonely.there.any() and "another cluster" in lonely.reason


def test_the_difference_in_means_is_that_of_the_fit_prompts(
    made: Made, variants: dict[str, Variant]
) -> None:
    found, fit = made.found, made.found.setting.fit
    assert fit is not None
    read = Capture(SITE)
    found.case.subject.outputs(fit, (read,))
    last = read.at(fit.ids, fit.prompt_length[:, None] - 1)[:, 0]
    variant = variants["answer_mean x1"]
    known = set(fit.targets.tolist())
    assert variant.there.tolist() == [t in known for t in found.case.batch.targets.tolist()]
    assert variant.there.any() and not variant.there.all()
    row = int(variant.there.int().argmax())
    own = fit.targets == found.case.batch.targets[row]
    by_hand = last[own].mean(0) - last[~own].mean(0)
    by_hand = by_hand / by_hand.norm() * found.length[row]
    torch.testing.assert_close(variant.draws[0][row, 0], by_hand, rtol=1e-4, atol=1e-5)


def test_many_rows_of_a_cluster_are_no_evidence() -> None:
    """Six prompts of two questions, all of them brought back by one vector and by the other none:
    of the four sign patterns two are as far from zero, whatever Holm makes of the rest."""
    ones, zeros = (torch.full((6,), value, dtype=torch.float64) for value in (1.0, 0.0))

    def performed(name: str, back: torch.Tensor) -> Performed:
        return Performed(name, 1, "", back, back, ones, zeros, zeros)

    made = [performed("nothing", zeros), performed("all", ones)]
    by_name = {each.name: each for each in made}
    nothing, everything = _rows(made, by_name, ["q1"] * 3 + ["q2"] * 3)
    assert (nothing["p"], everything["p"]) == (0.5, 1.0) and nothing["p_holm"] == 1.0
    alone, _ = _rows(made, by_name, [str(row) for row in range(6)])
    assert alone["p"] == 2 / 2**6


def test_a_prompt_without_a_baseline_is_unscored_with_a_reason(made: Made) -> None:
    paths = follow(made.found, PathSpec(scales=(1.0,), draws=1), seed=0)
    row = next(r for r in paths.record["baselines"] if r["name"] == "answer_mean x1")
    n = len(made.found)
    assert 0 < row["back"]["n"] < n and row["back"]["n"] + row["back"]["n_unscored"] == n
    assert "no prompts with this answer" in row["back"]["reason"]
    laid = paths.laid(n)["variant.answer_mean x1.margin"]
    assert int(laid.isnan().sum()) == row["back"]["n_unscored"]


def test_without_a_promise_there_is_no_inside(subject: Subject) -> None:
    loose = make(subject, kind="unconstrained").found
    names = {v.name.partition(" ")[0] for v in baselines(loose, PathSpec(), seed=0)}
    assert names == {"nothing", "undo", "random", "transfer", "answer_mean"}


def test_what_is_orthogonal_to_the_constraint_has_no_inside(made: Made) -> None:
    """A vector along the held encoder columns: only rounding of it is left in their null space."""
    from holdfast.constraints.encoder_null import EncoderNull

    found = made.found
    feasible = EncoderNull().feasible(found.problem)
    column = found.problem.held[SITE].W_enc[0, :, 0]
    inside, there = bring_inside(found, feasible, column.expand_as(found.delta), 1.0)
    assert not there.any() and inside.abs().max() == 0
    inside, there = bring_inside(found, feasible, torch.ones_like(found.delta), 1.0)
    assert there.all() and inside.abs().max() > 0


def test_where_a_set_ends_the_vector_is_shorter_than_asked(subject: Subject) -> None:
    """Towards a threshold there is only so much room: no feature comes on, whatever was asked."""

    found = make(subject, kind="one_sided").found
    bank, problem = found.problem.held[SITE], found.problem
    feasible = found.spec.constraint.feasible(problem)
    column = bank.W_enc[0, :, 0].expand_as(found.delta)
    inside, there = bring_inside(found, feasible, column, 64.0)
    norm = inside.norm(dim=(1, 2)) / found.length
    assert there.any() and (norm[there] > 0).all() and (norm < 32).all()
    h, frame = problem.replay.reference[SITE], found.case.batch.frame()
    before, after = (bank.activations(x.double(), frame) for x in (h, h + inside))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    free = bank.activations((h + 64 * column).double(), frame)
    assert (free - before).abs().max() > 1, "the same direction without the set switches it on"


def test_with_the_clamp_last_it_has_the_last_word(subject: Subject) -> None:
    """`set` overwrites what the features were given: taking its displacement back does nothing to
    them."""
    found = make(subject, order="perturbation_then_clamp").found
    by_name = {v.name: v for v in baselines(found, PathSpec(scales=(1.0,)), seed=0)}
    again, undo = perform(found, [Variant.whole("all", found.delta), by_name["undo x1"]])
    assert again.back.all()
    case = found.case
    edits = found.edits(found.perturbation(by_name["undo x1"].draws[0]))
    assert torch.equal(
        undo.margin, case.batch.margin(case.subject.read(case.batch, edits)).double()
    )


def test_many_draws_are_what_full_passes_say(made: Made) -> None:
    """Shares, the best of all and which are as good, of the same vectors run from the embedding."""
    found, n = made.found, 40
    told = many_draws(found, PathSpec(margin_draws=n), seed=0)
    assert told["n"] == n
    constraint = found.spec.constraint
    feasible = constraint.feasible(constraint.acting(found.problem))
    drawn = [noise(found, 0, FIRST + draw) for draw in range(n)]
    made_of = {
        "free": [found.scaled(each)[0] for each in drawn],
        "inside": [bring_inside(found, feasible, each, 1.0)[0] for each in drawn],
    }
    for name, deltas in made_of.items():
        ran = perform(found, [Variant.whole(str(i), delta) for i, delta in enumerate(deltas)])
        whole, nothing = perform(
            found, [Variant.whole("a", found.delta), Variant.whole("b", 0 * found.delta)]
        )
        margins = torch.stack([each.margin for each in ran])
        back = (margins > 0).double().mean(0)
        best = (margins.amax(0) - nothing.margin) / (whole.margin - nothing.margin)
        own = told[name]
        assert own["back"]["estimate"] == pytest.approx(float(back.mean()))
        assert own["any"]["estimate"] == pytest.approx(float((back > 0).double().mean()))
        middle = float(best.quantile(0.5))
        assert own["best"]["estimate"] == pytest.approx(middle, abs=1e-3)
        as_good = float((margins >= whole.margin).double().mean())
        assert own["as_good"]["estimate"] == pytest.approx(as_good) and as_good < 0.1
    assert told["free"] != told["inside"]


def test_many_draws_need_margins_that_are_the_behavior(made: Made, subject: Subject) -> None:
    loose = make(subject, kind="unconstrained").found
    assert many_draws(loose, PathSpec(margin_draws=1), seed=0)["inside"] is None
    setting = replace(
        made.found.setting,
        behavior=Echo(),
        observed=Echo().observe(made.found.case.subject, made.found.case.batch),
    )
    told = many_draws(replace(made.found, setting=setting), PathSpec(), seed=0)
    assert told["n"] == 0 and "generated text" in told["reason"]


def test_nothing_recovered_is_said(made: Made) -> None:
    found = made.found
    none = Recovered.of(
        found.setting, found.case, found.problem, found.spec, found.delta, found.positions,
        torch.zeros(0, dtype=torch.long),
    )  # fmt: skip
    paths = follow(none, PathSpec(), seed=0)
    assert paths.record == {"n": 0, "reason": "no prompt was recovered"} and paths.laid(5) == {}


def test_rows_stand_where_they_were_audited(made: Made) -> None:
    n = len(made.found)
    paths = follow(made.found, PathSpec(scales=(1.0,), draws=1), 0, torch.arange(n) * 2)
    laid = paths.laid(2 * n)["variant.all.back"]
    assert laid[::2].tolist() == [1.0] * n and laid[1::2].isnan().all()


class Echo(BehaviorKind):
    """Shows its behavior on every prompt but the first, whatever the logits say."""

    kind: str = "echo"

    def observe(
        self, subject: Subject, batch: Batch, edits: Any = (), references: Any = None
    ) -> Observation:
        shows = torch.ones(len(batch), dtype=torch.bool)
        shows[0] = False
        return Observation(shows, ~shows, labels=("said",) * len(batch))


def test_text_is_judged_and_not_its_margin(made: Made) -> None:
    setting = replace(
        made.found.setting,
        behavior=Echo(),
        observed=Echo().observe(made.found.case.subject, made.found.case.batch),
    )
    found = replace(made.found, setting=setting)
    (nothing,) = perform(found, [Variant.whole("nothing", torch.zeros_like(found.delta))])
    assert nothing.back.tolist() == [0.0] + [1.0] * (len(found) - 1)


# --- In a study -----------------------------------------------------------------------------------


APART = {audit.name for audit in parse(bundled("demo")).audits if audit.paths is False}
"""Audits of the demo that say for themselves that they are not compared."""


def test_only_the_headline_of_the_audit_itself_is_compared() -> None:
    compared = [t for t in plan(parse(bundled("demo"), ["paths=true"])).trials if t.paths]
    assert compared and {t.control.kind for t in compared} == {"none"}
    assert {t.label for t in compared} == {"encoder_null", "feature_hold", "jacobian_null"}
    assert len(compared) == len({t.audit for t in compared}), "one constraint of an audit"
    every = plan(parse(bundled("demo"), ["paths={every=true, draws=5}"])).trials
    assert {t.id for t in every if t.paths} == {
        t.id for t in every if t.is_audit and t.audit not in APART
    }
    assert {t.paths for t in every if t.paths} == {PathSpec(draws=5)}, "`every` is no number"


def test_an_audit_has_the_last_word() -> None:
    def compared(*sets: str) -> set[str]:
        return {t.audit for t in plan(parse(bundled("demo"), sets)).trials if t.paths}

    names = {audit.name for audit in parse(bundled("demo")).audits} - APART
    assert compared("paths=true", "audits.0.paths=false") == names - {"ioi"}
    assert compared("paths=false", "audits.1.paths=true") == {"mcq"}
    assert compared("paths=false") == set()


def test_comparing_is_part_of_a_trials_identity_and_of_no_controls() -> None:
    def ids(paths: str, control: str) -> set[str]:
        trials = plan(parse(bundled("demo"), [f"paths={paths}"])).trials
        return {t.id for t in trials if t.control.kind == control and t.searches}

    written = ("false", "true", "{draws=7}")
    shared = set.intersection(*(ids(paths, "none") for paths in written))
    n_audits = len(parse(bundled("demo")).audits) - len(APART)
    assert len(ids("true", "none") - shared) == n_audits, "the headline of every audit"
    assert ids("false", "wrong_target") == ids("true", "wrong_target")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{scales=[]}", "at least 1 item"),
        ("{scales=[0.0]}", "greater than 0"),
        ("{draws=0}", "greater than or equal to 1"),
        ("{draw=3}", "did you mean 'draws'"),
        ("{top=0}", "greater than or equal to 1"),
    ],
)
def test_a_wrong_entry_is_named(written: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        parse(bundled("demo"), [f"paths={written}"])
