"""Tiny subjects for tests, and contract checks that any plug-in can run.

Public on purpose: whoever adds an edit, a constraint or a behavior checks it with these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.batching import Batching
from holdfast.constraints import ConstraintKind
from holdfast.edits import Edit
from holdfast.hooks import apply_edits
from holdfast.problem import Problem, relative_violation
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject

WORDS = tuple(f"w{i}" for i in range(40))


def tiny_tokenizer() -> object:
    """One token a word, `<bos>` in front; the words are `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<bos>", "<eos>", "<unk>")
    ids = {word: i for i, word in enumerate((*special, *WORDS))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip


def tiny_model(seed: int = 0, d_model: int = 32, n_layers: int = 3, n_kv_heads: int = 2) -> object:
    """A randomly initialized Llama with grouped queries; nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4, hidden_size=d_model, intermediate_size=2 * d_model,
        num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=n_kv_heads,
        max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def random_sae(
    site: Site, d_model: int = 32, n_features: int = 64, seed: int = 0, jump: bool = True
) -> SAE:
    """An SAE with random unit decoder rows; thresholds above zero if `jump`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W_dec = normal(n_features, d_model)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    return SAE(
        site=site,
        W_enc=W_dec.T.clone() + 0.05 * normal(d_model, n_features),
        W_dec=W_dec,
        b_enc=0.1 * normal(n_features),
        b_dec=0.1 * normal(d_model),
        threshold=0.2 * normal(n_features).abs() if jump else torch.zeros(n_features),
        subtract_b_dec=not jump,
        name=f"random:{site}",
    )


def fitted_sae(site: Site, x: Tensor, n_features: int | None = None) -> SAE:
    """An SAE that reconstructs residuals x [tokens d_model]: one feature for each half of each
    principal direction in which they vary, the rest never fires. n_features: at least 4·d_model,
    8·d_model if left out.

    Read as it is written it explains all of the variance; read otherwise, or elsewhere, less. That
    is what preflight looks for in a real one.
    """
    d = x.shape[1]
    n = 8 * d if n_features is None else n_features
    assert n >= 4 * d, f"{n} features cannot be sparse in {d} directions"
    mean = x.mean(0)
    _, size, Vh = torch.linalg.svd(x - mean, full_matrices=False)
    directions = Vh[size > 1e-3 * size[0]]  # what never varies is not learned
    k = len(directions)
    W_dec = directions[torch.arange(n) % k]
    W_dec[k : 2 * k] = -directions
    b_enc = torch.zeros(n)
    b_enc[2 * k :] = -1e4  # far below any residual
    return SAE(
        site=site,
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=mean,
        threshold=torch.zeros(n),
        subtract_b_dec=True,
        name=f"fitted:{site}",
    )


def tiny_subject(
    seed: int = 0, sites: Sequence[Site] = (Site(1), Site(2)), batch_size: int = 128
) -> Subject:
    """A random Llama with random SAEs at `sites`."""
    saes = {site: random_sae(site, seed=seed + site.depth) for site in sites}
    return Subject.of("tiny", tiny_model(seed), tiny_tokenizer(), saes, Batching(batch_size))


def tiny_batch(subject: Subject, n: int = 6, ragged: bool = True, seed: int = 0) -> Batch:
    """n random prompts with an answer and two rivals; of different lengths if `ragged`."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[str]:
        return [WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist()]

    examples = []
    for i in range(n):
        length = 5 + (i % 4 if ragged else 0)
        answers = [WORDS[j] for j in torch.randperm(len(WORDS), generator=generator)[:4].tolist()]
        examples.append(
            Example(
                id=f"tiny:{i}",
                text=" ".join(words(length)),
                target=answers[0],
                rivals=tuple(answers[1:3]),
                alternatives=(answers[3],),
                cluster=f"tiny:{i}",
                group=f"g{i % 2}",
            )
        )
    return subject.batch(examples)


def tiny_problem(
    subject: Subject, batch: Batch, bank: FeatureBank, goal: float = 1.0, budget: float = 0.5
) -> Problem:
    """Raise every prompt's margin to `goal` by a perturbation at the last prompt token."""
    positions = batch.prompt_length[:, None] - 1
    replay = Replay.record(subject, batch, bank.site, positions)
    reference = replay.residual().norm(dim=(1, 2))
    return Problem(
        replay=replay,
        batch=batch,
        goal=torch.full_like(reference, goal),
        held={bank.site: bank},
        reference_norm=reference,
        radius=budget * reference,
    )


def check_edit(edit: Edit, batch: Batch, d_model: int, seed: int = 0) -> None:
    """The contract of an edit: it keeps shape and dtype, and what it does not select bit for bit.

    Raises AssertionError naming what does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    frame = batch.frame()
    for site in edit.sites:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(*frame.positions.shape, d_model, generator=generator).to(dtype)
            before = x.clone()
            selects = edit.selects(site, frame)
            after = apply_edits((edit,), site, x, frame)
            assert selects.shape == frame.positions.shape, f"{site}: selects {selects.shape}"
            assert not (selects & (frame.positions < 0)).any(), f"{site}: padding is selected"
            assert after.shape == before.shape and after.dtype == dtype, f"{site}: shape or dtype"
            assert torch.equal(x, before), f"{site}: the residual was changed in place"
            assert torch.equal(after[~selects], before[~selects]), f"{site}: unselected changed"


def check_constraint(constraint: ConstraintKind, problem: Problem, seed: int = 0) -> None:
    """The contract of a constraint's set: projections are idempotent, and the set is closed under
    scaling; if it claims to be exact and holds features, retracted points do not move them.

    Raises AssertionError naming what does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    feasible = constraint.feasible(problem)
    n = len(problem)
    assert feasible.dimension.shape == (n,), "one dimension a row"
    x = torch.randn(problem.shape, generator=generator)
    once = feasible.retract(x)
    assert torch.allclose(feasible.retract(once), once, atol=1e-5), "retract is not idempotent"
    assert torch.allclose(feasible.retract(0.3 * once), 0.3 * once, atol=1e-5), "not scalable"
    rows = torch.tensor([n - 1, 0, 0])
    assert torch.allclose(feasible.rows(rows).retract(x[rows]), once[rows], atol=1e-5), "rows mix"
    if constraint.promise in ("preactivations", "active"):
        leak = relative_violation(problem, once, torch.arange(n))
        assert leak.max() < 1e-6, f"claims to be exact, leaks {leak.max():.1e}"
