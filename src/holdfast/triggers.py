"""How often a conditional clamp acts: on what it is meant for, and on what it should leave alone.

A condition that opens on everything is a clamp without one; one that never opens on the audited
prompts is none at all (METHODS A.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.edits import Capture, Edit, FeatureEdit
from holdfast.measure import Measurement, rate, share
from holdfast.subject import Subject

AUDITED = "audited"
"""What the audited behavior's own prompts are called beside its neighbors'."""


def opened(subject: Subject, batch: Batch, edits: Sequence[Edit]) -> Tensor | None:
    """[b] share of the tokens that conditional clamps may act on at which one of them does, with
    all edits on; None where none has a condition."""
    gated = [edit for edit in edits if isinstance(edit, FeatureEdit) and edit.gate is not None]
    if not gated:
        return None
    before = {id(edit): Capture(edit.bank.site) for edit in gated}
    passed: list[Edit] = []
    for edit in edits:
        if id(edit) in before:
            passed.append(before[id(edit)])
        passed.append(edit)
    subject.outputs(batch, passed)
    may: dict[str, Tensor] = {}
    does: dict[str, Tensor] = {}
    for edit in gated:
        assert edit.gate is not None
        for frame, x in before[id(edit)].seen:
            selects = edit.selects(edit.bank.site, frame)
            opens = selects & edit.gate.opens(x, frame)
            for row, example in enumerate(frame.ids):
                first = torch.zeros_like(selects[row])
                may[example] = may.get(example, first) | selects[row]
                does[example] = does.get(example, first) | opens[row]
    shares = [does[example].sum() / may[example].sum().clamp_min(1) for example in batch.ids]
    return torch.stack(shares).double()


def trigger_rates(
    shares: Mapping[str, Tensor], clusters: Mapping[str, Sequence[str]]
) -> list[Measurement]:
    """For each set of prompts the share on which a condition opens at any token, and the mean share
    of tokens at which it does."""
    made = []
    for name, values in shares.items():
        made += [
            rate(f"trigger_rate.{name}", values > 0, clusters[name]),
            share(f"trigger_tokens.{name}", values, clusters[name], unit="share of tokens"),
        ]
    return made
