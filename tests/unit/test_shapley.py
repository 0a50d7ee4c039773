"""Shapley values against every order in which the players can join."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from holdfast.shapley import Coalition, coalitions, interactions, shapley

PLAYERS = ("a", "b", "c", "d")


def game(n: int = 5) -> dict[Coalition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        c: torch.randn(n, generator=generator, dtype=torch.float64) for c in coalitions(PLAYERS)
    }


def test_it_is_the_mean_over_all_orders() -> None:
    worth = game()
    found = shapley(worth)
    for player in PLAYERS:
        gains = []
        for order in permutations(PLAYERS):
            before = frozenset(order[: order.index(player)])
            gains.append(worth[before | {player}] - worth[before])
        torch.testing.assert_close(found[player], torch.stack(gains).mean(0))


def test_values_sum_to_what_all_achieve() -> None:
    worth = game()
    total = torch.stack(list(shapley(worth).values())).sum(0)
    torch.testing.assert_close(total, worth[frozenset(PLAYERS)] - worth[frozenset()])


def test_who_changes_nothing_gets_nothing_and_twins_get_the_same() -> None:
    worth = {c: torch.tensor([float("a" in c or "b" in c)]) for c in coalitions(("a", "b", "z"))}
    found = shapley(worth)
    assert found["z"].item() == 0
    assert found["a"].item() == pytest.approx(0.5) == found["b"].item()


def test_a_missing_coalition_is_named() -> None:
    worth = game()
    del worth[frozenset({"a", "c"})]
    with pytest.raises(ValueError, match=r"\['a', 'c'\] is missing"):
        shapley(worth)
    with pytest.raises(ValueError, match="some player"):
        shapley({frozenset(): torch.zeros(1)})


def test_effects_that_add_do_not_interact_and_a_product_does() -> None:
    own = {player: torch.randn(4).double() for player in PLAYERS}
    nothing = torch.randn(4).double()

    def sums(c: Coalition) -> Tensor:
        return nothing + sum((own[player] for player in c), torch.zeros(4).double())

    added = interactions({c: sums(c) for c in coalitions(PLAYERS)})
    assert set(added) == {(a, b) for a in PLAYERS for b in PLAYERS if a < b}
    for values in added.values():
        torch.testing.assert_close(values, torch.zeros(4).double())
    made = interactions({c: sums(c) + 3.0 * ({"a", "c"} <= c) for c in coalitions(PLAYERS)})
    for pair, values in made.items():
        beyond = torch.full((4,), 3.0 if pair == ("a", "c") else 0.0).double()
        torch.testing.assert_close(values, beyond)


def test_who_does_the_others_work_interacts_below_zero() -> None:
    worth = {c: torch.tensor([float(bool(c))]) for c in coalitions(("a", "b"))}
    assert interactions(worth)["a", "b"].item() == -1
    del worth[frozenset({"b"})]
    with pytest.raises(ValueError, match=r"\['b'\] is missing"):
        interactions(worth)
