"""The bundled refusal study for Gemma-2-2B-it, end to end on a tiny Gemma-2 of the test's own.

The stand-in is trained for some seconds to answer questions about some things and to refuse those
about others, in a chat template; the study's own judge reads what it generates. Nothing harmful is
in it: what it refuses are dragons. Model, SAEs and prompt sets are local files in the published
layouts; everything else of the study stays as it is, but for smaller numbers.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from holdfast.behaviors.prompts import _chat
from holdfast.canonical import sha256_file
from holdfast.chat import render
from holdfast.edits import Capture
from holdfast.manifest import prompt_sha256
from holdfast.organism.assets import resolve
from holdfast.planning import plan
from holdfast.saes.release import entry_of
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.store import RunFolder
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.testing import fitted_sae
from tests.e2e.cli import Said, holdfast, write
from tests.e2e.test_studies import beside, unfilled, write_gemma_scope

pytestmark = pytest.mark.e2e

VERBS = ["paint", "carry", "fold", "mend", "polish", "bury", "weigh", "lift", "hide", "sell"]
THINGS = ["kettle", "ladder", "basket", "lantern", "thimble", "pebble", "acorn", "feather"]
REFUSED = ["dragon", "griffin", "phoenix", "basilisk", "unicorn", "kraken"]
PLACES = ["garden", "library", "harbor", "museum", "bakery", "station"]
REFUSAL = "i cannot help with that ."
LAYERS = (0, 1, 2)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn> ' + m['role'] + ' ' }}"
    "{{ m['content'] | trim }}{{ ' <end_of_turn> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn> model' }}{% endif %}"
)


def answer(verb: str, thing: str, place: str) -> str:
    if thing in REFUSED:
        return REFUSAL
    return f"to {verb} the {thing} you first go to the {place} and wait there ."


def every_question() -> list[tuple[str, str]]:
    """(prompt, answer) of every verb, thing and place, in an order that mixes them."""
    made = [
        (f"how do i {verb} the {thing} in the {place}", answer(verb, thing, place))
        for verb in VERBS for thing in (*THINGS, *REFUSED) for place in PLACES
    ]  # fmt: skip
    return [made[(i * 389) % len(made)] for i in range(len(made))]


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<unk>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
    words = sorted({word for pair in every_question() for text in pair for word in text.split()})
    ids = {word: i for i, word in enumerate([*special, "user", "model", *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        pad_token="<pad>", extra_special_tokens=special[4:],
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train(tokenizer: Any, steps: int = 150, batch: int = 24) -> Any:
    """A Gemma-2 of four blocks that answers and refuses."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12,
        max_position_embeddings=64, sliding_window=32, bos_token_id=0, eos_token_id=[1, 5],
        pad_token_id=3, attn_implementation="eager", initializer_range=0.1,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).train()
    rows = []
    for prompt, said in every_question():
        asked = tokenizer.encode(render(tokenizer, prompt).text, add_special_tokens=False)
        told = tokenizer.encode(f"{said} <end_of_turn>", add_special_tokens=False)
        rows.append((asked, told))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for step in range(steps):
        some = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        width = max(len(asked) + len(told) for asked, told in some)
        tokens, labels = torch.full((batch, width), 3), torch.full((batch, width), -100)
        for i, (asked, told) in enumerate(some):
            tokens[i, : len(asked) + len(told)] = torch.tensor(asked + told)
            labels[i, len(asked) : len(asked) + len(told)] = torch.tensor(told)
        loss = model(input_ids=tokens, attention_mask=(tokens != 3).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.generation_config.eos_token_id = [1, 5]
    return model.eval().requires_grad_(False)


def residuals(subject: Subject, prompts: Sequence[str], site: Site) -> tuple[Tensor, Tensor]:
    """Residuals of chats with their answers: [tokens d_model] without BOS, and [prompts d_model] of
    the last prompt tokens."""
    capture = Capture(site)
    batch = subject.batch(
        [_chat(subject.tokenizer, text, text, REFUSAL.split()[0], "to") for text in prompts]
    )
    batch = batch.forcing([row.tolist() for row in subject.generate(batch, max_new_tokens=16)])
    subject.outputs(batch, (capture,))
    ((frame, x),) = capture.seen
    last = frame.positions == frame.prompt_length[:, None] - 1
    return x[frame.positions > 0].float(), x[last].float()


def circuit_sae(site: Site, x: Tensor, toward: Tensor) -> tuple[SAE, int]:
    """An SAE that reconstructs residuals x [tokens d_model], with one feature for a direction, and
    that feature's id. It begins half of the direction's range below all of x and so fires
    everywhere: a factor, which cannot switch a feature on, can raise it."""
    toward = toward / toward.norm()
    along = x @ toward
    sae = fitted_sae(site, x - along[:, None] * toward)
    feature = int((sae.b_enc < -1).nonzero()[0])  # one that never fires
    begin = along.min() - 0.5 * (along.max() - along.min())
    W_enc, W_dec, b_enc = sae.W_enc.clone(), sae.W_dec.clone(), sae.b_enc.clone()
    W_enc[:, feature], W_dec[feature], b_enc[feature] = toward, toward, 0.0
    b_dec = sae.b_dec - (sae.b_dec @ toward) * toward + begin * toward
    made = replace(sae, W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec)
    return made, feature


class Local(NamedTuple):
    """Where everything lies that the study would download."""

    model: Path
    saes: dict[int, Path]
    features: Path
    sets: dict[str, Path]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    path = tmp_path_factory.mktemp("refusal")
    tokenizer = make_tokenizer()
    model = train(tokenizer)
    asked = every_question()
    prompts, refused = [q for q, _ in asked[:120]], torch.tensor([a == REFUSAL for _, a in asked])
    subject = Subject.of("tiny", model, tokenizer, {})
    saes, features = {}, []
    for layer in LAYERS:
        site = Site(layer + 1)
        x, last = residuals(subject, prompts, site)
        toward = last[refused[:120]].mean(0) - last[~refused[:120]].mean(0)
        sae, feature = circuit_sae(site, x, toward)
        saes[layer] = path / f"layer_{layer}" / "width_65k" / "average_l0_70"
        write_gemma_scope(saes[layer], sae)
        features.append({"site": str(site), "ids": [feature]})
    (path / "features.json").write_text(json.dumps(features))
    model.to(torch.bfloat16).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    answered = [row for row in asked if row[1] != REFUSAL]
    sets = {
        "advbench": write_set(path / "advbench.csv", "prompt", asked[120:180]),
        "harmbench": write_set(path / "harmbench.csv", "prompt", asked[180:240], category="new"),
        "jailbreakbench": write_set(path / "jbb.csv", "Goal", asked[240:300], Category="new"),
        "alpaca": write_set(path / "alpaca.csv", "instruction", answered[200:260], input=""),
        "xstest": write_set(path / "xstest.csv", "prompt", answered[300:340], type="homonyms",
                            label="safe"),
    }  # fmt: skip
    return Local(path / "model", saes, path / "features.json", sets)


def write_set(path: Path, column: str, rows: Sequence[tuple[str, str]], **more: str) -> Path:
    """Prompts in a published set's columns."""
    lines = [",".join([column, *more])]
    lines += [",".join([prompt, *more.values()]) for prompt, _ in rows]
    path.write_text("\n".join(lines))
    return path


def preset(local: Local, name: str) -> str:
    part = {"xstest": "safe", "jailbreakbench": "harmful"}.get(name)
    only = f', only = "{part}"' if part else ""
    file = f'{{ kind = "file", path = "{local.sets[name]}" }}'
    return f'{{ kind = "preset", name = "{name}"{only}, source = {file} }}'


STUDY = tomllib.loads(bundled("gemma-2-2b-it-refusal"))
PUBLISHED = ("advbench-published", "harmbench-published", "layer-11")
AUDITS = [audit for audit in STUDY["audits"] if audit["name"] not in PUBLISHED]
AS_PUBLISHED = [audit for audit in STUDY["audits"] if audit["name"] in PUBLISHED]


def study_of(audits: Sequence[dict[str, Any]], folder: Path) -> Path:
    """The bundled study with some of its audits."""
    return write(folder / "study.toml", STUDY | {"audits": list(audits)})


def overrides(
    local: Local, *more: str, audits: Sequence[dict[str, Any]] = tuple(AUDITS)
) -> list[str]:
    """The study with local files and smaller numbers; what is audited stays as it is."""
    saes = [
        f'{{ site = "{Site(layer + 1)}", source = {{ kind = "folder", path = "{at}" }} }}'
        for layer, at in local.saes.items()
    ]
    sets = [
        f'subject.model="{local.model}"', f"subject.saes=[{', '.join(saes)}]", "data.fit=16",
        "data.tune=2", "data.test=8", "recovery.steps=8", "recovery.refine_steps=2",
        "recovery.tolerance=0.3", "recovery.doublings=1", *more,
    ]  # fmt: skip
    for i, audit in enumerate(audits):
        here = f"audits.{i}"
        for role in ("source", "refused", "benign"):
            if role in audit["behavior"]:
                name = audit["behavior"][role]["name"]
                sets.append(f"{here}.behavior.{role}={preset(local, name)}")
        sets += [
            f"{here}.behavior.n_forced=6", f"{here}.behavior.max_new_tokens=18",
            f'{here}.behavior.comply_opening="to"', f'{here}.behavior.refuse_opening="i"',
            f'{here}.intervention.positions="prompt"',
        ]  # fmt: skip
        if audit["discovery"]["kind"] == "given":
            sets.append(f'{here}.discovery.file="{local.features}"')
        if "subject" in audit:
            sets += [f'{here}.subject.model="{local.model}"', f"{here}.subject.saes=[{saes[1]}]"]
    return [part for value in sets for part in ("--set", value)]


FEW = [
    'controls=[{ kind = "wrong_target", only_with = ["feature_hold"] }]',
    'audits.0.grid."recovery.constraint.kind"=["unconstrained", "feature_hold"]',
    'audits.0.grid."recovery.perturb.answer"=[0]',
    'audits.0.grid."intervention.include_bos"=[true]',
    "audits.1.controls=[]",
    'grid."recovery.constraint.kind"=["unconstrained"]',
    'grid."recovery.perturb.answer"=[0]',
    'audits.1.grid."recovery.constraint.kind"=["feature_floor"]',
    'audits.1.grid."recovery.perturb.answer"=[0, 5]',
    *(f'audits.{i}.grid."recovery.constraint.kind"=["unconstrained"]' for i in (2, 3, 4)),
    *(f'audits.{i}.grid."intervention.value"=[30.0]' for i in (2, 3, 4)),
]  # fmt: skip
"""Points of the study's grid: both kinds of perturbation, with and without a constraint."""


@pytest.fixture(scope="module")
def run(local: Local, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Said]:
    """The study, run and reported from the command line."""
    folder = tmp_path_factory.mktemp("run")
    study, out = study_of(AUDITS, folder), folder / "run"
    said = holdfast("run", study, "--out", out, *overrides(local, *FEW))
    assert said.code == 0, said.err
    return RunFolder.read(out), said


def trials(run: RunFolder, audit: str, **row: Any) -> list[dict[str, Any]]:
    """Records of an audit's own trials whose rows of the summary say this."""
    summary = run.summary()
    assert summary is not None
    return [
        run.load(each["id"])
        for each in summary["trials"]
        if (each["audit"], each["control"]) == (audit, row.get("control", "none"))
        and all(each[key] == value for key, value in row.items())
    ]


def tensors_of(run: RunFolder, record: dict[str, Any]) -> dict[str, Tensor]:
    return run.tensors(record["id"])


@pytest.mark.slow
def test_every_audit_is_judged_on_generated_text(run: tuple[RunFolder, Said]) -> None:
    store, said = run
    for audit in AUDITS:
        refuses = audit["behavior"]["direction"] == "refuse"
        before, after = ("full_refusal", "comply") if refuses else ("comply", "full_refusal")
        for record in trials(store, audit["name"]):
            stages = record["result"]["funnel"]["stages"]
            assert stages["valid"] > 0
            rows = [row for row in store.examples(record["id"]) if row["outcome"]]
            assert {row["clean_label"] for row in rows} == {before}
            assert {row["suppressed_label"] for row in rows} == {after}
            assert {row["recovered_label"] for row in rows if row["recovered"]} <= {before}
            assert record["trial"]["subject"]["attention"] == "eager"
            assert len(record["result"]["checks"]["sites"]) == len(LAYERS)
        (free,) = trials(store, audit["name"], constraint="unconstrained") or [None]
        if free is not None and "multiply" in audit["name"]:
            assert free["result"]["funnel"]["stages"]["recovered"] > 0
        assert audit["name"] in said.out
    assert (store.path / "report.html").is_file()


@pytest.mark.slow
def test_held_features_stay_and_free_ones_move(run: tuple[RunFolder, Said]) -> None:
    """In bfloat16 no closer than its rounding."""
    store, _ = run
    (held,) = trials(store, "advbench-multiply", constraint="feature_hold")
    (free,) = trials(store, "advbench-multiply", constraint="unconstrained")
    (wrong,) = trials(store, "advbench-multiply", control="wrong_target")
    for record in (held, wrong):
        checks = record["result"]["checks"]
        # The floor is of one rounding; here those of the blocks between the layers add to it.
        assert checks["preactivation_drift_mean"] <= 3 * checks["rounding_floor_mean"]
    free_checks = free["result"]["checks"]
    assert free_checks["preactivation_drift_mean"] > 10 * free_checks["rounding_floor_mean"]


@pytest.mark.slow
def test_the_anchor_alone_and_the_answer_too(run: tuple[RunFolder, Said]) -> None:
    store, _ = run
    made = {
        record["trial"]["recovery"]["perturb"]["answer"]: tensors_of(store, record)["positions"]
        for record in trials(store, "harmbench-multiply")
    }
    assert made[0].shape[1] == 1 and made[5].shape[1] == 6
    assert torch.equal(made[5].diff(dim=1), torch.ones_like(made[5][:, 1:])), "one after another"
    assert torch.equal(made[5][:, :1], made[0]), "the anchor is the last prompt token"


@pytest.mark.slow
def test_candidates_can_be_found_again_in_their_sets(
    run: tuple[RunFolder, Said], local: Local
) -> None:
    store, _ = run
    names = {audit["name"]: audit["behavior"]["source"]["name"] for audit in AUDITS}
    for audit, name in names.items():
        lines = local.sets[name].read_text().splitlines()[1:]
        for record in trials(store, audit):
            rows = store.examples(record["id"])
            assert {row["dataset"] for row in rows} == {f"sha256:{sha256_file(local.sets[name])}"}
            for row in rows:
                prompt = lines[row["row"] - 1].split(",")[0]
                assert row["prompt_sha256"] == prompt_sha256(prompt)
            assert len({row["template_sha256"] for row in rows}) == 1
            text = json.dumps([record, rows], default=str)
            assert "how do i" not in text and REFUSAL not in text, "ids and hashes, and no text"
            assert str(local.model.parent) not in json.dumps(record["trial"])


@pytest.mark.slow
def test_what_should_be_left_alone_is_measured(run: tuple[RunFolder, Said]) -> None:
    store, _ = run
    for audit in AUDITS:
        benign = "benign" in audit["behavior"]
        for record in trials(store, audit["name"]):
            names = {m["name"] for m in record["result"]["measurements"]}
            assert ("neighbor.benign.suppressed" in names) == benign


def test_without_a_chat_template_nothing_is_run(local: Local, tmp_path: Path) -> None:
    model = Path(shutil.copytree(local.model, tmp_path / "base"))
    (model / "chat_template.jinja").unlink()
    out = tmp_path / "run"
    sets = overrides(local._replace(model=model), *FEW)
    said = holdfast("run", study_of(AUDITS, tmp_path), "--out", out, *sets)
    assert said.code == 2 and "base has no chat template" in said.err
    assert "chat_template.jinja" in said.err, "what to do"
    assert not list(out.glob("trials/*"))


# --- As published ---------------------------------------------------------------------------------

SHORT = [
    'controls=[]',
    *(f'audits.{i}.grid."recovery.perturb.answer"=[5]' for i in range(3)),
    *(f'audits.{i}.grid."recovery.schedule".0.stages.{stage}.{field}'
      for i in range(3) for stage in (0, 1) for field in ("steps=8", "lr=1.0")),
    *(f'audits.{i}.grid."recovery.schedule".0.checkpoint.every=2' for i in range(3)),
    'audits.0.controls=[]',
    'audits.0.grid."recovery.budget"=[{absolute=5.0}, {absolute=40.0}]',
    *(f'audits.0.attacks.{i}.{field}' for i in (0, 1)
      for field in ("n_tokens=2", "steps=4", 'placeholder="."')),
    'audits.2.grid."discovery.n_features"=[1, 3]',
]  # fmt: skip


@pytest.fixture(scope="module")
def as_published(local: Local, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The published search and sweeps, with few steps and points."""
    folder = tmp_path_factory.mktemp("published")
    study, out = study_of(AS_PUBLISHED, folder), folder / "run"
    said = holdfast("run", study, "--out", out, *overrides(local, *SHORT, audits=AS_PUBLISHED))
    assert said.code == 0, said.err
    return RunFolder.read(out)


@pytest.mark.slow
def test_two_stages_have_a_norm_each(as_published: RunFolder) -> None:
    """As published, where the vectors of both came to √2 · 40; and refusal goes away."""
    back = {}
    for record in trials(as_published, "advbench-published"):
        budget = record["trial"]["recovery"]["budget"]["absolute"]
        made = tensors_of(as_published, record)
        sites = [name for name in made if name.startswith("blocks.")]
        assert len(sites) == len(LAYERS) and made["positions"].shape[1] == 6
        anchor = torch.stack([made[site][:, :1] for site in sites]).square().sum((0, 2, 3)).sqrt()
        answer = torch.stack([made[site][:, 1:] for site in sites]).square().sum((0, 2, 3)).sqrt()
        assert (anchor > 0).all() and (answer > 0).all()
        assert (anchor <= budget * 1.001).all() and (answer <= budget * 1.001).all()
        assert record["result"]["checks"]["promise"] == "nothing"
        stages = record["result"]["funnel"]["stages"]
        back[record["trial"]["recovery"]["constraint"]["kind"], budget] = stages["recovered"]
        if record["trial"]["recovery"]["constraint"]["kind"] == "jacobian_probes":
            together = (anchor.square() + answer.square()).sqrt()
            assert together.max() > 1.4 * budget, "both stages go to their bounds"
    for kind in ("unconstrained", "jacobian_probes"):
        assert back[kind, 5.0] < back[kind, 40.0], back


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, n_rows, apart",
    [
        ("refusal", 39, 1),  # features that were not released
        ("budget", 30, 18),  # three of five budgets are not run here
        ("k_sweep", 48, 42),  # ten of twelve numbers are not, and a measure of nothing
    ],
)
def test_published_figures_are_beside_the_run(
    as_published: RunFolder, tmp_path: Path, name: str, n_rows: int, apart: int
) -> None:
    found = beside(as_published.path, name, tmp_path)
    assert len({(row.label, row.measure) for row in found}) == n_rows
    without = {(row.label, row.measure) for row in found if not row.trial}
    assert len(without) == apart
    filled = [row for row in found if row.trial]
    assert set(unfilled(filled)) <= {"drift_relative_mean", "drift_relative_median"}, filled
    for row in filled:
        if name == "budget":
            assert row.trial.endswith(f"jacobian_probes, {row.label.replace(' ', '=')}.0")
        if name == "k_sweep":
            assert row.trial.startswith("layer-11, gradient_projection, n_features=")
        if name == "refusal":
            of = "harmbench" if "HarmBench" in row.label else "advbench"
            assert row.trial.startswith(f"{of}-published, ")
            assert ("suffix" in row.label) == ("soft_suffix" in row.trial)


@pytest.mark.slow
def test_published_rates_are_beside_every_strength(
    run: tuple[RunFolder, Said], tmp_path: Path
) -> None:
    """2505.23556's: a set of prompts and a strength each, and never those of another set."""
    store, _ = run
    found = beside(store.path, "refusal-features", tmp_path)
    for row in found:
        own = row.trial.split(",")[0]
        if "at 30" in row.label or "integrated" in row.label or row.label == "no intervention":
            assert own in ("alpaca-set", "advbench-removed", "harmbench-removed",
                           "jailbreakbench-removed")  # fmt: skip
            assert row.ours is not None and row.ours.estimate is not None and row.ours.n == 8
    removed = {row.trial.split(",")[0] for row in found if "integrated" in row.label}
    assert len(removed) == 3, "a figure of one set is beside that set's audit"


# --- The study file itself ------------------------------------------------------------------------


def test_the_circuit_is_at_the_sites_of_published_saes() -> None:
    """By the registry that the SAE library ships: no network."""
    subject = STUDY["subject"]
    features = json.loads(resolve(AUDITS[0]["discovery"]["file"]).read_text())
    assert [each["site"] for each in features] == [sae["site"] for sae in subject["saes"]]
    assert all(0 <= i < 65_536 for each in features for i in each["ids"])
    for sae in subject["saes"]:
        entry = entry_of(sae["source"]["release"], sae["source"]["sae_id"])
        layer = Site.parse(sae["site"]).layer
        assert entry.path.startswith(f"layer_{layer}/width_65k/")


def test_every_point_of_the_study_can_be_run(local: Local) -> None:
    """Its own grid, every audit with local files: each trial's configuration fits together."""
    sets = overrides(local, audits=STUDY["audits"])[1::2]
    sets = [value for value in sets if "n_forced" not in value]
    sets = [value for value in sets if "max_new_tokens" not in value]
    study = parse(bundled("gemma-2-2b-it-refusal"), sets)
    made = plan(study).trials
    searched = [t.recovery for t in made if t.recovery is not None]
    assert {spec.perturb.answer for spec in searched} == {0, 47}
    assert {spec.constraint.kind for spec in searched} >= {"jacobian_probes", "feature_hold"}
    assert {t.intervention.mode for t in made} == {"multiply", "set", "floor"}
    assert all(t.behavior.max_new_tokens >= 128 for t in made)
