"""Recovered prompts of tiny subjects, after a whole search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from holdfast.attacks.residual import pose
from holdfast.batch import Batch
from holdfast.bounded import Bounded, Components
from holdfast.controls.none import NoControl
from holdfast.edits import Edit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.interventions.clamp import Clamp
from holdfast.parts import Split, take_apart
from holdfast.recovery import RecoverySpec, recover
from holdfast.setting import Setting
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.variants import Recovered


def features_at(sites: Sequence[Site], ids: tuple[int, ...] = (1, 5, 9, 30)) -> FeatureSet:
    return FeatureSet(
        entries=tuple(SiteFeatures(site=str(s), ids=ids, median_active=1.0) for s in sites),
        source="test",
    )


def set_up(
    subject: Subject, batch: Batch, features: FeatureSet, edits: tuple[Edit, ...], gain: float = 1.0
) -> Setting:
    """A setting that asks for `gain` logits above zero where the edits leave less than zero: every
    prompt is read for an answer that is not given under them."""
    given = batch.margin(subject.read(batch, edits)) > 0
    targets = torch.where(given, batch.rivals[:, 0], batch.targets)
    rivals = batch.rivals.clone()
    rivals[given, 0] = batch.targets[given]
    batch = batch.aimed(targets, rivals)
    clamped = batch.margin(subject.read(batch, edits))
    assert (clamped < 0).all()
    return Setting(
        subject=subject, features=features, intervention=Clamp(mode="set", value=1.0), edits=edits,
        sizes={}, test=batch, clean_margin=torch.full_like(clamped, gain),
        suppressed_margin=clamped, suppressed_answer=batch.targets, neighbors={},
    )  # fmt: skip


def search(setting: Setting, constraint: str = "encoder_null", **fields: Any) -> Recovered:
    """Search, and keep the prompts whose margin became positive."""
    fields = {"budget": {"relative": 1.0}, "steps": 25, "doublings": 1} | fields
    spec = RecoverySpec.model_validate({"constraint": {"kind": constraint}} | fields)

    def no_twin() -> Setting:
        raise AssertionError

    case = NoControl().case(setting, no_twin)
    problem = pose(spec, case)
    found = recover(problem, spec, seed=0)
    n, q, _ = found.delta.shape
    p = q // len(problem.sites)
    columns = problem.replay.columns
    there = problem.replay.frame.positions.gather(1, columns.clamp(min=0))
    positions = torch.where(columns >= 0, there, -1)
    assert positions.shape == (n, p)
    rows = (found.margin > 0).nonzero().flatten()
    return Recovered.of(setting, case, problem, spec, found.delta, positions, rows)


def split(found: Recovered, n_top: int) -> Split:
    """The exact split alone."""
    return take_apart(found, None, n_top, atoms=1, seed=0)[0]


def bounded(
    found: Recovered, components: Components | None, atoms: int, seed: int
) -> dict[str, Bounded]:
    """The splits into subspaces alone."""
    return take_apart(found, components, 1, atoms, seed)[1]
