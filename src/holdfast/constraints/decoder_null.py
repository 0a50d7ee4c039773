"""Neither move the clamped features nor use the directions they write."""

from __future__ import annotations

from typing import Literal

import torch

from holdfast.constraints.in_place import HoldingKind
from holdfast.problem import Problem
from holdfast.sites import Site
from holdfast.subspace import NullSpace


class DecoderNull(HoldingKind):
    """Orthogonal to the held features' encoder columns and to their decoder rows (METHODS C.5).

    A clamp writes along decoder rows, and encoder orthogonality alone lets a perturbation write
    there as well, which can take the clamp's effect back without moving a feature.
    """

    kind: Literal["decoder_null"] = "decoder_null"

    def space(self, problem: Problem, site: Site) -> NullSpace:
        held = problem.held[site]
        columns = torch.cat([held.W_enc, held.W_dec.mT], 2)
        valid = torch.cat([held.valid, held.valid], 1)
        return NullSpace.of(columns, valid, held.slices(problem.replay.frame))
