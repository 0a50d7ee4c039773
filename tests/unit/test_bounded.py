"""Parts that cannot be longer than the vector, and what a part is to be told from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.decomposition import PCA

from holdfast.bounded import SUBSPACES, Bounded, Components
from holdfast.edits import Capture, FeatureEdit
from holdfast.parts import EXACT
from holdfast.paths import follow
from holdfast.replays import of_likes, of_norms, of_parts, of_places, parts_of
from holdfast.saes.bank import FeatureBank
from holdfast.saes.inputs import Inputs
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.testing import random_sae, tiny_batch, tiny_subject
from holdfast.variants import PathSpec, Recovered, perform
from tests.unit.recovered import bounded, features_at, search, set_up, split

SITE, ATOMS, TOP = Site(2), 6, 5


def recovered(
    sae: SAE | None = None, constraint: str = "encoder_null", where: str = "last_prompt"
) -> Recovered:
    subject = tiny_subject()
    if sae is not None:
        subject = replace(subject, saes={SITE: sae})
    features = features_at((SITE,))
    clamp = FeatureEdit(FeatureBank.of(subject.sae(SITE), features), "set", 1.0)
    setting = set_up(subject, tiny_batch(subject, 6), features, (clamp,))
    setting = replace(setting, fit=tiny_batch(subject, 20, seed=1))
    found = search(setting, constraint, perturb={"positions": where})
    assert len(found) >= 4
    return found


@pytest.fixture(scope="module")
def found() -> Recovered:
    return recovered()


@pytest.fixture(scope="module")
def components(found: Recovered) -> Components:
    return Components.of(found.case.subject, found.setting.fit, (SITE,), TOP)


@pytest.fixture(scope="module")
def made(found: Recovered, components: Components) -> dict[str, Bounded]:
    return bounded(found, components, ATOMS, seed=0)


def test_part_and_rest_are_orthogonal_and_no_longer_than_the_vector(
    found: Recovered, made: dict[str, Bounded]
) -> None:
    whole = found.delta.double()
    assert tuple(made) == SUBSPACES
    for name, own in made.items():
        rest = whole - own.part
        assert (own.part * rest).sum(-1).abs().max() < 1e-5 * whole.square().sum(-1).max(), name
        for piece in (own.part, rest):
            assert (piece.norm(dim=-1) <= whole.norm(dim=-1) * (1 + 1e-6)).all(), name
        assert 0.01 < own.part.norm() / whole.norm() < 0.999, f"{name} says something"


def test_each_is_in_its_subspace_and_so_is_its_noise(
    found: Recovered, made: dict[str, Bounded], components: Components
) -> None:
    sae = found.case.subject.sae(SITE).full()
    h = found.problem.replay.reference[SITE]
    for row in range(len(found)):
        on = (sae.encode(h[row, 0]) > 0) | (sae.encode(h[row, 0] + found.delta[row, 0]) > 0)
        columns = {
            "seen": sae.W_dec[on].T, "encoder": sae.W_enc[:, on],
            "principal": components.basis[SITE],
        }  # fmt: skip
        for name, span in columns.items():
            own, span = made[name], span.double()
            assert int(own.rank[row, 0]) == int(torch.linalg.matrix_rank(span))
            for vector in (own.part[row, 0], own.noise[row, 0]):
                fit = span @ torch.linalg.lstsq(span, vector[:, None]).solution
                torch.testing.assert_close(fit[:, 0], vector, atol=1e-5, rtol=1e-4)
            # No vector of the subspace comes nearer.
            best = span @ torch.linalg.lstsq(span, found.delta[row, 0].double()[:, None]).solution
            torch.testing.assert_close(best[:, 0], own.part[row, 0], atol=1e-5, rtol=1e-4)
    for own in made.values():
        torch.testing.assert_close(own.noise.norm(dim=-1), own.part.norm(dim=-1))
        cosine = (own.noise * own.part).sum(-1) / own.part.norm(dim=-1).square()
        assert cosine.abs().max() < 0.999, "random, and not the part again"


def test_a_sparse_code_has_few_rows_and_no_more_than_are_active(
    found: Recovered, components: Components, made: dict[str, Bounded]
) -> None:
    sae = found.case.subject.sae(SITE).full()
    h = found.problem.replay.reference[SITE][found.problem.perturbed]
    l0 = round(float((sae.encode(h) > 0).sum(-1).double().mean()))
    assert 1 <= int(made["sparse"].rank.max()) <= min(ATOMS, l0)
    more = bounded(found, components, 10_000, seed=0)["sparse"]
    assert ATOMS < int(more.rank.max()) <= l0
    assert (more.part.norm(dim=-1) >= made["sparse"].part.norm(dim=-1) - 1e-9).all()


def test_chunks_change_nothing(
    found: Recovered,
    components: Components,
    made: dict[str, Bounded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("holdfast.chunks.ENTRIES", 64)  # a few features, and a slot, at a time
    for name, own in bounded(found, components, ATOMS, seed=0).items():
        torch.testing.assert_close(own.part, made[name].part, atol=1e-5, rtol=1e-4)
        assert torch.equal(own.rank, made[name].rank)


def test_components_are_scikit_learns(found: Recovered, components: Components) -> None:
    subject, fit = found.case.subject, found.setting.fit
    read = Capture(SITE)
    subject.outputs(fit, (read,))
    (frame, x) = read.seen[0]
    theirs = PCA(TOP).fit(x[frame.positions > 0].double().numpy())
    ours, other = components.basis[SITE], torch.from_numpy(theirs.components_.T)
    torch.testing.assert_close(ours @ ours.T, other @ other.T, atol=1e-4, rtol=0)
    assert components.share[SITE] == pytest.approx(theirs.explained_variance_ratio_.sum())


@pytest.mark.parametrize("kind", ["scaled", "layer_norm", "wide"])
def test_other_saes_and_many_positions(kind: str) -> None:
    sae = random_sae(SITE, n_features=256 if kind == "wide" else 64)
    inputs = {"scaled": Inputs(scale=0.5), "layer_norm": Inputs(norm="layer_norm")}
    sae = replace(sae, inputs=inputs.get(kind, sae.inputs))
    found = recovered(sae, "unconstrained", "all")
    there = found.problem.perturbed
    assert not there.all()
    for name, own in bounded(found, None, ATOMS, 0).items():
        assert name != "principal", "there was nothing to see it on"
        assert own.part.shape == found.delta.shape
        assert own.part[~there].abs().max() == 0, "nothing where there is no slot"
        assert (own.part.norm(dim=-1) <= found.delta.norm(dim=-1) * (1 + 1e-6)).all()


def test_parts_are_brought_to_every_norm_and_left_out(
    found: Recovered, made: dict[str, Bounded]
) -> None:
    parts = parts_of(split(found, 3), made)
    spec = PathSpec(part_scales=(0.25, 0.5, 1.0, 1.5, 2.0))
    variants = {v.name: v for v in (*of_parts(found, parts), *of_norms(found, parts, spec))}
    for name, part in parts.items():
        for scale in spec.part_scales:
            own = variants[f"{name} x{scale:g}"]
            length = own.draws[0].norm(dim=(1, 2))[own.there]
            torch.testing.assert_close(length, scale * found.length.double()[own.there])
        if name not in ("seen", "unseen"):
            together = variants[name].draws[0] + variants[f"all but {name}"].draws[0]
            torch.testing.assert_close(together, found.delta.double())
            assert torch.equal(variants[name].draws[0], part.to(variants[name].draws[0].dtype))


def test_likes_are_another_prompts_part_and_noise_of_the_same_norm(
    found: Recovered, made: dict[str, Bounded]
) -> None:
    parts = parts_of(split(found, 3), made)
    likes = {v.name: v for v in of_likes(found, parts, made)}
    assert set(likes) == {f"{n} of another" for n in EXACT} | {f"random in {n}" for n in SUBSPACES}
    for variant in likes.values():
        length = variant.draws[0].norm(dim=(1, 2))[variant.there]
        torch.testing.assert_close(length, found.length.double()[variant.there])
    n = len(found)
    other = torch.roll(torch.arange(n), -1)
    theirs = parts["residual"][other]
    theirs = theirs / theirs.norm(dim=(1, 2), keepdim=True)
    own = likes["residual of another"].draws[0]
    torch.testing.assert_close(own / own.norm(dim=(1, 2), keepdim=True), theirs)
    # Within one cluster there is no other prompt.
    batch = replace(found.case.batch, clusters=("one",) * n)
    alone = replace(found, case=replace(found.case, batch=batch))
    assert not any(
        v.there.any() for v in of_likes(alone, parts, made) if v.name.endswith("of another")
    )


def test_what_was_found_comes_to_the_record(found: Recovered) -> None:
    spec = PathSpec(scales=(1.0,), draws=1, atoms=ATOMS, principal=TOP)
    record = follow(found, spec, seed=0).record
    ranks = {row["name"]: row["rank"] for row in record["parts"]}
    assert ranks["principal"] == TOP and 1 <= ranks["sparse"] <= ATOMS
    assert ranks["seen"] == pytest.approx(record["rank"])
    assert 0 < record["principal_variance"][str(SITE)] < 1
    kept = {row["name"]: row["regained"] for row in record["routes"]["kept"]}
    assert set(kept) == {"direct", "no attention", "no mlps", "no patterns"}
    lens = {row["name"]: row["lead"]["estimate"] for row in record["routes"]["lens"]}
    assert lens["clamped"] + lens["other"] + lens["residual"] == pytest.approx(lens["all"])
    heads = record["heads"]
    assert heads["error_max"] < 1e-4 and heads["softcap"] is None
    for condition in ("clean", "suppressed", "recovered", "gain"):
        total = sum(term[condition]["estimate"] for term in heads["terms"])
        assert total == pytest.approx(heads["lead"][condition]["estimate"], abs=1e-4)
    assert heads["strongest"]["suppressed"] == 1
    by_size = [abs(row["gain"]["estimate"]) for row in heads["top"]]
    assert by_size == sorted(by_size, reverse=True)
    less = follow(
        found, spec.model_copy(update={"heads": False, "routes": False, "likes": False}), 0
    )
    assert less.record["heads"] is None and less.record["routes"] is None
    assert not any("another" in row["name"] for row in less.record["variants"])


def test_overlaps_are_cosines_with_what_nobody_searched_for(found: Recovered) -> None:
    record = follow(found, PathSpec(scales=(1.0,), draws=1, margin_draws=2), seed=0).record
    made = {row["name"]: row["cosine"] for row in record["overlaps"]}
    assert set(made) == {"undo", "answer_mean", "gradient_inside"}
    replay = found.problem.replay
    back = (replay.unclamped[SITE] - replay.reference[SITE]).flatten(1)
    cosine = torch.cosine_similarity(back, found.delta.flatten(1))
    assert made["undo"]["estimate"] == pytest.approx(float(cosine.quantile(0.5)), abs=1e-5)
    assert made["gradient_inside"]["estimate"] > 0, "a recovery climbs"


def test_up_to_a_place_is_the_sum_of_those_before_it() -> None:
    found = recovered(constraint="unconstrained", where="all")
    variants = {v.name: v.draws[0] for v in of_places(found, PathSpec(groups=4))}
    alone = [variants[f"at positions {i} of 4"] for i in (1, 2, 3, 4)]
    torch.testing.assert_close(sum(alone), found.delta)
    torch.testing.assert_close(variants["up to positions 2 of 4"], alone[0] + alone[1])
    torch.testing.assert_close(variants["up to positions 3 of 4"], found.delta - alone[3])
    assert "up to positions 1 of 4" not in variants and "up to positions 4 of 4" not in variants


def test_the_whole_recovery_is_in_it_still(found: Recovered, made: dict[str, Bounded]) -> None:
    """Full replay is the recovery, and a part with its rest is the full replay, exactly."""
    from holdfast.variants import Variant

    part = made["sparse"].part
    both = Variant.whole("both", (part + (found.delta.double() - part)).float())
    again, put_together = perform(found, [Variant.whole("all", found.delta), both])
    assert again.back.all()
    torch.testing.assert_close(put_together.margin, again.margin, atol=1e-5, rtol=1e-5)
