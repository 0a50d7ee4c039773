"""Every family of the table, on tiny random models: what holds for one holds for all.

Each test runs in every attention implementation that the family's row allows, and is a ✓ in
docs/support.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from holdfast.batch import Batch, Frame
from holdfast.batching import Batching
from holdfast.block_calls import with_cache
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.edits import Capture, Edit, FeatureEdit, Perturbation
from holdfast.errors import EditError, SubjectError
from holdfast.families import FAMILIES, Family, d_model_of, family_of
from holdfast.gates import DirectionGate, Sensor
from holdfast.hooks import AttachedEdits
from holdfast.prefix import PrefixCache, by_formula
from holdfast.problem import Problem
from holdfast.replay import Replay
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import random_sae
from tests.families import (
    BITES,
    CASES,
    CLAMPED,
    D_MODEL,
    N_LAYERS,
    OFF,
    SITES,
    TINY,
    clamp,
    family_subject,
    model_of,
    prompts,
)


def in_every_family(*columns: str) -> pytest.MarkDecorator:
    """Run a test on every tiny subject; it proves `columns` of the family's row."""
    return pytest.mark.parametrize(
        "subject",
        [
            pytest.param(
                (name, attention),
                id=f"{name}-{attention}",
                marks=[pytest.mark.proves("families", name, column) for column in columns],
            )
            for name, attention in CASES
        ],
        indirect=True,
    )


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return family_subject(*request.param)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def plain(subject: Subject, tokens: Tensor, positions: Tensor, **options: Any) -> Any:
    """transformers by itself, without a cache."""
    with torch.no_grad():
        return subject.model(
            input_ids=tokens,
            attention_mask=(positions >= 0).long(),
            position_ids=positions.clamp(min=0),
            use_cache=False,
            **options,
        )


def last_positions(batch: Batch) -> Tensor:
    return batch.prompt_length[:, None] - 1


def perturbation(batch: Batch, site: Site, positions: Tensor) -> Perturbation:
    return Perturbation(batch.ids, positions, {site: torch.randn(*positions.shape, D_MODEL)})


def test_every_row_of_the_table_is_tested() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name, settings in BITES.items() for setting in settings],
)
def test_what_makes_a_family_hard_shows_in_its_logits(name: str, setting: str) -> None:
    subject = family_subject(name, FAMILIES[name].attention[0])
    config = TINY[name]()
    setattr(config.get_text_config(), setting, OFF[setting])
    without = replace(subject, model=model_of(config, FAMILIES[name].attention[0]))
    batch = prompts(subject)
    assert (subject.outputs(batch) - without.outputs(batch)).abs().max() > 0.1


@in_every_family("loading")
def test_a_saved_model_loads_as_the_row_says(subject: Subject, tmp_path: Path) -> None:
    subject.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=subject.model.config._attn_implementation
    )
    loaded = Subject.of("loaded", model.eval(), subject.tokenizer, subject.saes)
    assert len(loaded.family.blocks_of(loaded.model)) == N_LAYERS
    assert d_model_of(loaded.model.config) == D_MODEL
    batch = prompts(subject)
    close(loaded.outputs(batch), subject.outputs(batch))


@in_every_family("no edit")
def test_no_edit_and_edits_of_nothing_are_bit_equal_to_transformers(subject: Subject) -> None:
    batch = prompts(subject)
    width = batch.tokens.shape[1]
    expected = plain(subject, batch.tokens, batch.positions).logits
    assert torch.equal(subject.outputs(batch, keep=width), expected)
    keep_all = replace(clamp(subject), mode="multiply", value=1.0)
    nowhere = Perturbation(batch.ids, last_positions(batch), {CLAMPED: torch.zeros(4, 1, D_MODEL)})
    for nothing in (keep_all, nowhere, *map(Capture, SITES)):
        assert torch.equal(subject.outputs(batch, (nothing,), keep=width), expected)


@in_every_family("residuals")
def test_residuals_are_what_transformers_reads(subject: Subject) -> None:
    batch = prompts(subject)
    captures = tuple(map(Capture, SITES))
    subject.outputs(batch, captures)
    read = [capture.seen[0][1] for capture in captures]
    output = plain(subject, batch.tokens, batch.positions, output_hidden_states=True)
    # transformers' last hidden state is taken after the final norm
    for depth in range(N_LAYERS):
        assert torch.equal(read[depth], output.hidden_states[depth]), f"depth {depth}"
    norm = subject.model.get_submodule(subject.family.final_norm)
    assert torch.equal(norm(read[-1]), output.hidden_states[-1])
    close(subject.family.unembed_of(subject.model, read[-1]), output.logits)
    tokens = torch.randint(0, output.logits.shape[-1], (len(read[-1]), 3))
    some = subject.family.unembed_of(subject.model, read[-1][:, -1], tokens)
    close(some, output.logits[:, -1].gather(1, tokens))


@in_every_family("residuals")
@pytest.mark.parametrize("site", [SITES[0], SITES[2], SITES[-1]], ids=str)
def test_an_edit_does_what_a_hook_written_by_hand_does(subject: Subject, site: Site) -> None:
    batch = prompts(subject)
    edit = perturbation(batch, site, last_positions(batch))

    def add(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, -1] += edit.deltas[site][:, 0]
        return x

    blocks = subject.family.blocks_of(subject.model)
    if site.depth == 0:
        handle = blocks[0].register_forward_pre_hook(lambda m, args: (add(args[0]), *args[1:]))
    else:
        handle = blocks[site.layer].register_forward_hook(lambda m, args, out: add(out))
    with handle:
        expected = plain(subject, batch.tokens, batch.positions).logits[:, -1:]
    edited = subject.outputs(batch, (edit,))
    close(edited, expected)
    assert (edited - subject.outputs(batch)).abs().max() > 0.1


@in_every_family("padding")
def test_left_padded_batches_equal_single_prompts(subject: Subject) -> None:
    batch = prompts(subject)
    added = perturbation(batch, Site(3), last_positions(batch))
    for edits in ((), (clamp(subject),), (clamp(subject), added)):
        single = torch.cat([subject.outputs(batch.rows([i]), edits) for i in range(len(batch))])
        close(subject.outputs(batch, edits), single)
        close(replace(subject, batching=Batching(3)).outputs(batch, edits), single)


@in_every_family("padding")
@pytest.mark.parametrize("where", ["all", "last_prompt"])
def test_right_padded_batches_equal_left_padded_ones(subject: Subject, where: str) -> None:
    """Edits go by absolute positions, so that the side of the padding does not matter."""
    batch = prompts(subject)
    tokens, positions = torch.zeros_like(batch.tokens), torch.full_like(batch.positions, -1)
    for row, length in enumerate(batch.prompt_length.tolist()):
        tokens[row, :length] = batch.tokens[row, -length:]
        positions[row, :length] = torch.arange(length)
    last = last_positions(batch)
    capture = Capture(SITES[-1])
    edits = (clamp(subject, where), perturbation(batch, Site(3), last), capture)
    logits = full_pass(subject, tokens, replace(batch.frame(), positions=positions), edits)
    at_last = logits[torch.arange(len(batch)), last[:, 0]]
    resid = capture.at(batch.ids, last)
    capture.seen.clear()
    close(at_last, subject.outputs(batch, edits)[:, -1])
    close(resid, capture.at(batch.ids, last))


def full_pass(subject: Subject, tokens: Tensor, frame: Frame, edits: Sequence[Edit]) -> Tensor:
    """Logits [b s vocab] of one pass without a cache, with edits on."""
    with AttachedEdits(subject.family.blocks_of(subject.model), edits) as attached:
        attached.frame = frame
        return plain(subject, tokens, frame.positions).logits


@in_every_family("generation")
@pytest.mark.parametrize("where", ["all", "prompt", "last_prompt", "generated"])
def test_cached_generation_equals_repeated_full_passes(subject: Subject, where: str) -> None:
    """Token for token, and in the logits of every step, from the keys and values that another
    vector's text left of the tokens before it."""
    batch = prompts(subject)
    length = batch.prompt_length[:, None]
    # the last prompt token and the second generated one
    added = perturbation(batch, Site(3), torch.cat([length - 1, length + 1], 1))
    edits = (clamp(subject, where), added)
    other = perturbation(batch, Site(3), length - 1)
    subject.generate(batch, (edits[0], other), 6)
    stepwise: list[Tensor] = []
    with subject.model.register_forward_hook(lambda m, a, out: stepwise.append(out.logits[:, -1])):
        cached = subject.generate(batch, edits, 6)

    tokens, positions = batch.tokens, batch.positions
    done = torch.zeros(len(batch), dtype=torch.bool)
    # `positions` grows, the prompt's length stays: new tokens are generated ones. One `with` for
    # all steps, as an edit of generated tokens does not fire in the first.
    with AttachedEdits(subject.family.blocks_of(subject.model), edits) as attached:
        for step in range(cached.shape[1]):
            attached.frame = replace(batch.frame(), positions=positions)
            logits = plain(subject, tokens, positions).logits[:, -1]
            close(stepwise[step], logits)
            chosen = torch.where(done, subject.tokenizer.pad_token_id, logits.argmax(-1))
            assert torch.equal(chosen, cached[:, step]), f"step {step}"
            done |= chosen == subject.tokenizer.eos_token_id
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)


@in_every_family("generation")
def test_generation_without_edits_equals_transformers_generate(subject: Subject) -> None:
    batch = prompts(subject)
    expected = subject.model.generate(
        input_ids=batch.tokens, attention_mask=batch.mask, max_new_tokens=6, do_sample=False
    )[:, batch.tokens.shape[1] :]
    got = subject.generate(batch, (), 6)
    assert torch.equal(got, expected[:, : got.shape[1]])


RAGGED, EVEN = (5, 14, 8, 11), (9, 9, 9)


def positions_of(batch: Batch, where: str) -> Tensor:
    length = batch.prompt_length[:, None]
    if where == "last":
        return length - 1
    if where == "last three":
        return torch.cat([length - 3, length - 2, length - 1], 1)
    if where == "from the start":
        return torch.cat([torch.zeros_like(length), length - 2], 1)
    if where == "early":  # the columns before them are padding in every shorter row
        return torch.cat([torch.full_like(length, 2), length - 1], 1)
    positions = torch.cat([length - 3, length - 1], 1)
    positions[::2, 0] = -1  # some rows have one position fewer
    return positions


@in_every_family("replay logits", "replay gradients")
@pytest.mark.parametrize("site", [SITES[0], SITES[2], SITES[-1]], ids=str)
@pytest.mark.parametrize(
    ("lengths", "where", "clamp_first"),
    [
        pytest.param(RAGGED, "last", True, id="ragged-last"),
        pytest.param(RAGGED, "last three", False, id="ragged-three"),
        pytest.param(RAGGED, "from the start", True, id="ragged-start"),
        pytest.param(RAGGED, "early", False, id="ragged-early"),
        pytest.param(RAGGED, "fewer in some", True, id="ragged-fewer"),
        pytest.param(EVEN, "last", False, id="even-last"),
        pytest.param(EVEN, "last three", True, id="even-three"),
    ],
)
def test_replay_equals_the_full_pass(
    subject: Subject, site: Site, lengths: tuple[int, ...], where: str, clamp_first: bool
) -> None:
    batch = prompts(subject, lengths)
    clamped = clamp(subject)
    positions = positions_of(batch, where)
    added = perturbation(batch, site, positions)
    delta = added.deltas[site].requires_grad_()
    weight = torch.randn(len(batch), subject.model.config.get_text_config().vocab_size)
    weight /= weight.norm(dim=1, keepdim=True)  # the gradient along one unit of logits
    edits = (clamped, added) if clamp_first else (added, clamped)

    replay = recorded(subject, batch, site, positions, clamp_first)
    logits = replay.logits(delta)
    close(logits, subject.outputs(batch, edits)[:, -1])
    full = subject.forward_with_gradients(batch, edits)
    expected = torch.autograd.grad((full * weight).sum(), delta)[0]
    close(torch.autograd.grad((logits * weight).sum(), delta)[0], expected)

    rows = torch.tensor([2, 0, 0, 1])
    close(replay.rows(rows).logits(delta[rows]), logits[rows])
    alone = recorded(subject, batch.rows([1]), site, positions[1:2], clamp_first)
    lanes = alone.rows(torch.zeros(3, dtype=torch.long))
    close(lanes.logits(delta[1:2].expand(3, -1, -1)), logits[1:2].expand(3, -1))


def recorded(
    subject: Subject, batch: Batch, site: Site, positions: Tensor, clamp_first: bool
) -> Replay:
    edits = (clamp(subject),)
    before, after = (edits, ()) if clamp_first else ((), edits)
    return Replay.record(subject, batch, site, positions, before=before, after=after)


@in_every_family("replay logits")
@pytest.mark.parametrize("lengths", [(5, 14, 14, 14, 8), (9, 9, 9)], ids=["ragged", "even"])
@pytest.mark.parametrize("where", ["last", "last three"])
def test_recorded_in_pieces_equals_recorded_at_once(
    subject: Subject, lengths: tuple[int, ...], where: str
) -> None:
    """One piece of the ragged batch has no padding, and of a single query transformers then leaves
    the mask out."""
    batch = prompts(subject, lengths)
    positions = positions_of(batch, where)
    delta = torch.randn(*positions.shape, D_MODEL)
    at_once = recorded(subject, batch, SITES[1], positions, True)
    pieces = recorded(replace(subject, batching=Batching(2)), batch, SITES[1], positions, True)
    close(pieces.logits(delta), at_once.logits(delta))
    close(pieces.residual(), at_once.residual())
    rows = torch.tensor([2, 0, 0, 1])
    close(pieces.rows(rows).logits(delta[rows]), at_once.logits(delta)[rows])


class HeldFeatures:
    """`feature_hold` written by hand, as an edit of full passes: the residual at some positions is
    put back to the reference along the encoder columns that a clamp holds."""

    def __init__(self, edit: FeatureEdit, positions: Tensor, reference: Tensor):
        self.site, self.positions, self.reference = edit.bank.site, positions, reference
        self.basis = torch.linalg.qr(edit.bank.W_enc[0]).Q

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        here = frame.positions[:, None] == self.positions[..., None]
        return (here & (self.positions[..., None] >= 0)).any(1)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        for p in range(self.positions.shape[1]):
            here = (frame.positions == self.positions[:, p, None]) & (frame.positions >= 0)
            off = (x - self.reference[:, p, None]) @ self.basis @ self.basis.T
            x = torch.where(here[..., None], x - off, x)
        return x

    def check_fired(self, site: Site, n_fired: int) -> None:
        assert n_fired


ANSWERS = ([5, 6, 7], [8], [9, 10], [11, 12, 13])


@in_every_family("several held layers")
@pytest.mark.parametrize("forced", [False, True], ids=["next token", "forced answer"])
def test_several_clamped_layers_that_are_held_replay_as_the_full_pass_runs(
    subject: Subject, forced: bool
) -> None:
    """Clamps at two sites, vectors at both, `feature_hold` on the way, in ragged prompts; read at
    the next token, or along answers of several lengths, with a vector at one of their tokens."""
    later = Site(3)
    both = replace(subject, saes={**subject.saes, later: random_sae(later, D_MODEL, seed=5)})
    clamps = (clamp(subject), clamp(both, site=later))
    batch = prompts(subject, RAGGED)
    positions = positions_of(batch, "fewer in some")
    if forced:
        batch, last = batch.forcing(ANSWERS), last_positions(batch)
        longer = torch.tensor([[len(answer) > 1] for answer in ANSWERS])
        positions = torch.cat([last, torch.where(longer, last + 1, -1)], 1)
    replay = Replay.record(both, batch, (CLAMPED, later), positions, before=clamps)
    nowhere = torch.ones(len(batch))
    banks = {edit.bank.site: edit.bank for edit in clamps}
    problem = Problem(replay, batch, nowhere, banks, nowhere, nowhere)
    replay = FeatureHold().acting(problem).replay
    assert set(replay.hold) == {CLAMPED, later}
    delta = torch.randn(len(batch), 4, D_MODEL, requires_grad=True)
    by_hand = [HeldFeatures(own, positions, replay.reference[own.bank.site]) for own in clamps]

    logits = replay.logits(delta)
    added = Perturbation(batch.ids, positions, replay.parts(delta))
    full = both.forward_with_gradients(batch, (*clamps, added, *by_hand))
    close(logits, full)
    weight = torch.randn_like(full)
    weight /= weight.flatten(1).norm(dim=1).view(-1, *[1] * (full.ndim - 1))
    used = (positions >= 0).repeat(1, 2)
    expected = torch.autograd.grad((full * weight).sum(), delta)[0][used]
    close(torch.autograd.grad((logits * weight).sum(), delta)[0][used], expected)
    unheld = both.forward_with_gradients(batch, (*clamps, added))
    assert (unheld - full).abs().max() > 0.01, "holding does something"

    really = Perturbation(batch.ids, positions, replay.parts(replay.realized(delta).detach()))
    close(logits.detach(), both.read(batch, (*clamps, really)))


@in_every_family("whole sequence")
def test_a_clamp_that_the_prompt_decides_on_is_replayed_whole(subject: Subject) -> None:
    """A vector at the last token takes a prompt over the edge of the clamp's condition, and so
    changes all its tokens; logits and gradients are the full pass's."""
    batch, site = prompts(subject, RAGGED), SITES[1]
    positions = last_positions(batch)
    added = perturbation(batch, site, positions)
    delta = added.deltas[site].requires_grad_()
    seen = []
    for edits in ((), (added,)):
        capture = Capture(site)
        subject.outputs(batch, (*edits, capture))
        seen.append(capture.at(batch.ids, positions)[:, 0].detach())
    along = torch.nn.functional.normalize(seen[1] - seen[0], dim=-1)[0]
    without, with_it = (torch.nn.functional.cosine_similarity(x, along[None]) for x in seen)
    gate = DirectionGate(site, along, float((without[0] + with_it[0]) / 2))
    assert not without[0] > gate.above and with_it[0] > gate.above, "the vector decides"
    clamps = (Sensor(gate), replace(clamp(subject), gate=gate))

    replay = Replay.record(subject, batch, site, positions, after=clamps)
    assert replay.extent.startswith("whole sequence") and not replay.prefix
    logits, full = replay.logits(delta), subject.forward_with_gradients(batch, (added, *clamps))
    close(logits, full)
    unclamped = subject.forward_with_gradients(batch, (added,))
    assert (unclamped - full)[0].abs().max() > 0.01, "and the clamp does something"
    weight = torch.nn.functional.normalize(torch.randn_like(full), dim=1)
    expected = torch.autograd.grad((full * weight).sum(), delta)[0]
    close(torch.autograd.grad((logits * weight).sum(), delta)[0], expected)


def test_a_block_called_without_a_cache_cannot_be_replayed() -> None:
    call = ((), {"attention_mask": torch.zeros(2, 1, 1, 3)})
    with pytest.raises(EditError, match="block 3 was called with 0 key-value caches"):
        with_cache(call, PrefixCache(()), 3)


def test_blocks_that_are_not_where_the_row_says() -> None:
    model = family_subject("gpt2", "sdpa").model
    with pytest.raises(SubjectError) as error:
        Family("transformer.layers", "transformer.ln_f").blocks_of(model)
    for part in (
        "GPT2LMHeadModel keeps no decoder blocks at 'transformer.layers'",
        "transformer has wte, wpe, drop, h, ln_f, and no 'layers'",
        "one row in holdfast/families.py",
        "transformer.h (4 × GPT2Block)",
    ):
        assert part in str(error.value)
    with pytest.raises(SubjectError, match=r"it has transformer, lm_head, and no 'model'"):
        Family("model.layers", "model.norm").blocks_of(model)
    with pytest.raises(SubjectError, match=r"transformer\.wte is a Embedding"):
        Family("transformer.wte", "transformer.ln_f").blocks_of(model)


def test_a_final_norm_that_is_not_where_the_row_says() -> None:
    model = family_subject("gpt2", "sdpa").model
    with pytest.raises(SubjectError, match=r"no final norm at 'transformer.norm'.*`final_norm`"):
        Family("transformer.h", "transformer.norm").unembed_of(model, torch.zeros(1, D_MODEL))


def test_an_unknown_family_names_near_ones_and_what_to_add() -> None:
    class Unknown(LlamaConfig):
        model_type = "gptneox"

    with pytest.raises(SubjectError, match=r"'gptneox'.*did you mean 'gpt_neox'.*known: gemma2"):
        family_of(Unknown())
    model = family_subject("llama", "sdpa").model
    with pytest.raises(SubjectError, match=r"'gptneox': Family\(.*model\.layers \(4 × LlamaDec"):
        family_of(Unknown(), model)
    with pytest.raises(SubjectError, match="model family None is not in"):
        family_of(object(), nn.Linear(1, 1))


def test_an_attention_that_gets_the_family_wrong_is_refused() -> None:
    assert FAMILIES["llama"].attention_for() == "sdpa"
    assert FAMILIES["gemma2"].attention_for() == "eager"
    assert FAMILIES["gemma2"].attention_for("eager") == "eager"
    with pytest.raises(SubjectError, match=r"'sdpa' does not compute.*expected 'eager'"):
        FAMILIES["gemma2"].attention_for("sdpa")


def test_discrete_routing_is_flagged_where_there_is_a_router() -> None:
    for name, family in FAMILIES.items():
        modules = family_subject(name, family.attention[0]).model.modules()
        assert family.moe == any("Router" in type(module).__name__ for module in modules), name


@pytest.mark.parametrize("lengths", [(9, 9, 9), (5, 14, 8, 11)], ids=["alike", "ragged"])
@pytest.mark.parametrize(
    ("family", "attention"), [(name, own) for name in TINY for own in FAMILIES[name].attention]
)
def test_attention_from_its_formula_is_the_familys_own_and_has_second_derivatives(
    family: str, attention: str, lengths: tuple[int, ...]
) -> None:
    """Of whole sequences too, with rows of different length; and no switch of the whole process is
    turned, which would change what other threads compute meanwhile."""
    subject = family_subject(family, attention)
    batch = prompts(subject, lengths)
    positions = torch.zeros(len(batch), 1, dtype=torch.long)
    replay = Replay.record(subject, batch, Site(1), positions)
    assert replay.cache.empty
    delta = torch.randn(len(batch), 1, replay.base.shape[-1], requires_grad=True)
    switches = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()]
    usual = replay.logits(delta)
    with by_formula():
        assert switches == [
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        ]  # fmt: skip
        formula = replay.logits(delta)
    torch.testing.assert_close(formula, usual, rtol=1e-5, atol=1e-5)
    (first,) = torch.autograd.grad(formula.square().sum(), delta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), delta)
    assert second.abs().max() > 0
