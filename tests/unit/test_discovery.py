"""Attribution equals the gradient through the SAE, and sees the fit split alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from holdfast.batch import Batch
from holdfast.discovery import with_scale
from holdfast.discovery.attribution import Attribution
from holdfast.discovery.given import Given
from holdfast.edits import Capture
from holdfast.errors import FeatureError, SplitError
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.sites import Site
from holdfast.splits import check_disjoint
from holdfast.subject import Subject
from holdfast.testing import tiny_batch

SITE = Site(2)


class Through:
    """The SAE in the graph as D(E(x)) + stop_gradient(error), with the codes kept as a leaf."""

    def __init__(self, subject: Subject):
        self.sae, self.z = subject.sae(SITE), None
        self.sites = (SITE,)

    def selects(self, site: Site, frame: object) -> torch.Tensor:
        return frame.positions >= 0  # type: ignore[attr-defined]

    def apply(self, site: Site, x: torch.Tensor, frame: object) -> torch.Tensor:
        self.z = self.sae.encode(x).detach().requires_grad_(True)
        return self.sae.decode(self.z) + (x - self.sae.decode(self.z)).detach()

    def check_fired(self, site: Site, n_fired: int) -> None:
        assert n_fired


def test_attribution_equals_the_gradient_through_the_sae(subject: Subject, batch: Batch) -> None:
    through = Through(subject)
    margin = batch.margin(subject.forward_with_gradients(batch, (through,)))
    gradient = torch.autograd.grad(margin.sum(), through.z)[0]
    mask = (batch.positions > 0)[..., None]
    expected = (through.z.detach() * gradient * mask).sum(1)
    got = Attribution().scores(subject, batch, subject.sae(SITE).full())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    last = Attribution(positions="last_prompt").scores(subject, batch, subject.sae(SITE).full())
    torch.testing.assert_close(last, (through.z * gradient)[:, -1], atol=1e-5, rtol=1e-4)


def test_features_are_those_with_the_largest_mean(subject: Subject, batch: Batch) -> None:
    kind = Attribution(n_features=5)
    found = kind.find(subject, batch, {}).at(SITE)[0]
    mean = kind.scores(subject, batch, subject.sae(SITE).full()).mean(0)
    assert list(found.ids) == mean.topk(5).indices.tolist()
    assert all(score > 0 for score in found.scores)


def test_groups_are_fitted_on_their_own_prompts(subject: Subject, batch: Batch) -> None:
    kind = Attribution(n_features=3, group="name")
    found = {entry.group: entry.ids for entry in kind.find(subject, batch, {}).at(SITE)}
    scores = kind.scores(subject, batch, subject.sae(SITE).full())
    for group in ("g0", "g1"):
        rows = [i for i, g in enumerate(batch.groups) if g == group]
        assert list(found[group]) == scores[rows].mean(0).topk(3).indices.tolist()


def test_features_that_fire_on_the_neighbors_are_left_out(subject: Subject, batch: Batch) -> None:
    other = tiny_batch(subject, 6, seed=5)
    rate = Attribution().firing_rate(subject, other, subject.sae(SITE).full())
    limit = 0.9
    kind = Attribution(n_features=5, retain_threshold=limit)
    by_hand = []
    for row in range(len(other)):
        capture = Capture(SITE)
        subject.outputs(other.rows([row]), (capture,))
        by_hand.append((subject.sae(SITE).encode(capture.seen[0][1][0, 1:]) > 0).any(0))
    torch.testing.assert_close(rate, torch.stack(by_hand).float().mean(0))
    found = kind.find(subject, batch, {"other": other}).at(SITE)[0].ids
    assert (rate[list(found)] <= limit).all()
    plain = Attribution(n_features=5).find(subject, batch, {}).at(SITE)[0].ids
    assert (rate[list(plain)] > limit).any(), "the fixture: without the rule some would be taken"
    with pytest.raises(FeatureError, match="neighbors"):
        kind.find(subject, batch, {})
    with pytest.raises(FeatureError, match=r"no feature .* positive attribution"):
        Attribution(retain_threshold=0.0).find(subject, batch, {"same": batch})


def test_scale_is_the_median_active_value_on_the_fit_split(subject: Subject, batch: Batch) -> None:
    features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=(1, 5)),), source="test")
    found = with_scale(subject, batch, features).at(SITE)[0].median_active
    capture = Capture(SITE)
    subject.outputs(batch, (capture,))
    x = capture.seen[0][1][batch.positions > 0]
    z = subject.sae(SITE).encode(x)[:, [1, 5]]
    assert found == pytest.approx(float(z[z > 0].median()))


def test_given_features_from_a_file_are_part_of_the_identity(
    tmp_path: Path, subject: Subject, batch: Batch
) -> None:
    path = tmp_path / "features.json"
    listed = [{"site": "blocks.1.hook_resid_post", "ids": [3, 4]}]
    path.write_text(json.dumps(listed))
    kind = Given.model_validate({"kind": "given", "file": str(path)})
    assert kind == Given.model_validate({"kind": "given", "features": listed})
    assert str(tmp_path) not in kind.model_dump_json()
    assert kind.find(subject, batch, {}).at(SITE)[0].ids == (3, 4)
    wrong = Given(features=(SiteFeatures(site=str(SITE), ids=(999,)),))
    with pytest.raises(FeatureError, match="out of range"):
        wrong.find(subject, batch, {})


def test_an_overlap_of_splits_is_an_error(subject: Subject) -> None:
    a, b = tiny_batch(subject, 4), tiny_batch(subject, 4, seed=9)
    with pytest.raises(SplitError, match="'fit' and 'test' must be disjoint"):
        check_disjoint({"fit": a, "test": a})
    renamed = Batch(**{**b.__dict__, "clusters": tuple(f"other{i}" for i in range(4))})
    check_disjoint({"fit": a, "test": renamed})
