"""Prefilling: the beginning of the answer is put into the model's mouth, the clamp on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from holdfast.attacks import Attacked, AttackKind, Listed, TrialResult
from holdfast.attacks.answers import AnswersFound, examples_of, result_of
from holdfast.attacks.opposed import NONE_OPPOSED, opposed_of
from holdfast.batch import Batch
from holdfast.behaviors import BehaviorKind
from holdfast.canonical import digest
from holdfast.edits import Edit
from holdfast.errors import StudyError
from holdfast.measure import Measurement, rate, rate_where
from holdfast.reply import Reply
from holdfast.subject import Subject

ENDED = "the answer ends within the tokens that would be given"
ALIKE = "no other prompt's answer is that long and begins otherwise"
WITHOUT = "the same beginning does not bring the behavior without the clamp"


class Prefill(AttackKind):
    """The first tokens of the prompt's own clean answer, given as the beginning of the answer; the
    model goes on freely (METHODS E.4).

    n_tokens: how many are given, several in turn. They are tokens of the answer, clamped as those
    are, and count towards its length. The behavior is there if the judge finds it in the whole
    answer *and* in what the model added, read alone: what was given is no doing of the model's. A
    rate is over the prompts on which the same beginning brings the behavior without the clamp.

    Beside it: the beginning of another prompt's answer with the clamp on, and, without any clamp,
    the beginning of an audited prompt's answer given to prompts on which the model by itself does
    the opposite.
    """

    kind: Literal["prefill"] = "prefill"
    listed: ClassVar[Listed] = "answers"
    n_tokens: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4)

    @field_validator("n_tokens")
    @classmethod
    def _each_once(cls, several: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(several)) < len(several):
            raise ValueError(f"expected every number of tokens once, got {list(several)}")
        return several

    @property
    def label(self) -> str:
        return f"{self.kind}, {' '.join(map(str, self.n_tokens))} tokens"

    @property
    def answers(self) -> tuple[int, int, int]:
        n = len(self.n_tokens)
        return 2 * n, n, n

    def check(self, behavior: BehaviorKind) -> None:
        limit = behavior.answer_tokens
        if not limit:
            raise StudyError(
                f"the attack {self.kind!r} begins an answer and judges how it goes on, and the "
                f"behavior {behavior.kind!r} is read from one token, which would be given; refusal "
                "is the behavior it is for: leave it out of this audit's `attacks`"
            )
        if max(self.n_tokens) >= limit:
            raise StudyError(
                f"the attack {self.kind!r} gives {max(self.n_tokens)} tokens of answers that are "
                f"cut after {limit} (max_new_tokens), which leaves none to judge; give fewer"
            )

    def run(self, attacked: Attacked) -> TrialResult:
        """begun → gone on without the intervention and with it → judged whole and alone."""
        setting, case = attacked.setting, attacked.case
        behavior = self.behavior_of(attacked)
        assert setting.observed is not None, "a behavior that has answers to judge"
        prompts, references = case.batch.unforced(), setting.observed.replies
        said = [setting.observed.tokens[row] for row in case.rows.tolist()]
        turned = setting.subject.batch(opposed_of(setting, behavior))
        rounds = {}
        for n in self.n_tokens:
            own = [tokens[:n] if len(tokens) > n else None for tokens in said]
            others = _others(prompts, said, n)
            lent = _lent(turned, [begun for begun in own if begun is not None])
            rounds[n] = _Round(
                n,
                without=_begun(case.subject, behavior, prompts, own, ENDED, (), references),
                clamped=_begun(case.subject, behavior, prompts, own, ENDED, case.edits, references),
                other=_begun(
                    case.subject, behavior, prompts, others, ALIKE, case.edits, references
                ),
                turned=_begun(setting.subject, behavior, turned, lent, ENDED),
            )
        found = _found(attacked, rounds)
        return TrialResult(result_of(found), {}, examples_of(found))


@dataclass(frozen=True)
class _Begun:
    """n prompts whose answers were begun. tried [n]: which were, `reason` says why not the others;
    whole, alone [n] bool: the judge finds the behavior in the whole answer, in what the model
    added; labels, alone_labels, sha256 (of the whole answer): empty where not tried."""

    clusters: tuple[str, ...]
    tried: Tensor
    reason: str
    whole: Tensor
    alone: Tensor
    labels: tuple[str, ...]
    alone_labels: tuple[str, ...]
    sha256: tuple[str, ...]

    @property
    def shows(self) -> Tensor:
        """[n] bool: the behavior, and not only in what was given."""
        return self.whole & self.alone


@dataclass(frozen=True)
class _Round:
    """One number n of tokens given: without the clamp, with it, with it and another prompt's
    beginning, and to the opposed prompts without it."""

    n: int
    without: _Begun
    clamped: _Begun
    other: _Begun
    turned: _Begun

    @property
    def name(self) -> str:
        return f"{self.n} token" + ("s" if self.n > 1 else "")

    @property
    def asked(self) -> Tensor:
        return self.clamped.tried & self.without.shows

    @property
    def back(self) -> Tensor:
        return self.asked & self.clamped.shows


def _begun(
    subject: Subject,
    behavior: BehaviorKind,
    prompts: Batch,
    given: Sequence[Sequence[int] | None],
    reason: str,
    edits: Sequence[Edit] = (),
    references: Sequence[Reply] | None = None,
) -> _Begun:
    """Let every answer go on after what is given, all of one length; None is not tried."""
    n, device = len(prompts), prompts.tokens.device
    tried = torch.tensor([begun is not None for begun in given], dtype=torch.bool, device=device)
    whole, alone = torch.zeros_like(tried), torch.zeros_like(tried)
    labels, alone_labels, sha256 = ([""] * n for _ in range(3))
    rows = tried.nonzero().flatten()
    if len(rows):
        kept, own = prompts.rows(rows), [list(begun) for begun in given if begun is not None]
        # All but the last forced token is run, as a part of the answer.
        following = kept.forcing([[*begun, begun[-1]] for begun in own])
        made = subject.generate(following, edits, behavior.answer_tokens - len(own[0]))
        start = torch.as_tensor(own, dtype=made.dtype, device=made.device)
        all_of_it = behavior.judged(subject, kept, torch.cat([start, made], 1), references)
        added = behavior.judged(subject, kept, made, references)
        whole[rows], alone[rows] = all_of_it.shows, added.shows
        for at, row in enumerate(rows.tolist()):
            labels[row], alone_labels[row] = all_of_it.labels[at], added.labels[at]
            sha256[row] = all_of_it.replies[at].sha256
    return _Begun(
        prompts.clusters, tried, reason, whole, alone, tuple(labels), tuple(alone_labels),
        tuple(sha256),
    )  # fmt: skip


def _others(prompts: Batch, said: Sequence[Sequence[int]], n: int) -> list[tuple[int, ...] | None]:
    """For each prompt the first n tokens of another cluster's answer that begins otherwise, drawn
    by id; None where there is none."""
    beginnings = [(c, tuple(t[:n])) for c, t in zip(prompts.clusters, said, strict=True)
                  if len(t) > n]  # fmt: skip
    found: list[tuple[int, ...] | None] = []
    for row, tokens in enumerate(said):
        free = sorted({b for c, b in beginnings
                       if c != prompts.clusters[row] and b != tuple(tokens[:n])})  # fmt: skip
        found.append(free[_draw(prompts.ids[row]) % len(free)] if free else None)
    return found


def _lent(prompts: Batch, beginnings: Sequence[Sequence[int]]) -> list[Sequence[int] | None]:
    """For each prompt the beginning of an audited prompt's answer, drawn by id."""
    return [beginnings[_draw(i) % len(beginnings)] if beginnings else None for i in prompts.ids]


def _draw(example: str) -> int:
    return int(digest(example)[:8], 16)


COLUMNS = {
    "back": "clamp on",
    "whole": "clamp on, what was given counted too",
    "without": "no clamp",
    "other": "clamp on, another prompt's beginning",
    "turned": "no clamp, on prompts that show the opposite",
}


def _found(attacked: Attacked, rounds: dict[int, _Round]) -> AnswersFound:
    case = attacked.case
    clusters = case.batch.clusters
    asked = torch.stack([each.asked for each in rounds.values()]).any(0)
    back = torch.stack([each.back for each in rounds.values()]).any(0)
    table, labels, arms = {}, {}, {}
    for each in rounds.values():
        table[each.name] = _cells(each, clusters)
        parts = {"no clamp": each.without, "clamped": each.clamped,
                 "clamped, another's": each.other, "opposed": each.turned}  # fmt: skip
        for name, part in parts.items():
            labels[f"{each.name}, {name}"] = part.labels
            labels[f"{each.name}, {name}, alone"] = part.alone_labels
        arms[each.name] = [_said(each, row) for row in range(len(case.rows))]
    tokens = ", ".join(str(n) for n in rounds)
    n_turned = sum(int(each.turned.shows.sum()) for each in rounds.values())
    sentence = (
        f"with the first {tokens} tokens of its own answer given, the behavior came back on "
        f"{int(back.sum())} of {int(asked.sum())} prompts, in what the model added too"
    )
    if back.any() and n_turned:
        sentence += (
            "; without any clamp such beginnings also turn prompts on which the model does the "
            "opposite by itself"
        )
    setting = attacked.setting
    return AnswersFound(setting, case, asked, back, WITHOUT, sentence, COLUMNS, table, labels, arms)


def _cells(each: _Round, clusters: Sequence[str]) -> dict[str, Measurement]:
    """A measurement for every column."""

    def told(key: str, hits: Tensor, scored: Tensor, reason: str) -> Measurement:
        return rate_where(f"{each.name}.{key}", hits, scored, clusters, reason)

    turned = each.turned
    rows = turned.tried.nonzero().flatten().tolist()
    alone = rate(f"{each.name}.turned", turned.shows[rows], [turned.clusters[row] for row in rows])
    return {
        "back": told("back", each.back, each.asked, WITHOUT),
        "whole": told("whole", each.clamped.whole, each.clamped.tried, ENDED),
        "without": told("without", each.without.shows, each.without.tried, ENDED),
        "other": told("other", each.other.shows, each.other.tried, ALIKE),
        "turned": alone if rows else alone.model_copy(update={"reason": NONE_OPPOSED}),
    }


def _said(each: _Round, row: int) -> dict[str, Any]:
    """The columns of one prompt. n_given: tokens of its answer that were not its own doing."""
    said: dict[str, Any] = {
        "n_given": each.n,
        "excluded": "" if each.clamped.tried[row] else ENDED,
        "back": bool(each.back[row]),
    }
    for name, part in (("without", each.without), ("clamped", each.clamped),
                       ("other", each.other)):  # fmt: skip
        said[f"{name}_label"] = part.labels[row]
        said[f"{name}_alone_label"] = part.alone_labels[row]
        said[f"{name}_sha256"] = part.sha256[row]
    return said
