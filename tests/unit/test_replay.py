"""Replay equals the full forward pass, in logits and in gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.edits import Capture, Edit, FeatureEdit
from holdfast.gates import DirectionGate, PromptGate, Sensor
from holdfast.replay import Replay
from holdfast.sites import Site
from holdfast.subject import Subject
from tests.unit.test_hooks import full_pass

SITE = Site(2)


class Added:
    """A perturbation that gradients flow into; independent of `Perturbation`."""

    def __init__(self, site: Site, positions: Tensor, delta: Tensor):
        self.site, self.positions, self.delta = site, positions, delta

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def selects(self, site: Site, frame: object) -> Tensor:
        return frame.positions >= 0  # type: ignore[attr-defined]

    def apply(self, site: Site, x: Tensor, frame: object) -> Tensor:
        for p in range(self.positions.shape[1]):
            here = frame.positions == self.positions[:, p, None]  # type: ignore[attr-defined]
            here &= self.positions[:, p, None] >= 0
            x = x + here[..., None] * self.delta[:, p, None]
        return x


def by_full_pass(
    subject: Subject, batch: Batch, edits: tuple[Edit, ...], delta: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    logits = full_pass(subject, batch.tokens, batch.frame(), edits)
    return logits, torch.autograd.grad((logits * weight).sum(), delta)[0]


def positions_of(batch: Batch, name: str) -> Tensor:
    length = batch.prompt_length[:, None]
    if name == "last":
        return length - 1
    if name == "last three":
        return torch.cat([length - 3, length - 2, length - 1], 1)
    if name == "from the start":
        return torch.cat([torch.zeros_like(length), length - 2], 1)
    ragged = torch.cat([length - 2, length - 1], 1)
    ragged[::2, 0] = -1  # some rows have one position fewer
    return ragged


@pytest.mark.parametrize("where", ["last", "last three", "from the start", "ragged"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("clamp_first", [True, False])
def test_replay_equals_the_full_pass(
    subject: Subject, batch: Batch, clamp: FeatureEdit, where: str, depth: int, clamp_first: bool
) -> None:
    site = Site(depth)
    edit = replace(clamp, mode="set", value=4.0)
    positions = positions_of(batch, where)
    delta = torch.randn(len(batch), positions.shape[1], 32, requires_grad=True)
    weight = torch.randn(len(batch), subject.model.config.vocab_size)
    added = Added(site, positions, delta)
    edits = (edit, added) if clamp_first else (added, edit)
    logits, gradient = by_full_pass(subject, batch, edits, delta, weight)

    replay = Replay.record(
        subject, batch, site, positions,
        before=(edit,) if clamp_first else (), after=() if clamp_first else (edit,),
    )  # fmt: skip
    again = replay.logits(delta)
    gradient_again = torch.autograd.grad((again * weight).sum(), delta)[0]
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
    used = (positions >= 0)[..., None].expand_as(gradient)
    # A sum's rounding scales with its terms, not with what is left of them.
    rounding = 1e-5 * float(gradient.abs().max())
    torch.testing.assert_close(gradient_again[used], gradient[used], atol=rounding, rtol=0)


def test_rows_can_be_picked_and_repeated(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    positions = batch.prompt_length[:, None] - 1
    replay = Replay.record(subject, batch, SITE, positions, before=(clamp,))
    delta = torch.randn(len(batch), 1, 32)
    whole = replay.logits(delta)
    rows = torch.tensor([5, 0, 0, 7])
    picked = replay.rows(rows).logits(delta[rows])
    torch.testing.assert_close(picked, whole[rows], atol=1e-5, rtol=1e-5)
    one = Replay.record(subject, batch.rows([3]), SITE, positions[3:4], before=(clamp,))
    lanes = one.rows(torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(
        lanes.logits(delta[3:4].expand(4, -1, -1)), whole[3:4].expand(4, -1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("clamp_first", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_clamp_that_decides_on_the_whole_prompt(
    subject: Subject, batch: Batch, clamp: FeatureEdit, clamp_first: bool, depth: int
) -> None:
    """A vector at the last token turns the clamp on at the first: the whole sequence is replayed,
    and equals the full pass in logits and gradients."""
    site, width = Site(depth), batch.tokens.shape[1]
    positions = batch.prompt_length[:, None] - 1
    delta = (3 * torch.randn(len(batch), 1, 32)).requires_grad_()
    weight = torch.randn(len(batch), subject.model.config.vocab_size)
    added = Added(site, positions, delta)
    largest = []
    for with_it in ((), (added,)):
        capture = Capture(SITE)
        full_pass(subject, batch.tokens, batch.frame(), (*with_it, capture))
        largest.append(clamp.bank.activations(capture.seen[0][1], batch.frame()).amax(-1))
    above = float((largest[0] + largest[1])[0, -1] / 2)
    counted = batch.positions > 0
    shares = [((z > above) & counted).sum(1) / counted.sum(1) for z in largest]
    changed = (shares[0] != shares[1]).nonzero().flatten()
    assert len(changed), "a vector decides"
    share = float((shares[0] + shares[1])[changed[0]] / 2)
    edit = replace(clamp, mode="set", value=4.0, gate=PromptGate(clamp.bank, above, share))
    edits = (edit, added) if clamp_first else (added, edit)
    logits, gradient = by_full_pass(subject, batch, edits, delta, weight)

    replay = Replay.record(
        subject, batch, site, positions,
        before=(edit,) if clamp_first else (), after=() if clamp_first else (edit,),
    )  # fmt: skip
    assert replay.extent == "whole sequence: a clamp's condition on the whole prompt"
    assert replay.frame.positions.shape[1] == width and not replay.prefix
    again = replay.logits(delta)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
    gradient_again = torch.autograd.grad((again * weight).sum(), delta)[0]
    rounding = 1e-5 * float(gradient.abs().max())
    torch.testing.assert_close(gradient_again, gradient, atol=rounding, rtol=0)
    rows = torch.tensor([5, 0, 0, 7])
    picked = replay.rows(rows).logits(delta[rows])
    torch.testing.assert_close(picked, logits[rows], atol=1e-5, rtol=1e-5)
    plain = Replay.record(subject, batch, site, positions, before=(clamp,))
    assert plain.extent == "suffix" and plain.frame.positions.shape[1] < width


@pytest.mark.parametrize("clamp_first", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("reads", [0, 1, 2])
def test_a_clamp_that_an_earlier_site_decides_on(
    subject: Subject, batch: Batch, clamp: FeatureEdit, reads: int, depth: int, clamp_first: bool
) -> None:
    """Where a vector comes after what the gate reads, what was decided stays; where it comes
    before, it is decided anew."""
    site, positions = Site(depth), batch.prompt_length[:, None] - 1
    delta = (3 * torch.randn(len(batch), 1, 32)).requires_grad_()
    weight = torch.randn(len(batch), subject.model.config.vocab_size)
    gate = DirectionGate(Site(reads), torch.randn(32), 0.0)
    added, frame = Added(site, positions, delta), batch.frame()
    cosines = []
    for with_it in ((), (added,)):
        capture = Capture(gate.site)
        order = (capture, *with_it) if clamp_first else (*with_it, capture)
        full_pass(subject, batch.tokens, batch.frame(), order)
        cosines.append(gate.cosines(capture.seen[0][1], frame))
    row = int((cosines[0] - cosines[1]).abs().argmax())  # one that the vector takes over the edge
    moved = float((cosines[0] - cosines[1])[row].abs()) > 1e-3
    edge = float((cosines[0] + cosines[1])[row] / 2) if moved else float(cosines[1].median())
    gate = replace(gate, above=edge)
    before, after = (each > gate.above for each in cosines)
    assert 0 < after.sum() < len(batch)
    moves = depth < reads or (depth == reads and not clamp_first)
    assert bool((before != after).any()) == moves, "the vector decides, or it does not"

    edit = replace(clamp, mode="set", value=4.0, gate=gate)
    clamps = (Sensor(gate), edit)
    edits = (*clamps, added) if clamp_first else (added, *clamps)
    logits, gradient = by_full_pass(subject, batch, edits, delta, weight)
    replay = Replay.record(
        subject, batch, site, positions,
        before=clamps if clamp_first else (), after=() if clamp_first else clamps,
    )  # fmt: skip
    assert replay.extent == "whole sequence: a clamp's condition on the prompt's last token"
    again = replay.logits(delta)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
    gradient_again = torch.autograd.grad((again * weight).sum(), delta)[0]
    rounding = 1e-5 * float(gradient.abs().max())
    torch.testing.assert_close(gradient_again, gradient, atol=rounding, rtol=0)
    rows = torch.tensor([5, 0, 0, 7])
    picked = replay.rows(rows).logits(delta[rows])
    torch.testing.assert_close(picked, logits[rows], atol=1e-5, rtol=1e-5)
    always = by_full_pass(subject, batch, (replace(edit, gate=None), added), delta, weight)[0]
    if depth < 3:
        assert not torch.allclose(logits, always, atol=1e-3), "the gate does something"


def test_what_was_decided_piece_by_piece_is_kept_for_all_rows(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    gate = DirectionGate(Site(1), torch.randn(32), 0.0)
    clamps = (Sensor(gate), replace(clamp, mode="set", value=4.0, gate=gate))
    positions = batch.prompt_length[:, None] - 1
    few = replace(subject, batching=Batching(3))
    made = [Replay.record(one, batch, Site(2), positions, before=clamps) for one in (subject, few)]
    (_, whole), (_, pieces) = (replay.frame.decided[id(gate)] for replay in made)
    assert torch.equal(whole, pieces) and len(whole) == len(batch) and len(whole.unique()) == 2
    delta = torch.randn(len(batch), 1, 32)
    torch.testing.assert_close(made[0].logits(delta), made[1].logits(delta), atol=1e-5, rtol=1e-5)


def test_the_prefix_is_never_changed(subject: Subject, batch: Batch, clamp: FeatureEdit) -> None:
    positions = batch.prompt_length[:, None] - 1
    replay = Replay.record(subject, batch, SITE, positions, before=(clamp,))
    kept = [own[0] for own in replay.prefix if own is not None]
    keys = [k.clone() for k in kept]
    assert len(kept) == len(replay.prefix) - SITE.depth, "blocks that never run keep nothing"
    first = replay.logits(torch.zeros(len(batch), 1, 32))
    replay.logits(torch.randn(len(batch), 1, 32))
    assert torch.equal(replay.logits(torch.zeros(len(batch), 1, 32)), first)
    assert all(torch.equal(a, b) for a, b in zip(keys, kept, strict=True))


def test_only_blocks_above_the_site_run_on_suffix_columns(
    subject: Subject, batch: Batch, clamp: FeatureEdit
) -> None:
    positions = batch.prompt_length[:, None] - 1
    replay = Replay.record(subject, batch, SITE, positions, before=(clamp,))
    ran = []
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: ran.append((i, out.shape[1])))
        for i, block in enumerate(subject.model.model.layers)
    ]
    replay.logits(torch.zeros(len(batch), 1, 32))
    for handle in handles:
        handle.remove()
    assert ran == [(2, 1)]
