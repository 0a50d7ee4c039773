"""A model whose blocks lie on several cards: what is found is what one device finds.

The cards are pretended (`tests/cards.py`): tensors of two that meet raise, as on real ones.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from holdfast.batching import Batching
from holdfast.constraints import ConstraintKind
from holdfast.constraints.feature_hold import FeatureHold
from holdfast.constraints.jacobian_null import JacobianNull
from holdfast.constraints.unconstrained import Unconstrained
from holdfast.discovery.attribution import Attribution
from holdfast.edits import Edit, FeatureEdit, Perturbation
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.jacobian import linearized
from holdfast.problem import Problem
from holdfast.recovery import Budget, Recovery, RecoverySpec, recover
from holdfast.replay import Replay
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import random_sae, tiny_batch, tiny_model, tiny_tokenizer
from holdfast.verify import Checks, verify
from tests.cards import OnCard, TwoCardsError, cards, on_card, spread

SITES = (Site(1), Site(2))


def of_blocks(places: list[int] | None) -> Subject:
    """Two prompts at a time, so that more than one piece is put together."""
    model: Any = tiny_model()
    if places is not None:
        spread(model, model.model.layers, places, places[-1])
    saes = {site: random_sae(site, seed=site.depth) for site in SITES}
    tokenizer: Any = tiny_tokenizer()
    return Subject.of("tiny", model, tokenizer, saes, Batching(2))


def clamps_of(subject: Subject) -> tuple[dict[Site, FeatureBank], tuple[Edit, ...]]:
    entries = tuple(SiteFeatures(site=str(site), ids=(1, 5, 9)) for site in SITES)
    features = FeatureSet(entries=entries, source="test")
    banks = {site: FeatureBank.of(subject.sae(site), features) for site in SITES}
    return banks, tuple(FeatureEdit(bank, "set_where_active", -2.0) for bank in banks.values())


def searched(
    subject: Subject, constraint: ConstraintKind, perturbed: tuple[Site, ...]
) -> tuple[Recovery, Checks]:
    batch = tiny_batch(subject, 3)
    banks, clamps = clamps_of(subject)
    positions = batch.positions[:, -2:]
    replay = Replay.record(subject, batch, perturbed, positions, before=clamps, watch=SITES)
    norm = replay.residual().norm(dim=(1, 2))
    problem = Problem(replay, batch, torch.ones_like(norm), banks, norm, norm)
    spec = RecoverySpec(constraint=constraint, steps=2, refine_steps=1, doublings=1, tolerance=0.5,
                        budget=Budget(relative=1))  # fmt: skip
    found = recover(problem, spec, seed=0)
    push = Perturbation(batch.ids, positions, replay.parts(found.delta))
    return found, verify(
        subject, batch, clamps, push, banks, {site: {"*": 1.0} for site in SITES}, True
    )


def plain(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnCard) else tensor


def one_by_one(output: Tensor, leaf: Tensor, weight: Tensor, batched: bool = False) -> Tensor:
    """What batched backward passes give: inside of them torch asks no tensor where it is."""
    own = list(weight) if batched else [weight]
    made = [torch.autograd.grad(output, leaf, y, retain_graph=True)[0] for y in own]
    return torch.stack(made) if batched else made[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("constraint", "perturbed"),
    [
        pytest.param(Unconstrained(), SITES[:1], id="unconstrained"),
        pytest.param(FeatureHold(), SITES, id="feature_hold", marks=pytest.mark.slow),
        pytest.param(JacobianNull(), SITES[:1], id="jacobian_null", marks=pytest.mark.slow),
    ],
)
def test_a_search_over_cards_is_that_of_one_device(
    monkeypatch: pytest.MonkeyPatch, constraint: ConstraintKind, perturbed: tuple[Site, ...]
) -> None:
    """Recorded, replayed, climbed, retracted, bisected, verified; sites on different cards."""
    found, checks = searched(of_blocks(None), constraint, perturbed)
    monkeypatch.setattr(linearized, "_gradient", one_by_one)
    with cards():
        other, again = searched(of_blocks([0, 1, 2]), constraint, perturbed)
    assert other.delta.device.index == 0, "a search lies where the tokens are"
    assert other.outcomes == found.outcomes
    torch.testing.assert_close(plain(other.delta), found.delta, rtol=1e-3, atol=1e-3)
    for field in fields(checks):
        if field.name in ("margin", "norm", "displacement", "drift_relative", "decoder_share"):
            one, two = (plain(getattr(each, field.name)) for each in (checks, again))
            torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3, equal_nan=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_outputs_text_and_attributions_over_cards_are_those_of_one_device() -> None:
    made = []
    for places in (None, [0, 1, 1]):
        with cards():
            subject = of_blocks(places)
            batch = tiny_batch(subject, 3)
            _, clamps = clamps_of(subject)
            sae = subject.sae(SITES[1]).full()
            kind = Attribution()
            made.append(
                [
                    plain(subject.outputs(batch, clamps)),
                    plain(subject.generate(batch, clamps, 3)),
                    plain(kind.scores(subject, batch, sae)),
                    plain(kind.firing_rate(subject, batch, sae)),
                ]
            )
    for one, two in zip(*made, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


def test_what_two_cards_refuse_is_refused_here() -> None:
    x, y, host = on_card(torch.ones(2), 0), on_card(torch.ones(2), 1), torch.ones(2)
    with cards():
        for other in (y, host):
            with pytest.raises(TwoCardsError):
                x + other
        with pytest.raises(TwoCardsError):
            x[torch.zeros(1, dtype=torch.long, device=y.device)]
        assert (x + y.to(x.device)).device == x.device
        assert (
            x[torch.tensor([0])].device == x.device and (x + torch.tensor(1.0)).device == x.device
        )
        leaf = on_card(torch.ones(2), 0).requires_grad_(True)
        (gradient,) = torch.autograd.grad((leaf.to(y.device) * y).sum(), leaf)
        assert gradient.device == leaf.device
