"""What is known of multiple-choice questions: in every order of their choices, and on which.

A letter that is right in one order may be a guess. SAEBench (METHODS J.2) asks in all orders and
counts on the questions that the model by itself gets right in every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.batch import Example
from holdfast.canonical import digest
from holdfast.edits import Edit
from holdfast.measure import Measurement, relative, share
from holdfast.readouts import Readout
from holdfast.readouts.logits import LOGITS
from holdfast.subject import Subject

PREFIX = "known"
FORGET = "forget"
"""What the behavior's own questions are called among the sets; neighbors have their names."""

SUBSETS = ("all", "correct", "correct-iff-question", "correct-no-tricks")
_ROWS = 512  # prompts whose logits are in memory at once


@dataclass(frozen=True)
class Orders:
    """Questions in every order of their choices: the same of each, a question one cluster.

    blind: the same prompts without the question; tricky: questions with a choice that points at
    other choices.
    """

    asked: tuple[Example, ...]
    blind: tuple[Example, ...]
    tricky: frozenset[str] = frozenset()

    @property
    def clusters(self) -> tuple[str, ...]:
        return tuple(example.cluster for example in self.asked)


def knowledge(
    subject: Subject,
    edits: Sequence[Edit],
    sets: Mapping[str, Orders],
    behavior: Mapping[str, Any],
    readout: Readout = LOGITS,
) -> tuple[Measurement, ...]:
    """`known.<set>.<subset>.<figure>` for every set of questions and four subsets of it.

    The subsets are the model's own, without the edits: `all`; `correct`, right in every order;
    `correct-iff-question`, those of `correct` that are not right in every order of the choices
    alone; `correct-no-tricks`, those of `correct` whose choices do not point at each other. The
    figures: `clean` and `suppressed`, the share of prompts answered rightly without and with the
    edits; `strict_clean` and `strict_suppressed`, the share of questions right in every order;
    `relative`, suppressed over clean. behavior: what tells these prompts from others, so that what
    the model does by itself is asked once. readout: how letters are read.
    """
    made: list[Measurement] = []
    for name, orders in sets.items():
        clusters = orders.clusters
        clean = _unedited(subject, orders.asked, [name, "asked", dict(behavior)], readout)
        blind = _unedited(subject, orders.blind, [name, "blind", dict(behavior)], readout)
        clamped = right(subject, orders.asked, edits, readout)
        members = subsets(clusters, clean, blind, orders.tricky)
        for subset in SUBSETS:
            own = members[subset]
            rows = torch.as_tensor([c in own for c in clusters], dtype=torch.bool)
            made += _figures(
                f"{PREFIX}.{name}.{subset}",
                clean[rows],
                clamped[rows],
                [c for c in clusters if c in own],
                "no question of this set is in the subset",
            )
    return tuple(made)


def subsets(
    clusters: Sequence[str], clean: Tensor, blind: Tensor, tricky: frozenset[str]
) -> dict[str, frozenset[str]]:
    """Subset → its questions. clean, blind [n] bool: the model by itself is right, with and without
    the question."""
    correct = strictly(clusters, clean)
    return dict(
        zip(
            SUBSETS,
            (frozenset(clusters), correct, correct - strictly(clusters, blind), correct - tricky),
            strict=True,
        )
    )


def strictly(clusters: Sequence[str], hits: Tensor) -> frozenset[str]:
    """The clusters all of whose rows are hits [n] bool."""
    missed = {c for c, hit in zip(clusters, hits.tolist(), strict=True) if not hit}
    return frozenset(clusters) - missed


def right(
    subject: Subject,
    examples: Sequence[Example],
    edits: Sequence[Edit] = (),
    readout: Readout = LOGITS,
) -> Tensor:
    """[n] bool on the CPU: the right letter beats the others."""
    return torch.cat(
        [torch.zeros(0, dtype=torch.bool)]
        + [
            (batch.margin(subject.read(batch, edits)) > 0).cpu()
            for batch in (subject.batch(piece, readout) for piece in _pieces(examples))
        ]
    )


def _pieces(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), _ROWS):
        yield examples[start : start + _ROWS]


def _unedited(
    subject: Subject, examples: Sequence[Example], asked: list[Any], readout: Readout
) -> Tensor:
    """`right` without edits, once a subject."""
    key = digest(["knowledge", *asked, [example.id for example in examples]])
    if key not in subject.counted:
        subject.counted[key] = right(subject, examples, readout=readout)
    return subject.counted[key]


def _figures(
    name: str, clean: Tensor, clamped: Tensor, clusters: Sequence[str], nothing: str
) -> list[Measurement]:
    """clean, clamped [n] bool of the prompts of one subset."""
    questions = sorted(set(clusters))
    made = []
    for condition, hits in (("clean", clean), ("suppressed", clamped)):
        made.append(share(f"{name}.{condition}", hits.double(), clusters, nothing))
        strict = strictly(clusters, hits)
        held = torch.as_tensor([q in strict for q in questions], dtype=torch.float64)
        unit = "share of questions"
        made.append(share(f"{name}.strict_{condition}", held, questions, nothing, unit))
    return [*made, relative(f"{name}.relative", clamped, clean, clusters, nothing)]
