"""The parts of a recovery: they sum to it, and known SAEs give known answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from holdfast.batch import Batch, Example
from holdfast.edits import FeatureEdit
from holdfast.parts import EXACT, REENCODED, Split, take_apart
from holdfast.paths import follow
from holdfast.saes.bank import FeatureBank
from holdfast.saes.inputs import Inputs
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.subject import Subject
from holdfast.testing import random_sae, tiny_batch, tiny_subject
from holdfast.variants import PathSpec, Recovered, Variant, perform
from holdfast.verify import verify
from tests.unit.recovered import features_at, search, set_up, split

SITE, D = Site(2), 32


def with_sae(sae: SAE, seed: int = 0) -> Subject:
    return replace(tiny_subject(seed), saes={sae.site: sae})


def recovered(
    subject: Subject,
    batch: Batch | None = None,
    site: Site = SITE,
    constraint: str = "encoder_null",
) -> Recovered:
    batch = tiny_batch(subject, 6) if batch is None else batch
    features = features_at((site,))
    clamp = FeatureEdit(FeatureBank.of(subject.sae(site), features), "set", 1.0)
    found = search(set_up(subject, batch, features, (clamp,)), constraint)
    assert len(found) >= 4, "the search itself has to work"
    return found


@pytest.fixture(scope="module")
def found() -> Recovered:
    return recovered(tiny_subject())


@pytest.fixture(scope="module")
def parts(found: Recovered) -> Split:
    return split(found, n_top=3)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def mirror(width: int = D) -> SAE:
    """Reconstructs every residual: a feature for either sign of every dimension."""
    eye = torch.eye(width)
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(2 * width)
    return SAE(
        site=SITE, W_enc=both.T.contiguous(), W_dec=both, b_enc=zeros, b_dec=torch.zeros(width),
        threshold=zeros,
    )  # fmt: skip


def silent() -> SAE:
    """No feature ever fires: everything is error."""
    sae = random_sae(SITE)
    return replace(sae, threshold=torch.full_like(sae.threshold, 1e6))


# --- Identities after the whole search ------------------------------------------------------------


def test_parts_sum_to_the_vector_and_shares_to_one(found: Recovered, parts: Split) -> None:
    total = parts.clamped + parts.other + parts.residual
    assert relative(total, found.delta.double()) < 1e-6
    shares = torch.stack([parts.shares[name] for name in EXACT])
    torch.testing.assert_close(shares.sum(0), torch.ones(len(found)).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.gram, parts.gram.mT)
    assert parts.other.norm() > 0.1 * found.delta.norm(), "the SAE has something to say here"


def test_the_split_by_hand(found: Recovered, parts: Split) -> None:
    """Against the definition, with the whole SAE and no chunks."""
    sae = found.case.subject.sae(SITE).full()
    h = found.problem.replay.reference[SITE]
    change = sae.encode(h + found.delta) - sae.encode(h)
    ids = list(found.case.features.entries[0].ids)
    by_hand = change[..., ids] @ sae.W_dec[ids]
    torch.testing.assert_close(parts.clamped.float(), by_hand, atol=1e-5, rtol=1e-5)
    change[..., ids] = 0
    torch.testing.assert_close(parts.other.float(), change @ sae.W_dec, atol=1e-5, rtol=1e-5)
    keep = change.abs() >= change.abs().topk(3, -1).values[..., -1:]
    top = torch.where(keep, change, 0.0) @ sae.W_dec
    torch.testing.assert_close(parts.top.float(), top, atol=1e-5, rtol=1e-5)


def test_the_bounded_split_is_orthogonal_and_no_longer_than_the_vector(
    found: Recovered, parts: Split
) -> None:
    whole = found.delta.double()
    assert relative(parts.seen + parts.unseen, whole) < 1e-6
    dots = (parts.seen * parts.unseen).sum(-1)
    assert dots.abs().max() < 1e-5 * whole.square().sum(-1).max()
    for part in (parts.seen, parts.unseen):
        assert (part.norm(dim=-1) <= whole.norm(dim=-1) * (1 + 1e-6)).all()
    # No combination of the active rows comes nearer to the vector.
    sae = found.case.subject.sae(SITE).full()
    h = found.problem.replay.reference[SITE][0, 0]
    on = (sae.encode(h) > 0) | (sae.encode(h + found.delta[0, 0]) > 0)
    rows = sae.W_dec[on].double()
    best = torch.linalg.lstsq(rows.T, whole[0, 0][:, None]).solution
    torch.testing.assert_close(parts.seen[0, 0], (rows.T @ best)[:, 0], atol=1e-5, rtol=1e-5)
    assert int(parts.rank[0, 0]) == int(torch.linalg.matrix_rank(rows))


def test_adding_the_vector_again_is_the_recovery(found: Recovered) -> None:
    (again,) = perform(found, [Variant.whole("all", found.delta)])
    case = found.case
    scale = {SITE: case.features.median_active(SITE)}
    checks = verify(
        case.subject, case.batch, case.edits, found.perturbation(found.delta), found.problem.held,
        scale, clamp_first=True,
    )  # fmt: skip
    assert torch.equal(again.margin, checks.margin)
    assert torch.equal(again.drift_relative, checks.drift_relative)
    assert torch.equal(again.preactivation_drift, checks.preactivation_drift)
    assert again.back.all() and torch.allclose(again.norm, torch.ones(len(found)).double())


def test_held_features_carry_nothing_and_a_leak_shows(found: Recovered, parts: Split) -> None:
    assert parts.clamped.norm() < 1e-5 * found.delta.norm()
    loose = recovered(found.case.subject, constraint="unconstrained")
    assert split(loose, 3).clamped.norm() > 1e-3 * loose.delta.norm()


# --- Known constructions --------------------------------------------------------------------------


def test_what_a_silent_sae_does_not_see_is_everything() -> None:
    found = recovered(with_sae(silent()))
    parts = split(found, 3)
    assert parts.clamped.norm() == parts.other.norm() == parts.seen.norm() == 0
    torch.testing.assert_close(parts.residual, found.delta.double())
    assert (parts.rank == 0).all() and parts.switched["residual"].max() == 0
    paths = follow(found, PathSpec(scales=(1.0,), draws=1, margin_draws=2), seed=0).record
    assert paths["shapley"]["margin"]["residual"]["estimate"] == pytest.approx(1, abs=1e-6)
    alone = {row["name"]: row["back"]["estimate"] for row in paths["variants"]}
    assert alone["residual"] == 1 and alone["other"] == 0 and alone["all but residual"] == 0


def test_nothing_escapes_an_sae_that_reconstructs_everything() -> None:
    found = recovered(with_sae(mirror()))
    parts = split(found, 3)
    assert parts.residual.norm() < 1e-5 * found.delta.norm()
    torch.testing.assert_close(parts.explained, torch.ones_like(parts.explained))
    paths = follow(found, PathSpec(scales=(1.0,), draws=1, margin_draws=2), seed=0).record
    assert paths["shapley"]["margin"]["residual"]["estimate"] == pytest.approx(0, abs=1e-4)
    by_name = {row["name"]: row for row in paths["variants"]}
    assert by_name["all but residual"]["back"]["estimate"] == 1
    assert by_name["residual x1"]["back"]["estimate"] is None, "nothing has no direction"
    assert by_name["residual x1"]["back"]["n_unscored"] == len(found)


def linear_subject() -> Subject:
    """A subject whose logits are linear in the residual of the last site."""
    subject = tiny_subject(sites=(Site(3),))
    subject.model.model.norm = torch.nn.Identity()
    return subject


def pairs(subject: Subject, n: int = 6) -> Batch:
    """Prompts with one rival each, so that the margin has no kink."""
    return subject.batch(
        [
            Example(
                id=f"p{i}", text=f"w{i} w{i + 7} w{2 * i + 3}", target=f"w{i}",
                rivals=(f"w{i + 10}",), alternatives=(f"w{i + 20}",), cluster=f"p{i}",
            )
            for i in range(n)
        ]
    )  # fmt: skip


def test_a_linear_readout_does_what_the_parts_predict() -> None:
    """Effect of a part = its inner product with the readout; performed patches have to agree."""
    subject = linear_subject()
    found = recovered(subject, pairs(subject), Site(3))
    parts = split(found, 3)
    names = (*EXACT, "top", "seen", "unseen")
    variants = [Variant.whole("nothing", torch.zeros_like(found.delta))]
    variants += [Variant.whole(name, getattr(parts, name)) for name in names]
    nothing, *performed = perform(found, variants)
    W = subject.model.lm_head.weight.double()
    readout = W[found.case.batch.targets] - W[found.case.batch.rivals[:, 0]]
    for made in performed:
        predicted = (getattr(parts, made.name).sum(1) * readout).sum(1)
        torch.testing.assert_close(
            made.margin - nothing.margin, predicted, atol=2e-4, rtol=1e-3
        )  # float32 logits
    paths = follow(found, PathSpec(scales=(1.0,), draws=1, margin_draws=2), seed=0).record
    whole = (found.delta.double().sum(1) * readout).sum(1)
    for name in EXACT:  # of an additive effect everybody gets what they bring
        own = (getattr(parts, name).sum(1) * readout).sum(1) / whole
        estimate = paths["shapley"]["margin"][name]["estimate"]
        assert estimate == pytest.approx(float(own.mean()), abs=1e-3)


def test_shapley_values_sum_to_the_whole(found: Recovered) -> None:
    record = follow(found, PathSpec(scales=(1.0,), draws=1, margin_draws=2), seed=0).record
    for what in ("margin", "back"):
        values = [record["shapley"][what][name]["estimate"] for name in EXACT]
        assert sum(values) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["topk", "scaled", "centered", "layer_norm"])
def test_every_kind_of_sae_is_split(kind: str) -> None:
    sae = random_sae(SITE, jump=kind != "topk")
    inputs = {
        "scaled": Inputs(scale=0.5),
        "centered": Inputs(center=True),
        "layer_norm": Inputs(norm="layer_norm"),
    }
    sae = replace(sae, k=8) if kind == "topk" else replace(sae, inputs=inputs[kind])
    free = kind in ("topk", "layer_norm")  # whose codes unchanged encoder directions do not fix
    found = recovered(with_sae(sae), constraint="unconstrained" if free else "encoder_null")
    parts = split(found, 3)
    assert relative(parts.clamped + parts.other + parts.residual, found.delta.double()) < 1e-6
    h = found.problem.replay.reference[SITE]
    decoded = sae.decode(sae.encode(h + found.delta), h + found.delta)
    change = decoded - sae.decode(sae.encode(h), h)
    seen = (parts.clamped + parts.other).float()
    if kind == "centered":  # the mean that centering puts back is the residual's
        change = change - found.delta.mean(-1, keepdim=True)
    if kind == "layer_norm":  # so are the decoder's bias and the token's own mean and length
        bias = sae.decode(torch.zeros_like(sae.encode(h)), h)
        moved = sae.decode(torch.zeros_like(sae.encode(h)), h + found.delta)
        change = change - (moved - bias)
    torch.testing.assert_close(seen, change, atol=2e-5, rtol=1e-4)


def test_chunks_change_nothing(
    found: Recovered, parts: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 64)  # a few features, and a slot, at a time
    again = split(found, 3)
    for name in (*EXACT, "top", "seen"):
        torch.testing.assert_close(getattr(again, name), getattr(parts, name), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [None, 8])
def test_a_residual_meets_the_sae_once(k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both splits together: the residual as it is, with the vector, and with each of the parts."""
    sae = random_sae(SITE, jump=k is None)
    found = recovered(with_sae(replace(sae, k=k)), constraint="unconstrained")
    met, read = Counter[str](), Counter[str]()

    def product(x: Tensor, W: Tensor) -> Tensor:
        met["encoded" if len(W) == D else "decoded"] += x.shape[:-1].numel() * W.numel() // D
        return x @ W

    def full(self: SAE) -> SAE:
        read[str(self.site)] += 1
        return self

    monkeypatch.setattr("holdfast.saes.sae.product", product)
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 900)  # many blocks, and no half of them
    monkeypatch.setattr(SAE, "full", full)
    take_apart(found, None, 3, 6, 0)
    whole = len(found) * sae.n_features
    assert met == {"encoded": (2 + len(REENCODED)) * whole, "decoded": len(REENCODED) * whole}
    assert read == {str(SITE): 1}


# --- Several sites and positions ------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep() -> Recovered:
    sites = (Site(1), Site(2))
    subject = tiny_subject(sites=sites)
    features = features_at(sites, (3, 7, 20))
    edits = tuple(FeatureEdit(FeatureBank.of(subject.sae(s), features), "set", 0.5) for s in sites)
    setting = set_up(subject, tiny_batch(subject, 5), features, edits)
    found = search(setting, "feature_hold", perturb={"positions": "prompt"}, steps=15)
    assert len(found) >= 2
    return found


def test_places_are_told_apart_and_put_together_again(deep: Recovered) -> None:
    from holdfast.replays import of_places

    places = {v.name: v.draws[0] for v in of_places(deep, PathSpec(groups=3))}
    alone = {name: delta for name, delta in places.items() if name.startswith("at ")}
    assert set(alone) == {
        f"at {Site(1)}", f"at {Site(2)}", "at positions 1 of 3", "at positions 2 of 3",
        "at positions 3 of 3",
    }  # fmt: skip
    for name, delta in alone.items():
        torch.testing.assert_close(delta + places[f"all but {name}"], deep.delta)
        assert 0 < delta.norm() < deep.delta.norm()
    for kind in ("blocks", "positions"):
        both = sum(delta for name, delta in alone.items() if kind in name)
        torch.testing.assert_close(both, deep.delta)


def test_parts_at_several_sites_sum_to_the_vectors(deep: Recovered) -> None:
    parts = split(deep, 3)
    total = parts.clamped + parts.other + parts.residual
    assert relative(total, deep.delta.double()) < 1e-6
    missing = ~deep.problem.perturbed
    assert missing.any() and parts.residual[missing].abs().max() == 0
    (again,) = perform(deep, [Variant.whole("all", total)])
    assert again.back.all()


def test_a_site_without_an_sae_is_not_split_and_says_so(deep: Recovered) -> None:
    subject = replace(deep.case.subject, saes={Site(1): deep.case.subject.sae(Site(1))})
    lone = replace(deep, case=replace(deep.case, subject=subject))
    record = follow(lone, PathSpec(scales=(1.0,), draws=1, margin_draws=2), seed=0).record
    assert record["reason"] == f"no SAE at {Site(2)}"
    assert record["parts"] == [] and record["gram"] is None and record["shapley"] == {}
    names = [row["name"] for row in record["variants"]]
    assert "all" in names and f"at {Site(2)}" in names and "residual" not in names


# --- The clamp taken back -------------------------------------------------------------------------


def undone(found: Recovered) -> dict[str, Tensor]:
    from holdfast.replays import of_undo

    return {v.name: v.draws[0] for v in of_undo(found)}


def test_what_takes_the_clamp_back_is_projected_out_slot_by_slot(found: Recovered) -> None:
    own, replay = undone(found), found.problem.replay
    back = replay.unclamped[SITE] - replay.reference[SITE]
    rows = found.problem.held[SITE].W_dec[0]
    for name, directions in (("along the clamp", back), ("in clamped rows", rows)):
        part, rest = own[name], own[f"all but {name}"]
        torch.testing.assert_close(part + rest, found.delta)
        assert part.norm() > 1e-3 * found.delta.norm(), "a random clamp is not orthogonal to it"
        inner = rest @ directions.mT if directions.ndim == 2 else (rest * directions).sum(-1)
        assert inner.abs().max() < 1e-4 * float(directions.norm() * rest.norm())
    # The clamp moves the residual within the span of its rows: the second part holds the first.
    assert (
        own["along the clamp"].norm(dim=(1, 2)) <= own["in clamped rows"].norm(dim=(1, 2)) + 1e-6
    ).all()


@pytest.mark.parametrize(
    ("constraint", "name"),
    [("undo_null", "along the clamp"), ("decoder_null", "in clamped rows")],
)
def test_constraints_that_forbid_it_leave_none(constraint: str, name: str) -> None:
    kept = recovered(tiny_subject(), constraint=constraint)
    assert undone(kept)[name].norm() < 1e-5 * kept.delta.norm()
