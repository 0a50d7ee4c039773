"""Clamps: what each mode, position policy, error term and condition does, and that it is done.

The long form encodes every feature, replaces some, decodes all and adds the error, in float64 and
written out for each SAE kind anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from holdfast.batch import Batch, Example, Frame
from holdfast.clamp_file import _saveable
from holdfast.discovery import with_scale
from holdfast.edits import Capture, Edit, FeatureEdit, decided_on_whole
from holdfast.errors import EditError, FeatureError, PositionError, StudyError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.gates import Gate, PromptGate, Sensor
from holdfast.hooks import apply_edits, attached
from holdfast.interventions import INTERVENTIONS, InterventionKind
from holdfast.interventions.clamp import (
    Clamp,
    Condition,
    DirectionCondition,
    Learnt,
    PromptCondition,
    Scale,
)
from holdfast.interventions.several import Several
from holdfast.saes.bank import FeatureBank
from holdfast.saes.inputs import Inputs
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import check_edit, random_sae, tiny_batch, tiny_subject
from holdfast.triggers import triggers
from tests.unit.test_hooks import full_pass

SITE, LATER = Site(2), Site(3)
IDS = (1, 5, 9, 30)
VALUES: dict[str, float | None] = {
    "set": -3.0,
    "set_where_active": -3.0,
    "multiply": 3.0,
    "add": 2.0,
    "floor": 0.7,
    "ceiling": 0.4,
    "mean": None,
    "max_scaled": 2.5,
}
POLICIES: dict[str, Any] = {
    "all": "all",
    "prompt": "prompt",
    "generated": "generated",
    "last_prompt": "last_prompt",
    "template": "template",
    "listed": (1, 9),
}
ERROR_TERMS: dict[str, Any] = {"keep": "keep", "drop": "drop", "scale": Scale(scale=0.4)}


def claims(names: Any, column: str, row: str = "{}") -> list[Any]:
    """One parameter a name, which proves a cell of the table of clamp modes."""
    return [
        pytest.param(name, marks=pytest.mark.proves("clamp modes", row.format(name), column))
        for name in names
    ]


def of_modes(column: str) -> list[Any]:
    return claims(VALUES, column)


def of_policies(column: str) -> list[Any]:
    return claims(POLICIES, column, "positions: {}")


# --- Another way to the same ----------------------------------------------------------------------


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gated(seed: int) -> SAE:
    """As the gated layout folds it: magnitudes exp(r)·(x·W) + b_mag, gates x·W + b_gate."""
    sae = random_sae(SITE, jump=False, seed=seed)
    gain = (0.3 * normal(64, seed=seed + 1)).exp()
    return replace(sae, gain=gain, offset=0.2 * normal(64, seed=seed + 2) - gain * sae.b_enc)


def with_inputs(**steps: Any) -> SAE:
    return replace(random_sae(SITE, seed=4), inputs=Inputs(**steps))


KINDS: dict[str, SAE] = {
    "relu": random_sae(SITE, jump=False, seed=4),
    "jumprelu": random_sae(SITE, seed=4),
    "topk": replace(random_sae(SITE, jump=False, seed=4), k=9),
    "gated": gated(4),
    "centered": with_inputs(center=True),
    "scaled": with_inputs(scale=0.3),
    "centered and scaled": with_inputs(center=True, scale=1.7),
    "layer_norm": with_inputs(norm="layer_norm"),
    "constant_norm_rescale": with_inputs(norm="constant_norm_rescale"),
    "topk behind a norm": replace(
        random_sae(SITE, jump=False, seed=4), k=9, inputs=Inputs(norm="layer_norm", scale=2.0)
    ),
    "everything before a norm": with_inputs(center=True, scale=0.3, norm="constant_norm_rescale"),
}


@dataclass(frozen=True)
class LongForm:
    """D(clamp(E(x))) + α·(x − D(E(x))) as an edit, with the whole SAE in float64.

    group → feature id → value; where each acts is asked of the edit it stands for.
    """

    sae: SAE
    mode: str
    values: dict[str, dict[int, float]]
    alpha: float
    instead_of: FeatureEdit

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.sae.site,)

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return self.instead_of.selects(site, frame)

    def check_fired(self, site: Site, n_fired: int) -> None:
        assert n_fired

    def encode(self, x: Tensor) -> Tensor:
        sae, steps = self.sae, self.sae.inputs
        y = x.double()
        if steps.center:
            y = y - y.mean(-1, keepdim=True)
        y = y * steps.scale
        if steps.norm == "layer_norm":
            y = (y - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-5)
        elif steps.norm == "constant_norm_rescale":
            y = y * (y.shape[-1] ** 0.5 / y.norm(dim=-1, keepdim=True))
        if sae.subtract_b_dec:
            y = y - sae.b_dec.double()
        p = y @ sae.W_enc.double() + sae.b_enc.double()
        if sae.gain is not None and sae.offset is not None:
            magnitude = sae.gain.double() * p + sae.offset.double()
            return magnitude.clamp(min=0) * (p > 0)
        if sae.k is not None:
            top = p.clamp(min=0).topk(sae.k, dim=-1)
            return torch.zeros_like(p).scatter(-1, top.indices, top.values)
        return p * (p > sae.threshold.double()) if bool(sae.threshold.any()) else p.clamp(min=0)

    def decode(self, z: Tensor, x: Tensor) -> Tensor:
        steps, y = self.sae.inputs, z @ self.sae.W_dec.double() + self.sae.b_dec.double()
        mean = x.double().mean(-1, keepdim=True)
        before = (x.double() - mean if steps.center else x.double()) * steps.scale
        if steps.norm == "layer_norm":
            y = y * before.std(-1, keepdim=True) + before.mean(-1, keepdim=True)
        elif steps.norm == "constant_norm_rescale":
            y = y * before.norm(dim=-1, keepdim=True) / y.shape[-1] ** 0.5
        y = y / steps.scale
        return y + mean if steps.center else y

    def clamped(self, z: Tensor, values: dict[int, float]) -> Tensor:
        c = z.clone()
        for i, value in values.items():
            old = z[..., i]
            if self.mode in ("set", "mean", "max_scaled"):
                c[..., i] = value
            elif self.mode == "set_where_active":
                c[..., i] = torch.where(old > 0, value, old)
            elif self.mode == "multiply":
                c[..., i] = value * old
            elif self.mode == "add":
                c[..., i] = old + value
            elif self.mode == "floor":
                c[..., i] = old.clamp(min=value)
            else:
                c[..., i] = old.clamp(max=value)
        return c

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        z = self.encode(x)
        own = [self.values.get(group, self.values.get("*", {})) for group in frame.groups]
        c = torch.stack([self.clamped(z[row], values) for row, values in enumerate(own)])
        out = self.decode(c, x) + self.alpha * (x.double() - self.decode(z, x))
        mask = self.selects(site, frame)
        if self.instead_of.gate is not None:
            mask = mask & self.instead_of.gate.opens(x, frame)
        return torch.where(mask[..., None], out.to(x.dtype), x)


def one_site(ids: tuple[int, ...] = IDS, site: Site = SITE, **known: Any) -> FeatureSet:
    entry = SiteFeatures(site=str(site), ids=ids, **known)
    return FeatureSet(entries=(entry,), source="test")


def values_of(mode: str, entry: SiteFeatures) -> dict[int, float]:
    """What each feature of an entry is given, by the words of the documentation."""
    value = VALUES[mode]
    if mode == "mean":
        return dict(zip(entry.ids, entry.mean, strict=True))
    assert value is not None
    if mode == "max_scaled":
        return {i: value * top for i, top in zip(entry.ids, entry.max, strict=True)}
    return dict.fromkeys(entry.ids, value)


def both(
    subject: Subject, features: FeatureSet, mode: str, **fields: Any
) -> tuple[FeatureEdit, LongForm]:
    """The clamp and its long form."""
    kind = Clamp(mode=mode, value=VALUES[mode], **fields)
    (edit,) = kind.edits(subject, features)
    assert isinstance(edit, FeatureEdit)
    values = {entry.group: values_of(mode, entry) for entry in features.entries}
    sae = subject.sae(features.sites[0]).full()
    return edit, LongForm(sae, mode, values, kind.error_scale, edit)


def with_sae(subject: Subject, sae: SAE) -> Subject:
    return replace(subject, saes={**subject.saes, sae.site: sae})


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


# --- What a mode means ----------------------------------------------------------------------------

MEAN, MAX = (0.25, 4.0), (2.0, 6.0)
BY_HAND = {  # two features, present values z, on three tokens
    "set": ([[0.0, 0.5], [3.0, 0.0], [1.0, 2.0]], [[-3, -3], [-3, -3], [-3, -3]]),
    "set_where_active": ([[0.0, 0.5], [3.0, 0.0], [1.0, 2.0]], [[0, -3], [-3, 0], [-3, -3]]),
    "multiply": ([[0.0, 0.5], [3.0, 0.0], [1.0, 2.0]], [[0, 1.5], [9, 0], [3, 6]]),
    "add": ([[0.0, 0.5], [3.0, 0.0], [1.0, 2.0]], [[2, 2.5], [5, 2], [3, 4]]),
    "floor": ([[0.0, 0.5], [3.0, 0.7], [1.0, 2.0]], [[0.7, 0.7], [3, 0.7], [1, 2]]),
    "ceiling": ([[0.0, 0.5], [3.0, 0.4], [1.0, 0.1]], [[0, 0.4], [0.4, 0.4], [0.4, 0.1]]),
    "mean": ([[0.0, 0.5], [3.0, 0.0], [1.0, 2.0]], [[0.25, 4], [0.25, 4], [0.25, 4]]),
    "max_scaled": ([[0.0, 0.5], [3.0, 0.0], [1.0, 2.0]], [[5, 15], [5, 15], [5, 15]]),
}


@pytest.mark.parametrize("mode", of_modes("definition"))
def test_a_mode_on_values_made_by_hand(subject: Subject, mode: str) -> None:
    features = one_site((5, 9), mean=MEAN, max=MAX)
    (edit,) = Clamp(mode=mode, value=VALUES[mode]).edits(subject, features)
    assert isinstance(edit, FeatureEdit)
    z, expected = (torch.tensor(values, dtype=torch.float32) for values in BY_HAND[mode])
    frame = tiny_batch(subject, 1).frame()
    assert torch.equal(edit.assigned(z[None], frame)[0], expected)


def test_every_mode_of_a_study_is_here() -> None:
    assert set(Clamp.model_fields["mode"].annotation.__args__) == set(VALUES) == set(BY_HAND)


def test_multiply_leaves_tokens_alone_where_no_feature_is_on(
    subject: Subject, batch: Batch
) -> None:
    edit, long = both(subject, one_site((5,)), "multiply", include_bos=True)
    x = torch.randn(*batch.tokens.shape, 32)
    on = long.encode(x)[..., 5] > 0
    real = batch.positions >= 0
    assert (on & real).any() and (~on & real).any()
    got = edit.apply(SITE, x, batch.frame())
    assert torch.equal(got[~on], x[~on])
    assert (got[on & real] != x[on & real]).any(-1).all()
    # nor can it switch a feature on, however large the factor
    more = replace(edit, value=1e6).apply(SITE, x, batch.frame())
    assert torch.equal(more[~on], x[~on])


def test_a_floor_switches_features_on_and_a_ceiling_never_does(
    subject: Subject, batch: Batch
) -> None:
    x = torch.randn(*batch.tokens.shape, 32)
    edit, long = both(subject, one_site((5,)), "floor", include_bos=True)
    off = (long.encode(x)[..., 5] == 0) & (batch.positions >= 0)
    row = subject.sae(SITE).full().W_dec[5]
    floored = edit.apply(SITE, x, batch.frame())
    torch.testing.assert_close(floored[off], x[off] + 0.7 * row, atol=1e-5, rtol=1e-5)
    edit, _ = both(subject, one_site((5,)), "ceiling", include_bos=True)
    assert torch.equal(edit.apply(SITE, x, batch.frame())[off], x[off])


# --- The long form --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("term", ERROR_TERMS)
@pytest.mark.parametrize("mode", of_modes("long form"))
def test_a_clamp_equals_the_long_form(
    subject: Subject, batch: Batch, mode: str, term: str, kind: str
) -> None:
    other = with_sae(subject, KINDS[kind])
    features = with_scale(other, batch, one_site())
    edit, long = both(other, features, mode, error_term=ERROR_TERMS[term], include_bos=True)
    x = 2 * torch.randn(*batch.tokens.shape, 32) + 0.5
    real = batch.positions >= 0
    some = long.encode(x)[..., list(IDS)][real] > 0
    assert some.any() and not some.all(), "some features are on and some are off"
    got = edit.apply(SITE, x, batch.frame())
    expected = long.apply(SITE, x.double(), batch.frame())
    assert relative(got[real], expected[real]) < 1e-5
    assert relative(got[real], x[real]) > 1e-2, "it does something"
    check_edit(edit, batch, 32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", of_modes("long form"))
def test_a_forward_pass_equals_one_with_the_long_form(
    subject: Subject, batch: Batch, mode: str, kind: str
) -> None:
    other = with_sae(subject, KINDS[kind])
    features = with_scale(other, batch, one_site())
    keep = batch.tokens.shape[1]
    real = batch.positions >= 0
    clean = other.outputs(batch, keep=keep)[real]
    for term in ERROR_TERMS.values():
        edit, long = both(other, features, mode, error_term=term)
        got = other.outputs(batch, (edit,), keep=keep)[real]
        assert relative(got, other.outputs(batch, (long,), keep=keep)[real]) < 1e-5
        assert relative(got, clean) > 1e-2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].k is None])
@pytest.mark.parametrize("mode", VALUES)
def test_in_a_model_in_double_precision_the_two_are_the_same_to_its_rounding(
    batch: Batch, mode: str, kind: str
) -> None:
    """The difference is rounding and nothing else: it goes away with it."""
    subject = with_sae(tiny_subject(), KINDS[kind])
    features = with_scale(subject, batch, one_site())
    subject.model.double()
    edit, long = both(subject, features, mode)
    logits = []
    for edits in ((), (edit,), (long,)):
        seen = Capture(Site(3))
        subject.outputs(batch, (*edits, seen))
        logits.append(seen.seen[0][1][batch.positions >= 0])
    # what is folded into weights was rounded when they were read, in float32
    assert logits[0].dtype == torch.float64
    assert relative(logits[1], logits[2]) < 1e-6
    assert relative(logits[1], logits[0]) > 1e-3


@pytest.mark.parametrize("inputs", [Inputs(), Inputs(scale=0.3), Inputs(norm="layer_norm")])
def test_the_feature_after_the_kth_of_a_topk_is_off(
    subject: Subject, batch: Batch, inputs: Inputs
) -> None:
    """Where a clamped feature comes right after the k largest, rounding must not switch it on."""
    n_wrong = 0
    for seed in range(5):
        sae = replace(random_sae(SITE, jump=False, seed=seed), k=9, inputs=inputs)
        bank = FeatureBank.of(sae, one_site(tuple(range(16))))
        x = normal(*batch.tokens.shape, 32, seed=seed)
        on = bank.activations(x, batch.frame()) > 0
        n_wrong += int((on != (sae.encode(x.double())[..., :16] > 0)).sum())
    assert n_wrong == 0


@pytest.mark.parametrize("term", claims(ERROR_TERMS, "definition", "error term: {}"))
def test_the_error_term(subject: Subject, batch: Batch, term: str) -> None:
    """What is passed on besides the clamped reconstruction."""
    sae = subject.sae(SITE).full()
    x = torch.randn(*batch.tokens.shape, 32)
    clamped = sae.encode(x)
    clamped[..., list(IDS)] = -3.0
    share = {"keep": 1.0, "drop": 0.0, "scale": 0.4}[term]
    expected = sae.decode(clamped) + share * (x - sae.decode(sae.encode(x)))
    edit, _ = both(subject, one_site(), "set", error_term=ERROR_TERMS[term], include_bos=True)
    real = batch.positions >= 0
    assert relative(edit.apply(SITE, x, batch.frame())[real], expected[real]) < 1e-5
    assert (edit.sae is None) == (term == "keep"), "the whole SAE is kept only if it is needed"


@pytest.mark.parametrize("term", claims(ERROR_TERMS, "long form", "error term: {}"))
def test_the_error_term_in_a_forward_pass(subject: Subject, batch: Batch, term: str) -> None:
    for mode in ("set", "multiply"):
        edit, long = both(subject, one_site(), mode, error_term=ERROR_TERMS[term])
        got, expected = (subject.outputs(batch, (e,)) for e in (edit, long))
        assert relative(got, expected) < 1e-5
        kept, _ = both(subject, one_site(), mode)
        changed = relative(got, subject.outputs(batch, (kept,)))
        assert (changed == 0) if term == "keep" else (changed > 1e-2)


# --- Several features, several sites, several interventions ---------------------------------------


def overlapping() -> SAE:
    """Features 1 and 5 share half of their direction."""
    sae = random_sae(SITE, jump=False, seed=4)
    W_enc, W_dec = sae.W_enc.clone(), sae.W_dec.clone()
    W_dec[5] = (W_dec[1] + W_dec[5]) / (W_dec[1] + W_dec[5]).norm()
    W_enc[:, 5] = W_dec[5]
    return replace(sae, W_enc=W_enc, W_dec=W_dec)


def test_all_values_come_from_the_same_activations(subject: Subject, batch: Batch) -> None:
    """Two features clamped together are not one clamped after the other."""
    other = with_sae(subject, overlapping())
    x = 2 * torch.randn(*batch.tokens.shape, 32)
    frame, real = batch.frame(), batch.positions >= 0
    edit, long = both(other, one_site((1, 5)), "multiply", include_bos=True)
    together = edit.apply(SITE, x, frame)
    assert relative(together[real], long.apply(SITE, x.double(), frame)[real]) < 1e-5
    one, two = (both(other, one_site((i,)), "multiply", include_bos=True)[0] for i in (1, 5))
    in_turn = two.apply(SITE, one.apply(SITE, x, frame), frame)
    other_turn = one.apply(SITE, two.apply(SITE, x, frame), frame)
    assert relative(in_turn[real], together[real]) > 1e-2
    assert relative(other_turn[real], in_turn[real]) > 1e-2
    # the order in which features are named says nothing
    turned, _ = both(other, one_site((5, 1)), "multiply", include_bos=True)
    assert relative(turned.apply(SITE, x, frame)[real], together[real]) < 1e-6


def given(mode: str, value: float | None, *entries: SiteFeatures, **fields: Any) -> Clamp:
    return Clamp(mode=mode, value=value, features=entries, **fields)


def entry(*ids: int, site: Site = SITE, group: str = "*") -> SiteFeatures:
    return SiteFeatures(site=str(site), ids=ids, group=group)


def prepared(
    kind: InterventionKind, subject: Subject, fit: Batch, found: FeatureSet
) -> tuple[Edit, ...]:
    """The edits as a trial makes them."""
    return kind.edits(subject, with_scale(subject, fit, kind.clamped(found)))


def test_several_at_one_site_act_in_their_order(subject: Subject, batch: Batch) -> None:
    other = with_sae(subject, overlapping())
    first, second = given("set", 4.0, entry(1)), given("multiply", -2.0, entry(5))
    found, frame = one_site((9,)), batch.frame()
    x, real = 2 * torch.randn(*batch.tokens.shape, 32), batch.positions >= 0
    alone = {k: prepared(k, other, batch, found)[0] for k in (first, second)}
    for of in ((first, second), (second, first)):
        edits = prepared(Several(of=of), other, batch, found)
        got = apply_edits(edits, SITE, x, frame)
        expected = alone[of[1]].apply(SITE, alone[of[0]].apply(SITE, x, frame), frame)
        assert torch.equal(got, expected)
        logits = other.outputs(batch, edits)
        assert torch.equal(logits, other.outputs(batch, [alone[kind] for kind in of]))
    swapped = apply_edits([alone[second], alone[first]], SITE, x, frame)
    assert relative(swapped[real], apply_edits(edits[::-1], SITE, x, frame)[real]) > 1e-2


def test_several_on_one_feature_in_turn(subject: Subject, batch: Batch) -> None:
    """The second finds what the first set, up to what the SAE reads of it."""
    kind = Several(of=(given("set", 4.0, entry(5)), given("floor", 4.0, entry(5))))
    first, second = prepared(kind, subject, batch, one_site())
    assert isinstance(second, FeatureEdit)
    x = torch.randn(*batch.tokens.shape, 32)
    after = first.apply(SITE, x, batch.frame())
    z = second.bank.activations(after, batch.frame())
    expected = after + (4.0 - z.clamp(max=4.0)) @ subject.sae(SITE).full().W_dec[[5]]
    mask = second.selects(SITE, batch.frame())
    got = second.apply(SITE, after, batch.frame())
    assert relative(got[mask], expected[mask]) < 1e-6


def test_each_of_several_acts_on_its_own_features(subject: Subject, batch: Batch) -> None:
    """One clamps what was found, the other what it names; neither clamps the other's."""
    found = one_site((1, 9))
    kind = Several(of=(Clamp(mode="set", value=4.0), given("set", -4.0, entry(5, 30))))
    edits = prepared(kind, subject, batch, found)
    assert [edit.bank.ids for edit in edits] == [((1, 9),), ((5, 30),)]  # type: ignore[attr-defined]
    # what a recovery has to leave alone is all of them
    assert kind.clamped(found).entries[0].ids == (1, 9, 5, 30)
    nested = Several(of=(kind, given("add", 1.0, entry(2))))
    assert [edit.bank.ids for edit in prepared(nested, subject, batch, found)] == [  # type: ignore[attr-defined]
        ((1, 9),), ((5, 30),), ((2,),),
    ]  # fmt: skip


def test_one_of_several_is_given_what_it_would_be_given_alone(
    subject: Subject, batch: Batch
) -> None:
    """A mean over all prompts stays one, beside a clamp whose features differ by group."""
    found = FeatureSet(entries=(entry(1, group="g0"), entry(9, group="g1")), source="test")
    mean = given("mean", None, entry(5, 30))
    (alone,) = prepared(mean, subject, batch, found)
    kind = Several(of=(Clamp(mode="max_scaled", value=2.0), mean))
    grouped, beside = prepared(kind, subject, batch, found)
    (grouped_alone,) = prepared(Clamp(mode="max_scaled", value=2.0), subject, batch, found)
    for one, other in ((alone, beside), (grouped_alone, grouped)):
        assert isinstance(one, FeatureEdit) and isinstance(other, FeatureEdit)
        assert one.bank.index == other.bank.index and one.bank.ids == other.bank.ids
        assert torch.equal(one.value, other.value)  # type: ignore[arg-type]


def test_a_later_site_sees_what_an_earlier_one_did(batch: Batch) -> None:
    subject = tiny_subject(sites=(SITE, LATER))
    features = FeatureSet(entries=(entry(1, 5), entry(2, 40, site=LATER)), source="test")
    kind = Clamp(mode="multiply", value=3.0)
    edits = kind.edits(subject, features)
    assert [edit.sites for edit in edits] == [(SITE,), (LATER,)]
    longs = [
        LongForm(subject.sae(e.bank.site).full(), "multiply", {"*": dict.fromkeys(ids, 3.0)}, 1, e)
        for e, ids in zip(edits, ((1, 5), (2, 40)), strict=True)
        if isinstance(e, FeatureEdit)
    ]
    got = subject.outputs(batch, edits)
    assert relative(got, subject.outputs(batch, longs)) < 1e-5
    assert torch.equal(got, subject.outputs(batch, edits[::-1])), "sites act in forward order"
    # the later clamp computes its values from the residual that the earlier one changed
    before, after = Capture(LATER), Capture(LATER)
    subject.outputs(batch, (edits[0], before, edits[1], after))
    (frame, x), (_, y) = before.seen[0], after.seen[0]
    assert torch.equal(edits[1].apply(LATER, x, frame), y)
    clean = Capture(LATER)
    subject.outputs(batch, (clean,))
    assert relative(clean.seen[0][1], x) > 1e-2
    both_kinds = Several(
        of=(given("multiply", 3.0, entry(1, 5)), given("multiply", 3.0, entry(2, 40, site=LATER)))
    )
    assert torch.equal(subject.outputs(batch, prepared(both_kinds, subject, batch, features)), got)


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", VALUES)
def test_groups_are_clamped_by_features_and_values_of_their_own(
    subject: Subject, batch: Batch, grouped_features: FeatureSet, mode: str
) -> None:
    features = with_scale(subject, batch, grouped_features)
    edit, long = both(subject, features, mode)
    x = 2 * torch.randn(*batch.tokens.shape, 32)
    real = batch.positions >= 0
    got, expected = (e.apply(SITE, x, batch.frame()) for e in (edit, long))
    assert relative(got[real], expected[real]) < 1e-5
    assert relative(subject.outputs(batch, (edit,)), subject.outputs(batch, (long,))) < 1e-5


def test_what_a_feature_is_given_is_its_groups_mean_or_maximum(
    subject: Subject, batch: Batch
) -> None:
    """The same feature in two groups: each has the mean of its own prompts."""
    both_groups = FeatureSet(entries=(entry(5, group="g0"), entry(5, 9, group="g1")), source="test")
    features = with_scale(subject, batch, both_groups)
    one, two = features.entries
    assert one.mean[0] != two.mean[0] and one.max[0] != two.max[0]
    (edit,) = Clamp(mode="max_scaled", value=10.0).edits(subject, features)
    assert isinstance(edit, FeatureEdit)
    frame = batch.frame()
    c = edit.assigned(torch.zeros(*batch.tokens.shape, 2), frame)
    for row, group in enumerate(batch.groups):
        top = torch.tensor([*one.max, 0.0] if group == "g0" else two.max)
        torch.testing.assert_close(c[row], (10 * top).expand_as(c[row]))


# --- The fit split --------------------------------------------------------------------------------


def codes_one_by_one(
    subject: Subject, batch: Batch, ids: tuple[int, ...], groups: set[str] | None = None
) -> Tensor:
    """[tokens k] one prompt at a time, without a batch, BOS left out."""
    rows = []
    for row, group in enumerate(batch.groups):
        if groups is not None and group not in groups:
            continue
        tokens = batch.tokens[row][batch.positions[row] >= 0]
        assert tokens[0] == subject.tokenizer.bos_token_id
        with torch.no_grad():
            states = subject.model(tokens[None], output_hidden_states=True).hidden_states
        rows.append(subject.sae(SITE).full().encode(states[SITE.depth][0, 1:])[:, list(ids)])
    return torch.cat(rows)


def check_scale(measured: SiteFeatures, z: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(measured.mean), z.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(measured.max), z.amax(0), atol=1e-5, rtol=1e-5)
    active = z[z > 0].sort().values
    assert measured.median_active == pytest.approx(float(active[(len(active) - 1) // 2]), rel=1e-4)


@pytest.mark.parametrize("batch_size", [128, 3])
def test_mean_and_maximum_are_those_of_a_plain_loop(batch: Batch, batch_size: int) -> None:
    subject = tiny_subject(batch_size=batch_size)
    (measured,) = with_scale(subject, batch, one_site()).entries
    z = codes_one_by_one(subject, batch, IDS)
    assert len(z) == int((batch.positions > 0).sum())
    check_scale(measured, z)
    assert 0 < measured.mean[0] < measured.max[0]


def test_bos_is_left_out_of_them(subject: Subject, batch: Batch) -> None:
    """BOS has activations nothing else has: with it the maximum is another."""
    capture = Capture(SITE)
    subject.outputs(batch, (capture,))
    at_bos = subject.sae(SITE).full().encode(capture.seen[0][1][batch.positions == 0])
    elsewhere = subject.sae(SITE).full().encode(capture.seen[0][1][batch.positions > 0])
    loudest = int((at_bos.amax(0) - elsewhere.amax(0)).argmax())
    (measured,) = with_scale(subject, batch, one_site((loudest,))).entries
    assert measured.max[0] < float(at_bos[:, loudest].max())
    assert measured.max[0] == pytest.approx(float(elsewhere[:, loudest].max()), rel=1e-5)


def test_each_group_is_measured_on_its_own_prompts(subject: Subject, batch: Batch) -> None:
    entries = (entry(1, 5, group="g0"), entry(5, 30, group="g1"))
    found = with_scale(subject, batch, FeatureSet(entries=entries, source="test"))
    for measured in found.entries:
        check_scale(measured, codes_one_by_one(subject, batch, measured.ids, {measured.group}))


def test_features_for_every_other_prompt(subject: Subject, batch: Batch) -> None:
    """`*` is measured on the prompts it serves, and on all where each has features of its own."""
    entries = (entry(1, 5, group="g0"), entry(9, 30))
    found = with_scale(subject, batch, FeatureSet(entries=entries, source="test"))
    check_scale(found.entries[0], codes_one_by_one(subject, batch, (1, 5), {"g0"}))
    check_scale(found.entries[1], codes_one_by_one(subject, batch, (9, 30), {"g1"}))
    entries = (*entries, entry(2, group="g1"))
    found = with_scale(subject, batch, FeatureSet(entries=entries, source="test"))
    check_scale(found.entries[1], codes_one_by_one(subject, batch, (9, 30)))


def test_several_sites_are_measured_each_at_its_own(batch: Batch) -> None:
    subject = tiny_subject(sites=(SITE, LATER))
    entries = (entry(5, 9), entry(5, 9, site=LATER))
    found = with_scale(subject, batch, FeatureSet(entries=entries, source="test"))
    check_scale(found.entries[0], codes_one_by_one(subject, batch, (5, 9)))
    assert found.entries[0].mean != found.entries[1].mean


def test_a_group_without_fit_prompts_has_no_mean(subject: Subject, batch: Batch) -> None:
    entries = (entry(5, group="g7"), entry(5))
    features = with_scale(subject, batch, FeatureSet(entries=entries, source="test"))
    assert features.entries[0].mean == ()
    Clamp(mode="set", value=1.0).edits(subject, features)
    with pytest.raises(StudyError, match=r"none was measured at .* for group 'g7'"):
        Clamp(mode="mean").edits(subject, features)


# --- Conditions -----------------------------------------------------------------------------------


@pytest.mark.proves("clamp modes", "conditional", "definition")
def test_a_condition_opens_over_its_threshold_and_not_at_it(subject: Subject, batch: Batch) -> None:
    x, frame = torch.randn(*batch.tokens.shape, 32), batch.frame()
    _, plain = both(subject, one_site(), "set")
    sae = subject.sae(SITE).full()
    z = FeatureBank.of(sae, one_site((7,))).activations(x, frame)[..., 0]
    mask = batch.positions > 0
    levels = z[mask & (z > 0)].sort().values
    for above in (0.0, float(levels[0]), float(levels[len(levels) // 2]), float(levels[-1])):
        edit, _ = both(subject, one_site(), "set", condition=Condition(feature=7, above=above))
        got = edit.apply(SITE, x, frame)
        opened = mask & (z > above)
        assert torch.equal(got[~opened], x[~opened])
        assert (got[opened] != x[opened]).any(-1).all()
        expected = replace(plain, instead_of=replace(edit, gate=None)).apply(SITE, x, frame)
        assert opened.sum() < mask.sum()
        if opened.any():
            assert relative(got[opened], expected[opened]) < 1e-5
    assert not opened.any(), "nothing is over the largest activation itself"


def test_a_condition_reads_what_is_there_before_its_clamp(subject: Subject, batch: Batch) -> None:
    """Also where the clamp switches off the feature it reads."""
    x, frame = torch.randn(*batch.tokens.shape, 32), batch.frame()
    edit, long = both(subject, one_site((5,)), "set", condition=Condition(feature=5, above=0.2))
    opened = (long.encode(x)[..., 5] > 0.2) & (batch.positions > 0)
    got = edit.apply(SITE, x, frame)
    assert torch.equal((got != x).any(-1), opened)
    # but after other edits of its site, like any later edit
    off = given("set", -20.0, entry(5))
    conditional = given("add", 2.0, entry(9), condition=Condition(feature=5, above=0.2))
    after = prepared(Several(of=(off, conditional)), subject, batch, one_site())
    alone = prepared(off, subject, batch, one_site())
    assert torch.equal(apply_edits(after, SITE, x, frame), apply_edits(alone, SITE, x, frame))
    before = prepared(Several(of=(conditional, off)), subject, batch, one_site())
    assert not torch.equal(apply_edits(before, SITE, x, frame), apply_edits(alone, SITE, x, frame))


@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_reads_every_kind_of_sae(subject: Subject, batch: Batch, kind: str) -> None:
    other = with_sae(subject, KINDS[kind])
    edit, long = both(other, one_site(), "add", condition=Condition(feature=7, above=0.3))
    x = 2 * torch.randn(*batch.tokens.shape, 32)
    opened = (long.encode(x)[..., 7] > 0.3) & (batch.positions > 0)
    assert opened.any() and not opened[batch.positions > 0].all()
    got = edit.apply(SITE, x, batch.frame())
    assert torch.equal((got != x).any(-1), opened)


@pytest.mark.proves("clamp modes", "conditional", "long form")
@pytest.mark.parametrize("term", ERROR_TERMS)
def test_a_conditional_clamp_equals_its_long_form(
    subject: Subject, batch: Batch, grouped_features: FeatureSet, term: str
) -> None:
    """One feature decides for prompts of every group."""
    edit, long = both(
        subject, grouped_features, "set", condition=Condition(feature=7, above=0.2),
        error_term=ERROR_TERMS[term],
    )  # fmt: skip
    assert edit.gate is not None
    capture = Capture(SITE)
    subject.outputs(batch, (capture,))
    opened = edit.gate.opens(capture.seen[0][1], batch.frame())[batch.positions > 0]
    assert opened.any() and not opened.all()
    assert relative(subject.outputs(batch, (edit,)), subject.outputs(batch, (long,))) < 1e-5


def test_a_condition_that_never_opens_changes_nothing(subject: Subject, batch: Batch) -> None:
    edit, _ = both(subject, one_site(), "set", condition=Condition(feature=7, above=1e6))
    assert torch.equal(subject.outputs(batch, (edit,)), subject.outputs(batch))


def test_a_condition_is_of_one_site(batch: Batch) -> None:
    subject = tiny_subject(sites=(SITE, LATER))
    condition = Condition(feature=7)
    with pytest.raises(ValueError, match="clamp one site with it"):
        given("set", 1.0, entry(1), entry(2, site=LATER), condition=condition)
    features = FeatureSet(entries=(entry(1), entry(2, site=LATER)), source="test")
    with pytest.raises(StudyError, match=r"features are at blocks\.1.*blocks\.2.*one site"):
        Clamp(mode="set", value=1.0, condition=condition).edits(subject, features)
    with pytest.raises(FeatureError, match="out of range"):
        Clamp(mode="set", value=1.0, condition=Condition(feature=64)).edits(subject, one_site())
    here = given("set", 1.0, entry(1), condition=condition)
    there = given("set", 1.0, entry(2, site=LATER), condition=condition)
    first, second = prepared(Several(of=(here, there)), subject, batch, features)
    assert isinstance(first, FeatureEdit) and isinstance(second, FeatureEdit)
    assert first.gate is not None and first.gate.bank.site == SITE
    assert second.gate is not None and second.gate.bank.site == LATER


# --- Conditions on the whole prompt ---------------------------------------------------------------


def often(share: float, above: float = 0.2, *features: int) -> PromptCondition:
    return PromptCondition(share=share, above=above, features=features)


@pytest.mark.parametrize("include_bos", [True, False])
@pytest.mark.parametrize("own", [(), (7, 11)], ids=["clamped features", "named features"])
def test_a_condition_on_the_prompt_counts_tokens(
    subject: Subject, batch: Batch, own: tuple[int, ...], include_bos: bool
) -> None:
    """Against a count by hand; the share itself is not over the share."""
    x, frame = torch.randn(*batch.tokens.shape, 32), batch.frame()
    counted = batch.positions >= (0 if include_bos else 1)
    z = subject.sae(SITE).full().encode(x)[..., list(own or (1, 5, 9))]
    shares = ((z > 0.2).any(-1) & counted).sum(1).double() / counted.sum(1)
    levels = sorted(set(shares.tolist()))
    assert len(levels) > 2 and levels[-1] > 0
    for share in (0.0, levels[0], levels[1], levels[-1]):
        if share == 1.0:
            continue
        edit, _ = both(
            subject, one_site((1, 5, 9)), "add", condition=often(share, 0.2, *own),
            include_bos=include_bos,
        )  # fmt: skip
        got = edit.apply(SITE, x, frame)
        plain = replace(edit, gate=None).apply(SITE, x, frame)
        for row, own_share in enumerate(shares.tolist()):
            assert torch.equal(got[row], plain[row] if own_share > share else x[row]), share


def test_cached_generation_keeps_what_the_prompt_decided(subject: Subject, chats: Batch) -> None:
    """Though the tokens that follow would have decided otherwise."""
    capture = Capture(SITE)
    subject.outputs(chats, (capture,))
    z = subject.sae(SITE).full().encode(capture.seen[0][1])[..., 7]
    counted = chats.positions > 0
    shares = ((z > 0.2) & counted).sum(1) / counted.sum(1)
    edit, _ = both(subject, one_site(), "set", condition=often(float(shares.median()), 0.2, 7))
    edit = replace(edit, value=-12.0)
    opened = Opened(edit)
    subject.generate(chats, (opened,), 6)
    assert set(opened.states) == {True, False}, "some prompts are clamped, some are not"
    check_cached(subject, chats, (edit,))
    with attached(subject.model, (edit,)):
        made = subject.model.generate(
            input_ids=chats.tokens, attention_mask=chats.mask, max_new_tokens=6, do_sample=False
        )[:, chats.tokens.shape[1] :]
    own = subject.generate(chats, (edit,), 6)
    assert torch.equal(made[:, : own.shape[1]], own)


def test_a_part_of_a_prompt_decides_nothing(subject: Subject, batch: Batch) -> None:
    edit, _ = both(subject, one_site(), "set", condition=often(0.3))
    frame, width = batch.frame(), batch.tokens.shape[1]
    with pytest.raises(EditError, match=r"over a part of a prompt; give the whole prompt"):
        edit.apply(SITE, torch.randn(8, 3, 32), frame.columns(slice(width - 3, width)))
    later = replace(frame, positions=frame.positions[:, -1:] + 1)
    with pytest.raises(EditError, match=r"goes on from a prompt that it never saw"):
        replace(edit).apply(SITE, torch.randn(8, 1, 32), replace(later, decided={}))
    on = attached(subject.model, (edit,))
    with pytest.raises(EditError, match=r"condition on the whole prompt depend on where"), on:
        subject.model(batch.tokens, attention_mask=batch.mask, use_cache=False)


def test_a_condition_on_the_prompt_says_what_it_is(subject: Subject) -> None:
    kind = Clamp(mode="set", value=1.0, condition=often(0.25))
    assert (
        "where any clamped feature exceeds 0.2 on more than 0.25 of the tokens"
        in (kind.formulas[0])
    )
    (edit,) = kind.edits(subject, one_site((1, 5)))
    assert isinstance(edit, FeatureEdit) and edit.gate is not None
    assert decided_on_whole((edit,)) == "a clamp's condition on the whole prompt"
    assert decided_on_whole((replace(edit, gate=None),)) == ""
    assert "any of 2 features over 0.2 on more than 0.25" in edit.gate.words
    with pytest.raises(EditError, match="no place for a clamp's condition on the whole prompt"):
        _saveable(edit, 0)


# --- Conditions on the direction of a prompt's last token -----------------------------------------

EARLIER = Site(1)


def points(above: float | Learnt, **fields: Any) -> DirectionCondition:
    return DirectionCondition(cosine_with=7, site=str(EARLIER), above=above, **fields)


def cosines_at(subject: Subject, batch: Batch, site: Site = EARLIER) -> Tensor:
    """[b] of the last prompt tokens with the decoder row of feature 7, one by one."""
    capture = Capture(site)
    subject.outputs(batch, (capture,))
    row = subject.sae(site).full().W_dec[7]
    return torch.stack(
        [
            torch.cosine_similarity(x[batch.positions[i] == batch.prompt_length[i] - 1][0], row, 0)
            for i, x in enumerate(capture.seen[0][1])
        ]
    )


def between(cosines: Tensor) -> float:
    """Over half of them, and at none."""
    levels = cosines.sort().values
    return float(levels[len(levels) // 2 - 1 : len(levels) // 2 + 1].mean())


def test_a_condition_on_a_direction_opens_over_its_cosine(subject: Subject, batch: Batch) -> None:
    """On all tokens of a prompt or on none, by what another site is at its last token."""
    cosines = cosines_at(subject, batch)
    levels = cosines.sort().values
    for above in (-1.0, float(levels[:2].mean()), between(cosines), float(levels[-1]) + 1e-3):
        kind = Clamp(mode="set", value=3.0, condition=points(above))
        edits = kind.edits(subject, one_site())
        assert isinstance(edits[0], Sensor) and edits[0].sites == (EARLIER,)
        before, after = Capture(SITE), Capture(SITE)
        subject.outputs(batch, (edits[0], before, edits[1], after))
        changed = (before.seen[0][1] != after.seen[0][1]).any(-1)
        opened = cosines > above
        assert torch.equal(changed, opened[:, None] & (batch.positions > 0))
        plain = Clamp(mode="set", value=3.0).edits(subject, one_site())
        always, never = subject.outputs(batch, plain), subject.outputs(batch)
        wanted = torch.where(opened[:, None, None], always, never)
        torch.testing.assert_close(subject.outputs(batch, edits), wanted, atol=1e-5, rtol=1e-5)
    assert not opened.any(), "over the largest it is closed for all"


def test_a_condition_on_a_direction_at_the_clamped_site_reads_before_the_clamp(
    subject: Subject, batch: Batch
) -> None:
    cosines = cosines_at(subject, batch, SITE)
    condition = DirectionCondition(cosine_with=7, above=between(cosines))
    edits = Clamp(mode="set", value=-9.0, condition=condition).edits(subject, one_site((7,)))
    after = Capture(SITE)
    subject.outputs(batch, (*edits, after))
    bare = Capture(SITE)
    subject.outputs(batch, (bare,))
    changed = (after.seen[0][1] != bare.seen[0][1]).any(-1).any(-1)
    assert torch.equal(changed, cosines > between(cosines)) and 0 < changed.sum() < len(batch)


@pytest.mark.parametrize("policy", ["all", "generated"])
def test_cached_generation_keeps_what_the_last_token_decided(
    subject: Subject, chats: Batch, policy: str
) -> None:
    """Decided once, from the prompt; and the same on a plain transformers model."""
    above = between(cosines_at(subject, chats))
    kind = Clamp(mode="set", value=-12.0, positions=POLICIES[policy], condition=points(above))
    edits = kind.edits(subject, one_site())
    check_cached(subject, chats, edits)
    opened = cosines_at(subject, chats) > above
    assert 0 < opened.sum() < len(chats)
    own, bare = subject.generate(chats, edits, 6), subject.generate(chats, (), 6)
    width = min(own.shape[1], bare.shape[1])
    assert torch.equal(own[~opened, :width], bare[~opened, :width]), "where it is closed"
    with attached(subject.model, edits):
        made = subject.model.generate(
            input_ids=chats.tokens, attention_mask=chats.mask, max_new_tokens=6, do_sample=False
        )[:, chats.tokens.shape[1] :]
    assert torch.equal(made[:, : own.shape[1]], own)


def test_a_cosine_is_learnt_from_prompts_to_be_left_alone(subject: Subject, batch: Batch) -> None:
    retain = (tiny_batch(subject, 7, seed=5), tiny_batch(subject, 4, seed=6))
    kind = Clamp(value=-2.0, condition=points(Learnt(percentile=70)))
    fitted = kind.fitted(subject, one_site(), retain)
    assert isinstance(fitted, Clamp) and isinstance(fitted.condition, DirectionCondition)
    cosines = torch.cat([cosines_at(subject, each) for each in retain])
    expected = np.percentile(cosines.numpy(), 70)
    assert fitted.condition.above == pytest.approx(expected, abs=1e-6)
    found = {m.name: m.estimate for m in triggers(
        subject, fitted.edits(subject, one_site()), {"left": retain[0], "test": batch}
    )}  # fmt: skip
    above = fitted.condition.above
    for name, each in (("left", retain[0]), ("test", batch)):
        rate = float((cosines_at(subject, each) > above).double().mean())
        assert found[f"trigger.{name}.prompts"] == pytest.approx(rate)
    with pytest.raises(StudyError, match="this behavior has none"):
        kind.fitted(subject, one_site(), ())
    with pytest.raises(StudyError, match="give what `fitted` returns"):
        kind.edits(subject, one_site())
    late = DirectionCondition(cosine_with=7, site=str(SITE), above=0.1)
    with pytest.raises(StudyError, match="comes after it"):
        Clamp(value=1.0, condition=late).edits(subject, one_site((1,), EARLIER))


def test_a_condition_on_a_direction_says_what_it_is(subject: Subject, batch: Batch) -> None:
    kind = Clamp(mode="set", value=1.0, condition=points(0.25))
    assert "whose last token's cosine with feature 7 at blocks.0" in kind.formulas[0]
    sensor, edit = kind.edits(subject, one_site((1, 5)))
    assert decided_on_whole((sensor, edit)) == "a clamp's condition on the prompt's last token"
    with pytest.raises(EditError, match="no place for a clamp's condition on the prompt's last"):
        _saveable(edit, 1)
    with pytest.raises(EditError, match="this pass never saw that token"):
        subject.outputs(batch, (edit,))
    check_edit(sensor, batch, 32)


# --- Positions ------------------------------------------------------------------------------------

SUFFIX = " w38 w39"


def chat_prompts(subject: Subject) -> Batch:
    """Ragged prompts of a chat: what was asked, then what the template puts after it."""
    asked = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9 w10", "w11 w12 w13 w14"]
    return subject.batch(
        [
            Example(
                id=f"chat:{row}", text=text + SUFFIX, suffix=SUFFIX, target="w1", rivals=("w2",),
                alternatives=("w3",), cluster=f"chat:{row}",
            )
            for row, text in enumerate(asked)
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def chats(subject: Subject) -> Batch:
    return chat_prompts(subject)


def named(policy: str, length: int, n_generated: int) -> list[int]:
    """The positions of a chat prompt that a policy names, counted by hand; BOS is 0."""
    every = range(length + n_generated)
    return {
        "all": list(every),
        "prompt": list(range(length)),
        "generated": list(range(length, length + n_generated)),
        "last_prompt": [length - 1],
        "template": [length - 2, length - 1],
        "listed": [p for p in (0, 1, 9) if p in every],
    }[policy]


@pytest.mark.parametrize("include_bos", [False, True])
@pytest.mark.parametrize("policy", of_policies("definition"))
def test_a_policy_acts_where_it_says(
    subject: Subject, chats: Batch, policy: str, include_bos: bool
) -> None:
    where = (0, 1, 9) if policy == "listed" else POLICIES[policy]
    edit, _ = both(subject, one_site(), "add", positions=where, include_bos=include_bos)
    n_new = 5
    positions = torch.cat([chats.positions, chats.prompt_length[:, None] + torch.arange(n_new)], 1)
    frame = replace(chats.frame(), positions=positions)
    x = torch.randn(*positions.shape, 32)
    changed = (edit.apply(SITE, x, frame) != x).any(-1)
    for row, length in enumerate(chats.prompt_length.tolist()):
        expected = [p for p in named(policy, length, n_new) if p or include_bos]
        assert positions[row][changed[row]].tolist() == expected


def test_without_a_bos_token_nothing_is_left_out(subject: Subject, chats: Batch) -> None:
    """SAEBench leaves position 0 alone even where it is a word."""
    edit, _ = both(subject, one_site(), "add")
    frame = replace(chats.frame(), bos=torch.zeros(len(chats), dtype=torch.bool))
    assert torch.equal(edit.selects(SITE, frame), chats.positions >= 0)


def test_the_template_is_the_suffix_of_a_chat(subject: Subject, chats: Batch) -> None:
    ids = [subject.tokenizer.convert_tokens_to_ids(word) for word in ("w38", "w39")]
    edit, _ = both(subject, one_site(), "set", positions="template")
    chosen = chats.tokens[edit.selects(SITE, chats.frame())].reshape(-1, 2)
    assert chosen.tolist() == [ids] * len(chats)


def test_template_positions_without_a_template_are_an_error(
    subject: Subject, chats: Batch, batch: Batch
) -> None:
    edit, _ = both(subject, one_site(), "set", positions="template")
    subject.outputs(chats, (edit,))
    with pytest.raises(PositionError, match="prompt tiny:0 has no chat template"):
        subject.outputs(batch, (edit,))
    with pytest.raises(PositionError, match="has no chat template"):
        subject.generate(batch, (edit,), 2)


# --- Generation under a cache ---------------------------------------------------------------------


def check_cached(subject: Subject, batch: Batch, edits: tuple[Edit, ...], n_new: int = 6) -> None:
    """Generation is a full forward pass per token, block by block, without hooks or a cache."""
    cached = subject.generate(batch, edits, n_new)
    assert cached.shape[1] > 3, "too few steps to tell"
    tokens, positions = batch.tokens, batch.positions
    done = torch.zeros(len(batch), dtype=torch.bool)
    eos, pad = subject.tokenizer.eos_token_id, subject.tokenizer.pad_token_id
    for step in range(cached.shape[1]):
        with torch.no_grad():
            frame = replace(batch.frame(), positions=positions)
            logits = full_pass(subject, tokens, frame, edits)
        chosen = torch.where(done, pad, logits.argmax(-1))
        assert torch.equal(chosen, cached[:, step]), f"step {step}"
        done |= chosen == eos
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    assert not torch.equal(cached, subject.generate(batch, (), n_new)), "the edits do something"


@pytest.mark.parametrize("include_bos", [False, True])
@pytest.mark.parametrize("policy", of_policies("cached generation"))
def test_cached_generation_equals_full_passes_for_every_policy(
    subject: Subject, chats: Batch, policy: str, include_bos: bool
) -> None:
    edit, _ = both(subject, one_site(), "set", positions=POLICIES[policy], include_bos=include_bos)
    check_cached(subject, chats, (replace(edit, value=8.0),))


@pytest.mark.parametrize("mode", of_modes("cached generation"))
def test_cached_generation_equals_full_passes_for_every_mode(
    subject: Subject, chats: Batch, batch: Batch, mode: str
) -> None:
    features = with_scale(subject, batch, one_site((1, 5, 9, 30, 2, 7, 11)))
    edit, _ = both(subject, features, mode, include_bos=True)
    value = {"mean": 30.0 * edit.value, "ceiling": 0.0, "multiply": -20.0, "floor": 6.0}.get(
        mode, edit.value
    )
    check_cached(subject, chats, (replace(edit, value=value),))


@pytest.mark.proves("clamp modes", "conditional", "cached generation")
@pytest.mark.parametrize("policy", POLICIES)
def test_cached_generation_equals_full_passes_for_a_conditional_clamp(
    subject: Subject, chats: Batch, policy: str
) -> None:
    edit, _ = both(
        subject, one_site(), "set", positions=POLICIES[policy],
        condition=Condition(feature=7, above=0.1),
    )  # fmt: skip
    edit = replace(edit, value=-12.0)
    opened = Opened(edit)
    subject.generate(chats, (opened,), 6)
    assert len(set(opened.states)) == 2, "open on some tokens, closed on others"
    check_cached(subject, chats, (edit,))


class Opened:
    """A conditional clamp that notes on which tokens it was open."""

    def __init__(self, edit: FeatureEdit):
        self.edit, self.sites, self.states = edit, edit.sites, list[bool]()
        self.selects, self.check_fired = edit.selects, edit.check_fired

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        assert isinstance(self.edit.gate, Gate | PromptGate)
        self.states += self.edit.gate.opens(x, frame)[self.selects(site, frame)].tolist()
        return self.edit.apply(site, x, frame)


@pytest.mark.parametrize("term", claims(ERROR_TERMS, "cached generation", "error term: {}"))
def test_cached_generation_equals_full_passes_for_every_error_term(
    subject: Subject, chats: Batch, term: str
) -> None:
    edit, _ = both(subject, one_site(), "set", error_term=ERROR_TERMS[term])
    check_cached(subject, chats, (replace(edit, value=8.0),))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_full_passes_for_every_sae(
    subject: Subject, chats: Batch, kind: str
) -> None:
    other = with_sae(subject, KINDS[kind])
    edit, _ = both(other, one_site(), "set")
    check_cached(other, chats, (replace(edit, value=8.0),))


def test_cached_generation_equals_full_passes_for_several_sites(chats: Batch) -> None:
    subject = tiny_subject(sites=(SITE, LATER))
    kind = Several(
        of=(
            given("multiply", -3.0, entry(1, 5, 9), positions="prompt"),
            given("add", 4.0, entry(2, 40), condition=Condition(feature=7)),
            given("set", 6.0, entry(2, 40, site=LATER), positions="generated"),
        )
    )
    check_cached(subject, chats, prepared(kind, subject, chats, one_site()))


# --- What a study may say -------------------------------------------------------------------------


def test_every_clamp_is_toml_object_and_json_at_once() -> None:
    for given_ in (
        {"kind": "clamp", "mode": "mean"},
        {"kind": "clamp", "mode": "max_scaled", "value": 5, "positions": [0, 4]},
        {"kind": "clamp", "value": [-2.0, -5.0], "positions": "template", "include_bos": True},
        {"kind": "clamp", "value": 1.0, "error_term": "drop"},
        {"kind": "clamp", "value": 1.0, "error_term": {"scale": 0.25}},
        {"kind": "clamp", "value": 1.0, "condition": {"feature": 3, "above": 0.5}},
        {"kind": "clamp", "value": 1.0, "condition": {"share": 0.05, "above": 0.5}},
        {"kind": "clamp", "value": 1.0, "condition": {"cosine_with": 3, "above": -0.5}},
        {
            "kind": "clamp",
            "value": 1.0,
            "condition": {"cosine_with": 3, "above": {"percentile": 9}, "site": "resid_post.1"},
        },
        {"kind": "clamp", "value": 1.0, "condition": {"share": 0.05, "features": [3, 4]}},
        {
            "kind": "several",
            "of": [
                {"kind": "clamp", "value": 1.0, "features": [{"site": "resid_post.1", "ids": [1]}]},
                {"kind": "clamp", "mode": "multiply", "value": 2.0},
            ],
        },
    ):
        kind = INTERVENTIONS.parse(given_)
        dumped = kind.model_dump(mode="json")
        assert INTERVENTIONS.parse(dumped) == kind
        assert INTERVENTIONS.parse(dumped).model_dump(mode="json") == dumped


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mode": "mean", "value": 1.0}, "leave `value` out"),
        ({"mode": "set"}, "needs a `value`"),
        ({"value": ()}, "at least 1 item"),
        ({"value": float("nan")}, "finite"),
        ({"mode": "ceil", "value": 1.0}, "'ceiling'"),
        ({"value": 1.0, "positions": "everywhere"}, "'last_prompt'"),
        ({"value": 1.0, "positions": (-1,)}, "greater than or equal to 0"),
        ({"value": 1.0, "error_term": "half"}, "'drop'"),
        ({"value": 1.0, "condition": {"feature": 1, "above": -0.5}}, "greater than or equal"),
        ({"value": 1.0, "condition": {"share": 1.0}}, "less than 1"),
        ({"value": 1.0, "condition": {"cosine_with": 3, "above": 1.0}}, "less than 1"),
    ],
)
def test_a_clamp_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clamp(**fields)


def test_a_strength_has_to_be_chosen(subject: Subject) -> None:
    for mode in ("set", "max_scaled"):
        kind = Clamp(mode=mode, value=(2.0, 5.0))
        features = one_site((5,), max=(3.0,))
        with pytest.raises(StudyError, match=r"lists the values \[2.0, 5.0\]"):
            kind.edits(subject, features)
        edits = [candidate.edits(subject, features)[0] for candidate in kind.candidates()]
        values = [float(torch.as_tensor(e.value).max()) for e in edits]  # type: ignore[attr-defined]
        assert values == ([2.0, 5.0] if mode == "set" else [6.0, 15.0])


def test_several_strengths_are_tried_in_every_combination() -> None:
    kind = Several(
        of=(Clamp(value=(1.0, 2.0)), Clamp(value=3.0), Several(of=(Clamp(value=(4.0, 5.0)),)))
    )

    def strengths(of: tuple[Any, ...]) -> Iterator[float]:
        for member in of:
            yield from strengths(member.of) if isinstance(member, Several) else [member.value]

    tried = [tuple(strengths(candidate.of)) for candidate in kind.candidates()]
    assert tried == [(1, 3, 4), (1, 3, 5), (2, 3, 4), (2, 3, 5)]


def test_features_of_another_clamp_are_refused(subject: Subject, batch: Batch) -> None:
    kind = given("set", 1.0, entry(1, 5))
    with pytest.raises(FeatureError, match="names its own features"):
        kind.edits(subject, one_site((9,)))
    several = Several(of=(kind, Clamp(value=1.0)))
    with pytest.raises(FeatureError, match="need a part of the features each"):
        several.edits(subject, one_site((9,)))
    assert len(several.edits(subject, several.clamped(one_site((9,))))) == 2


def test_what_the_parts_are_is_no_part_of_a_record() -> None:
    kind = Several(of=(given("set", 1.0, entry(1, 5)), Clamp(value=1.0)))
    features = kind.clamped(one_site((5, 9)))
    assert [part.entries[0].ids for part in features.parts] == [(1, 5), (5, 9)]
    assert features.model_dump(mode="json").keys() == {"entries", "source"}
    assert features.entries[0].ids == (1, 5, 9), "a feature of both is named once"


@pytest.mark.parametrize("mode", ["set", "set_where_active", "add", "floor", "ceiling"])
def test_values_in_units_of_a_unit_decoder(mode: Any) -> None:
    """What a dashboard shows: the same clamp on the SAE with its decoder norms folded."""
    from dataclasses import replace as changed

    from holdfast.testing import random_sae, tiny_batch, tiny_subject

    plain = random_sae(Site(2))
    lengths = torch.linspace(0.5, 3.0, plain.n_features)
    sae = changed(plain, W_dec=plain.W_dec * lengths[:, None])
    folded = changed(
        plain, W_enc=sae.W_enc * lengths, b_enc=sae.b_enc * lengths,
        threshold=sae.threshold * lengths,
    )  # fmt: skip
    subject = tiny_subject(sites=())
    features = FeatureSet(
        entries=(SiteFeatures(site=str(Site(2)), ids=(1, 5, 9, 40)),), source="test"
    )
    outputs = []
    for one, units in ((sae, "unit_decoder"), (folded, "activation")):
        own = changed(subject, saes={Site(2): one})
        clamp = Clamp(mode=mode, value=2.5, units=units)
        batch = tiny_batch(own, 6)
        outputs.append(own.outputs(batch, clamp.edits(own, features)))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_units_need_a_mode_with_values_of_its_own() -> None:
    with pytest.raises(ValidationError, match="has no units"):
        Clamp(mode="multiply", value=2.0, units="unit_decoder")


def test_a_condition_on_the_prompt_is_decided_where_only_the_answer_is_clamped(
    subject: Subject, batch: Batch
) -> None:
    bank = FeatureBank.of(subject.sae(SITE), one_site())
    free = FeatureEdit(bank, "set", 40.0, where="generated")
    plain = subject.generate(batch, (), max_new_tokens=4)
    clamped = subject.generate(batch, (free,), max_new_tokens=4)
    assert not torch.equal(plain, clamped), "the fixture: the clamp changes what is written"
    for above, expected in ((-1.0, clamped), (1e6, plain)):
        edit = replace(free, gate=PromptGate(bank, above, 0.0))
        assert torch.equal(subject.generate(batch, (edit,), max_new_tokens=4), expected)
