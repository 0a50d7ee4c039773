"""What a vector does without the clamp: as an independent pass has it, and where it is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.controls.wrong_target import WrongTarget
from holdfast.edits import FeatureEdit, Perturbation
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import tiny_batch, tiny_subject
from holdfast.unclamped import Unclamped
from holdfast.variants import Recovered
from tests.unit.recovered import features_at, search, set_up

SITE = Site(2)
FEATURES = features_at((SITE,))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject()


@pytest.fixture(scope="module")
def found(subject: Subject) -> Recovered:
    bank = FeatureBank.of(subject.sae(SITE), FEATURES)
    clamp = FeatureEdit(bank, "set", 2.0, where="last_prompt")
    return measured(search(set_up(subject, tiny_batch(subject, 6), FEATURES, (clamp,))))


def measured(found: Recovered) -> Recovered:
    """With the clean margins there are, and not those that the search was to reach."""
    setting = found.setting
    clean = setting.test.margin(setting.subject.read(setting.test))
    return replace(found, setting=replace(setting, clean_margin=clean))


def vector(found: Recovered) -> Perturbation:
    return found.perturbation(found.delta)


def with_clamp(found: Recovered) -> torch.Tensor:
    case = found.case
    read = case.subject.read(case.batch, found.edits(vector(found)))
    return case.batch.margin(read).double()


def test_it_is_a_pass_with_the_vector_alone(subject: Subject, found: Recovered) -> None:
    """Row by row through the model itself, the vector added by a hook at the last token."""
    batch, under = found.case.batch, with_clamp(found)
    seen = Unclamped.of(found.setting, found.case, vector(found), under)
    assert seen is not None and len(found) >= 4
    block = subject.model.model.layers[SITE.depth - 1]
    for row, delta in enumerate(found.delta[:, 0]):
        tokens = batch.tokens[row][batch.positions[row] >= 0]

        def add(module: object, args: object, out: object, delta: torch.Tensor = delta) -> object:
            x = out[0] if isinstance(out, tuple) else out
            x[:, -1] += delta
            return out

        handle = block.register_forward_hook(add)
        with torch.no_grad():
            logits = subject.model(tokens[None]).logits[:, -1]
        handle.remove()
        one = batch.rows(torch.tensor([row]))
        torch.testing.assert_close(seen.margin[row].float(), one.margin(logits)[0].float())
    setting, rows = found.setting, found.case.rows
    gained = (seen.margin - setting.clean_margin[rows]) / (under - setting.suppressed_margin[rows])
    torch.testing.assert_close(seen.gain, torch.where(under > 0, gained, torch.nan))
    assert (seen.gain - 1).abs().max() > 1e-3, "the clamp makes a difference here"


def test_where_nothing_is_clamped_it_is_all_of_it(subject: Subject) -> None:
    found = measured(search(set_up(subject, tiny_batch(subject, 6), FEATURES, ())))
    seen = Unclamped.of(found.setting, found.case, vector(found), with_clamp(found))
    assert seen is not None and len(seen.gain) >= 4
    torch.testing.assert_close(seen.gain, torch.ones_like(seen.gain))


def test_what_did_not_come_back_has_no_gain(found: Recovered) -> None:
    nothing = torch.full_like(with_clamp(found), -1.0)
    seen = Unclamped.of(found.setting, found.case, vector(found), nothing)
    assert seen is not None and seen.gain.isnan().all() and seen.margin.isfinite().all()


def test_it_is_no_question_for_a_control(found: Recovered) -> None:
    def no_twin() -> None:
        raise AssertionError

    case = WrongTarget().case(found.setting, no_twin)  # type: ignore[arg-type]
    assert Unclamped.of(found.setting, case, vector(found), with_clamp(found)) is None
