"""What takes the clamp back, alone and left out: as full passes have it, and where it is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast.batching import Batching
from holdfast.edits import FeatureEdit
from holdfast.replays import of_undo
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.undone import ARMS, COLUMNS, FORCED, LEADS, NOBODY, STILL, WHOLE, Undone
from holdfast.variants import Recovered, perform
from holdfast.verify import margin_in_order
from tests.unit.recovered import features_at, search, set_up

SITE = Site(2)
FEATURES = features_at((SITE,))


def clamped(subject: Subject) -> FeatureEdit:
    return FeatureEdit(FeatureBank.of(subject.sae(SITE), FEATURES), "set", 2.0, "last_prompt")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject()


@pytest.fixture(scope="module")
def found(subject: Subject) -> Recovered:
    return search(set_up(subject, tiny_batch(subject, 6), FEATURES, (clamped(subject),)))


def verified(found: Recovered) -> Tensor:
    """[n] the vectors' margins, in full passes."""
    case = found.case
    push = found.perturbation(found.delta)
    return margin_in_order(case.subject, case.batch, case.edits, push, found.clamp_first)


def undone(found: Recovered) -> Undone:
    return Undone.of(found, torch.arange(len(found)), verified(found))


def figures(undone: Undone) -> dict[str, float | None]:
    return {m.name: m.estimate for m in undone.measurements}


def test_replayed_margins_are_those_of_full_passes(found: Recovered) -> None:
    made = undone(found)
    assert len(found) >= 4 and set(made.margins) == {WHOLE, *ARMS}
    full = {p.name: p.margin for p in perform(found, of_undo(found))}
    for arm, name in ARMS.items():
        torch.testing.assert_close(made.margins[arm], full[name], atol=1e-4, rtol=0)
    values = torch.stack(list(made.margins.values()))
    apart = (values[:, None] - values[None]).abs().amax(2) + 10 * torch.eye(len(values))
    assert apart.min() > 1e-2, "no two of them are one vector, so that none can pass for another"


def test_several_layers_and_a_clamp_with_the_last_word() -> None:
    sites = (Site(1), Site(2))
    subject = tiny_subject(sites=sites)
    features = features_at(sites, (3, 7, 20))
    edits = tuple(FeatureEdit(FeatureBank.of(subject.sae(s), features), "set", 0.5) for s in sites)
    setting = set_up(subject, tiny_batch(subject, 5), features, edits)
    own = search(
        setting, "unconstrained", perturb={"positions": "prompt"}, steps=15,
        order="perturbation_then_clamp",
    )  # fmt: skip
    made = undone(own)
    full = {p.name: p.margin for p in perform(own, of_undo(own))}
    for arm, name in ARMS.items():
        torch.testing.assert_close(made.margins[arm], full[name], atol=1e-4, rtol=0)


def test_a_vector_that_is_the_clamp_undone_is_all_in_its_part(found: Recovered) -> None:
    """Then the part alone gives the untouched model back, and without it the clamp is all there
    is."""
    replay, setting = found.problem.replay, found.setting
    back = replay.unclamped[SITE] - replay.reference[SITE]
    made = undone(replace(found, delta=back))
    batch = found.case.batch
    clean = batch.margin(setting.subject.read(batch)).double()
    under = batch.margin(setting.subject.read(batch, found.case.edits)).double()
    assert (clean - under).abs().max() > 0.1
    for name in ("clamp", "rows"):
        torch.testing.assert_close(made.margins[f"{name}.alone"], clean, atol=1e-4, rtol=0)
        torch.testing.assert_close(made.margins[f"{name}.rest"], under, atol=1e-4, rtol=0)
    torch.testing.assert_close(made.margins[WHOLE], clean, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("constraint", "arm"), [("undo_null", "clamp"), ("decoder_null", "rows")])
def test_where_it_is_forbidden_the_rest_does_everything(
    subject: Subject, constraint: str, arm: str
) -> None:
    setting = set_up(subject, tiny_batch(subject, 6), FEATURES, (clamped(subject),))
    own = search(setting, constraint)
    made = undone(own)
    assert len(own) >= 3
    seen = figures(made)
    assert (seen[f"undo.{arm}.alone.rate"], seen[f"undo.{arm}.rest.rate"]) == (0, 1)
    torch.testing.assert_close(made.margins[f"{arm}.rest"], made.margins[WHOLE], atol=1e-4, rtol=0)


def test_figures_are_shares_and_medians_of_the_recovered(found: Recovered) -> None:
    made = undone(found)
    told = {m.name: m for m in made.measurements}
    for name, values in made.margins.items():
        assert told[f"undo.{name}.rate"].estimate == float((values > 0).double().mean())
        median = told[f"undo.{name}.margin"]
        assert median.unit == "logits" and median.n == len(found)
        assert median.estimate == pytest.approx(values.quantile(0.5).item())
    assert made.record == {"n": len(found), "read": LEADS, "reason": ""}


def test_prompts_keep_their_places(found: Recovered) -> None:
    rows = torch.arange(len(found)) * 2 + 1
    laid = Undone.of(found, rows, verified(found)).columns(2 * len(found) + 1)
    assert tuple(laid) == COLUMNS
    for name, values in laid.items():
        own = undone(found).margins[name.removeprefix("undo.")]
        assert torch.equal(values[rows], own) and bool(values[::2].isnan().all())


def test_where_the_clamp_moved_nothing_there_is_nothing_to_take_back(subject: Subject) -> None:
    features = FEATURES
    idle = FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "add", 0.0, "last_prompt")
    own = search(set_up(subject, tiny_batch(subject, 4), features, (idle,)))
    told = {m.name: m for m in undone(own).measurements}
    for name in ("undo.clamp.alone.rate", "undo.clamp.rest.margin"):
        assert (told[name].estimate, told[name].n, told[name].reason) == (None, 0, STILL)
    assert told["undo.rows.rest.rate"].n == len(own) >= 2, "the rows are there all the same"


def test_nothing_recovered_is_said(found: Recovered) -> None:
    none = torch.zeros(0, dtype=torch.long)
    nobody = Recovered.of(
        found.setting, found.case, found.problem, found.spec, found.delta, found.positions, none
    )
    made = Undone.of(nobody, none, torch.zeros(0))
    assert made.record == {"n": 0, "read": LEADS, "reason": NOBODY}
    for measurement in made.measurements:
        assert (measurement.estimate, measurement.n, measurement.reason) == (None, 0, NOBODY)
    assert all(bool(v.isnan().all()) and len(v) == 3 for v in made.columns(3).values())


def test_pieces_change_nothing(found: Recovered) -> None:
    case = replace(found.case, subject=replace(found.case.subject, batching=Batching(3)))
    for name, values in undone(replace(found, case=case)).margins.items():
        torch.testing.assert_close(values, undone(found).margins[name], atol=1e-5, rtol=0)


def test_a_forced_answer_is_read_at_its_own_tokens(subject: Subject) -> None:
    """Text is judged elsewhere, and the record says so."""
    batch = tiny_batch(subject, 4)
    forced = batch.forcing([[3, 5], [7, 2], [4, 4], [9, 1]])
    setting = set_up(subject, forced, FEATURES, (clamped(subject),), gain=0.01)
    own = search(setting, "unconstrained", perturb={"positions": "prompt"})
    made = undone(own)
    assert len(own) >= 2 and made.record["read"] == FORCED
    full = {p.name: p.margin for p in perform(own, of_undo(own))}
    for arm, name in ARMS.items():
        torch.testing.assert_close(made.margins[arm], full[name], atol=1e-4, rtol=0)
