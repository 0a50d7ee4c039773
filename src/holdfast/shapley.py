"""How a joint effect divides among those who made it: Shapley values, and what pairs add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from math import comb

from torch import Tensor

Coalition = frozenset[str]


def coalitions(players: Sequence[str]) -> Iterator[Coalition]:
    """Every set of players, from nobody to all of them."""
    for size in range(len(players) + 1):
        yield from map(frozenset, combinations(players, size))


def shapley(values: Mapping[Coalition, Tensor]) -> dict[str, Tensor]:
    """Player → [n] its mean contribution over all orders in which the players can join (Shapley
    1953). They sum to what all achieve less what nobody does.

    values: coalition → [n] what it achieves. Raises ValueError if a coalition is missing.
    """
    players = sorted(frozenset[str]().union(*values))
    missing = [c for c in coalitions(players) if c not in values]
    if missing or not players:
        wanted = sorted(missing[0]) if missing else "some player"
        raise ValueError(f"Shapley values need every coalition; {wanted} is missing")
    n = len(players)
    made = {}
    for player in players:
        others = [p for p in players if p != player]
        gains = [
            (values[c | {player}] - values[c]) / (n * comb(n - 1, len(c)))
            for c in coalitions(others)
        ]
        made[player] = sum(gains[1:], gains[0])
    return made


def interactions(values: Mapping[Coalition, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Pair of players → [n] what both achieve beyond what each does by itself,
    f(AB) − f(A) − f(B) + f(nobody): 0 where effects add, below where one does the other's work.

    values: coalition → [n] what it achieves. Raises ValueError if a coalition is missing.
    """
    players = sorted(frozenset[str]().union(*values))
    made = {}
    for a, b in combinations(players, 2):
        four = [frozenset({a, b}), frozenset({a}), frozenset({b}), frozenset[str]()]
        if missing := [sorted(c) for c in four if c not in values]:
            raise ValueError(f"interactions need every pair and player; {missing[0]} is missing")
        both, first, second, nobody = (values[c] for c in four)
        made[a, b] = both - first - second + nobody
    return made
