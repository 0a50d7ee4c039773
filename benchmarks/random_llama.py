"""A random Llama, a random SAE, and a recovery problem on them: what benchmarks of a step share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.edits import FeatureEdit
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.problem import Lanes, Problem
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.steppers import Steepest
from holdfast.subject import Subject
from holdfast.subspace import Iterate, NullSpace, into_ball
from holdfast.testing import tiny_tokenizer

VALUE = -2.0
BUDGET = 0.25
"""Norm budget, as a share of the residual."""

CHOICES, CHOICE_TOKENS = 4, 8
"""Choices of a question, and the tokens of each."""


@dataclass(frozen=True)
class Size:
    """Subject, SAE and prompts. positions: how many at the end of a prompt are perturbed."""

    n_layers: int = 12
    d_model: int = 512
    n_heads: int = 8
    d_mlp: int = 1536
    vocabulary: int = 32_000
    n_features: int = 16_384
    clamped: int = 16
    layer: int = 4
    tokens: int = 100
    positions: int = 1
    prompts: int = 24
    repeats: int = 7
    family: str = "llama"
    n_kv_heads: int | None = None
    head_dim: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def summary(self) -> dict[str, int]:
        """The settings of a result."""
        return {
            "layers": self.n_layers, "d_model": self.d_model, "vocabulary": self.vocabulary,
            "SAE_features": self.n_features, "clamped_features": self.clamped,
            "after_block": self.layer, "tokens": self.tokens, "repeats": self.repeats,
        }  # fmt: skip


QUICK = Size(
    n_layers=6, d_model=128, n_heads=4, d_mlp=256, vocabulary=2000, n_features=2048, tokens=50,
    prompts=8, repeats=3,
)  # fmt: skip


def posed(size: Size, batch: Batch | None = None) -> tuple[Problem, FeatureEdit]:
    """A recovery problem under a clamp on features that really fire."""
    subject = random_subject(size)
    batch = batch or random_batch(size)
    (site,) = subject.saes
    ids = busiest(subject, batch, site, size.clamped)
    features = FeatureSet(entries=(SiteFeatures(site=str(site), ids=ids),), source="busiest")
    bank = FeatureBank.of(subject.sae(site), features)
    edit = FeatureEdit(bank, "set_where_active", VALUE, include_bos=True)
    replay = Replay.record(subject, batch, site, last(batch, size.positions), before=(edit,))
    reference = replay.residual().norm(dim=(1, 2))
    goal = torch.full_like(reference, torch.inf)
    return Problem(replay, batch, goal, {site: bank}, reference, BUDGET * reference), edit


def last(batch: Batch, n: int = 1) -> Tensor:
    """[b n] the last positions of each prompt."""
    return batch.prompt_length[:, None] - n + torch.arange(n, device=batch.tokens.device)


def question(size: Size) -> Batch:
    """The 24 permutations of one question: its choices in every order, one letter of four right."""
    generator = torch.Generator().manual_seed(0)
    orders = list(permutations(range(CHOICES)))
    stem = torch.randint(
        size.vocabulary, (size.tokens - CHOICES * CHOICE_TOKENS,), generator=generator
    )
    choices = torch.randint(size.vocabulary, (CHOICES, CHOICE_TOKENS), generator=generator)
    letters = torch.randperm(size.vocabulary, generator=generator)[:CHOICES]
    tokens = torch.stack([torch.cat([stem, choices[list(order)].flatten()]) for order in orders])
    right = torch.tensor([order.index(0) for order in orders])
    others = torch.stack([torch.arange(CHOICES)[torch.arange(CHOICES) != r] for r in right])
    return _batch(tokens, letters[right], letters[others], "question", size.device)


def random_subject(size: Size) -> Subject:
    site = Site(size.layer + 1)
    sae = wide_sae(site, size.d_model, size.n_features)
    tokenizer: Any = tiny_tokenizer()
    return Subject.of("random", random_model(size), tokenizer, {site: sae}, batching=Batching(64))


def wide_sae(site: Site, d_model: int, n_features: int) -> SAE:
    """A random SAE, made in place: a million features take their 4 GB and no more."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(n_features, d_model, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = torch.randn(d_model, n_features, generator=generator).mul_(0.05).add_(W_dec.T)
    return SAE(
        site=site, W_enc=W_enc, W_dec=W_dec, b_enc=torch.zeros(n_features),
        b_dec=torch.zeros(d_model), threshold=torch.full((n_features,), 0.1), name="random",
    )  # fmt: skip


def random_model(size: Size) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    own = {"head_dim": size.head_dim} if size.head_dim else {}
    config = AutoConfig.for_model(
        size.family, vocab_size=size.vocabulary, hidden_size=size.d_model,
        intermediate_size=size.d_mlp, num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads, num_key_value_heads=size.n_kv_heads or size.n_heads,
        max_position_embeddings=2 * max(size.tokens, 200), initializer_range=0.06,
        tie_word_embeddings=False, **own,
    )  # fmt: skip
    with torch.device(size.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size.dtype))
    return model.eval().requires_grad_(False)


def random_batch(size: Size) -> Batch:
    """Prompts of equal length, each aimed at one token against two others."""
    generator = torch.Generator().manual_seed(0)
    n = size.prompts
    answers = torch.stack(
        [torch.randperm(size.vocabulary, generator=generator)[:3] for _ in range(n)]
    )
    tokens = torch.randint(size.vocabulary, (n, size.tokens), generator=generator)
    return _batch(tokens, answers[:, 0], answers[:, 1:], "random", size.device)


def _batch(tokens: Tensor, targets: Tensor, rivals: Tensor, name: str, device: str) -> Batch:
    n, length = tokens.shape
    targets, rivals = targets.to(device), rivals.to(device)
    names = tuple(f"{name}:{i}" for i in range(n))
    return Batch(
        ids=names,
        clusters=names,
        groups=("",) * n,
        texts=names,
        tokens=tokens.to(device),
        positions=torch.arange(length, device=device).repeat(n, 1),
        bos=torch.zeros(n, dtype=torch.bool, device=device),
        template=torch.full((n,), length, device=device),
        targets=targets,
        rivals=rivals,
        alternatives=rivals[:, :1],
    )


def busiest(subject: Subject, batch: Batch, site: Site, n: int) -> tuple[int, ...]:
    """The features that fire most on the prompts, so that the clamp has something to do."""
    positions = batch.positions[:, :1]
    replay = Replay.record(subject, batch, site, positions)
    sae, x = subject.sae(site).full(), replay.base
    fired = [(sae.encode(x, own) > 0).sum((0, 1)) for own in sae.blocks(x.shape[:-1].numel())]
    return tuple(torch.cat(fired).topk(n).indices.tolist())


def replayed(problem: Problem) -> Step:
    """holdfast's step on all prompts of a problem, as a search makes it."""
    return Step(
        problem, Lanes.of(problem, torch.arange(len(problem), device=problem.goal.device)).margin
    )


class Step:
    """holdfast's step on all prompts, for a way to compute the margin."""

    def __init__(self, problem: Problem, margin: Callable[[Tensor], Tensor]):
        self.problem, self.margin, self.stepper = problem, margin, Steepest()
        held = problem.held[problem.sites[0]]
        self.sets = NullSpace.of(held.W_enc, held.valid, held.slices(problem.batch.frame()))
        self.delta = torch.zeros(problem.shape, device=problem.goal.device)
        self.state = self.stepper.start(self.delta)

    def __call__(self) -> None:
        leaf = self.delta.requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.margin(leaf).sum(), leaf)
        radius = self.problem.radius
        move, self.state = self.stepper.move(
            self.state, self.sets.tangent(gradient, Iterate(self.delta))
        )
        moved = self.delta.detach() + (0.1 * radius)[:, None, None] * move
        self.delta = into_ball(self.sets.retract(moved), radius)
