"""Whether the behavior is back, in the behavior's own terms, with the saved perturbation on.

For what is read from logits the verified margin says it. Text is generated anew, freely, under the
cache, with clamp and perturbation on at their absolute positions, and judged like clean and clamped
text; the published code lost its answer perturbations there (METHODS D.9-1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.behaviors.observation import Observation
from holdfast.controls import Case
from holdfast.edits import Perturbation
from holdfast.problem import Problem
from holdfast.setting import Setting
from holdfast.verify import Checks, verify


@dataclass(frozen=True)
class Regained:
    """n audited prompts. recovered [n] bool; drift [n]: largest preactivation drift of held
    features at tokens of the generated text that carry no perturbation, against a pass over the
    same tokens without it; NaN where nothing was generated. seen: the judged replies, if any."""

    recovered: Tensor
    drift: Tensor
    seen: Observation | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        return self.seen.labels if self.seen is not None else ()

    def label(self, row: int) -> str:
        return self.labels[row] if self.seen is not None else ""

    def sha256(self, row: int) -> str:
        """The hash of a reply, which is all that is stored of it."""
        return self.seen.replies[row].sha256 if self.seen is not None else ""


def regain(
    setting: Setting,
    case: Case,
    problem: Problem,
    perturbation: Perturbation,
    checks: Checks,
    clamp_first: bool,
) -> Regained:
    """Read the recovered state as the behavior reads every other."""
    nothing = torch.full_like(checks.margin, torch.nan)
    if setting.observed is None or setting.behavior is None:
        return Regained(checks.recovered, nothing)
    edits = (*case.edits, perturbation) if clamp_first else (perturbation, *case.edits)
    references = setting.observed.replies
    seen = setting.behavior.observe(case.subject, case.batch, edits, references)
    prompts = case.batch.unforced()
    # The last token of a forced answer is read and not run: one more makes all of the text run.
    text = prompts.forcing([[*tokens, tokens[-1]] for tokens in seen.tokens])
    scale = {site: case.features.median_active(site) for site in problem.held}
    along = verify(
        case.subject, text, case.edits, perturbation.within(text), problem.held, scale, clamp_first
    )
    # Whether an answer was forced is read from its own tokens; whether the behavior is back, from
    # what the judge says.
    back = seen.shows if case.own else checks.margin > 0
    return Regained(back & (checks.overtaken == 0), along.preactivation_drift_elsewhere, seen)
