"""Prompts as tensors, and the view of them that edits see.

Positions are absolute: the index in the unpadded sequence, BOS = 0, padding = -1. Rows are padded
on the left, which shifts columns and never positions, so that the last column is the last prompt
token of every row and generation can go on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from holdfast.errors import SplitError
from holdfast.readouts import Readout
from holdfast.readouts.logits import LOGITS

T = TypeVar("T")


def margin_of(logits: Tensor, targets: Tensor, rivals: Tensor) -> Tensor:
    """[n] logit of the target minus the *largest* logit among its rivals.

    The largest and not the mean: with the mean the objective can grow while another answer still
    wins. logits [n vocab], targets [n], rivals [n m] token ids.
    """
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    return target - logits.gather(-1, rivals).amax(-1)


def lead(logits: Tensor, targets: Tensor, rivals: Tensor, forced: Tensor | None) -> Tensor:
    """[n] how far an answer leads, in logits.

    Without a forced answer: the target's lead over its rivals, logits [n vocab]. With one, logits
    [n t vocab]: the smallest lead of a token of it over all other tokens of the vocabulary, which
    is positive exactly if greedy decoding gives the answer. Its gradient is that of a soft minimum,
    so that a step works on every token that lags and not on one alone.
    """
    if forced is None:
        return margin_of(logits, targets, rivals)
    there = forced >= 0
    token = forced.clamp(min=0)[..., None]
    own = logits.gather(-1, token).squeeze(-1)
    others = logits.scatter(-1, token, -torch.inf).amax(-1)
    leads = torch.where(there, own - others, torch.inf)
    least = leads.amin(-1)
    soft = -torch.logsumexp(torch.where(there, -leads, -torch.inf), -1)
    return least.detach() + soft - soft.detach()


@dataclass(frozen=True)
class Frame:
    """What an edit may know about the rows and columns it is applied to.

    ids: b example ids; groups: b group labels (feature sets can differ by group);
    positions [b s]: absolute, -1 for padding; prompt_length [b]: tokens in the prompt, BOS
    included; bos [b]: whether position 0 is a beginning-of-sequence token; template [b]: position
    of the first token of the chat template after the instruction, prompt_length without one;
    decided: what edits decided on these prompts, [b] by the id of what did. A frame of what follows
    a prompt, made by `replace`, has it from the prompt's.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    positions: Tensor
    prompt_length: Tensor
    bos: Tensor
    template: Tensor
    decided: dict[int, tuple[object, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _known: dict[int, tuple[object, Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def once(self, owner: object, work_out: Callable[[], T]) -> T:
        """What `owner` works out of the frame alone, worked out the first time it is asked for.

        The steps of a search pass one frame again and again. What comes from lists would be built
        and copied to the device each time, and the device waited for.
        """
        if id(owner) not in self._known:
            self._known[id(owner)] = (owner, work_out())  # the owner too: ids are used again
        found: T = self._known[id(owner)][1]
        return found

    def to(self, device: torch.device) -> Frame:
        """The same frame on a device; itself if it is there."""
        if self.positions.device == device:
            return self
        names = ("positions", "prompt_length", "bos", "template")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def rows(self, rows: Tensor) -> Frame:
        """The same columns for some rows, in the order given; repeats are allowed."""
        index = rows.tolist()
        return Frame(
            tuple(self.ids[i] for i in index),
            tuple(self.groups[i] for i in index),
            self.positions[rows],
            self.prompt_length[rows],
            self.bos[rows],
            self.template[rows],
            {
                key: (owner, made[rows.to(made.device)])
                for key, (owner, made) in self.decided.items()
            },
        )

    def columns(self, columns: slice) -> Frame:
        return replace(self, positions=self.positions[:, columns])


@dataclass(frozen=True)
class Batch:
    """b prompts, left-padded to s tokens, each with an answer that is read from a pass over it.

    tokens [b s]; positions [b s] absolute, -1 for padding; bos [b]; template [b] position where the
    chat template goes on after the instruction (prompt_length without one); targets [b] answers;
    rivals [b m] answers the target must beat; alternatives [b a] answers that could be forced
    instead; ids unique, but where several searches of the same prompts are stacked; clusters: the
    independent unit of each row (a question, a prompt); groups: the label a feature set can be
    keyed by; readout: what scores answers. An answer is the index of its score: of logits, a token
    id.

    forced [b t]: an answer of t tokens that is read instead of the target, -1 in front where it is
    shorter, t = 0 for none. Its tokens but the last follow the prompt in `tokens` and count as
    generated.
    """

    ids: tuple[str, ...]
    clusters: tuple[str, ...]
    groups: tuple[str, ...]
    texts: tuple[str, ...] = field(repr=False)
    tokens: Tensor
    positions: Tensor
    bos: Tensor
    template: Tensor
    targets: Tensor
    rivals: Tensor
    alternatives: Tensor
    forced: Tensor | None = None
    readout: Readout = LOGITS

    def __post_init__(self) -> None:
        b = len(self.ids)
        sizes = {
            "clusters": len(self.clusters),
            "groups": len(self.groups),
            "texts": len(self.texts),
            "tokens": self.tokens.shape[0],
            "positions": self.positions.shape[0],
            "bos": self.bos.shape[0],
            "template": self.template.shape[0],
            "targets": self.targets.shape[0],
            "rivals": self.rivals.shape[0],
            "alternatives": self.alternatives.shape[0],
        }
        assert all(size == b for size in sizes.values()), f"{b} ids but {sizes}"
        assert self.tokens.shape == self.positions.shape
        padded_right = (self.positions[:, -1:] < 0).any()
        assert not padded_right, "rows are padded on the left: the last column is read"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mask(self) -> Tensor:
        """[b s] int64, 1 where there is a token: the attention mask."""
        return (self.positions >= 0).long()

    @property
    def prompt_length(self) -> Tensor:
        """[b] number of prompt tokens, BOS included."""
        end = self.positions[:, -1] + 1
        return end if self.forced is None else end + 1 - (self.forced >= 0).sum(1)

    @property
    def n_read(self) -> int:
        """At how many of the last columns the logits are read."""
        return 1 if self.forced is None else self.forced.shape[1]

    def frame(self) -> Frame:
        return Frame(
            self.ids, self.groups, self.positions, self.prompt_length, self.bos, self.template
        )

    def extended(self, tokens: Tensor) -> Batch:
        """The same rows with one more token each, tokens [b]; it counts as part of the prompt."""
        return replace(
            self,
            tokens=torch.cat([self.tokens, tokens[:, None]], 1),
            positions=torch.cat([self.positions, self.positions[:, -1:] + 1], 1),
        )

    def frame_of(self, prompts: Batch) -> Frame:
        """The frame of rows that continue `prompts`: what follows these counts as generated."""
        return replace(prompts.frame(), positions=self.positions)

    def rows(self, rows: Tensor | Sequence[int]) -> Batch:
        """Some rows; columns that are padding in all of them are dropped."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.tokens.device)
        index = rows.tolist()
        positions = self.positions[rows]
        used = (positions >= 0).any(0)
        first = int(used.int().argmax()) if len(index) else 0
        return Batch(
            ids=tuple(self.ids[i] for i in index),
            clusters=tuple(self.clusters[i] for i in index),
            groups=tuple(self.groups[i] for i in index),
            texts=tuple(self.texts[i] for i in index),
            tokens=self.tokens[rows, first:],
            positions=positions[:, first:],
            bos=self.bos[rows],
            template=self.template[rows],
            targets=self.targets[rows],
            rivals=self.rivals[rows],
            alternatives=self.alternatives[rows],
            forced=None if self.forced is None else self.forced[rows],
            readout=self.readout,
        )

    def answers(self) -> Tensor:
        """[b 1+m+a] every answer in play: the target, its rivals, the alternatives."""
        return torch.cat([self.targets[:, None], self.rivals, self.alternatives], 1)

    def given(self, scores: Tensor) -> Tensor:
        """[b] the answer in play with the largest score; scores [b answers]."""
        answers = self.answers()
        best = scores.gather(-1, answers).argmax(-1)
        return answers.gather(-1, best[:, None]).squeeze(-1)

    def aimed(self, targets: Tensor, rivals: Tensor) -> Batch:
        """The same prompts, read for another answer."""
        return replace(self, targets=targets, rivals=rivals)

    def margin(self, scores: Tensor) -> Tensor:
        """[b] how far the answer leads, in logits; scores as the readout gives them: [b answers],
        or [b t answers] of a forced answer, at the columns that are read."""
        return lead(scores, self.targets, self.rivals, self.forced)

    def forcing(self, answers: Sequence[Sequence[int]]) -> Batch:
        """The same prompts, read for answers of several tokens instead of the target.

        answers: b lists of token ids, none empty.
        """
        t = max(map(len, answers))
        prompts = self.unforced()
        device = self.tokens.device
        forced = torch.full((len(self), t), -1, dtype=torch.long)
        for row, answer in enumerate(answers):
            forced[row, t - len(answer) :] = torch.as_tensor(list(answer))
        forced = forced.to(device)
        rows = []
        for row, answer in enumerate(answers):
            own = prompts.positions[row] >= 0
            follow = torch.as_tensor(list(answer[:-1]), dtype=torch.long, device=device)
            rows.append(torch.cat([prompts.tokens[row, own], follow]))
        return replace(self._padded(rows), forced=forced)

    @staticmethod
    def stacked(parts: Sequence[Batch]) -> Batch:
        """The rows of several batches, one after another, repeats allowed; all are read by the same
        readout, for forced answers of the same number of tokens or for none."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        answers = (first.forced is None, first.n_read)
        assert all((part.forced is None, part.n_read) == answers for part in parts)
        width = max(part.tokens.shape[1] for part in parts)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        def padded(name: str, value: int) -> Tensor:
            """Filled up on the left."""
            rows = [getattr(part, name) for part in parts]
            return torch.cat(
                [functional.pad(x, (width - x.shape[1], 0), value=value) for x in rows]
            )

        def repeated(name: str) -> Tensor:
            """Filled up with the first column: one answer more than once changes no margin."""
            rows = [getattr(part, name) for part in parts]
            most = max(x.shape[1] for x in rows)
            return torch.cat(
                [torch.cat([x, x[:, :1].expand(-1, most - x.shape[1])], 1) for x in rows]
            )

        return Batch(
            ids=tuple(chain.from_iterable(part.ids for part in parts)),
            clusters=tuple(chain.from_iterable(part.clusters for part in parts)),
            groups=tuple(chain.from_iterable(part.groups for part in parts)),
            texts=tuple(chain.from_iterable(part.texts for part in parts)),
            tokens=padded("tokens", 0),
            positions=padded("positions", -1),
            bos=joined("bos"),
            template=joined("template"),
            targets=joined("targets"),
            rivals=repeated("rivals"),
            alternatives=repeated("alternatives"),
            forced=None if first.forced is None else joined("forced"),
            readout=first.readout,
        )

    def unforced(self) -> Batch:
        """The prompts alone, read for their targets."""
        if self.forced is None:
            return self
        n = self.prompt_length
        rows = [
            self.tokens[row, (self.positions[row] >= 0) & (self.positions[row] < n[row])]
            for row in range(len(self))
        ]
        return replace(self._padded(rows), forced=None)

    def inserted(self, tokens: Tensor) -> Batch:
        """The same prompts with tokens [k] put in where the chat template goes on, at the end
        without one; a forced answer follows as it did."""
        prompts = self.unforced()
        rows = []
        for row, at in enumerate(prompts.template.tolist()):
            own = prompts.tokens[row, prompts.positions[row] >= 0]
            rows.append(torch.cat([own[:at], tokens, own[at:]]))
        longer = replace(prompts._padded(rows), template=prompts.template + len(tokens))
        if self.forced is None:
            return longer
        return longer.forcing(
            [[token for token in row if token >= 0] for row in self.forced.tolist()]
        )

    def _padded(self, rows: Sequence[Tensor]) -> Batch:
        """This batch with other tokens, padded on the left; `forced` is left out."""
        width = max(map(len, rows), default=1)
        pad = int(self.tokens[0, 0]) if len(self) and bool(self.positions[0, 0] < 0) else 0
        tokens = self.tokens.new_full((len(rows), width), pad)
        positions = self.positions.new_full((len(rows), width), -1)
        for row, own in enumerate(rows):
            tokens[row, width - len(own) :] = own
            positions[row, width - len(own) :] = torch.arange(len(own), device=own.device)
        return replace(self, tokens=tokens, positions=positions, forced=None)

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            **{
                name: getattr(self, name).to(device)
                for name in (
                    "tokens",
                    "positions",
                    "bos",
                    "template",
                    "targets",
                    "rivals",
                    "alternatives",
                )
            },
            forced=None if self.forced is None else self.forced.to(device),
        )


def check_disjoint(splits: dict[str, Batch]) -> None:
    """Raise SplitError if two splits share a prompt text or a cluster (a question, a prompt).

    Features and strengths that saw an audited prompt make optimistic counts.
    """
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = splits[first], splits[second]
            shared = set(a.texts) & set(b.texts)
            clusters = set(a.clusters) & set(b.clusters)
            if shared or clusters:
                raise SplitError(
                    f"the splits {first!r} and {second!r} must be disjoint, but share "
                    f"{len(shared)} prompts and {len(clusters)} clusters "
                    f"(for example {sorted(clusters)[:3]}); draw them from other prompts"
                )


@dataclass(frozen=True)
class Example:
    """One prompt before tokenization.

    target: the answer that is the behavior; rivals: what it must beat; alternatives: other answers
    that could be forced instead, for the wrong-target control; each a continuation of one token.
    cluster: its independent unit (a question, a prompt); group: what features may be fitted for.
    suffix: what a chat template put after the instruction, the end of `text`; special: whether the
    tokenizer adds its special tokens (a rendered chat template has its own); instruction: what the
    user asks, without the template, for prompts that can be asked in other words; dataset, row:
    where it came from, the row from 1; "" and None for prompts that are made and not read.
    """

    id: str
    text: str
    target: str
    rivals: tuple[str, ...]
    alternatives: tuple[str, ...]
    cluster: str
    group: str = ""
    suffix: str = ""
    special: bool = True
    instruction: str = ""
    dataset: str = field(default="", compare=False)
    row: int | None = field(default=None, compare=False)
