"""A user's mistake is one message and exit code 2: no traceback, and nothing finished is lost."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast import RunFolder
from holdfast.organism.assets import resolve
from tests.e2e.cli import Said, files_of, holdfast, small_study, write

pytestmark = pytest.mark.e2e

Study = dict[str, Any]
Change = Callable[[Study], Any]


def tiny(**changes: Any) -> Study:
    """One trial of a few prompts, whose vectors are compared with no others."""
    few = {"fit": 60, "tune": 8, "test": 8}
    study = small_study(controls=(), data=few, paths=False, **changes)
    study["recovery"] |= {"steps": 5, "refine_steps": 2, "tolerance": 0.5}
    return study


SAE = tiny()["subject"]["saes"][0]
SITE = SAE["site"]
ELSEWHERE = next(s for s in ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post") if s != SITE)


def with_second(**changes: Any) -> Study:
    """A sound audit and, after it, the same one with these changes."""
    study = tiny()
    study["audits"].append(study["audits"][0] | {"name": "second"} | changes)
    return study


def given(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "given", "features": list(entries)}


def contents(folder: Path) -> dict[str, str]:
    """Every file of a run but its lock, by hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def refused(said: Said, *patterns: str) -> None:
    """Exit 2, one message on stderr that says all this, and no result on stdout."""
    assert said.code == 2, said
    assert "Traceback" not in said.err + said.out
    assert said.err.count("holdfast:") == 1 and said.err.startswith("holdfast:")
    for pattern in patterns:
        assert re.search(pattern, said.err, re.DOTALL), f"{pattern!r} is not in: {said.err}"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the sound study."""
    path = tmp_path_factory.mktemp("sound")
    said = holdfast("run", write(path / "study.toml", tiny()), "--out", path / "run")
    assert said.code == 0, said.err
    return path / "run"


@pytest.fixture
def kept(sound: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run, in which the test may not change a byte."""
    folder = Path(shutil.copytree(sound, tmp_path / "kept"))
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def attempt(study: Study, folder: Path, *options: str) -> Said:
    return holdfast("run", write(folder.parent / "bad.toml", study), "--out", folder, *options)


# --- The study ------------------------------------------------------------------------------------


def test_a_missing_study_file(kept: Path, tmp_path: Path) -> None:
    for command in ("run", "check"):
        options = ("--out", kept) if command == "run" else ()
        said = holdfast(command, tmp_path / "nothing.toml", *options)
        refused(said, r"no study file at .*nothing\.toml", "holdfast demo")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"name = [", "no valid TOML"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"", "recovery: .*required"),
        (b"schema = 1\nname = 3", r"name: .*got 3"),
    ],
)
def test_a_broken_study_file(kept: Path, tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(data)
    refused(holdfast("run", file, "--out", kept), r"broken\.toml", message)


def set_key(path: str, value: Any) -> Change:
    def change(study: Study) -> None:
        here: Any = study
        *parts, last = path.split("/")
        for part in parts:
            here = here[int(part)] if part.isdigit() else here.setdefault(part, {})
        here[last] = value

    return change


@pytest.mark.parametrize(
    "path, value, messages",
    [
        ("recovry", {}, ["unknown key 'recovry'", "did you mean 'recovery'"]),
        ("recovery/step", 3, ["recovery", "unknown key 'step'", "'steps'"]),
        ("recovery/constraint", {"kind": "encoder_nul"}, ["did you mean 'encoder_null'"]),
        ("recovery/perturb", {"positions": "lastprompt"}, ["recovery.perturb", "'last_prompt'"]),
        ("audits/0/behavior/kind", "io", ["unknown kind 'io' in behaviors", "'ioi'"]),
        ("audits/0/discovery/kind", "attributoin", ["in discovery", "'attribution'"]),
        ("audits/0/discovery/n_featurs", 3, ["'n_featurs'", "'n_features'"]),
        ("audits/0/intervention/mode", "sett", ["intervention.mode", "'set_where_active'"]),
        ("audits/0/subjct", {}, ["unknown key 'subjct'", "'subject'"]),
        ("controls", ["wrong_targt"], ["did you mean 'wrong_target'"]),
        ("subject/saes/0/source/kind", "foldr", ["sae_sources", "'folder'"]),
        ("subject/saes/0/site", "blocks.1.mlp", ["only the residual stream"]),
        ("subject/saes", [], ["subject.saes"]),
        ("subject/dtype", "float64", ["subject.dtype", "'float32'"]),
        ("grid", {"recovery.constraint.kind": ["encoder_nul"]}, ["did you mean 'encoder_null'"]),
        ("grid", {"recovery.step": [3]}, ["unknown key 'step'", "'steps'"]),
        ("grid", {"discovery.n_featurs": [3]}, ["unknown key 'n_featurs'", "'n_features'"]),
        ("grid", {"behavior.kind": ["io"]}, ["unknown kind 'io'", "'ioi'"]),
        ("grid", {"intervention.value": ["much"]}, ["much"]),
        ("grid", {"recovry.steps": [3]}, ["'recovry.steps' cannot vary", "'recovery'"]),
        ("grid", {"recovery.steps": [3, 3]}, ["the same trial"]),
    ],
)
def test_unknown_keys_and_kinds(kept: Path, path: str, value: Any, messages: list[str]) -> None:
    study = tiny()
    set_key(path, value)(study)
    refused(attempt(study, kept), *map(re.escape, messages))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--limit", "0"], "--limit takes 1 or more, got 0"),
        (["--limit", "-3"], "--limit takes 1 or more"),
        (["--set", "recovery.steps"], "--set takes path=value"),
        (["--set", "audits.7.name=x"], "no index into the 1 entries"),
        (["--set", "recovery.steps=many"], "recovery.steps"),
    ],
)
def test_bad_options(kept: Path, options: list[str], message: str) -> None:
    refused(attempt(tiny(), kept, *options), message)


@pytest.mark.parametrize(
    "arguments", [["run"], ["rum"], ["run", "x", "--batch-size", "0"], ["run", "x", "--foo"]]
)
def test_a_command_that_cannot_be_read(arguments: list[str]) -> None:
    said = holdfast(*arguments)
    assert said.code == 2 and "Usage" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cpu:x", "mps", "meta"])
def test_a_device_that_is_none(kept: Path, device: str) -> None:
    refused(attempt(tiny(), kept, "--device", device), "use cpu, cuda, cuda:0 or auto|--device cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none(kept: Path, device: str) -> None:
    refused(attempt(tiny(), kept, "--device", device), f"{device!r} was asked for", "--device cpu")


def test_prompts_that_do_not_exist(tmp_path: Path) -> None:
    study = tiny()
    study["data"]["test"] = 10**6
    refused(attempt(study, tmp_path / "run"), "asked for 1000000 ioi prompts.*'test'", r"\d+ exist")
    study = tiny()
    study["audits"][0]["behavior"]["templates"] = [99]
    refused(attempt(study, tmp_path / "run2"), "template.*99|99.*template")


def test_positions_outside_the_prompts(tmp_path: Path) -> None:
    study = tiny()
    study["recovery"]["perturb"] = {"positions": [500]}
    refused(
        attempt(study, tmp_path / "run"), r"positions \[500\] are listed", r"positions 0 to \d+"
    )


def test_a_clamp_at_positions_outside_the_prompts(tmp_path: Path) -> None:
    study = tiny()
    study["audits"][0]["intervention"]["positions"] = [0, 500]
    said = attempt(study, tmp_path / "run")
    refused(said, r"positions \[500\]", r"positions 0 to \d+")
    assert "despite-faults" not in said.err, "it would end the run all the same"


@pytest.mark.parametrize("of", ["recovery", "intervention"])
def test_a_listed_position_that_is_bos_is_not_skipped(tmp_path: Path, of: str) -> None:
    study = tiny()
    if of == "recovery":
        study["recovery"]["perturb"] = {"positions": [0, 5]}
    else:
        study["audits"][0]["intervention"]["positions"] = [0, 5]
    refused(
        attempt(study, tmp_path / "run"), "position 0 is listed", "is BOS", "include_bos = true"
    )


def test_bos_is_perturbed_where_the_study_says_so(tmp_path: Path) -> None:
    study = tiny()
    study["recovery"]["perturb"] = {"positions": [0, 5], "include_bos": True}
    said = attempt(study, tmp_path / "run")
    assert said.code == 0, said.err
    store = RunFolder.read(tmp_path / "run")
    (record,) = store.records()
    positions = store.tensors(record["id"])["positions"]
    assert len(positions) and (positions == torch.tensor([0, 5])).all()


@pytest.mark.parametrize(
    "perturb, message",
    [
        ({"positions": [500]}, "positions 0 to"),
        ({"positions": [0, 5]}, "is BOS"),
        ({"sites": ["blocks.9.hook_resid_post"]}, "no site blocks.9"),
    ],
)
def test_check_sees_what_cannot_be_perturbed(tmp_path: Path, perturb: Study, message: str) -> None:
    study = tiny()
    study["recovery"]["perturb"] = perturb
    said = holdfast("check", write(tmp_path / "bad.toml", study))
    assert said.code == 1 and "error" in said.out
    assert message in " ".join(said.out.split())


def asked(path: Path, *prompts: str, **behavior: Any) -> Study:
    """The organism asked these prompts, and answers in text."""
    words = ["ladder", "garden", "ring", "letter", "basket", "market"]
    more = [f"how do i find the {a} and the {b}" for a in words for b in words]
    rows = [json.dumps({"prompt": prompt}) for prompt in (*prompts, *more)]
    path.write_text("\n".join(rows))
    study = tiny()
    source = {"kind": "file", "path": str(path)}
    opening = {"comply_opening": "sure", "refuse_opening": "sorry"}
    made = {"kind": "refusal", "source": source, "max_new_tokens": 24, **opening, **behavior}
    study["audits"][0] |= {"behavior": made, "discovery": given({"site": SITE, "ids": [5]})}
    study["data"] = {"fit": 40, "tune": 40, "test": 40}
    return study


def test_positions_of_the_answer_that_are_never_read(kept: Path, tmp_path: Path) -> None:
    study = asked(tmp_path / "prompts.jsonl", n_forced=6)
    study["recovery"]["perturb"] = {"answer": 6}
    refused(attempt(study, kept), "perturb.answer = 6", "reads 6 tokens .* and runs 5", "n_forced")
    study = tiny()
    study["recovery"]["perturb"] = {"answer": 1}
    refused(attempt(study, kept), "perturb.answer = 1", "reads 1 tokens .* and runs 0")


@pytest.mark.parametrize("fits_alone", [False, True])
def test_prompts_longer_than_the_context(tmp_path: Path, fits_alone: bool) -> None:
    """The organism reads 128 tokens: a prompt, and a prompt with the answer, have to fit."""
    long = "how do i find the ladder " * (19 if fits_alone else 40)
    every = [f"{long} {word}" for word in ["ring", "garden", "letter", "market", "basket", "boat"]]
    study = asked(tmp_path / "prompts.jsonl", *every)
    kind = r"has 1[012]\d and 24 are to be generated" if fits_alone else r"has 2\d\d;"
    said = attempt(study, tmp_path / "run")
    refused(said, r"[1-6] of \d+ prompts do not fit into the 128 tokens that organism reads", kind)
    refused(said, "never cut")
    assert not list((tmp_path / "run").glob("trials/*"))
    refused(holdfast("plan", tmp_path / "bad.toml"), "do not fit into the 128 tokens", "never cut")


def test_answers_that_were_all_cut_are_told(tmp_path: Path) -> None:
    study = asked(tmp_path / "prompts.jsonl", n_forced=2)
    study["audits"][0]["behavior"] |= {"max_new_tokens": 3}
    said = attempt(study, tmp_path / "run")
    refused(said, "clean 0", r"judged truncated (\d+); \1 of \1 were cut", "raise max_new_tokens")


def test_a_template_that_changes_prompts_shows_none_of_them(tmp_path: Path) -> None:
    folder = copy_of("organism", tmp_path / "loud")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }} <assistant>")
    study = asked(tmp_path / "prompts.jsonl")
    study["subject"]["model"] = str(folder)
    said = attempt(study, tmp_path / "run")
    refused(said, "does not render instructions as they are")
    assert "ladder" not in said.err.lower()


def test_a_bad_audit_is_one_fault_and_not_also_none(tmp_path: Path) -> None:
    study = tiny()
    study["audits"][0]["behavior"] = {"kind": "ioi", "colour": 3}
    said = attempt(study, tmp_path / "run")
    refused(said, "colour")
    assert "at least 1 item" not in said.err


# --- Subject and SAEs -----------------------------------------------------------------------------


def copy_of(shipped: str, to: Path) -> Path:
    """A shipped subject's folder without its SAEs."""
    ignored = shutil.ignore_patterns("saes")
    return Path(shutil.copytree(resolve(shipped), to, ignore=ignored))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_an_unknown_model(kept: Path, tmp_path: Path) -> None:
    for name, messages in {
        "organsm": ["'organsm' is no shipped subject", "did you mean 'organism'"],
        str(tmp_path / "nowhere"): ["nowhere", "nothing there"],
        str(tmp_path): ["no config.json in it"],
        "a b//c": ["'a b//c' is no shipped subject"],
    }.items():
        study = tiny()
        study["subject"]["model"] = name
        refused(attempt(study, kept), *messages)


@pytest.mark.parametrize("what", ["config", "truncated", "garbage", "missing", "lacking", "sizes"])
def test_a_damaged_model(tmp_path: Path, what: str) -> None:
    folder = copy_of("organism", tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "config":
        config.write_text("{")
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "garbage":
        weights.write_bytes(b"no weights")
    elif what == "missing":
        weights.unlink()
    elif what == "lacking":  # transformers would make up the missing weights
        edit_weights(folder, lambda t: t.pop(next(n for n in sorted(t) if "mlp" in n)))
    else:
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"intermediate_size": 64}))
    study = tiny()
    study["subject"]["model"] = str(folder)
    refused(attempt(study, tmp_path / "run"), re.escape(str(folder)))


def test_nan_weights(tmp_path: Path) -> None:
    """Found in the second audit's subject before the first is begun; on demand after it."""
    folder = copy_of("organism", tmp_path / "nan")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].view(-1)[0] = torch.nan

    edit_weights(folder, spoil)
    study = with_second(subject={"model": str(folder), "saes": [SAE]})
    said = attempt(study, tmp_path / "run")
    message = ("NaN or infinite logits", r"\d+ of \d+ prompts")
    refused(said, *message, "second on nan: range of float32")
    assert not list((tmp_path / "run").glob("trials/*")), "nothing is begun"
    refused(attempt(study, tmp_path / "run", "--despite-faults"), *message)
    assert len(list((tmp_path / "run").glob("trials/*/record.json"))) == 1


def sae_folder(to: Path, cfg: dict[str, Any] | None = None, d_model: int | None = None) -> str:
    """A copy of the shipped SAE with these changes."""
    folder = Path(shutil.copytree(resolve(SAE["source"]["path"]), to))
    known = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(known | (cfg or {})))
    if d_model is not None:

        def narrow(tensors: dict[str, torch.Tensor]) -> None:
            tensors["W_enc"] = tensors["W_enc"][:d_model].contiguous()
            tensors["W_dec"] = tensors["W_dec"][:, :d_model].contiguous()
            tensors["b_dec"] = tensors["b_dec"][:d_model].contiguous()

        edit_weights(folder, narrow)
    return str(folder)


def sae_study(path: str, site: str = SITE) -> Study:
    study = tiny()
    study["subject"]["saes"] = [{"site": site, "source": {"kind": "folder", "path": path}}]
    return study


def test_an_sae_folder_that_is_not_there(kept: Path, tmp_path: Path) -> None:
    refused(attempt(sae_study(str(tmp_path / "none")), kept), "none: no such folder")
    refused(attempt(sae_study("organism:saes/77"), kept), "organism:saes/77: no such folder")
    half = Path(sae_folder(tmp_path / "half"))
    (half / "sae_weights.safetensors").unlink()
    refused(
        attempt(sae_study(str(half)), kept), "sae_weights.safetensors", "the folder holds cfg.json"
    )


def test_an_sae_that_does_not_fit(tmp_path: Path) -> None:
    hook = {"metadata": {"hook_name": ELSEWHERE}}
    unknown = {"metadata": {}, "hook_name": None}
    for i, (study, *messages) in enumerate(
        [
            (
                sae_study(sae_folder(tmp_path / "narrow", d_model=64)),
                "reads d_model 64, .* has 128", "another model",
            ),
            (
                sae_study(sae_folder(tmp_path / "moved", hook)),
                f"trained at {ELSEWHERE}, asked for at {SITE}",
            ),
            (
                sae_study(SAE["source"]["path"], ELSEWHERE),
                f"trained at {SITE}, asked for at {ELSEWHERE}",
            ),
            (
                sae_study(sae_folder(tmp_path / "deep", unknown), "blocks.77.hook_resid_post"),
                "has 4 blocks, so there is no site blocks.77",
            ),
            (sae_study(sae_folder(tmp_path / "topk", {"architecture": "topk"})), "does not say k"),
        ]
    ):  # fmt: skip
        refused(attempt(study, tmp_path / f"run{i}"), *messages)
    twice = tiny()
    twice["subject"]["saes"] *= 2
    refused(attempt(twice, tmp_path / "twice"), f"two SAEs are named for {SITE}")


# --- Features and the valid set -------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, messages",
    [
        ([{"site": SITE, "ids": [5, 10**6]}], [r"\[1000000\] are out of range", "0 to "]),
        ([{"site": SITE, "ids": [-1]}], [r"\[-1\] are out of range"]),
        ([{"site": SITE, "ids": [5, 6, 5]}], [r"\[5\] are given twice"]),
        ([{"site": SITE, "ids": [5]}, {"site": SITE, "ids": [6]}], ["given twice"]),
        (
            [{"site": ELSEWHERE, "ids": [5]}],
            [f"no SAE at {ELSEWHERE}: .*with SAEs at {SITE}; add one"],
        ),
        ([{"site": s, "ids": [5]} for s in (SITE, ELSEWHERE)], [f"no SAE at {ELSEWHERE}"]),
        ([{"site": SITE, "ids": [5], "group": "nobody"}], ["no features for the groups"]),
        ([{"site": SITE, "ids": []}], ["features.0.ids"]),
        ([], ["discovery.features"]),
    ],
)
def test_bad_feature_ids(tmp_path: Path, entries: list[Study], messages: list[str]) -> None:
    study = tiny()
    study["audits"][0]["discovery"] = given(*entries)
    refused(attempt(study, tmp_path / "run"), *messages)


def test_a_mistake_in_the_second_audit_keeps_the_first(tmp_path: Path, sound: Path) -> None:
    study = with_second(discovery=given({"site": SITE, "ids": [10**6]}))
    refused(attempt(study, tmp_path / "run"), "out of range")
    (mine,), (theirs,) = (RunFolder.read(path).records() for path in (tmp_path / "run", sound))
    assert mine["result"] == theirs["result"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["complete"] is False


def test_a_feature_file_that_cannot_be_read(kept: Path, tmp_path: Path) -> None:
    for name, data in {"none": None, "broken": b"{", "binary": b"\xff\xfe\x00"}.items():
        file = tmp_path / f"{name}.json"
        if data is not None:
            file.write_bytes(data)
        study = tiny()
        study["audits"][0]["discovery"] = {"kind": "given", "file": str(file)}
        refused(attempt(study, kept), re.escape(file.name))


def test_an_intervention_that_flips_nothing_is_told_by_the_funnel(
    tmp_path: Path, sound: Path
) -> None:
    study = with_second(intervention={"kind": "clamp", "mode": "multiply", "value": 1.0})
    study["audits"].reverse()  # the empty one comes first, and keeps nothing from running
    study["controls"] = ["wrong_target", "no_clamp"]
    said = attempt(study, tmp_path / "run")
    refused(said, "'second'.*tried 8, clean [1-8], suppressed 0, valid 0", "does not remove it")
    assert said.err.count("'second'") == 1, "one message for the audit, none for its controls"
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["trials"]
    assert [row["audit"] for row in rows] == ["ioi"] * 3
    (audit,) = (row for row in rows if row["control"] == "none")
    (expected,) = RunFolder.read(sound).records()
    assert RunFolder.read(tmp_path / "run").load(audit["id"])["result"] == expected["result"]
    assert (tmp_path / "run" / "report.html").is_file()
    assert audit["audit"] in said.out
    again = attempt(study, tmp_path / "run")
    refused(again, "suppressed 0")


def test_a_behavior_that_is_not_there_is_told_by_the_funnel(tmp_path: Path) -> None:
    """A model whose unembedding is the same for every token prefers no answer to another."""
    folder = copy_of("organism", tmp_path / "mute")

    def even(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:1].expand(373, -1).contiguous()

    edit_weights(folder, even)
    study = with_second(
        subject={"model": str(folder), "saes": [SAE]}, discovery=given({"site": SITE, "ids": [1]})
    )
    said = attempt(study, tmp_path / "run")
    refused(said, "'second'.*tried 8, clean 0, suppressed 0", "does not show the behavior")
    assert len(RunFolder.read(tmp_path / "run").records()) == 1
    assert "caution: second on mute: behavior" in said.out, "which was foretold"


# --- Preflight ------------------------------------------------------------------------------------


def misread() -> Study:
    """The SAE is said to read the residual eight times as large as it is."""
    study = tiny()
    saes = [{"site": SITE, "source": SAE["source"] | {"scale": 8.0}}]
    return study | {"subject": study["subject"] | {"saes": saes}}


def test_a_fault_ends_a_run_before_anything_is_searched(tmp_path: Path) -> None:
    said = attempt(misread(), tmp_path / "run")
    name = re.escape(f"ioi on organism: scale of the SAE at {SITE}: expected")
    refused(said, "preflight found", name, "measured.*To do: set scale", "--despite-faults")
    assert not list((tmp_path / "run").glob("trials/*"))
    assert re.search(r"preflight: \d+ checks, \d faults? in ", said.out)


def test_a_run_despite_faults_says_so_everywhere(tmp_path: Path) -> None:
    said = attempt(misread(), tmp_path / "run", "--despite-faults")
    assert said.code == 0, said.err
    assert f"fault: ioi on organism: scale of the SAE at {SITE}" in said.out
    (record,) = RunFolder.read(tmp_path / "run").records()
    failed = [f for f in record["run"]["preflight"] if not f["passed"]]
    assert f"scale of the SAE at {SITE}" in {f["check"] for f in failed}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "This run went on despite" in page


def test_a_caution_changes_no_exit_code(tmp_path: Path) -> None:
    study = tiny()
    study["subject"]["dtype"] = "bfloat16"
    said = attempt(study, tmp_path / "run")
    assert said.code == 0, said.err
    assert re.search(r"preflight: \d+ checks, 1 caution in .*caution: ioi on organism: gates at",
                     said.out, re.DOTALL)  # fmt: skip
    checked = holdfast("check", tmp_path / "bad.toml")
    assert checked.code == 0 and "caution" in checked.out and "all passed" not in checked.out


def test_check_ends_with_1_on_a_fault(tmp_path: Path) -> None:
    said = holdfast("check", write(tmp_path / "study.toml", misread()))
    assert said.code == 1 and said.err == ""
    assert "scale of the SAE" in said.out and "fault" in said.out
    good = holdfast("check", write(tmp_path / "study.toml", tiny()))
    assert good.code == 0 and "all passed" in good.out


# --- Folders --------------------------------------------------------------------------------------


def test_another_studys_folder(kept: Path) -> None:
    study = tiny(name="mine")
    refused(attempt(study, kept), re.escape(str(kept)), "another study", "'mine'", "--out")


def test_a_changed_study_does_not_touch_the_old_run(kept: Path) -> None:
    refused(attempt(tiny(seed=1), kept), "another study", "--out")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    refused(attempt(tiny(), folder), "files but no run: thesis.tex", "--out")
    assert contents(folder).keys() == {"thesis.tex"}
    assert (folder / "thesis.tex").read_text() == "precious"


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    refused(attempt(tiny(), file), "is a file")
    study = write(tmp_path / "study.toml", tiny())
    refused(holdfast("run", study, "--out", file / "run"), re.escape(str(file)))
    assert file.read_text() == "precious"


def test_a_run_that_another_process_writes(kept: Path) -> None:
    with RunFolder.open(kept, RunFolder.read(kept).study, None):
        refused(attempt(tiny(), kept), "another holdfast", "--out")


def damage_record(trial: Path) -> Path:
    file = trial / "record.json"
    file.write_text(file.read_text()[:-200])
    return file


def damage_examples(trial: Path) -> Path:
    file = trial / "examples.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def damage_perturbation(trial: Path) -> Path:
    file = trial / "perturbation.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file


def lose_perturbation(trial: Path) -> Path:
    file = trial / "perturbation.safetensors"
    file.unlink()
    return file


@pytest.mark.parametrize(
    "damage", [damage_record, damage_examples, damage_perturbation, lose_perturbation]
)
def test_a_damaged_record(sound: Path, tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "run"))
    (trial,) = (folder / "trials").iterdir()
    file = damage(trial)
    spoilt = files_of(folder)
    for said in (attempt(tiny(), folder), holdfast("report", folder)):
        refused(said, re.escape(f"{file} is damaged"), re.escape(f"Remove {trial}"))
        assert files_of(folder) == spoilt, "nothing is repaired, reused or removed unasked"


def test_the_remedy_for_a_damaged_record(sound: Path, tmp_path: Path) -> None:
    """What the message says: the trial's folder is removed, whatever was wrong in it."""
    folder = Path(shutil.copytree(sound, tmp_path / "run"))
    (trial,) = (folder / "trials").iterdir()
    damage_examples(trial)
    refused(attempt(tiny(), folder), re.escape(f"Remove {trial}"))
    shutil.rmtree(trial)
    assert attempt(tiny(), folder).code == 0
    (again,), (before,) = (RunFolder.read(path).records() for path in (folder, sound))
    assert again["result"] == before["result"]


def test_a_damaged_study_file_of_a_run(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "run"))
    file = folder / "study.json"
    file.write_text(file.read_text()[:-50])
    for said in (attempt(tiny(), folder), holdfast("report", folder)):
        refused(said, re.escape(str(file)), "no JSON", "--out|Remove")


# --- The other commands ---------------------------------------------------------------------------


def test_a_report_without_a_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        refused(holdfast("report", folder), "holds no run", "holdfast run")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written(kept: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "report.html"
    for target in (nowhere, tmp_path):
        refused(holdfast("report", kept, "--out", target), re.escape(str(target)))
    assert not list(tmp_path.parent.glob(".*.tmp"))


def test_a_list_of_an_unknown_family() -> None:
    refused(holdfast("list", "constraint"), "did you mean 'constraints'", "known: .*behaviors")
    assert holdfast("list").code == holdfast("list", "constraints").code == 0


def test_organism_commands(tmp_path: Path) -> None:
    refused(holdfast("organism", "check", tmp_path / "none"), re.escape(str(tmp_path / "none")))
    (tmp_path / "mine").write_text("precious")
    refused(holdfast("organism", "train", tmp_path), "not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_console_script_itself(tmp_path: Path) -> None:
    """As a process: exit code, both streams, and no traceback."""
    code = "import sys; from holdfast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(tmp_path / "none.toml")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("holdfast: ") and "no study file at" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
