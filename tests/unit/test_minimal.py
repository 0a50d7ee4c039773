"""A minimal set is what is planted, and no more; pairs are scored as the double sum says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.batch import Batch
from holdfast.discovery import DISCOVERIES
from holdfast.discovery.attribution import Attribution
from holdfast.discovery.factorization import Factorization, Machine, fit_machine, largest
from holdfast.discovery.given import Given
from holdfast.discovery.minimal import Minimal, chosen, minimal, slots_of
from holdfast.edits import FeatureEdit
from holdfast.errors import FeatureError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch

SITE = Site(2)

# --- The greedy filter ----------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [(0,), (3, 7, 19), (0, 1, 2, 3), tuple(range(20))])
def test_the_planted_features_stay_and_no_other(planted: tuple[int, ...]) -> None:
    """METHODS Q 15: those whose loss is felt, whatever the order they are tried in."""

    def effect(places: tuple[int, ...]) -> float:
        return sum(1.0 if place in planted else 1e-3 for place in places)

    least = 0.05 * effect(tuple(range(20)))
    for order in (range(20), range(19, -1, -1), torch.randperm(20).tolist()):
        assert minimal(list(order), effect, least) == list(planted)


def test_of_two_that_do_the_same_one_stays() -> None:
    """Backups of each other: either alone is not missed, both are."""

    def effect(places: tuple[int, ...]) -> float:
        return 1.0 * bool({2, 5} & set(places)) + 1.0 * (9 in places)

    for seed in range(20):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed)).tolist()
        assert minimal(order, effect, 0.1) in ([2, 9], [5, 9])
    assert minimal([2, 9, 5], effect, 0.1) == [5, 9], "tried first, so it may go"


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.9))
def test_what_is_left_is_missed_and_costs_few_evaluations(sizes: list[float], least: float) -> None:
    calls = []

    def effect(places: tuple[int, ...]) -> float:
        calls.append(places)
        return sum(sizes[place] for place in places)

    kept = minimal(range(len(sizes)), effect, least)
    whole = effect(tuple(kept))
    for place in kept:
        rest = tuple(other for other in kept if other != place)
        assert not rest or whole - effect(rest) >= least - 1e-9
    assert len(calls) <= len(sizes) ** 2 + 4 * len(sizes) + 4


def test_each_return_is_compared_with_the_set_as_it_is_by_then() -> None:
    """METHODS L.2 goes feature by feature, so what is not felt one by one can add up to nearly all;
    what is felt stays whatever has left before."""

    def even(places: tuple[int, ...]) -> float:
        return float(len(places))

    assert len(minimal(range(40), even, 1.5)) == 1, "each is 1 of 40, and felt is 1.5"
    assert minimal(range(40), even, 1.0) == list(range(40)), "what is felt exactly stays"

    def strong(places: tuple[int, ...]) -> float:
        return even(places) + 10.0 * (7 in places)

    assert minimal(range(40), strong, 1.5) == [7]


def ablated(subject: Subject, batch: Batch, ids: Sequence[int]) -> float:
    only = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=tuple(ids)),), source="")
    edit = FeatureEdit(FeatureBank.of(subject.sae(SITE), only), "set_where_active", 0.0)
    return float(batch.margin(subject.read(batch, (edit,))).mean())


def test_on_a_model_every_feature_that_stays_is_missed(subject: Subject, batch: Batch) -> None:
    of = Attribution(n_features=12)
    all_of_it = of.find(subject, batch, {})
    everything = next(e for e in all_of_it.entries if e.site == str(SITE))
    given_ids = Given(features=(everything,))
    found = Minimal(of=given_ids, threshold=0.05).find(subject, batch, {})
    (entry,) = found.entries
    assert 0 < len(entry.ids) < len(everything.ids) and set(entry.ids) < set(everything.ids)
    score = dict(zip(everything.ids, everything.scores, strict=True))
    assert list(entry.scores) == [score[i] for i in entry.ids], "scores stay with their features"
    clean = float(batch.margin(subject.read(batch)).mean())
    felt = 0.05 * (clean - ablated(subject, batch, everything.ids))
    own = clean - ablated(subject, batch, entry.ids)
    for feature in entry.ids:
        rest = [i for i in entry.ids if i != feature]
        if rest:
            assert own - (clean - ablated(subject, batch, rest)) >= felt - 1e-5


def test_what_cannot_be_filtered_is_said(subject: Subject, batch: Batch) -> None:
    by_group = Attribution(n_features=3, group="name")
    with pytest.raises(FeatureError, match=r"fitted by group.*leave `group` out"):
        Minimal(of=by_group).find(subject, batch, {})
    against = Attribution().scores(subject, batch, subject.sae(SITE).full()).mean(0).argmin()
    clean = float(batch.margin(subject.read(batch)).mean())
    assert ablated(subject, batch, [int(against)]) > clean, "the fixture: without it more is there"
    silent = Given(features=(SiteFeatures(site=str(SITE), ids=(int(against),)),))
    with pytest.raises(FeatureError, match="does not lower the mean margin"):
        Minimal(of=silent).find(subject, batch, {})


# --- The factorization machine --------------------------------------------------------------------


def test_pairs_are_the_double_sum() -> None:
    """METHODS Q 15: the identity, against every pair written out."""
    n, m, rank = 6, 7, 3
    x, v = torch.randn(n, m, dtype=torch.float64), torch.randn(m, rank, dtype=torch.float64)
    w, bias = torch.randn(m, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    expected = bias + x @ w
    for i, j in itertools.combinations(range(m), 2):
        expected = expected + (v[i] @ v[j]) * x[:, i] * x[:, j]
    torch.testing.assert_close(Machine(bias, w, v).score(x), expected)
    by_hand = [
        abs(w[i]) + 0.5 * sum(abs(v[i] @ v[j]) for j in range(m) if j != i) for i in range(m)
    ]
    torch.testing.assert_close(Machine(bias, w, v).strengths(), torch.stack(by_hand))


def test_a_pair_that_says_something_only_together_is_found() -> None:
    """The label is the sign of x_2 · x_5: no single feature tells it, and a linear probe cannot."""
    x = torch.randn(400, 8)
    y = (x[:, 2] * x[:, 5] > 0).float()
    held = torch.arange(400) % 4 == 0
    machine, loss = fit_machine(x, y, held, rank=4, decay=0.01, seed=0)
    right = ((machine.score(x) > 0) == (y > 0))[held].float().mean()
    assert right > 0.9 and loss < 0.4
    assert set(machine.strengths().topk(2).indices.tolist()) == {2, 5}
    linear = Machine(machine.bias, machine.linear, torch.zeros_like(machine.factors))
    assert ((linear.score(x) > 0) == (y > 0))[held].float().mean() < 0.7


def test_fitting_stops_by_what_it_has_not_seen() -> None:
    """Labels that nothing tells: what is kept says no more than chance on the held-out rows."""
    x, held = torch.randn(60, 20), torch.arange(60) % 3 == 0
    y = (torch.arange(60) % 2).float()
    _, loss = fit_machine(x, y, held, rank=8, decay=0.0, seed=0)
    assert loss <= 0.6932


def test_activations_are_the_largest_of_a_prompts_tokens(subject: Subject, batch: Batch) -> None:
    found = FeatureSet(
        entries=(
            SiteFeatures(site="blocks.0.hook_resid_post", ids=(3, 8)),
            SiteFeatures(site=str(SITE), ids=(5,)),
        ),
        source="",
    )
    x = largest(subject, batch, found)
    alone = [largest(subject, batch.rows(torch.tensor([row])), found) for row in range(len(batch))]
    torch.testing.assert_close(x, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert x.shape == (len(batch), 3) and (x >= 0).all()


def test_a_study_can_ask_for_both(subject: Subject) -> None:
    fit, other = tiny_batch(subject, 24), tiny_batch(subject, 24, seed=9)
    of: dict[str, Any] = {"kind": "attribution", "n_features": 10}
    kind = DISCOVERIES.parse({"kind": "factorization", "of": of, "n_features": 4, "seeds": 2})
    assert isinstance(kind, Factorization) and isinstance(kind.of, Attribution)
    again = DISCOVERIES.parse(kind.model_dump(mode="json"))
    assert again == kind and kind.reads_whole
    found = kind.find(subject, fit, {"other": other})
    candidates = slots_of(kind.of.find(subject, fit, {}), "")
    picked = slots_of(found, "")
    assert len(picked) == 4 and {p[:2] for p in picked} <= {c[:2] for c in candidates}
    assert all(score > 0 for _, _, score in picked)
    assert found == kind.find(subject, fit, {"other": other}), "the same each time"
    with pytest.raises(FeatureError, match="24 and 0: it needs a behavior with neighbors"):
        kind.find(subject, fit, {})


def test_some_of_a_set_keep_their_order() -> None:
    entries = (
        SiteFeatures(site="blocks.0.hook_resid_post", ids=(7, 3, 9), scores=(3.0, 2.0, 1.0)),
        SiteFeatures(site=str(SITE), ids=(4,), scores=(5.0,)),
    )
    found = FeatureSet(entries=entries, source="a")
    part = chosen(found, [("blocks.0.hook_resid_post", 9), ("blocks.0.hook_resid_post", 7)], "b")
    assert part.source == "b" and len(part.entries) == 1
    assert part.entries[0].ids == (7, 9) and part.entries[0].scores == (3.0, 1.0)
