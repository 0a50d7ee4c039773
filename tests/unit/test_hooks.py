"""Hooks act where they say, at absolute positions, and leave nothing behind."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from holdfast.batch import Batch, Frame
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.errors import EditError, EditNeverFiredError, NonFiniteError, PositionError
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import check_edit, tiny_batch

SITE = Site(2)


def plain(subject: Subject, batch: Batch, keep: int) -> torch.Tensor:
    """transformers by itself, called as the subject calls it."""
    with torch.no_grad():
        return subject.model(
            input_ids=batch.tokens,
            attention_mask=batch.mask,
            position_ids=batch.positions.clamp(min=0),
            use_cache=False,
            logits_to_keep=keep,
        ).logits


def n_hooks(subject: Subject) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())


def test_no_edit_and_an_edit_of_nothing_are_bit_equal_to_transformers(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    keep = batch.tokens.shape[1]
    expected = plain(subject, batch, keep)
    assert torch.equal(subject.outputs(batch, keep=keep), expected)
    # "multiply by one" changes no feature; the splice then adds exact zeros
    nothing = replace(clamp, mode="multiply", value=1.0)
    assert torch.equal(subject.outputs(batch, (nothing,), keep=keep), expected)
    assert torch.equal(subject.outputs(batch, (Capture(SITE),), keep=keep), expected)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_capture_reads_what_an_independent_hook_reads(
    subject: Subject, batch: Batch, depth: int
) -> None:
    blocks = subject.model.model.layers
    seen = []
    if depth == 0:
        handle = blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        handle = blocks[depth - 1].register_forward_hook(lambda m, a, out: seen.append(out))
    plain(subject, batch, 1)
    handle.remove()
    capture = Capture(Site(depth))
    subject.outputs(batch, (capture,))
    real = batch.positions >= 0
    assert torch.equal(capture.seen[0][1][real], seen[0][real])


def test_hooks_are_gone_after_a_pass_and_after_an_exception(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    before = n_hooks(subject)
    subject.outputs(batch, (clamp,))
    assert n_hooks(subject) == before

    class Broken(Capture):
        def apply(self, site: Site, x: torch.Tensor, frame: Frame) -> torch.Tensor:
            raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        subject.outputs(batch, (clamp, Broken(SITE)))
    assert n_hooks(subject) == before
    with pytest.raises(EditError, match="no site"):
        subject.outputs(batch, (clamp, Capture(Site(9))))
    assert n_hooks(subject) == before


def test_an_edit_that_never_fired_is_an_error(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    with pytest.raises(PositionError, match=r"position 0 is listed, .* that is BOS"):
        subject.outputs(batch, (replace(clamp, where=(0,)),))
    with pytest.raises(EditNeverFiredError, match="touched no token"):
        subject.outputs(batch, (replace(clamp, where="generated"),))


def test_a_position_outside_the_sequence_is_an_error_never_skipped(
    subject: Subject, batch: Batch
) -> None:
    positions = batch.prompt_length[:, None].clone()  # one past the end
    delta = torch.randn(len(batch), 1, 32)
    with pytest.raises(PositionError, match="the sequence has positions 0 to"):
        subject.outputs(batch, (Perturbation(batch.ids, positions, {SITE: delta}),))
    other = Perturbation(tuple("abcdefgh"), positions - 1, {SITE: delta})
    with pytest.raises(PositionError, match="no vectors for the prompts"):
        subject.outputs(batch, (other,))


def test_a_listed_position_that_some_prompts_lack_is_an_error(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    shortest = int(batch.prompt_length.min())
    subject.outputs(batch, (replace(clamp, where=(shortest - 1,)),))
    beyond = replace(clamp, where=(1, shortest))
    with pytest.raises(PositionError, match=rf"positions \[{shortest}\] are listed"):
        subject.outputs(batch, (beyond,))
    subject.generate(batch, (beyond,), 2)  # there it is the first generated one


def test_left_padded_batches_equal_single_prompts(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    positions = batch.prompt_length[:, None] - 1
    added = Perturbation(batch.ids, positions, {SITE: torch.randn(len(batch), 1, 32)})
    for edits in ((), (clamp,), (clamp, added)):
        together = subject.outputs(batch, edits)
        single = torch.cat([subject.outputs(batch.rows([i]), edits) for i in range(len(batch))])
        torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["all", "prompt", "last_prompt", "generated", (2, 9)])
def test_cached_generation_equals_the_full_forward(
    subject: Subject, clamp: FeatureEdit, where: object
) -> None:
    """Token for token and at every step, with edits on prompt and generated positions."""
    batch = tiny_batch(subject, 5, seed=3)
    n_new = 6
    edit = replace(clamp, mode="set", value=4.0, where=where)
    # perturbations at the last prompt token and at the second generated one
    length = batch.prompt_length[:, None]
    positions = torch.cat([length - 1, length + 1], 1)
    added = Perturbation(batch.ids, positions, {SITE: 3 * torch.randn(len(batch), 2, 32)})
    edits = (edit, added)
    cached = subject.generate(batch, edits, n_new)

    tokens, frame_positions = batch.tokens, batch.positions
    done = torch.zeros(len(batch), dtype=torch.bool)
    eos, pad = subject.tokenizer.eos_token_id, subject.tokenizer.pad_token_id
    from holdfast.hooks import AttachedEdits

    for step in range(cached.shape[1]):
        with torch.no_grad(), AttachedEdits(subject.model.model.layers, ()) as attached:
            # a reference of its own: one full pass a step, edits applied by `apply_edits`
            attached.frame = None
            frame = replace(batch.frame(), positions=frame_positions)
            logits = full_pass(subject, tokens, frame, edits)
        chosen = torch.where(done, pad, logits.argmax(-1))
        assert torch.equal(chosen, cached[:, step]), f"step {step}"
        done |= chosen == eos
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        frame_positions = torch.cat([frame_positions, frame_positions[:, -1:] + 1], 1)


def full_pass(
    subject: Subject, tokens: torch.Tensor, frame: Frame, edits: tuple[object, ...]
) -> torch.Tensor:
    """Logits at the last column, block by block without hooks and without a cache."""
    from holdfast.hooks import apply_edits

    model = subject.model.model
    positions = frame.positions.clamp(min=0)
    x = apply_edits(edits, Site(0), model.embed_tokens(tokens), frame)  # type: ignore[arg-type]
    rotary = model.rotary_emb(x, position_ids=positions)
    n = tokens.shape[1]
    real = frame.positions >= 0
    visible = torch.tril(torch.ones(n, n, dtype=torch.bool))[None] & real[:, None, :]
    visible = visible | torch.eye(n, dtype=torch.bool)[None]  # padding sees itself: no NaN
    mask = torch.where(visible[:, None], 0.0, torch.finfo(torch.float32).min)
    for layer, block in enumerate(model.layers):
        x = block(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        x = apply_edits(edits, Site(layer + 1), x, frame)  # type: ignore[arg-type]
    return subject.model.lm_head(model.norm(x[:, -1]))


def test_generation_without_edits_equals_transformers_generate(subject: Subject) -> None:
    batch = tiny_batch(subject, 5, seed=7)
    expected = subject.model.generate(
        input_ids=batch.tokens, attention_mask=batch.mask, max_new_tokens=6, do_sample=False
    )[:, batch.tokens.shape[1] :]
    got = subject.generate(batch, (), 6)
    assert torch.equal(got, expected[:, : got.shape[1]])


def test_nan_logits_are_an_error_that_names_the_prompts(subject: Subject, batch: Batch) -> None:
    positions = batch.prompt_length[:, None] - 1
    delta = torch.zeros(len(batch), 1, 32)
    delta[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1 of 8 prompts \(first: \['tiny:3'\]\)"):
        subject.outputs(batch, (Perturbation(batch.ids, positions, {SITE: delta}),))


def test_edits_keep_their_contract(subject: Subject, batch: Batch, clamp: FeatureEdit) -> None:
    positions = torch.cat([batch.prompt_length[:, None] - 1, torch.full((8, 1), -1)], 1)
    check_edit(clamp, batch, 32)
    check_edit(
        replace(clamp, where="last_prompt", error_scale=0.3, sae=subject.sae(SITE)), batch, 32
    )
    check_edit(Perturbation(batch.ids, positions, {SITE: torch.randn(8, 2, 32)}), batch, 32)
    check_edit(Capture(SITE), batch, 32)


def test_a_cache_holds_the_edited_prompt(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    """Keys of the layers above the site are those of the clamped residual."""
    edit = replace(clamp, mode="set", value=4.0)
    from holdfast.hooks import AttachedEdits

    caches = []
    for edits in ((), (edit,)):
        cache = DynamicCache(config=subject.model.config)
        with torch.no_grad(), AttachedEdits(subject.model.model.layers, edits) as attached:
            attached.frame = batch.frame()
            subject.model(
                input_ids=batch.tokens, attention_mask=batch.mask,
                position_ids=batch.positions.clamp(min=0), past_key_values=cache,
            )  # fmt: skip
        caches.append(cache)
    assert torch.equal(caches[0].layers[1].keys, caches[1].layers[1].keys)
    assert not torch.equal(caches[0].layers[2].keys, caches[1].layers[2].keys)


def test_nothing_piles_up_over_many_passes(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    """Tracing libraries leaked tensors pass by pass; here as many are alive after 50 as after 5."""

    def alive() -> int:
        gc.collect()
        return sum(1 for obj in gc.get_objects() if type(obj) is torch.Tensor)

    def passes(n: int) -> int:
        for _ in range(n):
            subject.outputs(batch, (clamp,))
            logits = subject.forward_with_gradients(batch, (clamp,))
            del logits
        return alive()

    first = passes(5)
    assert passes(50) <= first
