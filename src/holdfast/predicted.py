"""What gradients say that a vector should do, beside what it did when it was added.

Two predictions of every vector v in a recovery's place (METHODS F.4), in logits of the margin. By
the gradient where nothing is added, as in attribution patching: what it misses is curvature, and
rivals that get ahead on the way. And by the gradient along v's own straight way, which by the
fundamental theorem of calculus *is* the effect: it foretells nothing, and shows that gradients and
performed patches are of one function, wherever this is smooth. Where a clamp that reads what v
moved switches on the way, it is not; such ways are told apart (`switches.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.direct import Spot
from holdfast.measure import mean, median
from holdfast.replay import Replay
from holdfast.replays import EVERYBODY, NOBODY
from holdfast.switches import Switches
from holdfast.variants import Performed, Recovered

NODES, MORE = 4, 16
"""Points of a way at which the gradient is read, Gauss's: first few, and again more where nothing
switched and these do not add up to what the replay gives for both ends. (A vector that turns the
residual far bends a norm sharply. Where more do not help either, the record shows it.)"""

MISS = 0.005
"""Of the effect of the recovery's vector: what the few may be off by."""

CLOSE = 0.05
"""Of the effect of the recovery's vector: a prediction so near to what happened is close."""

ALL = "on the way to every vector a clamp switched"
"""Why a prompt has no way that is smooth."""


@dataclass(frozen=True)
class Foreseen:
    """What v vectors should do to n prompts, [v n] each: changes of the margin in logits, by the
    gradient at the beginning and along each way; switched: on the way a clamp found another feature
    on than at its beginning. reads: whether any clamp reads what the vectors move."""

    linear: Tensor
    along: Tensor
    switched: Tensor
    reads: bool


def foresee(found: Recovered, vectors: Mapping[str, Tensor]) -> Foreseen:
    """vectors: name → [n q d_model]."""
    problem, over = found.problem, found.case.subject.batching.over
    device, n = found.delta.device, len(found)
    everyone = torch.arange(n, device=device)
    begun = over("steps", everyone, lambda rows: _beginning(found, rows))
    gradient, whole = (torch.cat(column) for column in zip(*begun, strict=True))
    linear = torch.stack([(gradient * v.double()).sum((1, 2)) for v in vectors.values()])
    each = list(vectors.values())

    def follow(lanes: Tensor, nodes: int) -> _Way:
        which, rows = (lanes // n).tolist(), lanes % n
        delta = torch.stack([each[v][row] for v, row in zip(which, rows.tolist(), strict=True)])
        return _along(problem.replay.rows(rows), problem.batch.rows(rows), delta.float(), nodes)

    lanes = torch.arange(len(each) * n, device=device)
    ways = over("steps", lanes, lambda some: follow(some, NODES))
    along, ends, switched = (torch.cat(column) for column in zip(*ways, strict=True))
    missed = (along - ends).abs() > MISS * whole.abs()[lanes % n]
    again = lanes[missed & ~switched]
    for at, way in over("steps", again, lambda some: (some, follow(some, MORE))):
        along[at], switched[at] = way.change, way.switched
    return Foreseen(linear, along.view(-1, n), switched.view(-1, n), bool(_clamps(problem.replay)))


def _beginning(found: Recovered, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n q d_model] float64 the gradient of the margin where nothing is added, and [n] what the
    vectors found change of it."""
    replay, batch = found.problem.replay.rows(rows), found.problem.batch.rows(rows)
    nothing = torch.zeros_like(found.delta[rows])
    with torch.no_grad():
        begins = batch.readout.replayed(replay, nothing)
        ends = batch.readout.replayed(replay, found.delta[rows])
    change = (batch.margin(ends) - batch.margin(begins)).double()
    return _gradient(replay, batch, Spot.of(batch, begins), nothing), change


class _Way(NamedTuple):
    """[n] each: the change of the margin by the gradient along a way, the same by its two ends, and
    whether a clamp switched on it."""

    change: Tensor
    ends: Tensor
    switched: Tensor


def _along(replay: Replay, batch: Batch, delta: Tensor, nodes: int) -> _Way:
    """The way to delta [n q d_model].

    A margin is the lead over the strongest rival, and bends where another gets ahead. So the lead
    that is followed is the one over the rival that is strongest at the end, which is smooth; how
    far this rival is from the strongest at the beginning is known there.
    """
    switches = Switches(_clamps(replay))
    if replay.before:
        replay = replace(replay, before=(switches, *replay.before))
    else:
        replay = replace(replay, after=(switches, *replay.after))
    with torch.no_grad():
        with switches.a_pass():
            begins = batch.readout.replayed(replay, torch.zeros_like(delta))
        with switches.a_pass():
            ends = batch.readout.replayed(replay, delta)
    spot = Spot.of(batch, ends)
    change = (spot.lead(begins) - batch.margin(begins)).double()
    points, weights = np.polynomial.legendre.leggauss(nodes)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        with switches.a_pass():
            gradient = _gradient(replay, batch, spot, float(point) * delta)
        change = change + float(weight) * (gradient * delta.double()).sum((1, 2))
    moved = switches.moved
    return _Way(
        change,
        (batch.margin(ends) - batch.margin(begins)).double(),
        torch.zeros_like(change, dtype=torch.bool) if moved is None else moved.to(change.device),
    )


def _clamps(replay: Replay) -> tuple[Any, ...]:
    """The edits that read what is added."""
    return (*replay.before, *replay.after)


def _gradient(replay: Replay, batch: Batch, spot: Spot, delta: Tensor) -> Tensor:
    """[n q d_model] float64: of the spot's lead, with delta added."""
    leaf = delta.detach().requires_grad_(True)
    if batch.forced is None:
        pair = torch.stack([spot.target, spot.rival], 1)
        own = batch.readout.replayed(replay, leaf, pair)
        lead = own[:, 0] - own[:, 1]
    else:
        lead = spot.lead(batch.readout.replayed(replay, leaf))
    return torch.autograd.grad(lead.sum(), leaf)[0].double()


def agreement(predicted: Tensor, performed: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """[n] correlation, and [v n] absolute difference as a share of the whole vector's effect.

    predicted, performed [v n]: changes of the margin by v vectors, in logits; whole [n].
    """
    a, b = (x - x.mean(0) for x in (predicted, performed))
    size = (a.square().sum(0) * b.square().sum(0)).sqrt()
    correlation = torch.where(size > 0, (a * b).sum(0) / size.clamp_min(1e-30), torch.nan)
    return correlation, (predicted - performed).abs() / whole.abs()


def predicted_of(
    found: Recovered, vectors: Mapping[str, Tensor], by_name: Mapping[str, Performed],
    clusters: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """How predictions of vectors agree with what these did, prompt by prompt.

    correlation, error (the mean over vectors), close (a share of the vectors), regained: vector →
    its effect as it should be; of the ways on which a clamp switched their share, and the error of
    the others.
    """
    nobody = by_name[NOBODY].margin
    brought = by_name[EVERYBODY].margin - nobody
    performed = torch.stack([by_name[name].margin - nobody for name in vectors])
    foreseen = foresee(found, vectors)
    unit = "share of the margin brought back"
    record: dict[str, Any] = {"variants": list(vectors), "nodes": [NODES, MORE]}
    for kind, made in (("linear", foreseen.linear), ("along", foreseen.along)):
        correlation, error = agreement(made, performed, brought)
        reason = "the variants do not differ in what they are predicted to do, or in what they do"
        close = (error <= CLOSE).double().mean(0)
        smooth = error.masked_fill(foreseen.switched, torch.nan).nanmean(0)
        record[kind] = {
            "correlation": median(
                "correlation", "Pearson's r", correlation, clusters, reason
            ).plain,
            "error": median("error", unit, error.mean(0), clusters).plain,
            "error_unswitched": median("error", unit, smooth, clusters, ALL).plain,
            "close": mean("close", "share of vectors", close, clusters).plain,
            "regained": {
                name: median("predicted", unit, own / brought, clusters).plain
                for name, own in zip(vectors, made, strict=True)
            },
        }
    share = foreseen.switched.double().mean(0)
    switched = mean("switched", "share of ways", share, clusters).plain
    record["switched"] = switched if foreseen.reads else None
    return record
