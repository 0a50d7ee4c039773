"""Direct attribution: terms sum to the lead in every family, and heads do what is known of them."""

from __future__ import annotations

from dataclasses import replace
from math import nan as NAN
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from holdfast import heads
from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.direct import CONDITIONS, Direct, Spot, attention, attribute, eager, unreadable
from holdfast.edits import Capture, Edit, Perturbation
from holdfast.errors import EditError, SubjectError
from holdfast.frozen import Frozen
from holdfast.hooks import tapped
from holdfast.organism.projected import project
from holdfast.readouts.probes import Probes
from holdfast.sites import Site
from holdfast.subject import Subject
from tests.families import (
    CASES,
    CLAMPED,
    D_MODEL,
    TINY,
    clamp,
    family_subject,
    model_of,
    prompts,
)

every_family = pytest.mark.parametrize(
    "subject", [pytest.param(case, id="-".join(case)) for case in CASES], indirect=True
)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return family_subject(*request.param)


def push(batch: Batch, size: float = 2.0) -> Perturbation:
    generator = torch.Generator().manual_seed(3)
    delta = size * torch.randn(len(batch), 1, D_MODEL, generator=generator)
    return Perturbation(batch.ids, batch.prompt_length[:, None] - 1, {CLAMPED: delta})


def spot_of(subject: Subject, batch: Batch, edits: tuple[Edit, ...] = ()) -> Spot:
    return Spot.of(batch, subject.read(batch, edits))


def n_hooks(subject: Subject) -> int:
    return sum(len(module._forward_hooks) for module in subject.model.modules())


# --- The sum --------------------------------------------------------------------------------------


@every_family
def test_terms_sum_to_the_margin_in_every_family(subject: Subject) -> None:
    """Grouped queries, norms after attention, parallel blocks, experts, biases, soft-caps; with a
    clamp and a perturbation on, in rows of different length and in chunks."""
    batch = prompts(subject)
    edits, added = (clamp(subject),), push(batch)
    small = replace(subject, batching=Batching(3))
    spot = spot_of(subject, batch, edits)
    cap = subject.family.softcap_of(subject.model)
    for first, then, pushed in (((), (), None), (edits, (), added), ((), edits, added)):
        found = attribute(small, batch, first, then, pushed, spot)
        passed = (*first, *(() if pushed is None else (pushed,)), *then)
        scores = subject.read(batch, passed).double()
        margin = batch.margin(scores.float()).double()
        if cap is not None:  # what is split is what the cap bends
            scores = torch.atanh(scores / cap) * cap
            own = [scores.gather(-1, t[:, None])[:, 0] for t in (spot.target, spot.rival)]
            margin = own[0] - own[1]
        torch.testing.assert_close(found.lead, margin, atol=1e-4, rtol=1e-4)
        total = torch.stack(list(found.terms.values())).sum(0)
        torch.testing.assert_close(total, margin, atol=1e-4, rtol=1e-4)
        assert found.error.max() < 1e-4 and found.strongest.all()
        assert found.others["blocks"].abs().max() < 1e-4, "the row says where blocks write"
        assert bool(found.others["clamp"].abs().max() > 1e-3) == bool(first or then)
        assert bool(found.others["perturbation"].abs().max() > 1e-3) == (pushed is not None)


@every_family
def test_a_head_is_worth_what_its_output_is(subject: Subject) -> None:
    """By another way: leave one of the last block's heads out of its input, and see by how much
    what attention adds to the residual changes, any norm's scale as it was."""
    batch = prompts(subject)
    spot = spot_of(subject, batch)
    found = attribute(subject, batch, (), (), None, spot)
    family, model, layer, head = subject.family, subject.model, subject.n_blocks - 1, 1
    module = family.inside(model, family.heads)[layer]
    seen: dict[str, torch.Tensor] = {}

    def without(index: int, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = args[0].unflatten(-1, (4, -1)).clone()
        x[:, :, head] = 0
        seen["norm"] = output
        seen["gone"] = output - module.forward(x.flatten(-2))

    with tapped(([module], without)):
        subject.read(batch)
    last = Capture(Site(subject.n_blocks))
    subject.outputs(batch, (last,))
    gone = seen["gone"][:, -1]
    if family.norms_attention:
        gone = Frozen.of(family.inside(model, family.attends)[layer], seen["norm"][:, -1])(gone)
    frozen = Frozen.of(family.final_norm_of(model), last.seen[0][1][:, -1])
    W = model.get_output_embeddings().weight.double()
    expected = (frozen(gone) * (W[spot.target] - W[spot.rival])).sum(-1)
    torch.testing.assert_close(found.heads[:, layer, head], expected, atol=1e-5, rtol=1e-4)


def test_what_a_projection_takes_away_has_a_term() -> None:
    """As in the known-answer subjects: a block that sees a few directions of the residual."""
    model = model_of(TINY["llama"](), "sdpa")
    project(model, torch.linalg.qr(torch.randn(D_MODEL, 5)).Q, layer=2)
    whole = family_subject("llama", "sdpa")
    subject = Subject.of("projected", model, whole.tokenizer, whole.saes)
    batch = prompts(subject)
    found = attribute(subject, batch, (), (), None, spot_of(subject, batch))
    assert found.others["blocks"].abs().min() > 1e-2
    assert found.error.max() < 1e-4


def test_a_forced_answer_is_read_where_it_lags_most() -> None:
    subject = family_subject("llama", "sdpa")
    batch = prompts(subject).forcing([[5, 6, 7], [8], [9, 10], [4, 5, 6]])
    scores = subject.read(batch)
    spot = Spot.of(batch, scores)
    found = attribute(subject, batch, (), (), None, spot)
    torch.testing.assert_close(found.lead.float(), batch.margin(scores), atol=1e-4, rtol=1e-4)
    assert found.strongest.all() and found.error.max() < 1e-4
    assert len(set(spot.back.tolist())) > 1, "not all at the last token"


# --- Norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_frozen_norm_is_linear_and_right_at_its_residuals(kind: type[nn.Module]) -> None:
    norm = kind(32)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x, y = torch.randn(5, 32), torch.randn(5, 32)
    frozen = Frozen.of(norm, x)
    torch.testing.assert_close((frozen(x) + frozen.bias).float(), norm(x))
    torch.testing.assert_close(frozen(x + 2 * y), frozen(x) + 2 * frozen(y), rtol=1e-6, atol=1e-6)
    assert frozen.centers == (kind is nn.LayerNorm)


def test_what_is_no_norm_is_refused() -> None:
    torch.manual_seed(1)
    with pytest.raises(SubjectError, match="no gain times a scale"):
        Frozen.of(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), torch.randn(3, 32))


# --- Attention ------------------------------------------------------------------------------------


@every_family
def test_attention_to_a_token_is_what_the_weights_say(subject: Subject) -> None:
    """Against transformers' own `output_attentions`; tokens that are not there are unscored."""
    batch = prompts(subject)
    spot = spot_of(subject, batch)
    there = torch.stack([batch.tokens[row, batch.positions[row] == 2][0] for row in range(4)])
    spot = replace(spot, target=there, rival=torch.full_like(there, 2))  # <eos> is in no prompt
    found = attention(replace(subject, batching=Batching(3)), batch, (), spot)
    with eager(subject), torch.no_grad():
        weights = subject.model(
            input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False,
            position_ids=batch.positions.clamp(min=0), output_attentions=True,
        ).attentions  # fmt: skip
    earlier = torch.arange(batch.tokens.shape[1]) < batch.tokens.shape[1] - 1
    match = (batch.tokens == there[:, None]) & earlier & (batch.positions >= 0)
    expected = torch.stack([(w[:, :, -1].double() * match[:, None]).sum(-1) for w in weights], 1)
    torch.testing.assert_close(found["target"], expected, atol=1e-6, rtol=1e-5)
    assert found["rival"].isnan().all() and (found["target"] <= 1 + 1e-6).all()
    assert subject.model.config.get_text_config()._attn_implementation != "eager" or (
        "eager" in subject.family.attention
    ), "put back"


# --- Taps -----------------------------------------------------------------------------------------


def test_taps_are_gone_and_a_silent_one_is_an_error() -> None:
    subject = family_subject("llama", "sdpa")
    batch = prompts(subject)
    plain, hooks = subject.read(batch), n_hooks(subject)
    mlps = subject.family.inside(subject.model, subject.family.mlp)
    with tapped((mlps, lambda layer, args, output: torch.zeros_like(output))):
        assert not torch.allclose(subject.read(batch), plain)
    assert torch.equal(subject.read(batch), plain)
    assert n_hooks(subject) == hooks
    with pytest.raises(EditError, match="never called"), tapped((mlps, lambda *seen: None)):
        pass
    with pytest.raises(RuntimeError, match="mine"), tapped((mlps, lambda *seen: None)):
        raise RuntimeError("mine")
    assert n_hooks(subject) == hooks


def test_a_wrong_row_is_named() -> None:
    subject = family_subject("llama", "sdpa")
    family = replace(subject.family, heads="self_attn.c_proj")
    with pytest.raises(SubjectError, match=r"nothing at 'self_attn.c_proj': self_attn has"):
        family.inside(subject.model, family.heads)


def test_probes_are_not_split() -> None:
    subject = family_subject("llama", "sdpa")
    batch = prompts(subject)
    assert unreadable(subject, batch) == ""
    probed = replace(batch, readout=Probes.unfitted(CLAMPED, ("a", "b"), D_MODEL))
    assert "no single logit" in unreadable(subject, probed)


# --- Movers ---------------------------------------------------------------------------------------


def looked_into(writes: list[float], answer: list[float], rival: list[float]) -> dict[str, Any]:
    """The row of a model's only head, by what it writes and where it looks in clean prompts."""
    n = len(writes)
    clean = torch.tensor(writes, dtype=torch.float64)[:, None, None]
    nothing = torch.zeros(n, dtype=torch.float64)
    made = {
        name: Direct(clean * (name == "clean"), nothing[:, None], {}, nothing, nothing == 0)
        for name in CONDITIONS
    }
    paid = {
        name: torch.tensor(values, dtype=torch.float64)[:, None, None]
        for name, values in (("target", answer), ("rival", rival))
    }
    batch = SimpleNamespace(clusters=tuple(f"c{i}" for i in range(n)))
    found: Any = SimpleNamespace(case=SimpleNamespace(batch=batch))
    (row,) = heads._top(made, dict.fromkeys(CONDITIONS, paid), found)
    return row


def test_attention_is_compared_on_prompts_that_have_both_answers() -> None:
    """On common prompts the head looks at the rival; those that have one answer alone would turn
    the two means round."""
    row = looked_into([1.0] * 6, [0.1, 0.1, 0.9, 0.9, 0.9, NAN], [0.4, 0.4, NAN, NAN, NAN, 0.0])
    assert row["n_both"] == 2
    assert row["attends"]["clean"] == {"target": pytest.approx(0.1), "rival": pytest.approx(0.4)}
    assert not row["mover"]
    apart = looked_into([1.0] * 4, [0.9, 0.9, NAN, NAN], [NAN, NAN, 0.1, 0.1])
    assert apart["n_both"] == 0 and not apart["mover"]
    assert apart["attends"]["clean"] == {"target": None, "rival": None}


@pytest.mark.parametrize(
    "writes, more, mover",
    [
        ([1.0, 1.1, 0.9, 1.2, 1.0, 0.8], [0.5, 0.4, 0.6, 0.5, 0.5, 0.4], True),
        ([9.0, -1.0, -1.0, -1.0, -1.0, -1.0], [0.5, 0.4, 0.6, 0.5, 0.5, 0.4], False),
        ([1.0, 1.1, 0.9, 1.2, 1.0, 0.8], [0.9, -0.1, -0.1, -0.1, -0.1, -0.1], False),
        ([-1.0, -1.1, -0.9, -1.2, -1.0, -0.8], [0.5, 0.4, 0.6, 0.5, 0.5, 0.4], False),
    ],
)
def test_a_star_needs_both_intervals_above_0(
    writes: list[float], more: list[float], mover: bool
) -> None:
    row = looked_into(writes, [0.3 + each for each in more], [0.3] * len(more))
    assert row["mover"] == mover
    above = row["clean"]["low"] > 0 and row["more"]["low"] > 0
    assert above == mover and (row["clean"]["estimate"] > 0) == (sum(writes) > 0)
