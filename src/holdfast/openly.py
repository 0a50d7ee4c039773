"""Whether a vector that brings a letter back brings the answer back (METHODS J.6).

The question of a recovered prompt is asked once more without its choices, and their texts are
compared by how likely each is to follow. A vector that only pushes a letter says nothing there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.behaviors.open_question import OpenQuestion
from holdfast.canonical import digest
from holdfast.edits import Edit, Perturbation
from holdfast.likelihood import nll
from holdfast.measure import mean, rate_where
from holdfast.subject import Subject
from holdfast.variants import Recovered
from holdfast.verify import effects

MEANINGS: Mapping[str, str] = {
    "clean": "without the clamp",
    "suppressed": "with the clamp",
    "recovered": "with the clamp and the vector that was found for the letter",
    "another": "with the clamp and one of that norm that was found for another question",
}
"""Conditions, in the order they are shown."""

JOINED = "the tokenizer joins a choice to what stands before it"
NOBODY = "no recovered prompt of another question to take a vector from"
NO_FLIP = "right without the choices only where the clamp is off: no such prompt"


@dataclass(frozen=True)
class Asked:
    """n questions without their choices. batch: the prompts; told [n][4]: the tokens of each choice
    after its prompt; right [n]: which of them is the answer."""

    batch: Batch
    told: list[list[list[int]]]
    right: Tensor

    def leads(self, subject: Subject, edits: Sequence[Edit]) -> Tensor:
        """[n] log-likelihood of the right choice minus that of the likeliest other, in nats."""
        columns = []
        for choice in range(len(self.told[0])):
            texts = [own[choice] for own in self.told]
            length = torch.tensor([len(text) for text in texts], device=subject.device)
            columns.append(-nll(subject, self.batch, texts, edits) * length)
        scores = torch.stack(columns, 1)
        right = self.right.to(scores.device)[:, None]
        return (scores.gather(1, right) - scores.scatter(1, right, -torch.inf).amax(1, True))[:, 0]


def openly(found: Recovered) -> dict[str, Any]:
    """Recovered prompts asked without choices, in each condition.

    `right`: the share on which the right choice's text is the likeliest; `lead`: the mean lead of
    its log-likelihood over the likeliest other. `back`: of those that the clean model gets right
    and the clamped one does not, the share on which a vector brings the answer back. The vector
    stands at the last token of the open prompt as it stood at the last of its own; the clamp acts
    on the answer's tokens too. A text's log-likelihood is the sum over its tokens, so that of two a
    longer one has it harder. left_out: reason → prompts that cannot be asked so.
    """
    behavior, subject = found.setting.behavior, found.case.subject
    assert behavior is not None and found.positions.shape[1] == 1
    example_of = {example.id: example for example in found.setting.examples}
    examples = [example_of[name] for name in found.case.batch.ids]
    asked: dict[int, tuple[OpenQuestion, list[list[int]]]] = {}
    left_out: Counter[str] = Counter()
    for row, question in enumerate(behavior.openly(subject.tokenizer, examples)):
        if isinstance(question, str):
            left_out[question] += 1
        elif told := continuations(subject, question):
            asked[row] = question, told
        else:
            left_out[JOINED] += 1
    record: dict[str, Any] = {"n": len(asked), "left_out": dict(left_out)}
    if not asked:
        return record | {"conditions": [], "back": [], "preactivation_drift_max": float("nan")}
    questions = Asked(
        subject.batch(
            [question.example for question, _ in asked.values()], found.case.batch.readout
        ),
        [told for _, told in asked.values()],
        torch.tensor([question.right for question, _ in asked.values()]),
    )
    return record | _measured(found, torch.tensor(list(asked)), questions)


def continuations(subject: Subject, question: OpenQuestion) -> list[list[int]]:
    """The tokens of each choice after the prompt; none if a tokenizer makes other tokens of the
    prompt when an answer follows."""
    before = subject.encode(question.example)
    told = []
    for choice in question.choices:
        whole = subject.encode(
            replace(question.example, text=f"{question.example.text} {choice.strip()}")
        )
        if whole[: len(before)] != before or len(whole) == len(before):
            return []
        told.append(whole[len(before) :])
    return told


def _measured(found: Recovered, rows: Tensor, asked: Asked) -> dict[str, Any]:
    """The record of the recovered prompts `rows`."""
    case, batch = found.case, asked.batch
    positions = batch.prompt_length[:, None] - 1
    lent, there = another(found)

    def added(delta: Tensor) -> Perturbation:
        return Perturbation(batch.ids, positions, found.problem.replay.parts(delta[rows]))

    own = added(found.delta)
    leads = {
        "clean": asked.leads(case.subject, ()),
        "suppressed": asked.leads(case.subject, case.edits),
        "recovered": asked.leads(case.subject, found.edits(own)),
        "another": asked.leads(case.subject, found.edits(added(lent))),
    }
    leads["another"] = torch.where(there[rows], leads["another"], torch.nan)
    flips = (leads["clean"] > 0) & (leads["suppressed"] <= 0)
    scale = {site: case.features.median_active(site) for site in found.problem.held}
    (moved,) = effects(
        case.subject, batch, case.edits, [own], found.problem.held, scale, found.clamp_first
    )

    def shown(name: str, lead: Tensor, scored: Tensor) -> dict[str, Any]:
        right = rate_where("right", lead > 0, scored, batch.clusters, NOBODY)
        length = mean("lead", "nats", lead, batch.clusters, NOBODY)
        return {
            "name": name,
            "right": right.model_dump(mode="json"),
            "lead": length.model_dump(mode="json"),
        }

    def brought(name: str) -> dict[str, Any]:
        lead = leads[name]
        scored = flips & ~lead.isnan()
        back = rate_where("back", lead > 0, scored, batch.clusters, NO_FLIP)
        return {"name": name, "back": back.model_dump(mode="json")}

    return {
        "conditions": [shown(name, lead, ~lead.isnan()) for name, lead in leads.items()],
        "n_flips": int(flips.sum()),
        "back": [brought("recovered"), brought("another")],
        "preactivation_drift_max": float(moved.preactivation_drift.max()),
    }


def another(found: Recovered) -> tuple[Tensor, Tensor]:
    """[n q d_model] a vector found for another question, of the norm of each prompt's own, and for
    which prompts [n] there is one. Which one does not hang on the order of the prompts."""
    ids, clusters = found.case.batch.ids, found.case.batch.clusters
    lent = torch.zeros_like(found.delta)
    for row in range(len(found)):
        strangers = [other for other in range(len(found)) if clusters[other] != clusters[row]]
        if strangers:
            donor = min(strangers, key=lambda other: digest(["open", ids[row], ids[other]]))
            lent[row] = found.delta[donor]
    return found.scaled(lent)
