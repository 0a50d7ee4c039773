"""Which heads carry a recovery: direct attribution of clean, suppressed and recovered beside each
other, and what the heads attend to (METHODS K.5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from holdfast.direct import CONDITIONS, TERMS, Direct, Spot, attention, attribute, unreadable
from holdfast.measure import Measurement, mean
from holdfast.variants import Recovered

TOP = 8
"""Heads that are listed for what they change, and again for what they write in clean prompts."""


def heads_of(found: Recovered) -> dict[str, Any]:
    """The leads of n recovered prompts over the rival that is strongest under the intervention.

    `reason`: why there is nothing else. error_max: how far terms are from summing to the lead, in
    logits; softcap: leads are before it, so that they are no margins. gain: recovered − suppressed.
    top: heads by the size of their mean gain, and by what they write in clean prompts. attends:
    mean share of attention on the answer and on its rival, over the `n_both` prompts that have both
    before the token that is read, the same in all conditions; None where there are none; more:
    their difference in clean prompts. mover: such a head writes for the answer in clean prompts and
    attends to it more than to its rival, by more than the intervals of both leave open.
    """
    subject, batch = found.case.subject, found.case.batch
    if reason := unreadable(subject, batch):
        return {"reason": reason}
    own, push = found.case.edits, found.perturbation(found.delta)
    first, then = (own, ()) if found.clamp_first else ((), own)
    spot = Spot.of(batch, subject.read(batch, own))
    made = {
        "clean": attribute(subject, batch, (), (), None, spot),
        "suppressed": attribute(subject, batch, first, then, None, spot),
        "recovered": attribute(subject, batch, first, then, push, spot),
    }
    looks = {
        name: attention(subject, batch, edits, spot)
        for name, edits in zip(CONDITIONS, ((), own, found.edits(push)), strict=True)
    }
    return {
        "reason": "",
        "softcap": subject.family.softcap_of(subject.model),
        "error_max": max(float(direct.error.max()) for direct in made.values()),
        "strongest": {name: float(d.strongest.double().mean()) for name, d in made.items()},
        "lead": _compared({name: direct.lead for name, direct in made.items()}, found),
        "terms": [
            {"name": term, **_compared({name: d.terms[term] for name, d in made.items()}, found)}
            for term in TERMS
        ],
        "heads": {name: direct.heads.mean(0).tolist() for name, direct in made.items()},
        "mlps": {name: direct.mlps.mean(0).tolist() for name, direct in made.items()},
        "top": _top(made, looks, found),
    }


def _top(
    made: dict[str, Direct], looks: dict[str, dict[str, Tensor]], found: Recovered
) -> list[dict[str, Any]]:
    """A row for each head listed, the largest gain first."""
    gain = (made["recovered"].heads - made["suppressed"].heads).mean(0)
    clean = made["clean"].heads.mean(0)
    n = min(TOP, gain.numel())
    largest = gain.abs().flatten().topk(n).indices
    listed = torch.cat([largest, clean.flatten().topk(n).indices]).unique()
    both = _both(looks)
    clusters = found.case.batch.clusters
    rows = []
    for index in listed.tolist():
        layer, head = divmod(index, gain.shape[1])
        compared = _compared({name: d.heads[:, layer, head] for name, d in made.items()}, found)
        paid = {
            condition: {answer: values[:, layer, head] for answer, values in of.items()}
            for condition, of in looks.items()
        }
        more = mean(
            "more", "share of attention",
            (paid["clean"]["target"] - paid["clean"]["rival"]).masked_fill(~both, torch.nan),
            clusters, "the prompt has not both answers",
        )  # fmt: skip
        rows.append(
            {
                "layer": layer, "head": head, "carrier": index in largest.tolist(),
                "mover": _above_0(compared["clean"]) and _above_0(more.model_dump()),
                **compared,
                "n_both": int(both.sum()),
                "attends": {
                    condition: {
                        answer: float(values[both].mean()) if both.any() else None
                        for answer, values in of.items()
                    }
                    for condition, of in paid.items()
                },
                "more": more.model_dump(mode="json"),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row["gain"]["estimate"]))


def _both(looks: dict[str, dict[str, Tensor]]) -> Tensor:
    """[n] bool: prompts that have the answer and its rival, in every condition: means over others
    would be over one set for the answer and over another for the rival."""
    there = [~values.isnan().flatten(1).any(1) for of in looks.values() for values in of.values()]
    return torch.stack(there).all(0)


def _above_0(measured: dict[str, Any]) -> bool:
    """Whether the interval of a measurement has 0 below it."""
    return measured["low"] is not None and measured["low"] > 0


def _compared(values: dict[str, Tensor], found: Recovered) -> dict[str, Any]:
    """Mean over prompts in every condition, and of what the recovery changed, in logits."""
    changed = values | {"gain": values["recovered"] - values["suppressed"]}
    clusters = found.case.batch.clusters
    made: dict[str, Measurement] = {
        name: mean(name, "logits", column, clusters) for name, column in changed.items()
    }
    return {name: measurement.model_dump(mode="json") for name, measurement in made.items()}
