"""The rank-|S| clamp against the long form, and what each mode means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from holdfast.batch import Batch
from holdfast.edits import FeatureEdit
from holdfast.errors import FeatureError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import random_sae

SITE = Site(2)
MODES = ["set", "set_where_active", "multiply"]


def long_form(
    sae: SAE, ids: list[int], mode: str, value: float, alpha: float, x: torch.Tensor
) -> torch.Tensor:
    """D(clamp(E(x))) + α·(x − D(E(x))): every feature encoded and decoded, in float64."""
    x = x.double()
    W_enc, W_dec = sae.W_enc.double(), sae.W_dec.double()
    b_enc, b_dec, theta = sae.b_enc.double(), sae.b_dec.double(), sae.threshold.double()
    p = (x - b_dec if sae.subtract_b_dec else x) @ W_enc + b_enc
    z = p * (p > theta)
    c = z.clone()
    for i in ids:
        if mode == "set":
            c[..., i] = value
        elif mode == "set_where_active":
            c[..., i] = torch.where(z[..., i] > 0, torch.full_like(z[..., i], value), z[..., i])
        else:
            c[..., i] = value * z[..., i]
    return (c @ W_dec + b_dec) + alpha * (x - (z @ W_dec + b_dec))


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.4])
def test_rank_s_clamp_equals_the_long_form(
    subject: Subject, batch: Batch, jump: bool, mode: str, alpha: float
) -> None:
    ids = [1, 5, 9, 30]
    sae = random_sae(SITE, jump=jump, seed=4)
    features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=tuple(ids)),), source="test")
    bank = FeatureBank.of(sae, features)
    edit = FeatureEdit(
        bank, mode, -3.0, include_bos=True, error_scale=alpha, sae=None if alpha == 1 else sae
    )
    x = 2 * torch.randn(*batch.tokens.shape, 32)
    expected = long_form(sae, ids, mode, -3.0, alpha, x)
    got = edit.apply(SITE, x, batch.frame())
    real = batch.positions >= 0
    error = (got.double() - expected)[real].abs().max() / expected[real].abs().max()
    assert error < 1e-5


def test_groups_get_their_own_features(
    subject: Subject, batch: Batch, grouped_features: FeatureSet
) -> None:
    sae = subject.sae(SITE)
    edit = FeatureEdit(FeatureBank.of(sae, grouped_features), "set", 2.0, include_bos=True)
    x = torch.randn(*batch.tokens.shape, 32)
    got = edit.apply(SITE, x, batch.frame())
    for row, group in enumerate(batch.groups):
        ids = list(grouped_features.at(SITE)[0 if group == "g0" else 1].ids)
        expected = long_form(sae, ids, "set", 2.0, 1.0, x[row])
        real = batch.positions[row] >= 0
        torch.testing.assert_close(got[row][real].double(), expected[real], atol=1e-5, rtol=1e-5)


def test_a_group_without_features_is_an_error(batch: Batch, subject: Subject) -> None:
    only = FeatureSet(entries=(SiteFeatures(site=str(SITE), group="g0", ids=(1,)),), source="test")
    bank = FeatureBank.of(subject.sae(SITE), only)
    with pytest.raises(FeatureError, match=r"no features for the groups \['g1'\]"):
        bank.slices(batch.frame())


def test_modes_on_values_made_by_hand() -> None:
    z = torch.tensor([0.0, 0.5, 3.0])
    bank = None  # the rule needs no features

    def assigned(mode: str, value: float) -> list[float]:
        return FeatureEdit(bank, mode, value).assigned(z, None).tolist()  # type: ignore[arg-type]

    assert assigned("set", 2.0) == [2.0, 2.0, 2.0]
    assert assigned("set_where_active", -5.0) == [0.0, -5.0, -5.0]
    assert assigned("multiply", 3.0) == [0.0, 1.5, 9.0]  # an inactive feature stays off


def test_bos_and_padding_are_left_alone(batch: Batch, clamp: FeatureEdit) -> None:
    edit = replace(clamp, mode="set", value=4.0)
    x = torch.randn(*batch.tokens.shape, 32)
    got = edit.apply(SITE, x, batch.frame())
    special = batch.positions <= 0
    assert torch.equal(got[special], x[special])
    assert (got[~special] != x[~special]).any(-1).all()
    with_bos = replace(edit, include_bos=True).apply(SITE, x, batch.frame())
    bos = batch.positions == 0
    assert (with_bos[bos] != x[bos]).any(-1).all()


@pytest.mark.parametrize(
    "ids, message", [((1, 1), "given twice"), ((64,), "out of range"), ((-1,), "out of range")]
)
def test_bad_feature_ids_are_refused(subject: Subject, ids: tuple[int, ...], message: str) -> None:
    features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=ids),), source="test")
    with pytest.raises(FeatureError, match=message):
        FeatureBank.of(subject.sae(SITE), features)


def test_partial_encode_equals_the_columns_of_the_full_one(subject: Subject) -> None:
    sae, x = subject.sae(SITE), torch.randn(7, 32)
    ids = [3, 40, 11]
    torch.testing.assert_close(sae.encode(x, ids), sae.encode(x)[:, ids], atol=1e-6, rtol=1e-6)


def test_thresholds_are_strict() -> None:
    sae = random_sae(SITE)
    at = replace(sae, W_enc=torch.zeros_like(sae.W_enc), b_enc=sae.threshold.clone())
    assert (at.encode(torch.zeros(1, 32)) == 0).all()
