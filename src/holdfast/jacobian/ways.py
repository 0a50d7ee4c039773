"""How each row is kept where Φ = 0: decided by what the row is, whoever stands beside it.

Four ways, the first that a row allows. Where every slot with features to hold is perturbed, what a
correction leaves is taken away in the forward pass. Where J is small, it is kept. Where only the
rows of J for later tokens are few, perturbed slots are settled in the forward pass and those rows
are kept. Else solves are made of products with J.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from holdfast.constraints.feature_hold import FeatureHold
from holdfast.jacobian.feature_map import FeatureMap
from holdfast.jacobian.frame import Frame, few
from holdfast.jacobian.framed import Framed
from holdfast.jacobian.level import Level
from holdfast.jacobian.offsets import Offsets, Plain
from holdfast.jacobian.preconditioners import factorable, prepared, rank
from holdfast.jacobian.settled import Settled
from holdfast.per_row import set_by_owner
from holdfast.problem import TINY, Problem
from holdfast.subspace import FeasibleSet


@dataclass(frozen=True)
class Way:
    """allows: which rows [n] bool can go it; made: the set of rows that all go it, given the
    largest entry of Φ that counts as none."""

    allows: Callable[[Problem, FeatureMap], Tensor]
    made: Callable[[Problem, FeatureMap, float], FeasibleSet]


def level_set(problem: Problem, features: FeatureMap, tolerance: float) -> FeasibleSet:
    """Where no monitored feature moves by more than `tolerance`: every row kept there in its way.

    features: Φ of the problem. A row's way depends on nothing but the row, and on what all rows of
    a problem have in common.
    """
    allowed = torch.stack([way.allows(problem, features) for way in WAYS])
    owner = allowed.int().argmax(0)

    def made(index: int, rows: Tensor) -> FeasibleSet:
        whole = len(rows) == len(problem)
        own = (problem, features) if whole else (problem.rows(rows), features.rows(rows))
        return WAYS[index].made(*own, tolerance)

    return set_by_owner(owner, made)


def _settles(problem: Problem) -> bool:
    """Whether the forward pass can put every perturbed slot's features where they should be."""
    return Offsets.fit(problem) and len(problem.sites) > 1


def _nothing_later(problem: Problem, features: FeatureMap) -> Tensor:
    return ~features.elsewhere.flatten(1).any(1) & _settles(problem)


def _in_place(problem: Problem, features: FeatureMap, tolerance: float) -> FeasibleSet:
    hold = FeatureHold()
    return _level(features, tolerance, hold.feasible(hold.acting(problem)))


def _small(problem: Problem, features: FeatureMap) -> Tensor:
    return few(features)


def _framed(problem: Problem, features: FeatureMap, tolerance: float) -> FeasibleSet:
    fits = Offsets.fit(problem)
    coordinates = Offsets(features, problem.reference_norm) if fits else Plain(features)
    frame = Frame.origin(features)
    free = features.unknowns - _rank(frame)
    return Framed(coordinates, frame, problem.reference_norm, free, tolerance)


def _small_later(problem: Problem, features: FeatureMap) -> Tensor:
    later = torch.where(features.elsewhere, features.weight, 0.0)
    return few(replace(features, weight=later)) & _settles(problem)


def _settled(problem: Problem, features: FeatureMap, tolerance: float) -> FeasibleSet:
    coordinates = Settled.of(problem, features)
    frame = Frame.origin(coordinates.features)
    # At least: features may depend on each other.
    free = (features.unknowns - features.monitored.sum((1, 2))).clamp_min(0)
    return Framed(coordinates, frame, problem.reference_norm, free, tolerance)


def _any(problem: Problem, features: FeatureMap) -> Tensor:
    return torch.ones(len(problem), dtype=torch.bool, device=features.weight.device)


def _by_products(problem: Problem, features: FeatureMap, tolerance: float) -> FeasibleSet:
    return _level(features, tolerance)


WAYS = (
    Way(_nothing_later, _in_place), Way(_small, _framed), Way(_small_later, _settled),
    Way(_any, _by_products),
)  # fmt: skip
"""In the order in which they are tried."""


def _level(
    features: FeatureMap, tolerance: float, in_place: FeasibleSet | None = None
) -> FeasibleSet:
    """Rows with the preconditioner that each allows."""

    def made(index: int, rows: Tensor) -> FeasibleSet:
        own = features.rows(rows)
        near, free = prepared(own)
        placed = None if in_place is None else in_place.rows(rows)
        return Level(own, near, free, tolerance, placed)

    return set_by_owner(factorable(features).int(), made)


def _rank(frame: Frame) -> Tensor:
    """[n] of J itself, its rows as long as they are, a row's at a time in float64."""
    length = torch.where(frame.scale > 0, 1 / frame.scale.clamp_min(TINY), 0.0)
    rows = torch.arange(len(length), device=length.device).split(1)
    return torch.cat([rank(frame.J[own].double() * length[own, :, None]) for own in rows])
