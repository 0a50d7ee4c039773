"""Hold everything that the SAE sees: the clamped features and every other feature that is on."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.constraints import Promise
from holdfast.constraints.in_place import HoldingKind
from holdfast.problem import Problem
from holdfast.saes.pieces import encoded
from holdfast.sites import Site
from holdfast.spans import Spans
from holdfast.subspace import NullSpace, NullSpacePerSlot

NEAR = 1e-5
"""A feature so near to its limit, in units of ‖a_i‖·‖h‖, counts as on: rounding decides there."""


class ActiveNull(HoldingKind):
    """`a_i·δ = 0` for the clamped features and for every feature of the SAE that fires in the
    reference, token by token (METHODS C.5 d).

    Under `encoder_null` a perturbation may say what it has to say through other features of the
    SAE, which a monitor of the whole SAE would see. Here every code that was there stays, so that
    what comes back comes back unseen by the SAE, but for features that were off: these may come on,
    and how many did is counted for every prompt (`others.py`).

    The sets differ from prompt to prompt and from token to token. Where the active features span
    the residual nothing is left, and such a prompt is `infeasible`.
    """

    kind: Literal["active_null"] = "active_null"

    @property
    def promise(self) -> Promise:
        return "active"

    def space(self, problem: Problem, site: Site) -> NullSpacePerSlot:
        h, there = problem.replay.reference[site], problem.replay.columns >= 0
        n, p, d = h.shape
        bank = problem.held[site]
        groups = bank.slices(problem.replay.frame).repeat_interleave(p).tolist()
        columns = [[bank.W_enc[group][:, bank.valid[group]]] for group in groups]
        x = h.reshape(n * p, d).double()
        length = x.norm(dim=-1, keepdim=True)
        for piece in encoded(problem.replay.subject.sae(site), x):
            near = NEAR * length * piece.own.W_enc.double().norm(dim=0)
            on = (piece.p > piece.limit - near) & there.reshape(-1, 1)
            for slot in on.any(1).nonzero().flatten().tolist():
                columns[slot].append(piece.own.W_enc[:, on[slot]])
        spans = Spans.of([torch.cat(own, 1) for own in columns])
        slots = torch.arange(n * p, device=h.device)
        return NullSpacePerSlot(NullSpace(spans, slots), there)
