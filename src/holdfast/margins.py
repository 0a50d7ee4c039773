"""Margins: by how much an answer leads, in logits."""

from __future__ import annotations

import torch
from torch import Tensor


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
