"""Direct logit attribution: what each head, MLP and edit writes for the answer (METHODS K.5).

The final residual is a sum: the embedding, what every head and every MLP adds, what edits add. With
the final norm's scale held at what it is, the lead of one token over another is linear in that sum,
and every term has a share of it. What a term does by way of later blocks is theirs (`routes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.batch import Batch, Frame
from holdfast.edits import Edit, EveryToken
from holdfast.errors import SubjectError
from holdfast.frozen import Frozen
from holdfast.hooks import tapped
from holdfast.sites import Site
from holdfast.subject import Subject

CONDITIONS = ("clean", "suppressed", "recovered")

TERMS = ("heads", "mlps", "embedding", "clamp", "perturbation", "biases", "blocks")
"""What the terms are put together to. biases: of attention's output, of the final norm, of the
unembedding; blocks: what blocks do to the residual beside adding attention and MLP: nothing in the
families of the table, in a known-answer subject what its projection takes away."""


@dataclass(frozen=True)
class Spot:
    """Where, and for what, the lead of n prompts is read.

    back [n]: column, counted from the last, which is 1; target, rival [n]: token ids.
    """

    back: Tensor
    target: Tensor
    rival: Tensor

    @classmethod
    def of(cls, batch: Batch, scores: Tensor) -> Spot:
        """The target and whoever is strongest against it by `scores`; of a forced answer the token
        that lags most."""
        if batch.forced is None:
            strongest = scores.gather(-1, batch.rivals).argmax(-1, keepdim=True)
            rival = batch.rivals.gather(-1, strongest).squeeze(-1)
            return cls(torch.ones_like(batch.targets), batch.targets, rival)
        token = batch.forced.clamp(min=0)[..., None]
        best = scores.scatter(-1, token, -torch.inf).max(-1)
        leads = scores.gather(-1, token).squeeze(-1) - best.values
        at = torch.where(batch.forced >= 0, leads, torch.inf).argmin(-1, keepdim=True)
        back = batch.n_read - at.squeeze(-1)
        return cls(back, batch.forced.gather(-1, at).squeeze(-1),
                   best.indices.gather(-1, at).squeeze(-1))  # fmt: skip

    def rows(self, rows: Tensor) -> Spot:
        return Spot(self.back[rows], self.target[rows], self.rival[rows])

    def lead(self, scores: Tensor) -> Tensor:
        """[n] of the target over this rival; scores as the readout gives them."""
        own = scores if scores.ndim == 2 else self.cut(scores)
        pair = own.gather(1, torch.stack([self.target, self.rival], 1))
        return pair[:, 0] - pair[:, 1]

    def cut(self, x: Tensor) -> Tensor:
        """[n ...] of x [n s ...] at the column that is read."""
        return x[torch.arange(len(x), device=x.device), x.shape[1] - self.back.to(x.device)]


@dataclass(frozen=True)
class Direct:
    """What n prompts' leads are made of, in logits before any soft-cap, float64.

    heads [n layers heads], mlps [n layers], others: of `TERMS` → [n]; lead [n]: as the model's own
    norm and unembedding give it, without the split; strongest [n] bool: no other token in play is
    ahead of this rival, so that the lead is the margin.
    """

    heads: Tensor
    mlps: Tensor
    others: Mapping[str, Tensor]
    lead: Tensor
    strongest: Tensor

    @property
    def terms(self) -> dict[str, Tensor]:
        """Term → [n]; they sum to the lead."""
        return {"heads": self.heads.sum((1, 2)), "mlps": self.mlps.sum(1), **self.others}

    @property
    def error(self) -> Tensor:
        """[n] how far the terms are from summing to the lead, in logits."""
        return (torch.stack(list(self.terms.values())).sum(0) - self.lead).abs()


@dataclass
class _Column(EveryToken):
    """Reads a site at one column a row: [b d_model] a pass."""

    site: Site
    spot: Spot
    seen: list[Tensor] = field(default_factory=list)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.seen.append(self.spot.cut(x.detach()))
        return x


def unreadable(subject: Subject, batch: Batch) -> str:
    """Why leads cannot be split; "" where they can."""
    if not batch.readout.unembeds:
        return "what is read is no single logit of the final residual"
    unembed = subject.model.get_output_embeddings()
    if type(unembed) is not nn.Linear or hasattr(unembed, "_hf_hook"):
        return "the rows of the unembedding cannot be read: it is quantized or kept elsewhere"
    return ""


def attribute(
    subject: Subject, batch: Batch, first: Sequence[Edit], then: Sequence[Edit],
    push: Edit | None, spot: Spot,
) -> Direct:  # fmt: skip
    """The leads of `spot` with edits on: `first`, the perturbation, `then`, at every site."""
    pieces = subject.batching.over(
        "passes", torch.arange(len(batch), device=batch.tokens.device),
        lambda rows: _attributed(subject, batch.rows(rows), first, then, push, spot.rows(rows)),
    )  # fmt: skip
    return Direct(
        heads=torch.cat([p.heads for p in pieces]),
        mlps=torch.cat([p.mlps for p in pieces]),
        others={name: torch.cat([p.others[name] for p in pieces]) for name in pieces[0].others},
        lead=torch.cat([p.lead for p in pieces]),
        strongest=torch.cat([p.strongest for p in pieces]),
    )


def _attributed(
    subject: Subject, batch: Batch, first: Sequence[Edit], then: Sequence[Edit],
    push: Edit | None, spot: Spot,
) -> Direct:  # fmt: skip
    family, model = subject.family, subject.model
    sites = [Site(depth) for depth in range(subject.n_blocks + 1)]
    entering, a, b, leaving = ([_Column(site, spot) for site in sites] for _ in range(4))
    pushed = () if push is None else (push,)
    into_heads: dict[int, Tensor] = {}
    added: dict[tuple[str, int], Tensor] = {}
    into_norm: dict[int, Tensor] = {}

    def heads(layer: int, args: tuple[Any, ...], output: Any) -> None:
        into_heads[layer] = spot.cut(args[0])

    def attends(layer: int, args: tuple[Any, ...], output: Any) -> None:
        added["attends", layer] = spot.cut(_first(output))
        if family.norms_attention:
            into_norm[layer] = spot.cut(args[0])

    def mlp(layer: int, args: tuple[Any, ...], output: Any) -> None:
        added["mlp", layer] = spot.cut(_first(output))

    taps = [(family.inside(model, path), see)
            for path, see in ((family.heads, heads), (family.attends, attends),
                              (family.mlp, mlp))]  # fmt: skip
    with tapped(*taps):
        scores = subject.read(batch, (*entering, *first, *a, *pushed, *b, *then, *leaving))
    device = batch.tokens.device
    x_in, x_a, x_b, x_out = (
        torch.stack([read.seen[0].to(device).double() for read in reads], 1)
        for reads in (entering, a, b, leaving)
    )  # [n sites d] each
    norm = family.final_norm_of(model)
    unembed = model.get_output_embeddings()
    final = leaving[-1].seen[0].to(device)
    frozen = Frozen.of(norm, final)
    pair = torch.stack([spot.target, spot.rival])
    target, rival = unembed.weight[pair].double()
    toward = target - rival  # [n d]
    bias = torch.zeros_like(toward[:, 0])
    if unembed.bias is not None:
        bias = unembed.bias[pair[0]].double() - unembed.bias[pair[1]].double()

    def worth(terms: Tensor) -> Tensor:
        """[n ...] of terms [n ... d] of the final residual."""
        return torch.einsum("n...d,nd->n...", frozen(terms.to(device)), toward)

    by_head, of_mlp, of_biases = [], [], frozen.bias @ toward.T + bias
    n_layers = subject.n_blocks
    for layer in range(n_layers):
        pieces = _by_head(subject, layer, into_heads[layer])
        whole = added["attends", layer].double()
        if layer in into_norm:
            post = Frozen.of(family.inside(model, family.attends)[layer], into_norm[layer])
            pieces = post(pieces)
        by_head.append(worth(pieces))
        of_mlp.append(worth(added["mlp", layer]))
        of_biases = of_biases + worth(whole - pieces.sum(1).to(whole.device))
    writes = torch.stack(
        [
            added["attends", layer].to(device).double() + added["mlp", layer].to(device).double()
            for layer in range(n_layers)
        ],
        1,
    )
    with torch.no_grad():
        read = norm(final).double()
    return Direct(
        heads=torch.stack(by_head, 1),
        mlps=torch.stack(of_mlp, 1),
        others={
            "embedding": worth(x_in[:, 0]),
            "clamp": worth((x_a - x_in + x_out - x_b).sum(1)),
            "perturbation": worth((x_b - x_a).sum(1)),
            "biases": of_biases,
            "blocks": worth((x_in[:, 1:] - x_out[:, :-1] - writes).sum(1)),
        },
        lead=(read * toward).sum(-1) + bias,
        strongest=_strongest(batch, scores, spot),
    )


def _strongest(batch: Batch, scores: Tensor, spot: Spot) -> Tensor:
    """[n] bool: by these scores nothing else is in the answer's way."""
    now = Spot.of(batch, scores)
    return (now.back == spot.back) & (now.rival == spot.rival)


def _by_head(subject: Subject, layer: int, x: Tensor) -> Tensor:
    """[n heads d] what each head gives, without a bias, of the heads side by side x
    [n heads·d_head]."""
    linear = subject.family.inside(subject.model, subject.family.heads)[layer]
    n_heads = subject.model.config.get_text_config().num_attention_heads
    apart = torch.eye(n_heads, dtype=x.dtype, device=x.device)
    alone = torch.einsum("nhk,hg->nghk", x.unflatten(-1, (n_heads, -1)), apart).flatten(-2)
    with torch.no_grad():
        made: Tensor = linear(alone).double() - linear(torch.zeros_like(x[:1])).double()
    return made


def _first(output: Any) -> Tensor:
    """A module's output; transformers' attention returns its weights beside it."""
    made: Tensor = output[0] if isinstance(output, tuple) else output
    return made


@contextmanager
def eager(subject: Subject) -> Iterator[None]:
    """Attention that is computed step by step, and so has weights to look at."""
    config = subject.model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual


def attention(
    subject: Subject, batch: Batch, edits: Sequence[Edit], spot: Spot
) -> dict[str, Tensor]:
    """ "target", "rival" → [n layers heads]: how much of its attention each head pays, from the
    column that is read, to earlier tokens that are this answer; NaN where the prompt has none."""
    family = subject.family
    modules = family.inside(subject.model, family.heads.rpartition(".")[0])

    def paid(rows: Tensor) -> dict[str, Tensor]:
        chunk, own = batch.rows(rows), spot.rows(rows)
        weights: dict[int, Tensor] = {}

        def see(layer: int, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, tuple) or output[1] is None:
                raise SubjectError(
                    f"attention of block {layer} gave no weights though it was asked to be eager: "
                    "this version of transformers returns them in another way"
                )
            weights[layer] = own.cut(output[1].transpose(1, 2)).double()  # [b h s]

        with eager(subject), tapped((modules, see)):
            subject.read(chunk, edits)
        every = torch.stack([weights[i].to(rows.device) for i in range(len(modules))], 1)
        column = torch.arange(chunk.tokens.shape[1], device=rows.device)
        found: dict[str, Tensor] = {}
        before = (column < chunk.tokens.shape[1] - own.back[:, None]) & (chunk.positions >= 0)
        for name, token in (("target", own.target), ("rival", own.rival)):
            there = (chunk.tokens == token[:, None]) & before
            share = torch.einsum("nlhs,ns->nlh", every, there.double())
            found[name] = torch.where(there.any(1)[:, None, None], share, torch.nan)
        return found

    everyone = torch.arange(len(batch), device=batch.tokens.device)
    pieces = subject.batching.over("passes", everyone, paid)
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
