"""Prompts as tensors.

Positions are absolute: the index in the unpadded sequence, BOS = 0, padding = -1. Rows are padded
on the left, which shifts columns and never positions, so that the last column is the last prompt
token of every row and generation can go on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

from holdfast.examples import Example
from holdfast.frame import Frame
from holdfast.margins import lead
from holdfast.readouts import Readout
from holdfast.readouts.logits import LOGITS

__all__ = ["Batch", "Example", "Frame"]


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
