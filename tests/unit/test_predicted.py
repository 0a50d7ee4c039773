"""Predicted effects beside performed ones: gradients and patches have to be of one function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast.attacks.residual import pose
from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.behaviors.ioi import IOI
from holdfast.controls.none import NoControl
from holdfast.discovery.attribution import Attribution
from holdfast.edits import FeatureEdit
from holdfast.interventions.clamp import Clamp
from holdfast.loading import SAESpec, SubjectSpec
from holdfast.paths import follow
from holdfast.predicted import Foreseen, agreement, foresee
from holdfast.recovery import RecoverySpec
from holdfast.replays import of_parts, of_undo, parts_of
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import Folder
from holdfast.setting import Data, prepare
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.variants import PathSpec, Recovered, Variant, perform
from tests.unit.recovered import features_at, search, set_up, split
from tests.unit.test_parts import SITE, linear_subject, pairs, recovered

FEW = PathSpec(scales=(1.0,), draws=1, margin_draws=2, heads=False, routes=False)


def vectors_of(found: Recovered) -> dict[str, Tensor]:
    """The vector, its parts, all but each, and noise of its norm."""
    parts = parts_of(split(found, 3), {})
    own = {v.name: v.draws[0] for v in (*of_parts(found, parts), *of_undo(found))}
    noise, _ = found.scaled(torch.randn_like(found.delta) * found.slots)
    return {"all": found.delta, "half": 0.5 * found.delta, "noise": noise, **own}


def effects_of(found: Recovered, vectors: Mapping[str, Tensor]) -> Tensor:
    """[v n] by full passes."""
    nothing, *made = perform(
        found,
        [
            Variant.whole("nothing", torch.zeros_like(found.delta)),
            *(Variant.whole(name, vector) for name, vector in vectors.items()),
        ],
    )
    return torch.stack([each.margin - nothing.margin for each in made])


def off(found: Recovered) -> tuple[Foreseen, Tensor, Tensor, Tensor]:
    """What is foreseen, and errors [v n] and [v n] of both predictions, [n] correlation along."""
    vectors = vectors_of(found)
    foreseen, performed = foresee(found, vectors), effects_of(found, vectors)
    _, linear = agreement(foreseen.linear, performed, performed[0])
    correlation, along = agreement(foreseen.along, performed, performed[0])
    return foreseen, linear, along, correlation


# --- Where nothing bends --------------------------------------------------------------------------


def test_of_a_linear_readout_every_prediction_comes_true() -> None:
    subject = linear_subject()
    found = recovered(subject, pairs(subject), Site(3))
    vectors = vectors_of(found)
    foreseen, performed = foresee(found, vectors), effects_of(found, vectors)
    for made in (foreseen.linear, foreseen.along):
        torch.testing.assert_close(made, performed, atol=5e-4, rtol=1e-3)
    record = follow(found, FEW, seed=0).record["predicted"]
    assert record["switched"] is None, "the clamp acts before the vector is added"
    for kind in ("linear", "along"):
        assert record[kind]["correlation"]["estimate"] == pytest.approx(1, abs=1e-4)
        assert record[kind]["error"]["estimate"] < 1e-3
        assert record[kind]["close"]["estimate"] == 1
        assert record[kind]["regained"]["all"]["estimate"] == pytest.approx(1, abs=1e-3)


def test_a_rival_that_gets_ahead_is_no_surprise_on_the_way() -> None:
    """The margin bends where another rival is the strongest; the lead over each of them does not.
    Against the closed form of a linear readout: the gradient at the beginning knows one rival."""
    subject = linear_subject()
    found = recovered(subject, tiny_batch(subject, 8), Site(3))
    vectors = vectors_of(found)
    W, batch = subject.model.lm_head.weight.double(), found.case.batch
    answers = W[torch.cat([batch.targets[:, None], batch.rivals], 1)]
    clamped = found.problem.replay.reference[Site(3)][:, 0].double()

    def margin(x: Tensor) -> Tensor:
        scores = torch.einsum("nad,nd->na", answers, x)
        return scores[:, 0] - scores[:, 1:].amax(1)

    moved = [clamped + v[:, 0].double() for v in vectors.values()]
    exact = torch.stack([margin(x) - margin(clamped) for x in moved])
    rival = [torch.einsum("nad,nd->na", answers[:, 1:], x).argmax(1) for x in (clamped, *moved)]
    overtaken = torch.stack([other != rival[0] for other in rival[1:]])
    foreseen = foresee(found, vectors)
    torch.testing.assert_close(foreseen.along, exact, atol=5e-4, rtol=1e-3)
    missed = (foreseen.linear - exact).abs() > 1e-2
    assert missed.any() and not missed[~overtaken].any()


# --- Where it does --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject()


def test_along_its_own_way_every_effect_is_what_was_performed(subject: Subject) -> None:
    """The fundamental theorem of calculus, of a model that bends and with several rivals; by the
    gradient at the beginning the same effects are far off."""
    foreseen, linear, along, correlation = off(recovered(subject, tiny_batch(subject, 8)))
    assert along.max() < 0.01 and correlation.median() > 0.999
    assert linear.mean(0).median() > 0.01, "here there is something to miss"
    assert not foreseen.reads and not foreseen.switched.any()


def pushed(subject: Subject, batch: Batch) -> Recovered:
    """Every prompt, with a random vector for each."""
    features = features_at((SITE,))
    clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "set", 1.0)
    setting = set_up(subject, batch, features, (clamp,))
    spec = RecoverySpec.model_validate(
        {"constraint": {"kind": "unconstrained"}, "budget": {"relative": 1.0}}
    )
    case = NoControl().case(setting, lambda: setting)
    problem = pose(spec, case)
    delta = torch.randn(problem.shape, generator=torch.Generator().manual_seed(0))
    positions = setting.test.prompt_length[:, None] - 1
    return Recovered.of(setting, case, problem, spec, delta, positions, torch.arange(len(batch)))


def test_of_an_answer_of_several_tokens_too(subject: Subject) -> None:
    """The margin there is the least lead of a token over all of the vocabulary. What the search
    goes up is a soft one: the integral of its gradient would miss the effect."""
    batch = tiny_batch(subject, 6)
    answers = torch.cat([batch.targets[:, None], batch.rivals], 1).tolist()
    found = pushed(subject, batch.forcing(answers))
    _, linear, along, correlation = off(found)
    assert along.max() < 0.01 and correlation.median() > 0.999
    assert linear.mean(0).median() > 0.01


def test_on_the_organism_gradients_and_patches_agree() -> None:
    """Indirect objects: trained weights, a trained SAE, names as rivals."""
    sae = SAESpec(site="blocks.0.hook_resid_post", source=Folder(path="organism:saes/0"))
    organism = Subject.load(SubjectSpec(model="organism", saes=(sae,)))
    setting = prepare(
        organism, IOI(templates="all"), Attribution(n_features=16),
        Clamp(mode="set_where_active", value=-10.0), Data(fit=60, tune=1, test=24), seed=0,
    )  # fmt: skip
    found = search(setting, budget={"relative": 0.5})
    assert len(found) >= 8
    record = follow(found, FEW, seed=0).record["predicted"]
    assert len(record["variants"]) >= 15
    along, linear = record["along"], record["linear"]
    assert along["error"]["estimate"] < 0.005 and along["correlation"]["estimate"] > 0.999
    assert along["close"]["estimate"] > 0.99
    assert linear["error"]["estimate"] > 0.05 and linear["correlation"]["estimate"] < 0.99


def test_for_small_vectors_the_gradient_is_enough(subject: Subject) -> None:
    found = recovered(subject, pairs(subject), SITE)
    vectors = {"tiny": 1e-2 * torch.randn_like(found.delta)}
    performed = effects_of(found, vectors)
    torch.testing.assert_close(foresee(found, vectors).linear, performed, atol=2e-4, rtol=0.05)


# --- Where it jumps -------------------------------------------------------------------------------


def above(clamp_first: bool, mode: str = "set_where_active") -> Recovered:
    """Clamps that read what is added: at a site above, or at the same one when they act last."""
    sites = (Site(1), Site(2))
    subject = tiny_subject(sites=sites)
    features = features_at(sites, tuple(range(0, 64, 4)))
    edits = tuple(FeatureEdit(FeatureBank.of(subject.sae(s), features), mode, 1.5) for s in sites)
    setting = set_up(subject, tiny_batch(subject, 8), features, edits)
    order = "clamp_then_perturbation" if clamp_first else "perturbation_then_clamp"
    where = {"sites": [str(Site(1))]}
    return search(setting, "unconstrained", order=order, perturb=where)


@pytest.mark.parametrize("clamp_first", [True, False])
def test_a_clamp_that_switches_is_told_and_explains_what_is_missed(clamp_first: bool) -> None:
    found = above(clamp_first)
    foreseen, _, along, _ = off(found)
    switched = foreseen.switched
    assert foreseen.reads and switched.any() and not switched.all()
    assert along[~switched].median() < 0.01, "without a switch gradients know it all"
    assert along[switched].median() > 5 * along[~switched].median().clamp_min(1e-3)
    record = follow(found, FEW, seed=0).record["predicted"]
    assert 0 < record["switched"]["estimate"] < 1
    assert record["along"]["error_unswitched"]["estimate"] < record["along"]["error"]["estimate"]


def test_switches_are_what_the_pass_itself_shows() -> None:
    """Against features read by hand, at both ends and on the way."""
    found = above(True)
    delta, replay = found.delta, found.problem.replay
    states = []
    for share in torch.linspace(0, 1, 200):
        there = replay.suffix(share * delta, [Site(2)])[Site(2)]
        states.append(found.problem.held[Site(2)].activations(there.entering, replay.frame) > 0)
    by_hand = torch.stack([(s != states[0]).flatten(1).any(1) for s in states]).any(0)
    told = foresee(found, {"all": delta}).switched[0]
    assert not (told & ~by_hand).any(), "nothing is told that is not there"
    ends = (states[-1] != states[0]).flatten(1).any(1)
    assert not (ends & ~told).any() and ends.any(), "what differs at the end is seen"


# --- The rest -------------------------------------------------------------------------------------


def test_chunks_change_nothing(subject: Subject) -> None:
    found = recovered(subject, tiny_batch(subject, 6), SITE)
    small = replace(subject, batching=Batching(2))
    problem = replace(found.problem, replay=replace(found.problem.replay, subject=small))
    again = replace(found, problem=problem, case=replace(found.case, subject=small))
    vectors = vectors_of(found)
    whole, pieces = foresee(found, vectors), foresee(again, vectors)
    for name in ("linear", "along"):
        torch.testing.assert_close(
            getattr(pieces, name), getattr(whole, name), atol=1e-5, rtol=1e-4
        )
    assert torch.equal(pieces.switched, whole.switched)


def test_agreement_by_hand() -> None:
    performed = torch.tensor([[1.0, 2.0], [2.0, 2.0], [4.0, 2.0]]).double()
    correlation, error = agreement(2 * performed + 1, performed, performed[-1])
    assert correlation[0] == pytest.approx(1) and correlation[1].isnan(), "all alike: no r"
    expected = torch.tensor([[2 / 4, 3 / 2], [3 / 4, 3 / 2], [5 / 4, 3 / 2]]).double()
    torch.testing.assert_close(error, expected)
    assert agreement(-performed, performed, performed[-1])[0][0] == pytest.approx(-1)
