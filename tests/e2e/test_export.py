"""`holdfast export`: the clamp of a study's audit, as a run prepares it, on a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from holdfast import RunFolder, SavedClamp, load_clamp, load_study, plan
from holdfast.batch import Batch
from holdfast.executor import Runtime, load_lab
from holdfast.organism.assets import resolve
from holdfast.setting import Setting
from holdfast.study import bundled
from tests.e2e.cli import holdfast, small_study, write
from tests.unit.test_clamp_file import check_same

pytestmark = pytest.mark.e2e

AUDITS = ("ioi", "mcq", "bottleneck", "second_route")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled study, whose features are looked for on fewer prompts."""
    path = tmp_path_factory.mktemp("study") / "demo.toml"
    text = bundled("demo")
    assert text.count("\nfit  = 400 ") == 1
    path.write_text(text.replace("\nfit  = 400 ", "\nfit  = 100 "))
    return path


def setting_of(study: Path, audit: str) -> Setting:
    """What a run prepares for an audit."""
    planned = plan(load_study(study))
    trial = next(t for t in planned.trials if t.audit == audit and t.control.kind == "none")
    return load_lab(planned, [trial], Runtime()).setting(trial, trial.subject)


def from_its_files(clamp: SavedClamp) -> PreTrainedModel:
    """The organism as transformers alone loads it."""
    dtype = getattr(torch, clamp.description.model.dtype)
    return AutoModelForCausalLM.from_pretrained(resolve("organism"), dtype=dtype).eval()


def margins(clamp: SavedClamp, model: PreTrainedModel, batch: Batch) -> Tensor:
    """[b] of a plain model with the clamp on it, one group of prompts at a time."""
    by_group = any("*" not in edit.bank.index for edit in clamp.edits)
    out = torch.full((len(batch),), torch.nan)
    for group in dict.fromkeys(batch.groups) if by_group else [None]:
        rows = [i for i, g in enumerate(batch.groups) if group in (None, g)]
        own = batch.rows(rows)
        with torch.no_grad(), clamp.on(model, group=group):
            logits = model(own.tokens, attention_mask=own.mask).logits
        out[rows] = own.margin(logits[:, -1])
    return out


@pytest.mark.parametrize("audit", AUDITS)
def test_every_clamp_of_the_demo_can_be_written_and_used(
    demo: Path, audit: str, tmp_path: Path
) -> None:
    path = tmp_path / "clamp.safetensors"
    said = holdfast("export", demo, "--audit", audit, "--out", path)
    assert said.code == 0, said.err
    assert path.stat().st_size < 300_000
    setting, clamp = setting_of(demo, audit), load_clamp(path)
    for edit, again in zip(setting.edits, clamp.edits, strict=True):
        check_same(edit, again)  # type: ignore[arg-type]
    n_valid, n_clean = len(setting.valid), int(setting.clean.sum())
    assert n_valid > 0
    assert f"suppressed: {n_valid} of {n_clean} test prompts that show the behavior" in said.out
    assert "set_where_active -" in said.out and str(path) in said.out
    told = clamp.description
    assert told.origin["study"] == "demo" and told.origin["audit"] == audit
    assert told.origin["intervention"]["value"] == setting.intervention.model_dump()["value"]
    # On the model as its user has it: its files alone, where they say all of it.
    model = setting.subject.model
    if audit in AUDITS[:2]:
        model = from_its_files(clamp)
    got = margins(clamp, model, setting.test)
    torch.testing.assert_close(got, setting.suppressed_margin, atol=1e-3, rtol=1e-4)
    assert torch.equal(got <= 0, setting.suppressed_margin <= 0)


def test_it_is_the_clamp_of_the_run(tmp_path: Path) -> None:
    """What the records of a run say of every prompt is what the file does to it."""
    study = write(tmp_path / "study.toml", small_study(controls=(), paths=False))
    assert holdfast("run", study, "--out", tmp_path / "run").code == 0
    path = tmp_path / "ioi.clamp.safetensors"
    said = holdfast("export", study, "--out", path)  # one audit: no need to name it
    assert said.code == 0, said.err
    store = RunFolder.read(tmp_path / "run")
    (record,) = store.records()
    clamp, setting = load_clamp(path), setting_of(study, "ioi")
    assert clamp.description.origin["intervention"] == record["result"]["intervention"]
    assert clamp.description.model.weights_sha256 == record["trial"]["subject"]["weights_sha256"]
    rows = {row["id"]: row["suppressed_margin"] for row in store.examples(record["id"])}
    got = margins(clamp, from_its_files(clamp), setting.test)
    expected = torch.tensor([rows[id_] for id_ in setting.test.ids])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


def test_a_mistake_is_one_message(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "clamp.safetensors"

    def refused(*arguments: str | Path) -> str:
        said = holdfast("export", *arguments, "--out", out)
        assert said.code == 2 and said.out == "" and said.err.startswith("holdfast:"), said
        return said.err

    assert "has 11 audits; name one of ioi, mcq, bottleneck, second_route" in refused(demo)
    assert "no audit 'iio': did you mean 'ioi'" in refused(demo, "--audit", "iio")
    assert "no study file at" in refused(tmp_path / "none.toml")
    varied = small_study(("bottleneck",))
    varied["grid"] = {"intervention.value": [-5.0, -2.0], "recovery.steps": [5, 10]}
    path = write(tmp_path / "varied.toml", varied)
    assert "has 2 clamps: the grid varies intervention.value;" in refused(path)
    dropped = small_study(("bottleneck",))
    dropped["audits"][0]["intervention"]["error_term"] = "drop"
    path = write(tmp_path / "dropped.toml", dropped)
    assert "cannot be saved by itself: it passes on 0 of the SAE's error" in refused(path)
    assert not out.exists()


def test_another_clamp_is_not_written_over(tmp_path: Path) -> None:
    study = write(tmp_path / "study.toml", small_study(("bottleneck",)))
    path = tmp_path / "clamp.safetensors"
    for _ in range(2):
        assert holdfast("export", study, "--out", path).code == 0
    before = path.read_bytes()
    other = ("--set", "audits.0.intervention.value=-1.0")
    said = holdfast("export", study, "--out", path, *other)
    assert said.code == 2 and "exists and is another clamp" in said.err
    assert path.read_bytes() == before


def test_it_is_written_beside_where_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write(tmp_path / "study.toml", small_study(("bottleneck",)))
    monkeypatch.chdir(tmp_path)
    assert holdfast("export", study, "--audit", "bottleneck").code == 0
    assert load_clamp("bottleneck.clamp.safetensors").description.model.d_model == 128
