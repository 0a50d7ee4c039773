"""Variants of a recovery: other vectors added in its place, measured as the recovery itself was.

A baseline is a variant and a part of the vector found is one, so that what either does can be set
beside what the recovery did, prompt by prompt. Only recovered prompts have variants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from holdfast.config import LATER, Config
from holdfast.controls import Case
from holdfast.edits import CaptureAt, Edit, Perturbation, in_order
from holdfast.problem import Problem
from holdfast.recovery import RecoverySpec
from holdfast.setting import Setting
from holdfast.sites import Site
from holdfast.subspace import norms
from holdfast.verify import effects

NOTHING = 1e-4
"""A vector below this share of the recovery's norm has no direction worth scaling up."""


class PathSpec(Config):
    """What is added in a recovery's place to see what of it matters.

    scales: norms of the baselines, as multiples of the recovery's; draws: random directions for
    each prompt; margin_draws: random directions more, run for their
    margins alone where these are the behavior; top: how many of the features that change most make
    a part of their own; groups: into how many groups of neighboring positions the perturbed ones
    are put, where there are several. part_scales: norms that the parts of a recovery are brought
    to, as multiples of its own; atoms: most decoder rows of a sparse code of the vector; principal:
    dimensions of the subspace in which clean residuals vary most. likes: beside the parts, those
    found for other prompts and random vectors of the same subspaces; routes: with later attention
    and MLPs kept as they were; heads: direct attribution, head by head; orders: vectors lent
    between orders of a question's choices (`generality.py`); openly: the questions asked once more
    without their choices (`openly.py`). every: for every constraint of the
    audit, not for the one its verdict is read from.
    """

    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 2.0, 4.0), min_length=1)
    draws: int = Field(2, ge=1)
    margin_draws: Annotated[int, LATER] = Field(100, ge=1)
    top: int = Field(10, ge=1)
    groups: int = Field(4, ge=1)
    part_scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], LATER] = Field(
        (1.0,), min_length=1
    )
    atoms: Annotated[int, LATER] = Field(32, ge=1)
    principal: Annotated[int, LATER] = Field(16, ge=1)
    likes: Annotated[bool, LATER] = True
    routes: Annotated[bool, LATER] = True
    heads: Annotated[bool, LATER] = True
    orders: Annotated[bool, LATER] = False
    openly: Annotated[bool, LATER] = False
    every: bool = False


@dataclass(frozen=True)
class Recovered:
    """n recovered prompts, and what brought the behavior back.

    case, problem: of these prompts alone; delta [n q d_model]: the vectors found, all positions of
    the first site, then of the next; positions [n p] absolute, -1 for none.
    """

    setting: Setting
    case: Case
    problem: Problem
    spec: RecoverySpec
    delta: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls,
        setting: Setting,
        case: Case,
        problem: Problem,
        spec: RecoverySpec,
        delta: Tensor,
        positions: Tensor,
        rows: Tensor,
    ) -> Recovered:
        """The prompts `rows` of a trial's own."""
        own = replace(
            case, rows=case.rows[rows], batch=case.batch.rows(rows),
            clean_margin=case.clean_margin[rows],
        )  # fmt: skip
        return cls(setting, own, problem.rows(rows), spec, delta[rows], positions[rows])

    def __len__(self) -> int:
        return len(self.delta)

    @property
    def clamp_first(self) -> bool:
        return self.spec.order == "clamp_then_perturbation"

    @property
    def length(self) -> Tensor:
        """[n] Frobenius norm of the vectors found."""
        return norms(self.delta).flatten()

    @property
    def slots(self) -> Tensor:
        """[n q 1]: 1 where a slot exists, else 0."""
        return self.problem.perturbed[..., None].to(self.delta.dtype)

    def edits(self, perturbation: Edit) -> tuple[Edit, ...]:
        """Clamp and perturbation in the trial's order."""
        return in_order(self.case.edits, perturbation, self.clamp_first)

    def perturbation(self, delta: Tensor) -> Perturbation:
        """Vectors [n q d_model] as an edit."""
        return Perturbation(
            self.case.batch.ids, self.positions, self.problem.replay.parts(delta.float())
        )

    def entered(self) -> dict[Site, Tensor]:
        """Site → [n p d_model] float32: the residual that the vectors found are added to, with
        those at earlier sites on."""
        ids = self.case.batch.ids
        reads = [CaptureAt(site, ids, self.positions) for site in self.problem.sites]
        push = self.perturbation(self.delta)
        own = self.case.edits
        first, last = (own, ()) if self.clamp_first else ((), own)
        edits: tuple[Edit, ...] = (*first, *reads, push, *last)
        self.case.subject.outputs(self.case.batch, edits)
        return {read.site: read.read for read in reads}

    def scaled(self, delta: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Vectors [n q d_model] brought to `scale` times the recovery's norm, and the rows [n] that
        have a direction; the others come back as zeros."""
        length = norms(delta)
        own = self.length[:, None, None].to(delta.dtype)
        there = length > NOTHING * own
        return torch.where(there, delta * (scale * own / length), 0.0), there.flatten()


@dataclass(frozen=True)
class Variant:
    """Vectors [n q d_model] in a recovery's place, one set a draw; there [n]: prompts it exists
    for, `reason`: why not for the others."""

    name: str
    draws: tuple[Tensor, ...]
    there: Tensor
    reason: str = ""

    @classmethod
    def whole(cls, name: str, delta: Tensor) -> Variant:
        """One that exists for every prompt."""
        there = torch.ones(len(delta), dtype=torch.bool, device=delta.device)
        return cls(name, (delta,), there)


@dataclass(frozen=True)
class Performed:
    """What a variant did to n prompts, meaned over its draws; NaN where it does not exist.

    margin in logits; back: share of draws that brought the behavior back; norm: relative to the
    recovery's; drift_relative, preactivation_drift: of the held features, the largest draw.
    """

    name: str
    n_draws: int
    reason: str
    margin: Tensor
    back: Tensor
    norm: Tensor
    drift_relative: Tensor
    preactivation_drift: Tensor


def perform(found: Recovered, variants: Sequence[Variant]) -> list[Performed]:
    """Run every variant in full forward passes; text is generated freely and judged."""
    case = found.case
    deltas = [delta for variant in variants for delta in variant.draws]
    scale = {site: case.features.median_active(site) for site in found.problem.held}
    made = zip(
        effects(
            case.subject, case.batch, case.edits, map(found.perturbation, deltas),
            found.problem.held, scale, found.clamp_first,
        ),
        _shown(found, deltas),
        strict=True,
    )  # fmt: skip
    performed = []
    for variant in variants:
        own = [next(made) for _ in variant.draws]
        nan = torch.full_like(own[0][0].margin, torch.nan)

        def over(values: list[Tensor], largest: bool, there: Tensor, nan: Tensor = nan) -> Tensor:
            stacked = torch.stack([value.double() for value in values])
            return torch.where(there, stacked.amax(0) if largest else stacked.mean(0), nan)

        there = variant.there
        back = [
            (effect.margin > 0 if shown is None else shown) & (effect.overtaken == 0)
            for effect, shown in own
        ]
        performed.append(
            Performed(
                name=variant.name,
                n_draws=len(own),
                reason=variant.reason,
                margin=over([e.margin for e, _ in own], False, there),
                back=over(back, False, there),
                norm=over([e.norm for e, _ in own], False, there) / found.length.double(),
                drift_relative=over([e.drift_relative for e, _ in own], True, there),
                preactivation_drift=over([e.preactivation_drift for e, _ in own], True, there),
            )
        )
    return performed


def _shown(found: Recovered, deltas: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """[n] bool for each: the behavior is there in generated text; None where margins say it."""
    setting, case = found.setting, found.case
    for delta in deltas:
        if setting.observed is None or setting.behavior is None or not case.own:
            yield None
        else:
            edits = found.edits(found.perturbation(delta))
            references = setting.observed.replies
            yield setting.behavior.observe(case.subject, case.batch, edits, references).shows
