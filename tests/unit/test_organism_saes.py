"""The organism's SAEs: what the recipe trains, and the second kind that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.organism import sae_training
from holdfast.organism.assets import ASSETS
from holdfast.organism.check import _load, _sae
from holdfast.organism.sae_training import HALF, OTHERS, WIDE, SAERecipe, recipes, train_sae
from holdfast.saes.sources import Folder
from holdfast.sites import Site


def test_only_the_organism_has_more_than_one_a_layer() -> None:
    assert list(recipes("ignorant")) == ["0", "1", "2"]
    assert list(recipes("full")) == ["0", "1", "2", *OTHERS]
    for name, (layer, recipe) in recipes("full").items():
        assert name.partition("-")[0] == str(layer)
        assert (ASSETS / "organism" / "saes" / name / "quality.json").is_file()
        assert recipe is (OTHERS[name][1] if name in OTHERS else WIDE)


def test_the_other_sae_is_another_kind_half_as_wide_and_explains_as_much() -> None:
    subject = _load(ASSETS / "organism", {"0-topk": 0})
    finding = _sae("organism", subject, Site(1))
    assert finding.passed, finding.measured
    sae, first = (Folder(path=f"organism:saes/{n}").load(Site(1)).full() for n in ("0-topk", "0"))
    assert sae.k == 8 and first.k is None and 2 * sae.n_features == first.n_features
    codes = sae.encode(10 * torch.randn(50, 128))
    assert ((codes > 0).sum(1) == 8).all()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "kind"), [(WIDE, "jumprelu"), (HALF, "topk")])
def test_what_is_trained_reads_as_sae_lens_reads_it(
    recipe: SAERecipe, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sae_lens")
    from sae_lens import SAE

    monkeypatch.setattr(sae_training, "TRAINING_TOKENS", 8_192)
    x = torch.randn(4096, 16) @ torch.randn(16, 16) + 3
    train_sae(x, 1, tmp_path / "sae", 0, recipe)
    theirs = SAE.load_from_disk(str(tmp_path / "sae"))
    ours = Folder(path=str(tmp_path / "sae")).load(Site(2)).full()
    assert theirs.cfg.architecture() == kind
    assert ours.n_features == recipe.expansion * 16
    with torch.no_grad():
        codes = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), codes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            ours.decode(ours.encode(x), x), theirs.decode(codes), atol=1e-4, rtol=1e-4
        )
