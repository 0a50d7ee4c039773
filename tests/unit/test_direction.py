"""A direction in an SAE's place: its clamp is the ablation, and its audit is an audit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.direction import basis_of, save_direction, write_direction
from holdfast.edits import Capture, FeatureEdit
from holdfast.errors import StoreError, StudyError
from holdfast.executor import Runtime
from holdfast.features import FeatureSet, SiteFeatures
from holdfast.planning import plan
from holdfast.run import run_study
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import Folder
from holdfast.sites import Site
from holdfast.store import RunFolder
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.testing import tiny_batch
from tests.e2e.cli import holdfast

SITE = Site(2)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12).filter(lambda v: max(map(abs, v)) > 0.1))
@settings(max_examples=60)
def test_the_basis_is_orthonormal_and_begins_along_the_direction(values: list[float]) -> None:
    direction = torch.tensor(values, dtype=torch.float64)
    basis = basis_of(direction)
    eye = torch.eye(len(values), dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(basis[:, 0], direction / direction.norm(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("axis", [1.0, -1.0])
def test_a_direction_along_an_axis_is_no_exception(axis: float) -> None:
    basis = basis_of(axis * torch.eye(5)[0])
    assert torch.equal(basis[:, 0], axis * torch.eye(5, dtype=torch.float64)[0])


def test_setting_both_features_to_zero_is_the_ablation(subject: Subject, tmp_path: Path) -> None:
    """Against h − (h·r̂)r̂; adding to the first steers; nothing else changes anything."""
    direction = torch.randn(subject.d_model)
    unit = (direction / direction.norm()).float()
    save_direction(tmp_path / "d", SITE, direction)
    sae = Folder(path=str(tmp_path / "d")).load(SITE)
    batch = tiny_batch(subject, 4)

    def after(mode: str, value: float, ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        features = FeatureSet(entries=(SiteFeatures(site=str(SITE), ids=ids),), source="test")
        edit = FeatureEdit(FeatureBank.of(sae, features), mode, value)
        reads = Capture(SITE), Capture(SITE)
        subject.outputs(batch, (reads[0], edit, reads[1]))
        at = batch.prompt_length[:, None] - 1
        return tuple(read.at(batch.ids, at)[:, 0] for read in reads)  # type: ignore[return-value]

    before, ablated = after("set", 0.0, (0, 1))
    expected = before - (before @ unit)[:, None] * unit
    torch.testing.assert_close(ablated, expected, atol=1e-5, rtol=1e-5)
    assert (before @ unit).abs().min() > 1e-3
    before, steered = after("add", 3.0, (0,))
    torch.testing.assert_close(steered, before + 3.0 * unit, atol=1e-5, rtol=1e-5)
    whole = sae.full()
    torch.testing.assert_close(whole.decode(whole.encode(before), before), before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The organism's refusal direction after its third block, from the command line."""
    folder = tmp_path_factory.mktemp("direction")
    said = holdfast(
        "direction", "refusal", "--audit", "removed", "--out", str(folder / "d"),
        "--site", "blocks.2.hook_resid_post",
    )  # fmt: skip
    assert said.code == 0 and "in a study" in said.out
    return folder / "d"


def test_it_is_the_difference_of_the_fit_prompts_means(written: Path) -> None:
    planned = plan(parse(bundled("refusal"), []))
    trial = next(t for t in planned.trials if t.audit == "removed")
    spec = planned.specs[next(iter(planned.specs))]
    subject = Subject.load(spec)
    means = []
    behavior, tokenizer = trial.behavior, subject.tokenizer
    for examples in (
        behavior.examples(tokenizer, "fit", 200, 0),
        behavior.opposed(tokenizer, "fit", 200, 0),
    ):
        rows = []
        for example in examples[:]:
            ids = torch.tensor([subject.encode(example)])
            with torch.no_grad():
                states = subject.model(ids, output_hidden_states=True).hidden_states
            rows.append(states[3][0, -1].double())
        means.append(torch.stack(rows).mean(0))
    expected = means[0] - means[1]
    sae = Folder(path=str(written / "blocks.2.hook_resid_post")).load(Site(3)).full()
    torch.testing.assert_close(
        sae.W_enc[:, 0].double(), expected / expected.norm(), atol=1e-5, rtol=0
    )


def test_an_audit_of_it_runs_with_its_controls(written: Path, tmp_path: Path) -> None:
    """Refusal ablated; the recovery that holds the direction is orthogonal to it."""
    text = f"""
schema = 1
name   = "direction"
[subject]
model = "organism"
[[subject.saes]]
site   = "blocks.2.hook_resid_post"
source = {{ kind = "folder", path = "{written / "blocks.2.hook_resid_post"}" }}
[data]
fit = 60
tune = 8
test = 8
[recovery]
constraint = {{ kind = "encoder_null" }}
budget = {{ relative = 1.0 }}
stop = {{ clean_margin = 0.5 }}
steps = 10
refine_steps = 2
tolerance = 0.2
doublings = 1
[[audits]]
name         = "ablated"
behavior     = {{ kind = "refusal", direction = "refuse" }}
discovery    = {{ kind = "given", features = [
  {{ site = "blocks.2.hook_resid_post", ids = [0, 1] }}] }}
intervention = {{ kind = "clamp", mode = "set", value = 0.0, positions = "all" }}
controls     = ["wrong_target", "random_features"]
[audits.grid]
"recovery.constraint.kind" = ["unconstrained", "encoder_null"]
"""
    planned = plan(parse(text))
    report = run_study(planned, tmp_path / "run", Runtime(workers=1))
    assert not report.failures
    rows = {(r["constraint"], r["control"]): r for r in report.summary["trials"]}
    held = rows["encoder_null", "none"]
    assert held["n_valid"] > 0 and held["preactivation_drift_max"] < 1e-6
    unit = Folder(path=str(written / "blocks.2.hook_resid_post")).load(Site(3)).full().W_enc[:, 0]
    store = RunFolder.read(tmp_path / "run")
    along = {}
    for name in ("unconstrained", "encoder_null"):
        delta = store.tensors(rows[name, "none"]["id"])["blocks.2.hook_resid_post"]
        along[name] = float(((delta @ unit).abs() / delta.norm(dim=-1)).max())
    assert along["encoder_null"] < 1e-5 < 1e-2 < along["unconstrained"]
    others = rows["encoder_null", "random_features"]
    assert others["n_suppressed"] < held["n_suppressed"], "another direction does not remove it"


def test_what_cannot_be_measured(written: Path, tmp_path: Path) -> None:
    planned = plan(parse(bundled("refusal"), []))
    with pytest.raises(StoreError, match="exists"):
        write_direction(planned, "removed", written, Runtime())
    with pytest.raises(StudyError, match="name one of"):
        write_direction(planned, None, tmp_path / "d", Runtime())
    ioi = plan(parse(bundled("soft-suffix"), ["audits.0.attacks=[]"]))
    with pytest.raises(StudyError, match="stand against"):
        write_direction(ioi, None, tmp_path / "d", Runtime())
    assert not (tmp_path / "d").exists()
    one = write_direction(
        planned, "removed", tmp_path / "one", Runtime(), [Site(2), Site(4)], measured_at=Site(3)
    )
    for site, folder in one.folders.items():
        own = Folder(path=str(folder)).load(site).full().W_enc
        there = Folder(path=str(written / "blocks.2.hook_resid_post")).load(Site(3)).full().W_enc
        assert torch.equal(own, there), "the direction of one site at all of them"
    # Before the first block the last token is the same in every prompt.
    with pytest.raises(StudyError, match="same mean"):
        write_direction(planned, "removed", tmp_path / "d", Runtime(), [Site(0)])
    said = json.loads((written / "blocks.2.hook_resid_post" / "cfg.json").read_text())
    assert said["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
