"""Vectors lent between prompts: from whom, at what norm, and that they hold what theirs held."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.edits import FeatureEdit
from holdfast.generality import MEANINGS, between_orders, lent
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subspace import norms
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.variants import Recovered
from tests.unit.recovered import features_at, search, set_up

SITE = Site(2)


@pytest.fixture(scope="module")
def found() -> Recovered:
    """Recovered prompts that stand for orders of two questions."""
    subject, features = tiny_subject(), features_at((SITE,))
    clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "set", 2.0)
    made = search(set_up(subject, tiny_batch(subject, 10), features, (clamp,)))
    assert len(made) >= 6
    return asked(made, "ababababab", "xxyyxxyyxx")


def asked(found: Recovered, clusters: str, letters: str) -> Recovered:
    """The same prompts as orders of these questions, with these right letters."""
    batch, n = found.case.batch, len(found)
    targets = torch.tensor([ord(letter) - ord("a") for letter in letters[:n]])
    named = replace(batch, clusters=tuple(clusters[:n]), targets=targets)
    return replace(found, case=replace(found.case, batch=named))


def test_who_lends_to_whom(found: Recovered) -> None:
    batch = found.case.batch
    given = lent(found)
    assert list(given) == list(MEANINGS)
    for name, (delta, there) in given.items():
        for row in range(len(found)):
            others = [o for o in range(len(found)) if o != row]
            siblings = [o for o in others if batch.clusters[o] == batch.clusters[row]]
            alike = [o for o in others if batch.targets[o] == batch.targets[row]]
            same = [o for o in siblings if o in alike]
            strangers = [o for o in alike if o not in siblings]
            allowed = {
                "same_letter": same, "other_letter": [o for o in siblings if o not in same],
                "shared": siblings, "other_question": strangers,
            }[name]  # fmt: skip
            assert bool(there[row]) == bool(allowed)
            if not allowed:
                assert not delta[row].any()
            elif name == "shared":
                torch.testing.assert_close(delta[row], found.delta[allowed].mean(0))
            else:
                assert any(torch.equal(delta[row], found.delta[o]) for o in allowed)


def test_it_does_not_hang_on_the_order_of_the_prompts(found: Recovered) -> None:
    back = torch.arange(len(found) - 1, -1, -1)
    batch = found.case.batch.rows(back)
    turned = replace(
        found, case=replace(found.case, batch=batch), delta=found.delta[back],
        problem=found.problem.rows(back), positions=found.positions[back],
    )  # fmt: skip
    for name, (delta, there) in lent(found).items():
        again, also = lent(turned)[name]
        assert torch.equal(also, there[back])
        torch.testing.assert_close(again, delta[back])


def test_a_lent_vector_keeps_the_features_and_has_the_norm_asked_for(found: Recovered) -> None:
    rows = between_orders(found, (1.0, 2.0))
    assert [(r["name"], r["scale"]) for r in rows] == [(m, s) for m in MEANINGS for s in (1.0, 2.0)]
    given = lent(found)
    for row in rows:
        assert row["back"]["n"] == int(given[row["name"]][1].sum())
        assert row["preactivation_drift_max"] < 1e-5, "the same features are held everywhere"
    scaled, _ = found.scaled(given["shared"][0], 2.0)
    torch.testing.assert_close(norms(scaled).flatten(), 2 * found.length, rtol=1e-4, atol=0)
    # Where all vectors are one, so is their mean, for every order.
    first = replace(found, delta=found.delta[:1].expand_as(found.delta).clone())
    delta, there = lent(asked(first, "a" * 10, "x" * 10))["shared"]
    torch.testing.assert_close(delta, first.delta)
    assert there.all()


def test_nobody_to_take_it_from_is_said(found: Recovered) -> None:
    alone = asked(found, "abcdefghij", "abcdefghij")
    for row in between_orders(alone, (1.0,)):
        assert row["back"]["estimate"] is None and "no recovered prompt" in row["back"]["reason"]
    nothing = torch.zeros(0, dtype=torch.long)
    empty = replace(found, delta=found.delta[nothing])
    assert between_orders(empty, (1.0,)) == []
