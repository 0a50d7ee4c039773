"""How alike two replies are to the model itself: the cosine of what its middle layer makes of them.

No other model is needed. Each reply is read alone, without its prompt, which would make any two
answers to it alike; the mean over clean answers is taken off, so that unrelated answers have a
cosine of about 0 and not of nearly 1 (METHODS H.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from holdfast.batch import Batch, Frame
from holdfast.running import by_row, joined
from holdfast.sites import Site
from holdfast.subject import Subject

Tokens = Sequence[Sequence[int]]


def embedded(subject: Subject, replies: Tokens) -> Tensor:
    """[n d_model] mean residual in the middle of the model over each reply's tokens, read after BOS
    where the tokenizer has one, float64; NaN for an empty one."""
    out = torch.full(
        (len(replies), subject.d_model), torch.nan, dtype=torch.float64, device=subject.device
    )
    some = [row for row, reply in enumerate(replies) if len(reply)]
    if not some:
        return out
    batch, first = _alone(subject, [replies[row] for row in some])

    def mean(frame: Frame, x: Tensor) -> Tensor:
        own = (frame.positions >= first)[..., None]
        return torch.where(own, x.double(), 0.0).sum(1) / own.sum(1)

    read = by_row(Site(max(1, subject.n_blocks // 2)), mean)
    subject.outputs(batch, (read,))
    out[some] = joined(read, out.device)
    return out


def likeness(
    subject: Subject, replies: Mapping[str, Tokens], rows: Sequence[int], answers: Tokens
) -> dict[str, Tensor]:
    """Name → [n] cosine of each of n replies and its own clean answer, both less the mean over all
    clean answers; NaN where one is empty, or nothing is left of it.

    answers: of every prompt; rows [n]: which of them are the replies' own.
    """
    clean = embedded(subject, answers)
    center = clean[[row for row, answer in enumerate(answers) if len(answer)]].mean(0)
    own = clean[list(rows)] - center
    found = {}
    for name, said in replies.items():
        other = embedded(subject, said) - center
        size = own.norm(dim=1) * other.norm(dim=1)
        found[name] = torch.where(size > 0, (own * other).sum(1) / size, torch.nan)
    return found


def _alone(subject: Subject, replies: Tokens) -> tuple[Batch, int]:
    """The replies as prompts of their own, and the position of their first token."""
    bos = getattr(subject.tokenizer, "bos_token_id", None)
    front = [] if bos is None else [int(bos)]
    rows = [[*front, *reply] for reply in replies]
    n, width, device = len(rows), max(map(len, rows)), subject.device
    tokens = torch.zeros(n, width, dtype=torch.long)
    positions = torch.full((n, width), -1)
    for row, ids in enumerate(rows):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        positions[row, width - len(ids) :] = torch.arange(len(ids))
    names = tuple(str(row) for row in range(n))
    nothing = torch.zeros(n, 1, dtype=torch.long, device=device)
    batch = Batch(
        ids=names,
        clusters=names,
        groups=("*",) * n,
        texts=("",) * n,
        tokens=tokens.to(device),
        positions=positions.to(device),
        bos=torch.full((n,), bool(front), device=device),
        template=torch.tensor([len(ids) for ids in rows], device=device),
        targets=nothing[:, 0],
        rivals=nothing,
        alternatives=nothing,
    )
    return batch, len(front)
