"""Features that are on stay exactly where they are; features that are off only have to stay off."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.constraints import Promise
from holdfast.constraints.in_place import HoldingKind
from holdfast.polyhedron import Polyhedron
from holdfast.problem import Problem
from holdfast.sites import Site

MARGIN = 1e-6
"""Kept below a threshold, in units of ‖a_i‖·‖h‖: rounding must not switch a feature on."""


class OneSided(HoldingKind):
    """`a_i·δ = 0` for held features that fire, `p_i ≤ threshold_i` for those that do not (METHODS
    C.5).

    The codes are held exactly, and the set is larger than `encoder_null`'s. Later layers read the
    residual and not the codes, though, and after a clamp to a negative value there is much room
    below the threshold: a perturbation may take the clamp back up to there. Read it beside
    `undo_null`.
    """

    kind: Literal["one_sided"] = "one_sided"

    @property
    def promise(self) -> Promise:
        return "codes"

    def space(self, problem: Problem, site: Site) -> Polyhedron:
        bank, frame = problem.held[site], problem.replay.frame
        h = problem.replay.reference[site].double()
        p, z = bank.preactivations(h, frame), bank.activations(h, frame)
        rows = bank.slices(frame)
        valid = bank.valid[rows][:, None].expand_as(p)
        scale = bank.W_enc.double().norm(dim=1)[rows][:, None] * h.norm(dim=-1, keepdim=True)
        room = bank.limits(h, frame) - p
        # A gate that is open on a magnitude of 0 is off as well, but at no threshold.
        off = valid & (z == 0) & (room >= 0)
        return Polyhedron(
            A=bank.W_enc,
            slice_of=rows,
            equal=valid & ~off,
            bounded=off,
            sign=torch.ones_like(p),
            bound=torch.where(off, (room - MARGIN * scale).clamp_min(0), 0.0),
        )
