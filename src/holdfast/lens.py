"""The logit lens: what a vector writes for the answer itself, at the token that is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from holdfast.direct import Spot, unreadable
from holdfast.edits import CaptureAt
from holdfast.frozen import Frozen
from holdfast.measure import mean
from holdfast.replays import EVERYBODY
from holdfast.sites import Site
from holdfast.variants import Recovered


@dataclass(frozen=True)
class Lens:
    """The logit lens: what a vector at the token that is read does to a lead by itself, the final
    norm's scale as it is under the intervention. at [n q]: which slots are read."""

    frozen: Frozen
    toward: Tensor
    at: Tensor

    @classmethod
    def of(cls, found: Recovered) -> Lens:
        """For the rival that is strongest under the intervention. Needs logits (`unreadable`)."""
        case, subject, batch = found.case, found.case.subject, found.case.batch
        # Which of the tokens that are read counts is not known before the pass.
        tokens = batch.positions[:, -batch.n_read :]
        last = CaptureAt(Site(subject.n_blocks), batch.ids, tokens)
        spot = Spot.of(batch, subject.read(batch, (*case.edits, last)))
        read, final = spot.cut(batch.positions), spot.cut(last.read)
        norm = subject.family.final_norm_of(subject.model)
        W = subject.model.get_output_embeddings().weight
        toward = W[spot.target].double() - W[spot.rival].double()
        at = (found.positions == read[:, None]).repeat(1, len(found.problem.sites))
        return cls(Frozen.of(norm, final.to(W.dtype)), toward, at)

    def __call__(self, delta: Tensor) -> Tensor:
        """[n] change of the lead, in logits before any soft-cap, by vectors [n q d_model]."""
        there = (delta.double() * self.at[..., None]).sum(1)
        return (self.frozen(there) * self.toward).sum(-1)


def seen_by_lens(
    found: Recovered, parts: Mapping[str, Tensor], clusters: Sequence[str]
) -> dict[str, Any]:
    """What the vector and each part write, in logits, for the rival strongest under the clamp."""
    if reason := unreadable(found.case.subject, found.case.batch):
        return {"lens_reason": reason, "lens": []}
    lens = Lens.of(found)
    return {
        "lens_reason": "",
        "lens": [
            {"name": name, "lead": mean("lead", "logits", lens(vectors), clusters).plain}
            for name, vectors in {EVERYBODY: found.delta, **parts}.items()
        ],
    }
