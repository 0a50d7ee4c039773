"""Edits on a plain transformers model do what they do on a subject, and leave nothing behind.

The subject knows its prompts; the plain model is only called. Everything it does is compared with
the subject's passes, token for token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from holdfast import attached
from holdfast.batch import Batch, Frame
from holdfast.discovery import with_scale
from holdfast.edits import Capture, Edit, FeatureEdit, Perturbation
from holdfast.errors import (
    EditError,
    EditNeverFiredError,
    FeatureError,
    PositionError,
    SubjectError,
)
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.hooks import AttachedEdits
from holdfast.interventions.clamp import Clamp, Condition
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_model, tiny_subject
from tests import families
from tests.unit.test_clamps import (
    IDS,
    POLICIES,
    SITE,
    both,
    chat_prompts,
    given,
    of_modes,
    of_policies,
    one_site,
    with_sae,
)
from tests.unit.test_hooks import full_pass, n_hooks, plain

N_NEW = 6
BY_PROMPT = ("prompt", "generated", "last_prompt", "template")


@pytest.fixture(scope="module")
def chats(subject: Subject) -> Batch:
    return chat_prompts(subject)


def at(subject: Subject, policy: str, value: float = 8.0, **fields: Any) -> FeatureEdit:
    """Features set to a value that changes what is generated, at a policy's positions."""
    edit, _ = both(subject, one_site(), "set", positions=POLICIES[policy], **fields)
    return replace(edit, value=value)


def generated(subject: Subject, batch: Batch, edits: tuple[Edit, ...], **options: Any) -> Tensor:
    """What `model.generate` adds to the prompts of a batch."""
    with attached(subject.model, edits, template_tokens=2):
        out = subject.model.generate(
            input_ids=batch.tokens, attention_mask=batch.mask,
            **{"do_sample": False, "max_new_tokens": N_NEW} | options,
        )  # fmt: skip
    return out[:, batch.tokens.shape[1] :]


def same_tokens(got: Tensor, expected: Tensor) -> bool:
    """Equal up to padding at the end."""
    width = min(got.shape[1], expected.shape[1])
    return torch.equal(got[:, :width], expected[:, :width]) and not (
        got[:, width:].any() or expected[:, width:].any()
    )


def on_the_right(batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens and mask of a batch, padded on the right."""
    lengths = batch.prompt_length.tolist()
    tokens, mask = torch.zeros_like(batch.tokens), torch.zeros_like(batch.mask)
    for row, length in enumerate(lengths):
        tokens[row, :length] = batch.tokens[row, -length:]
        mask[row, :length] = 1
    return tokens, mask


# --- One forward pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("include_bos", [False, True])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "generated"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_the_subjects_logits(
    subject: Subject, chats: Batch, policy: str, side: str, include_bos: bool
) -> None:
    edit = at(subject, policy, include_bos=include_bos)
    edit = replace(edit, where=(1, 3)) if policy == "listed" else edit
    real = chats.positions >= 0
    expected = subject.outputs(chats, (edit,), keep=real.shape[1])[real]
    tokens, mask = (chats.tokens, chats.mask) if side == "left" else on_the_right(chats)
    with torch.no_grad(), attached(subject.model, [edit], template_tokens=2):
        got = subject.model(tokens, attention_mask=mask).logits[mask.bool()]
        again = subject.model(
            input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits[mask.bool()]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)
    clean = subject.outputs(chats, keep=real.shape[1])[real]
    assert (got - clean).abs().max() > 0.1


def test_one_prompt_without_a_mask(subject: Subject) -> None:
    batch = tiny_batch(subject, 1)
    edit = at(subject, "all")
    expected = subject.outputs(batch, (edit,))[:, -1]
    with torch.no_grad(), attached(subject.model, [edit]):
        for output in (
            subject.model(batch.tokens).logits,
            subject.model(input_ids=batch.tokens, use_cache=False).logits,
            subject.model(batch.tokens, return_dict=False)[0],
        ):
            torch.testing.assert_close(output[:, -1], expected, atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_an_attached_clamp(subject: Subject, batch: Batch) -> None:
    edit = at(subject, "all")
    start = subject.model.get_input_embeddings()(batch.tokens).detach().requires_grad_(True)

    class Start(Capture):
        def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
            return start

    with attached(subject.model, [Start(Site(0)), edit]):
        out = subject.model(batch.tokens, attention_mask=batch.mask).logits[:, -1]
    assert torch.autograd.grad(out.sum(), start)[0].abs().max() > 0


# --- Generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("include_bos", [False, True])
@pytest.mark.parametrize("policy", of_policies("plain model"))
def test_generation_is_the_subjects_for_every_policy(
    subject: Subject, chats: Batch, policy: str, include_bos: bool
) -> None:
    edit = at(subject, policy, include_bos=include_bos)
    got = generated(subject, chats, (edit,))
    assert same_tokens(got, subject.generate(chats, (edit,), N_NEW))
    assert not same_tokens(got, subject.generate(chats, (), N_NEW))


@pytest.mark.parametrize("mode", of_modes("plain model"))
def test_generation_is_the_subjects_for_every_mode(
    subject: Subject, chats: Batch, batch: Batch, mode: str
) -> None:
    edit, _ = both(subject, with_scale(subject, batch, one_site()), mode)
    assert same_tokens(generated(subject, chats, (edit,)), subject.generate(chats, (edit,), N_NEW))


@pytest.mark.proves("clamp modes", "conditional", "plain model")
@pytest.mark.parametrize("policy", POLICIES)
def test_generation_is_the_subjects_for_a_conditional_clamp(
    subject: Subject, chats: Batch, policy: str
) -> None:
    edit = at(subject, policy, -12.0, condition=Condition(feature=7, above=0.1))
    got = generated(subject, chats, (edit,))
    assert same_tokens(got, subject.generate(chats, (edit,), N_NEW))
    assert not same_tokens(got, subject.generate(chats, (replace(edit, gate=None),), N_NEW))


@pytest.mark.parametrize("name", families.TINY)
def test_generation_is_the_subjects_for_every_family(name: str) -> None:
    attention = families.FAMILIES[name].attention[0]
    subject = families.family_subject(name, attention)
    batch = families.prompts(subject)
    for where in ("all", "last_prompt", "generated"):
        edit = families.clamp(subject, where)
        got = generated(subject, batch, (edit,))
        assert same_tokens(got, subject.generate(batch, (edit,), N_NEW)), where


def step_logits(
    subject: Subject, batch: Batch, rows: Tensor, new: Tensor, edits: tuple[Edit, ...]
) -> Tensor:
    """[n steps vocab] logits of each step, by a full pass a step; rows [n] of the batch."""
    own = batch.frame().rows(rows)
    tokens, positions, out = batch.tokens[rows], own.positions, []
    for step in range(new.shape[1]):
        with torch.no_grad():
            out.append(full_pass(subject, tokens, replace(own, positions=positions), edits))
        tokens = torch.cat([tokens, new[:, step : step + 1]], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return torch.stack(out, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_sampling_is_done_from_the_edited_logits(
    subject: Subject, chats: Batch, policy: str
) -> None:
    edit = at(subject, policy, 4.0)
    with attached(subject.model, [edit], template_tokens=2):
        done = subject.model.generate(
            input_ids=chats.tokens, attention_mask=chats.mask, max_new_tokens=N_NEW, do_sample=True,
            temperature=3.0, num_return_sequences=3, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    rows = torch.arange(len(chats)).repeat_interleave(3)
    new = done.sequences[:, chats.tokens.shape[1] :]
    assert len({tuple(row.tolist()) for row in new}) > len(chats), "it samples"
    expected = step_logits(subject, chats, rows, new, (edit,))
    torch.testing.assert_close(torch.stack(done.logits, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_are_scored_under_the_edit(subject: Subject, chats: Batch, policy: str) -> None:
    """Beams are reordered in the cache at every step; each keeps the positions of its prompt."""
    edit = at(subject, policy, 4.0)
    with attached(subject.model, [edit], template_tokens=2):
        done = subject.model.generate(
            input_ids=chats.tokens, attention_mask=chats.mask, max_new_tokens=N_NEW,
            min_new_tokens=N_NEW, do_sample=False, num_beams=4, num_return_sequences=4,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    rows = torch.arange(len(chats)).repeat_interleave(4)
    new = done.sequences[:, chats.tokens.shape[1] :]
    logits = step_logits(subject, chats, rows, new, (edit,))
    chosen = logits.log_softmax(-1).gather(-1, new[..., None]).squeeze(-1)
    expected = chosen.sum(1) / N_NEW
    torch.testing.assert_close(done.sequences_scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cache_filled_by_hand(subject: Subject, chats: Batch, policy: str) -> None:
    """The prompt in one call, then a token at a time; the model makes the cache or is given one."""
    edit = at(subject, policy)
    expected = subject.generate(chats, (edit,), N_NEW)
    for cache in (None, DynamicCache(config=subject.model.config)):
        tokens, mask, made = chats.tokens, chats.mask, []
        with torch.no_grad(), attached(subject.model, [edit], template_tokens=2):
            for _ in range(N_NEW):
                output = subject.model(
                    tokens, attention_mask=mask, past_key_values=cache,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
                )  # fmt: skip
                cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
                made.append(tokens)
                mask = torch.cat([mask, mask.new_ones(len(chats), 1)], 1)
        got = torch.cat(made, 1)
        ended = (expected == 0) & ((expected == 2).cumsum(1) > 0)  # padding after the end
        assert torch.equal(got[~ended], expected[~ended])


def test_two_caches_in_turn_keep_their_own_prompts(subject: Subject) -> None:
    edit = at(subject, "generated")
    batches = [tiny_batch(subject, 1, seed=seed) for seed in (3, 4)]
    batches[1] = batches[1].rows([0])
    expected = [subject.generate(batch, (edit,), 4) for batch in batches]
    state: list[Any] = [(batch.tokens, None) for batch in batches]
    got: list[list[int]] = [[], []]
    with torch.no_grad(), attached(subject.model, [edit]):
        for _ in range(4):
            for which, (tokens, cache) in enumerate(state):
                output = subject.model(tokens, past_key_values=cache)
                state[which] = (output.logits[:, -1:].argmax(-1), output.past_key_values)
                got[which].append(int(state[which][0]))
    assert got == [tokens[0].tolist() for tokens in expected]


def test_many_generations_in_one_block(subject: Subject, chats: Batch) -> None:
    edit = at(subject, "generated")
    batches = [chats, tiny_batch(subject, 5, seed=2), tiny_batch(subject, 1, seed=6), chats]
    with attached(subject.model, [edit]):
        for batch in batches:
            out = subject.model.generate(
                input_ids=batch.tokens, attention_mask=batch.mask, max_new_tokens=N_NEW,
                do_sample=False,
            )  # fmt: skip
            expected = subject_alone(subject, batch, edit)
            assert same_tokens(out[:, batch.tokens.shape[1] :], expected)


def subject_alone(subject: Subject, batch: Batch, edit: Edit) -> Tensor:
    """The subject's generation with a copy of its model, which nothing is attached to."""
    return tiny_subject().generate(batch, (edit,), N_NEW)


def test_edits_and_blocks_act_in_their_order(subject: Subject, chats: Batch) -> None:
    first, second = at(subject, "all", 6.0), at(subject, "all", -3.0)
    turned = replace(second, mode="multiply")
    model = subject.model
    options: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False}
    for order in ((first, turned), (turned, first)):
        expected = subject.generate(chats, order, N_NEW)
        assert same_tokens(generated(subject, chats, order), expected)
        with attached(model, [order[0]]), attached(model, [order[1]]):
            out = model.generate(chats.tokens, attention_mask=chats.mask, **options)
        assert same_tokens(out[:, chats.tokens.shape[1] :], expected)
    with attached(model, [first]):
        with attached(model, [turned]):
            model.generate(chats.tokens, attention_mask=chats.mask, **options)
        alone = model.generate(chats.tokens, attention_mask=chats.mask, **options)
    assert same_tokens(alone[:, chats.tokens.shape[1] :], subject.generate(chats, (first,), N_NEW))


def test_several_sites_at_once(chats: Batch) -> None:
    subject = tiny_subject(sites=(SITE, Site(3)))
    edits = tuple(
        edit
        for site, ids in ((SITE, (1, 5)), (Site(3), (2, 40)))
        for edit in Clamp(mode="set", value=7.0).edits(subject, one_site(ids, site))
    )
    assert same_tokens(generated(subject, chats, edits), subject.generate(chats, edits, N_NEW))


def test_a_topk_clamp_that_drops_the_error(subject: Subject, chats: Batch) -> None:
    """What no file can hold can still be attached."""
    from tests.unit.test_clamps import KINDS

    other = with_sae(subject, KINDS["topk"])
    edit, _ = both(other, one_site(), "set", error_term="drop")
    assert same_tokens(generated(other, chats, (edit,)), other.generate(chats, (edit,), N_NEW))


# --- Groups, BOS, listed positions ----------------------------------------------------------------


def test_features_by_group_need_a_group(
    subject: Subject, batch: Batch, grouped_features: FeatureSet
) -> None:
    (edit,) = Clamp(mode="set", value=8.0).edits(subject, grouped_features)
    with (
        pytest.raises(FeatureError, match=r"differ by group of prompts \(g0, g1\).*give group="),
        attached(subject.model, [edit]),
    ):
        pass
    for group in ("g0", "g1"):
        own = batch.rows([row for row, g in enumerate(batch.groups) if g == group])
        expected = subject.outputs(own, (edit,))[:, -1]
        with torch.no_grad(), attached(subject.model, [edit], group=group):
            got = subject.model(own.tokens, attention_mask=own.mask).logits[:, -1]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    with (
        pytest.raises(FeatureError, match=r"no features for the groups \['g7'\]"),
        attached(subject.model, [edit], group="g7"),
    ):
        subject.model(batch.tokens, attention_mask=batch.mask)


@contextmanager
def bos_is(subject: Subject, config: int | None, generation: int | None) -> Iterator[None]:
    model = subject.model
    before = (model.config.bos_token_id, model.generation_config.bos_token_id)
    model.config.bos_token_id, model.generation_config.bos_token_id = config, generation
    try:
        yield
    finally:
        model.config.bos_token_id, model.generation_config.bos_token_id = before


@pytest.mark.parametrize(
    "config, generation, left_alone", [(1, None, True), (None, 1, True), (None, None, False)]
)
def test_bos_is_what_the_models_configuration_says(
    subject: Subject, batch: Batch, config: int | None, generation: int | None, left_alone: bool
) -> None:
    seen, clean = Capture(SITE), Capture(SITE)
    with bos_is(subject, config, generation), torch.no_grad():
        with attached(subject.model, [at(subject, "all"), seen]):
            subject.model(batch.tokens, attention_mask=batch.mask)
        with attached(subject.model, [clean]):
            subject.model(batch.tokens, attention_mask=batch.mask)
    changed = (seen.seen[0][1] != clean.seen[0][1]).any(-1)
    assert torch.equal(changed, batch.positions >= (1 if left_alone else 0))


def test_a_first_token_that_is_no_bos_is_edited(subject: Subject, batch: Batch) -> None:
    tokens = torch.where(batch.positions == 0, 9, batch.tokens)
    seen = Capture(SITE)
    with torch.no_grad(), attached(subject.model, [seen]):
        subject.model(tokens, attention_mask=batch.mask)
    frame = seen.seen[0][0]
    assert not frame.bos.any()
    assert torch.equal(at(subject, "all").selects(SITE, frame), batch.positions >= 0)


def test_a_listed_position_must_be_there_in_every_row(subject: Subject, chats: Batch) -> None:
    shortest = int(chats.prompt_length.min())
    edit = replace(at(subject, "all"), where=(1, shortest))
    with (
        pytest.raises(PositionError, match=rf"positions \[{shortest}\] are listed"),
        attached(subject.model, [edit]),
    ):
        subject.model(chats.tokens, attention_mask=chats.mask)
    generated(subject, chats, (edit,))  # there it is the first generated one
    far = replace(edit, where=(1, int(chats.prompt_length.max()) + 1))
    with pytest.raises(PositionError, match="are listed, but the shortest sequence"):
        generated(subject, chats, (far,), max_new_tokens=3)
    beyond = replace(edit, where=(1, 60))  # in no row: text may end before it
    generated(subject, chats, (beyond,))
    with pytest.raises(EditNeverFiredError, match="touched no token"):
        generated(subject, chats, (replace(edit, where=(60,)),))


def test_an_edit_that_never_fired_is_an_error(subject: Subject, batch: Batch) -> None:
    with (
        pytest.raises(EditNeverFiredError, match="touched no token"),
        attached(subject.model, [at(subject, "generated")]),
    ):
        subject.model(batch.tokens, attention_mask=batch.mask)
    with (
        pytest.raises(EditNeverFiredError, match="touched no token"),
        attached(subject.model, [at(subject, "all")]),
    ):
        pass


# --- What cannot be known is refused --------------------------------------------------------------


@pytest.mark.parametrize("policy", BY_PROMPT)
def test_without_a_cache_prompts_have_no_end(subject: Subject, chats: Batch, policy: str) -> None:
    edit = at(subject, policy)
    with (
        pytest.raises(EditError, match=rf"\['{policy}'\] depend on where the prompt ends"),
        attached(subject.model, [edit], template_tokens=2),
    ):
        subject.model(chats.tokens, attention_mask=chats.mask, use_cache=False)
    with pytest.raises(EditError, match="use_cache=False every call looks like a new prompt"):
        generated(subject, chats, (edit,), use_cache=False)


def test_positions_that_need_no_prompt_need_no_cache(subject: Subject, chats: Batch) -> None:
    for where in ("all", (1, 2, 3)):
        edit = replace(at(subject, "all"), where=where)
        got = generated(subject, chats, (edit,), use_cache=False)
        assert same_tokens(got, subject.generate(chats, (edit,), N_NEW))


def test_embeddings_alone_are_refused(subject: Subject, batch: Batch) -> None:
    x = subject.model.get_input_embeddings()(batch.tokens)
    for run, options in ((subject.model, {}), (subject.model.generate, {"max_new_tokens": 2})):
        with (
            pytest.raises(EditError, match="called without input_ids"),
            attached(subject.model, [at(subject, "all")]),
        ):
            run(inputs_embeds=x, attention_mask=batch.mask, **options)


@pytest.mark.parametrize("policy", BY_PROMPT)
def test_an_assistant_is_refused_where_the_prompt_matters(subject: Subject, policy: str) -> None:
    batch = repeated(subject)
    for length in (2, N_NEW):
        with pytest.raises(EditError, match="assist"):
            generated(
                subject, batch, (at(subject, policy),), prompt_lookup_num_tokens=2,
                max_new_tokens=length,
            )  # fmt: skip


def repeated(subject: Subject) -> Batch:
    """One prompt that repeats itself, so that candidates are found in it."""
    batch = tiny_batch(subject, 1, seed=3)
    batch.tokens[:, 1:] = torch.tensor([7, 8, 7, 8, 7])
    return batch


def test_an_assistant_changes_nothing_where_it_does_not(subject: Subject) -> None:
    batch, edit = repeated(subject), at(subject, "all", 3.0)
    got = generated(subject, batch, (edit,), prompt_lookup_num_tokens=2)
    assert same_tokens(got, subject.generate(batch, (edit,), N_NEW))


def test_a_prompt_in_chunks(subject: Subject, chats: Batch) -> None:
    seen, edit = Capture(SITE), at(subject, "all")
    got = generated(subject, chats, (edit, seen), prefill_chunk_size=3)
    assert same_tokens(got, subject.generate(chats, (edit,), N_NEW))
    assert (chats.positions[:, :3] < 0).all(1).any(), "a first chunk that is padding alone"
    whole = torch.cat([frame.positions for frame, _ in seen.seen[:3]], 1)
    assert torch.equal(whole, chats.positions)
    for frame, _ in seen.seen:
        acted = edit.selects(SITE, frame)
        assert torch.equal(acted, frame.positions > 0), "BOS is left alone in whichever chunk"
    for policy in BY_PROMPT:
        with pytest.raises(EditError, match="without prefill chunks"):
            generated(subject, chats, (at(subject, policy),), prefill_chunk_size=6)


def test_a_cache_filled_without_the_edits_is_refused(subject: Subject, batch: Batch) -> None:
    """Its keys and values would be those of residuals that were not edited."""
    model, edit = subject.model, at(subject, "all")
    with torch.no_grad():
        cache = model(batch.tokens, attention_mask=batch.mask).past_key_values
    mask = torch.cat([batch.mask, batch.mask[:, -1:]], 1)
    with (
        pytest.raises(EditError, match="a cache that was filled without these edits"),
        attached(model, [edit]),
    ):
        model(batch.tokens[:, -1:], attention_mask=mask, past_key_values=cache)
    with torch.no_grad(), attached(model, [edit]):
        cache = model(batch.tokens, attention_mask=batch.mask).past_key_values
        with (
            pytest.raises(EditError, match="a cache that was filled without these edits"),
            attached(model, [at(subject, "all", -3.0)]),
        ):
            model(batch.tokens[:, -1:], attention_mask=mask, past_key_values=cache)
        with pytest.raises(EditError, match="has 3 rows, and its cache began with 8"):
            model(batch.tokens[:3, -1:], attention_mask=mask[:3], past_key_values=cache)


def test_masks_that_do_not_tell_where_padding_is_are_refused(
    subject: Subject, batch: Batch
) -> None:
    edit = at(subject, "all")
    with pytest.raises(EditError, match=r"got \[8, 1, .*dynamic cache"):
        generated(subject, batch, (edit,), cache_implementation="static")
    with (
        pytest.raises(EditError, match=r"expected an attention mask \[8, 9\].*got \[8, 8\]"),
        attached(subject.model, [edit]),
    ):
        subject.model(batch.tokens, attention_mask=batch.mask[:, 1:])


def test_position_ids_that_disagree_are_refused(subject: Subject, chats: Batch) -> None:
    tokens, mask = on_the_right(chats)
    with (
        pytest.raises(EditError, match="pad on the left"),
        attached(subject.model, [at(subject, "all")]),
    ):
        subject.model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
    packed = torch.tensor([[0, 1, 2, 0, 1]])  # two sequences in one row
    with (
        pytest.raises(EditError, match="row 0: position_ids are"),
        attached(subject.model, [at(subject, "all")]),
    ):
        subject.model(chats.tokens[:1, -5:], position_ids=packed)


def test_template_positions_need_to_be_told(subject: Subject, chats: Batch) -> None:
    edit = at(subject, "template")
    with (
        pytest.raises(EditError, match="give template_tokens"),
        attached(subject.model, [edit]),
    ):
        pass
    with (
        pytest.raises(PositionError, match="the shortest prompt has 5 tokens in all"),
        attached(subject.model, [edit], template_tokens=5),
    ):
        subject.model(chats.tokens, attention_mask=chats.mask)


def test_an_unknown_family_or_site_is_refused(subject: Subject, batch: Batch) -> None:
    with (
        pytest.raises(EditError, match=r"no site .* the model has 3 blocks"),
        attached(subject.model, [Capture(Site(9))]),
    ):
        pass
    inner = subject.model.model  # the decoder without its head
    with (
        pytest.raises(SubjectError, match="keeps no decoder blocks"),
        attached(inner, [at(subject, "all")]),
    ):
        pass
    vectors = {SITE: torch.randn(len(batch), 1, 32)}
    added = Perturbation(batch.ids, batch.prompt_length[:, None] - 1, vectors)
    with (
        pytest.raises(PositionError, match=r"no vectors for the prompts \['row 0'"),
        attached(subject.model, [added]),
    ):
        subject.model(batch.tokens, attention_mask=batch.mask)


def test_parts_of_the_model_called_alone_are_refused(subject: Subject, batch: Batch) -> None:
    """Before any call of the whole model, and after one, whose positions would be stale."""
    with torch.no_grad(), attached(subject.model, [at(subject, "all")]):
        with pytest.raises(EditError, match="expected a call of the whole model"):
            subject.model.model(batch.tokens, attention_mask=batch.mask)
        subject.model(batch.tokens, attention_mask=batch.mask)
        with pytest.raises(EditError, match="expected a call of the whole model"):
            subject.model.model(batch.tokens, attention_mask=batch.mask)


# --- Nothing is left behind -----------------------------------------------------------------------


def test_the_model_is_as_it_was(batch: Batch) -> None:
    subject = tiny_subject()
    model = subject.model
    keys, attributes = list(model.state_dict()), set(vars(model))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, hooks = plain(subject, batch, 3), n_hooks(subject)
    with attached(model, [at(subject, "all")]):
        assert list(model.state_dict()) == keys
        assert n_hooks(subject) == hooks + 3, "one on the block, two on the model"
        model.generate(batch.tokens, attention_mask=batch.mask, max_new_tokens=3, do_sample=False)
        with attached(model, [at(subject, "generated")]):
            model.generate(
                batch.tokens, attention_mask=batch.mask, max_new_tokens=3, do_sample=False
            )
    assert n_hooks(subject) == hooks
    assert list(model.state_dict()) == keys and set(vars(model)) == attributes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(plain(subject, batch, 3), before)


def test_hooks_are_gone_after_an_exception(subject: Subject, batch: Batch) -> None:
    before, edit = n_hooks(subject), at(subject, "all")

    class Broken(Capture):
        def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
            raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"), attached(subject.model, [Broken(SITE)]):
        subject.model(batch.tokens, attention_mask=batch.mask)
    assert n_hooks(subject) == before
    with pytest.raises(KeyError), attached(subject.model, [edit]):
        raise KeyError("in the block itself, before any call")
    assert n_hooks(subject) == before
    with (
        pytest.raises(RuntimeError, match="broken edit"),
        attached(subject.model, [edit]),
        attached(subject.model, [Broken(SITE)]),
    ):
        subject.model(batch.tokens, attention_mask=batch.mask)
    assert n_hooks(subject) == before
    with pytest.raises(EditError, match="got list"), attached(subject.model, [edit]):
        subject.model(batch.tokens, attention_mask=[1])
    assert n_hooks(subject) == before
    # and it can be attached again at once
    with torch.no_grad(), attached(subject.model, [edit]):
        got = subject.model(batch.tokens, attention_mask=batch.mask).logits[:, -1]
    expected = subject.outputs(batch, (edit,))[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_frame_follows_the_residual_to_another_device(subject: Subject, batch: Batch) -> None:
    """A model spread over devices hands its residual on; positions have to go along."""
    seen = Capture(SITE)
    attached_edits = AttachedEdits(subject.model.model.layers, [seen])
    attached_edits.frame = batch.frame()
    # Nothing can be read of a meta tensor: here nobody asks whether the edit selects anything.
    attached_edits._edit(SITE, torch.empty(*batch.tokens.shape, 32, device="meta"))
    assert attached_edits.frame.positions.device.type == "meta"
    ((frame, x),) = seen.seen
    assert {frame.positions.device.type, x.device.type} == {"meta"}


def test_models_of_one_architecture_do_not_share_hooks(subject: Subject, batch: Batch) -> None:
    other: Any = tiny_model(seed=1)
    with torch.no_grad():
        before = other(batch.tokens, attention_mask=batch.mask).logits
        with attached(subject.model, [at(subject, "all")]):
            subject.model(batch.tokens, attention_mask=batch.mask)
            assert torch.equal(other(batch.tokens, attention_mask=batch.mask).logits, before)


def test_a_clamp_of_a_study_can_be_attached(subject: Subject, batch: Batch) -> None:
    kind = given("set_where_active", -5.0, SiteFeatures(site=str(SITE), ids=IDS))
    edits = kind.edits(subject, kind.clamped(one_site()))
    assert same_tokens(generated(subject, batch, edits), subject.generate(batch, edits, N_NEW))
