"""The bundled studies for published models, end to end on tiny random models of their families.

What is downloaded in earnest is made here: model, tokenizer, SAE in its published format, question
files. Everything else of the study file stays as it is, but for smaller numbers.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from holdfast.behaviors.english import NAMES, TEMPLATES
from holdfast.edits import Capture
from holdfast.planning import plan
from holdfast.published.beside import Beside, PublishedComparison
from holdfast.saes.sae import SAE
from holdfast.sites import Site
from holdfast.store import RunFolder
from holdfast.study import bundled, bundled_names, parse, read_text
from holdfast.subject import Subject
from holdfast.testing import fitted_sae
from tests.e2e.cli import holdfast, write

pytestmark = pytest.mark.e2e

FEWER = [
    "data.fit=24", "data.tune=24", "data.test=24", "recovery.steps=8", "recovery.refine_steps=4",
    "recovery.doublings=1", 'grid."recovery.constraint.kind"=["encoder_null"]',
]  # fmt: skip
PLACES = "garden library market station museum river bakery bridge ring letter basket ladder map"


def byte_pairs(texts: Sequence[str], special: dict[str, str], bos_in_front: bool) -> Any:
    """A byte-level tokenizer of the kind both families have, trained on the study's own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys(special.values()))
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=tokens, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    if bos_in_front:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def residuals(model: Any, tokenizer: Any, site: Site, texts: Sequence[str]) -> Tensor:
    """[tokens d_model] float32 of texts one by one, BOS left out."""
    subject = Subject.of("tiny", model.float(), tokenizer, {}, prepend_bos=True)
    out = []
    from holdfast.batch import Example

    some = tokenizer.decode([40])
    for i, text in enumerate(texts):
        capture = Capture(site)
        example = Example(str(i), text, some, (some,), (some,), str(i))
        subject.outputs(subject.batch([example]), (capture,))
        out.append(capture.seen[0][1][0, 1:].float())
    return torch.cat(out)


def save(path: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


# ---------------------------------------------------------------------------------- GPT-2 small


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny GPT-2 and an SAE of its centered residuals in the layout of the published ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("gpt2")
    texts = [t.format(a=a, b=b, s=a, place="garden", object="ring") + f" {b}"
             for t in TEMPLATES for a, b in zip(NAMES[::2], NAMES[1::2], strict=False)]  # fmt: skip
    end = "<|endoftext|>"
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    tokenizer = byte_pairs([*texts, PLACES], special, bos_in_front=False)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=6, n_head=4, n_positions=128,
        initializer_range=0.25, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # a residual with a mean, which centering takes out
        model.transformer.wpe.weight += 1.0
    save(path / "model", model, tokenizer)
    x = residuals(model, tokenizer, Site(4), texts[::5])
    write_res_jb(path / "sae", fitted_sae(Site(4), x - x.mean(-1, keepdim=True)))
    return path / "model", path / "sae"


def write_res_jb(path: Path, sae: SAE) -> None:
    path.mkdir()
    metadata = {
        "sae_lens_version": "6.30.0", "model_name": "gpt2-small", "prepend_bos": True,
        "hook_name": "blocks.4.hook_resid_pre",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }  # fmt: skip
    cfg = {
        "architecture": "standard", "d_in": sae.d_model, "d_sae": sae.n_features,
        "dtype": "float32", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "metadata": metadata,
    }  # fmt: skip
    (path / "cfg.json").write_text(json.dumps(cfg))
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    save_file({name: getattr(sae, name).contiguous() for name in names},
              path / "sae_weights.safetensors")  # fmt: skip


def only(study: str, audit: str, tmp_path: Path) -> Path:
    """The bundled study with one of its audits."""
    tables = tomllib.loads(bundled(study))
    tables["audits"] = [each for each in tables["audits"] if each["name"] == audit]
    assert len(tables["audits"]) == 1
    return write(tmp_path / f"{study}.toml", tables)


def beside(run: Path, name: str, tmp_path: Path) -> list[Beside]:
    """The rows that the command puts a run beside."""
    out = tmp_path / f"{name}.json"
    said = holdfast("compare", run, f"published:{name}", "--out", out)
    assert said.code == 0, said.err
    (found,) = json.loads(out.read_text())["comparisons"]
    return list(PublishedComparison.model_validate(found).rows)


def unfilled(rows: Sequence[Beside]) -> dict[str, str]:
    """Measure → what is said of a published figure that has no value beside it."""
    return {
        row.measure: " ".join(row.unlike)
        for row in rows
        if row.ours is None or row.ours.estimate is None
    }


def overrides(model: Path, sae: Path, *more: str) -> list[str]:
    source = f'subject.saes.0.source={{kind="folder", path="{sae}"}}'
    every = [f'subject.model="{model}"', source, *FEWER, *more]
    return [part for value in every for part in ("--set", value)]


@pytest.mark.slow
def test_ioi_on_gpt2(gpt2: tuple[Path, Path], tmp_path: Path) -> None:
    model, sae = gpt2
    sets = overrides(
        model, sae, "audits.0.behavior.n_names=6", "audits.0.discovery.n_features=12",
        "audits.1.behavior.n_names=10", "audits.1.discovery.n_features=12",
        "audits.1.data={fit=30, tune=1, test=16}",
        'audits.1.grid."recovery.schedule"=[{stages=[{steps=8, lr=0.1}]}]',
    )  # fmt: skip
    said = holdfast("run", "gpt2-small-ioi", "--out", tmp_path / "run", *sets)
    assert said.code == 0, said.err
    run = RunFolder.read(tmp_path / "run")
    rows = [row for row in run.summary()["trials"] if row["audit"] == "ioi"]
    assert [row["control"] for row in rows] == ["none", "wrong_target", "no_clamp"]
    main = rows[0]
    assert main["n_valid"] > 0 and main["preactivation_drift_max"] < 1e-6
    record = run.load(main["id"])
    assert record["result"]["checks"]["guarantee"] == "exact"
    assert record["trial"]["subject"]["prepend_bos"] is True
    assert "/" not in json.dumps(record["trial"]["subject"]), "an identity holds no path"

    found = beside(tmp_path / "run", "ioi", tmp_path)
    assert len(found) == 18 and not unfilled(found)
    for each in found:
        assert each.trial.startswith("published, "), "and not the audit of all templates"
        differs = {told.partition(":")[0] for told in each.unlike}
        assert differs <= {"n_features", "data.test", "recovery.schedule.stages.0.steps"}, differs
    own = [row for row in run.summary()["trials"] if row["audit"] == "published"]
    asked = {row["id"].split(":")[3] for row in run.examples(own[0]["id"])}
    assert asked == {"BABA"}


def test_without_bos_or_without_centering_gpt2_is_not_audited(
    gpt2: tuple[Path, Path], tmp_path: Path
) -> None:
    model, sae = gpt2
    for change, fault in (
        ("subject.prepend_bos=false", "beginning of sequence"),
        ("subject.saes.0.source.center=false", "centering"),
    ):
        out = tmp_path / fault.split()[0]
        sets = overrides(model, sae, "audits.0.behavior.n_names=6", change)
        said = holdfast("run", "gpt2-small-ioi", "--out", out, *sets)
        assert said.code == 2 and fault in said.err, said.err
        assert not list((out / "trials").glob("*")), "nothing was searched"


# ---------------------------------------------------------------------------------- Gemma-2


CHAT = (
    "{{ bos_token }}{% for m in messages %}turn of {{ m['role'] }}\n{{ m['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}turn of model\n{% endif %}"
)
SUBJECTS = ("moss", "lantern", "kettle", "pebble", "feather", "compass", "thimble", "acorn")
COLORS = ("amber", "violet", "silver", "green", "ivory", "copper")


def write_questions(path: Path, n: int, about: str) -> Path:
    """Invented questions in the columns of WMDP and MMLU."""
    rows = []
    for i in range(n):
        subject, color = SUBJECTS[i % len(SUBJECTS)], COLORS[(i * 5) % len(COLORS)]
        choices = [COLORS[(i + k) % len(COLORS)] for k in range(4)]
        question = f"In the {about} number {i}, what is the color of the {color} {subject}?"
        rows.append({"question": question, "choices": choices, "answer": i % 4})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Path]]:
    """A tiny Gemma-2 in bfloat16, an SAE as a Gemma Scope `params.npz`, and question files."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    path = tmp_path_factory.mktemp("gemma")
    files = {
        name: write_questions(path / f"{name}.jsonl", 60, f"{name} garden")
        for name in ("wmdp", "history", "geography", "computing", "aging")
    }
    rows = [json.loads(line) for file in files.values() for line in file.read_text().splitlines()]
    texts = [
        f"The following is a question.\n\n{row['question']}\nA. {row['choices'][0]}\nB. "
        f"{row['choices'][1]}\nC. {row['choices'][2]}\nD. {row['choices'][3]}\nAnswer: A B C D"
        for row in rows
    ]
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    tokenizer = byte_pairs(texts, special, bos_in_front=True)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16,
        initializer_range=0.2, query_pre_attn_scalar=8, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=3, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    x = residuals(model, tokenizer, Site(4), texts[::6])
    save(path / "model", model.to(torch.bfloat16), tokenizer)
    folder = path / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_32"
    write_gemma_scope(folder, fitted_sae(Site(4), x))
    return path / "model", folder, files


def write_gemma_scope(folder: Path, sae: SAE) -> None:
    folder.mkdir(parents=True)
    # That format does not subtract b_dec before encoding: what it does goes into b_enc.
    b_enc = sae.b_enc - sae.b_dec @ sae.W_enc
    arrays = {
        "W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": b_enc, "b_dec": sae.b_dec,
        "threshold": torch.full_like(b_enc, 1e-3),
    }  # fmt: skip
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})


@pytest.mark.slow
@pytest.mark.parametrize(
    "letters",
    [
        ("audits.0.intervention.value=[-10.0, -40.0]",),
        ("audits.0.behavior.spellings=true", "audits.0.intervention.value=-200.0", "data.test=60"),
    ],
    ids=["one spelling", "two spellings"],
)
def test_wmdp_on_gemma_2(
    gemma: tuple[Path, Path, dict[str, Path]], tmp_path: Path, letters: tuple[str, ...]
) -> None:
    model, sae, files = gemma
    sets = overrides(
        model, sae,
        f'audits.0.behavior.source={{kind="file", path="{files["wmdp"]}"}}',
        f'audits.0.behavior.retain.history={{kind="file", path="{files["history"]}"}}',
        f'audits.0.behavior.retain.geography={{kind="file", path="{files["geography"]}"}}',
        "audits.0.discovery.n_features=12", "audits.0.discovery.retain_threshold=1.0",
        *letters,
    )  # fmt: skip
    study = only("gemma-2-2b-it-wmdp", "wmdp-bio", tmp_path)
    said = holdfast("run", study, "--out", tmp_path / "run", *sets)
    assert said.code == 0, said.err
    run = RunFolder.read(tmp_path / "run")
    main = run.summary()["trials"][0]
    record = run.load(main["id"])
    checks = record["result"]["checks"]
    assert main["n_valid"] > 0
    assert checks["preactivation_drift_mean"] <= 1.5 * checks["rounding_floor_mean"]
    trial = json.dumps(record["trial"])
    assert str(tmp_path.parent) not in trial and str(files["wmdp"].parent) not in trial
    assert record["trial"]["subject"]["attention"] == "eager"
    assert len(record["trial"]["behavior"]["source"]["sha256"]) == 64
    assert len(record["result"]["readout"].get("spellings", [])) == (4 if len(letters) > 1 else 0)


@pytest.mark.slow
def test_wmdp_as_published_on_gemma_2(
    gemma: tuple[Path, Path, dict[str, Path]], tmp_path: Path
) -> None:
    """Every figure has a value beside it, at its own budget; a random model knows no question in
    all orders, so which of them are audited is left to another test."""
    model, sae, files = gemma
    features = [{"site": "blocks.3.hook_resid_post", "ids": list(range(0, 64, 2))}]
    listed = tmp_path / "features.json"
    listed.write_text(json.dumps(features))
    sets = overrides(
        model, sae,
        f'audits.0.behavior.source={{kind="file", path="{files["wmdp"]}"}}',
        "audits.0.behavior.every_order=false", "audits.0.intervention.value=-200.0",
        f'audits.0.discovery.file="{listed}"', "audits.0.data={fit=24, tune=1, test=72}",
        'audits.0.grid."recovery.budget"=[{absolute=5.0}, {absolute=20.0}]',
        'audits.0.grid."recovery.schedule"=[{stages=[{steps=6, lr=0.08}]}]',
        'audits.0.attacks=[{kind="soft_suffix", n_tokens=3, steps=4, placeholder="!"}]',
    )  # fmt: skip
    study = only("gemma-2-2b-it-wmdp", "published", tmp_path)
    said = holdfast("run", study, "--out", tmp_path / "run", *sets)
    assert said.code == 0, said.err
    found = beside(tmp_path / "run", "wmdp", tmp_path)
    apart = [row for row in found if row.label.endswith((" 2", " 10"))]
    assert len(found) == 24 and len(apart) == 8
    assert unfilled(apart).keys() == {"recovery_rate", "drift_absolute_mean"}
    assert all("no such point" in told for told in unfilled(apart).values())
    rest = [row for row in found if row not in apart]
    # 32 features that are off have no scale by which a drift could be relative.
    assert set(unfilled(rest)) <= {"drift_relative_mean"}
    for each in rest:
        attacked = each.label == "suffix (OABD)"
        assert ("soft_suffix" in each.trial) == attacked
    run = RunFolder.read(tmp_path / "run")
    own = [row for row in run.summary()["trials"] if row["control"] == "none"]
    by_budget = {row["point"].get("recovery.budget", {}).get("absolute"): row for row in own
                 if row["constraint"] == "unconstrained"}  # fmt: skip
    made = {budget: run.examples(row["id"]) for budget, row in by_budget.items()}
    for budget in (5.0, 20.0):
        norms = [row["norm"] for row in made[budget] if row["outcome"]]
        assert norms and max(norms) <= budget * 1.01


def write_corpus(path: Path, about: str) -> Path:
    """Invented texts, some too short to be read."""
    rows = [
        {"text": f"In the {about} number {i} the {SUBJECTS[i % 8]} is {COLORS[i % 6]} and lies by "
                 f"the {PLACES.split()[i % 10]}, which is near.", "title": "none"}
        for i in range(40)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, [*rows, {"text": "Too short.", "title": ""}])))
    return path


@pytest.mark.slow
def test_wmdp_grid_on_gemma_2(gemma: tuple[Path, Path, dict[str, Path]], tmp_path: Path) -> None:
    model, sae, files = gemma
    corpora = {name: write_corpus(tmp_path / f"{name}.jsonl", name) for name in ("garden", "river")}

    def file(path: Path) -> str:
        return f'{{kind="file", path="{path}"}}'

    sets = overrides(model, sae)
    del sets[2 * (2 + FEWER.index(FEWER[-1])) :]  # the constraint is no axis of this grid
    retain = ("history", "computing", "geography", "aging")
    sets += [part for value in (
        f"audits.0.behavior.source={file(files['wmdp'])}",
        *(f"audits.0.behavior.retain.{name}={file(files[name])}" for name in retain),
        f"audits.0.discovery.forget={file(corpora['garden'])}",
        f"audits.0.discovery.retain={file(corpora['river'])}",
        "audits.0.discovery.n_sequences=32", "audits.0.discovery.n_tokens=40", "data.test=6",
        'grid."discovery.retain_threshold"=[0.3, 1.0]', 'grid."discovery.n_features"=[4]',
        'grid."intervention.value"=[-10.0, -200.0]', "audits.0.controls=[]",
    ) for part in ("--set", value)]  # fmt: skip
    said = holdfast("run", "gemma-2-2b-it-wmdp-grid", "--out", tmp_path / "run", *sets)
    assert said.code == 0, said.err
    run = RunFolder.read(tmp_path / "run")
    summary = run.summary()
    (score,) = summary["unlearning"]
    assert len(score["settings"]) + score["n_without"] == 4 and score["settings"]
    for setting in score["settings"]:
        assert set(setting["by_set"]) == set(retain) and setting["n_features"] == 4
        record = run.load(setting["trials"][0])
        measured = {m["name"]: m for m in record["result"]["measurements"]}
        every = measured["known.forget.all.clean"]
        assert (every["n"], every["n_clusters"]) == (6 * 24, 6), "all 24 orders of a question"
        known = measured["known.forget.correct.clean"]
        assert known["estimate"] == 1.0 or (known["n"] == 0 and known["reason"])
        trial = json.dumps(record["trial"])
        assert str(tmp_path) not in trial and str(files["wmdp"].parent) not in trial
        assert len(record["trial"]["discovery"]["forget"]["sha256"]) == 64
        behavior = record["trial"]["behavior"]
        assert (behavior["cue"], behavior["chat"], behavior["spellings"]) == (
            "Answer: (",
            True,
            True,
        )
        assert len(record["result"]["readout"]["spellings"]) == 4, "SAEBench's way of asking"
    assert score["score"] is not None or score["reason"]
    assert "What is unlearned" in (tmp_path / "run" / "report.html").read_text()


# ---------------------------------------------------------------------------------- unlearning


@pytest.mark.slow
def test_unlearning_of_the_organism(tmp_path: Path) -> None:
    """The features that the two corpora give hide the hazard domain and spare the others; with a
    laxer threshold another domain goes along, and no picker takes that."""
    fewer = ['audits.0.grid."intervention.value"=[-2.0]', "audits.0.controls=[]",
             "recovery.steps=15", "recovery.refine_steps=4",
             "audits.1.paths.margin_draws=2"]  # fmt: skip
    sets = [part for value in fewer for part in ("--set", value)]
    said = holdfast("run", "unlearning", "--out", tmp_path / "run", *sets)
    assert said.code == 0, said.err
    run = RunFolder.read(tmp_path / "run")
    (score,) = run.summary()["unlearning"]
    by = {s["point"]["discovery.retain_threshold"]: s for s in score["settings"]
          if s["point"]["discovery.n_features"] == 4}  # fmt: skip
    assert by[0.001]["forget"] < 0.05 and by[0.001]["kept"] == 1.0
    assert by[0.01]["by_set"]["music"] < 0.5 and by[0.01]["by_set"]["harvest"] > 0.9
    assert score["score"] > 0.95 and score["n_without"] == 1
    for pick in score["picks"]:
        assert score["settings"][pick["index"]]["kept"] >= 0.99, pick["why"]
    main = next(row for row in run.summary()["trials"] if row["control"] == "none")
    assert main["n_recovered"] > 0.8 * main["n_valid"], "what the score calls unlearned comes back"
    rows = [row for row in run.summary()["trials"] if row["audit"] == "orders"]
    exact = next(row for row in rows if row["constraint"] == "encoder_null")
    lent = run.load(exact["id"])["result"]["paths"]["orders"]
    back = {(row["name"], row["scale"]): row["back"]["estimate"] for row in lent}
    assert back["same_letter", 1.0] > 0.5 and back["other_question", 2.0] > 0.5
    asked = run.load(exact["id"])["result"]["paths"]["openly"]
    right = {each["name"]: each["right"]["estimate"] for each in asked["conditions"]}
    assert asked["n"] == exact["n_recovered"] and asked["n_flips"] == 0
    assert right["clean"] == right["suppressed"] == 1.0, "the clamp takes letters, not the answer"
    guarded = next(row for row in run.summary()["trials"] if row["audit"] == "guardrail")
    result = run.load(guarded["id"])["result"]
    acts = {m["name"]: m["estimate"] for m in result["measurements"] if "trigger." in m["name"]}
    assert acts["trigger.test.prompts"] == 1.0 and acts["trigger.weather.prompts"] == 0.0
    assert isinstance(result["intervention"]["condition"]["above"], float), "what was learnt"
    assert result["checks"]["replay"] != "", "a decision on whole prompts is replayed whole"
    pointed = next(row for row in run.summary()["trials"] if row["audit"] == "direction")
    result = run.load(pointed["id"])["result"]
    acts = {m["name"]: m["estimate"] for m in result["measurements"] if "trigger." in m["name"]}
    assert acts["trigger.test.prompts"] == 1.0 and acts["trigger.weather.prompts"] == 0.0
    assert result["checks"]["replay"].startswith(
        "whole sequence: a clamp's condition on the prompt"
    )
    assert result["checks"]["replay_error"] < 1e-3
    page = tmp_path / "again.html"
    assert holdfast("report", tmp_path / "run", "--out", page).code == 0
    written = (tmp_path / "run" / "report.html").read_text()
    for at in ("Unlearning score", "Methods on one valid set", "Another order", "No choices",
               "conditional"):  # fmt: skip
        assert at in written and at in page.read_text()


# ---------------------------------------------------------------------------------- sweeps


@pytest.mark.slow
def test_steps_and_kinds_of_sae_are_swept(tmp_path: Path) -> None:
    """Every point has prompts to search, and the features are those of its own SAE."""
    tables = tomllib.loads(bundled("sweeps"))
    tables["audits"] = [each for each in tables["audits"] if each["name"] in ("steps", "sae")]
    for audit in tables["audits"]:
        audit["data"] = {"fit": 100, "tune": 1, "test": 6}
        audit["controls"] = []
    said = holdfast("run", write(tmp_path / "sweeps.toml", tables), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    run = RunFolder.read(tmp_path / "run")
    rows = [row for row in run.summary()["trials"] if row["n_valid"] > 0]
    steps = [row for row in rows if row["audit"] == "steps"]
    assert {row["point"]["recovery.steps"] for row in steps} == {3, 10, 30} and len(steps) == 6
    used = {}
    for row in (row for row in rows if row["audit"] == "sae"):
        features = run.load(row["id"])["result"]["features"]["entries"]
        used[row["point"]["variant"]] = max(i for entry in features for i in entry["ids"])
    assert set(used) == {"JumpReLU, 1024", "TopK, 512"} and used["TopK, 512"] < 512
    page = (tmp_path / "run" / "report.html").read_text()
    assert "recovery.steps" in page and "TopK, 512" in page


@pytest.mark.slow
def test_what_saes_cost_elsewhere_stands_beside_what_they_explain(tmp_path: Path) -> None:
    """The less of the variance an SAE explains the more its reconstruction costs on other texts,
    where the behavior's own rate hardly falls; with half of its error passed on it costs less."""
    tables = tomllib.loads(bundled("error-term"))
    (audit,) = tables["audits"] = [a for a in tables["audits"] if a["name"] == "fidelity"]
    audit["grid"]["intervention.error_term"] = [{"scale": alpha} for alpha in (1.0, 0.5, 0.0)]
    audit["grid"]["recovery.order"] = ["clamp_then_perturbation"]
    audit["grid"]["variant"] = ["all features", "TopK, 512", "896"]
    for name in set(tables["variants"]) - set(audit["grid"]["variant"]):
        del tables["variants"][name]
    tables["recovery"] |= {"steps": 5, "refine_steps": 2}
    tables["data"] |= {"fit": 100, "test": 8}
    said = holdfast("run", write(tmp_path / "fidelity.toml", tables), "--out", tmp_path / "run")
    assert said.code == 0, said.err
    run = RunFolder.read(tmp_path / "run")
    more, explained = {}, {}
    for row in run.summary()["trials"]:
        alpha = row["point"]["intervention.error_term"]["scale"]
        result = run.load(row["id"])["result"]
        told = {m["name"]: m for m in result["measurements"] if m["name"].startswith("texts.")}
        assert told["texts.loss.clean"]["n"] == 120
        if alpha < 1:
            name = row["point"]["variant"]
            more[name, alpha] = told["texts.loss.difference"]
            (explained[name],) = result["explained"].values()
        else:
            assert set(told) == {"texts.loss.clean", "texts.accuracy.clean"}
    ranked = sorted(explained, key=lambda name: -explained[name])
    assert ranked == ["all features", "TopK, 512", "896"]
    lost = [more[name, 0.0]["estimate"] for name in ranked]
    assert lost == sorted(lost) and lost[-1] > 10 * lost[0] > 0
    assert all(more[name, 0.0]["low"] > more[name, 0.5]["estimate"] for name in ranked)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Loss on other texts that the SAE in place adds" in page


def test_every_bundled_study_names_what_exists() -> None:
    """Parsed without a network: the hub is asked only for a data set's questions."""
    for name in bundled_names():
        text = read_text(name)
        if 'kind = "hub"' in text or 'kind = "preset"' in text:
            assert f'name   = "{name}"' in text
        else:
            assert parse(text).name == name


def test_the_refusal_study_holds_an_answer_behind_one_token() -> None:
    """By the only constraint that can: a vector at the prompt's end, three layers, the answer."""
    trials = [t for t in plan(parse(read_text("refusal"))).trials if t.audit == "anchor"]
    searched = [t.recovery for t in trials if t.recovery is not None and t.is_audit]
    assert {spec.constraint.kind for spec in searched} == {"unconstrained", "jacobian_null"}
    for spec in searched:
        assert spec.perturb.positions == "last_prompt" and spec.perturb.answer == 0
        assert spec.budget.relative == 1.0
    assert all(len(trial.subject.saes) == 3 for trial in trials)


# ---------------------------------------------------------------------------------- TPP


def write_lives(path: Path, n: int) -> Path:
    """Invented lives in the columns of Bias in Bios, n of each profession and gender."""
    from holdfast.datasets.labelled import PRESETS

    rows = []
    for k, value in enumerate(PRESETS["bias_in_bios_1"].classes.values()):
        for gender in (0, 1):
            for i in range(n):
                own, shared = COLORS[k], SUBJECTS[i % len(SUBJECTS)]
                text = f"{'She' if gender else 'He'} keeps a {shared} and {i} {own} {own} kettle."
                rows.append({"hard_text": text, "profession": int(value), "gender": gender})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def gemma_base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny Gemma-2 in bfloat16, an SAE of layer 5 as a Gemma Scope `params.npz`, and lives."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    path = tmp_path_factory.mktemp("gemma-base")
    lives = write_lives(path / "lives.jsonl", 70)
    texts = [json.loads(line)["hard_text"] for line in lives.read_text().splitlines()]
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    tokenizer = byte_pairs(texts, special, bos_in_front=True)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16,
        initializer_range=0.2, query_pre_attn_scalar=8, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=3, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    x = residuals(model, tokenizer, Site(6), texts[::9])
    save(path / "model", model.to(torch.bfloat16), tokenizer)
    folder = path / "gemma-scope-2b-pt-res" / "layer_5" / "width_16k" / "average_l0_68"
    write_gemma_scope(folder, fitted_sae(Site(6), x))
    return path / "model", folder, lives


@pytest.mark.slow
def test_tpp_on_gemma_2(gemma_base: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, sae, lives = gemma_base
    sets = overrides(
        model, sae, f'audits.0.behavior.source={{kind="file", path="{lives}"}}',
        'grid."discovery.n_features"=[4, 12]', "audits.0.behavior.penalties=[0.01, 1.0]",
    )  # fmt: skip
    study = only("gemma-2-2b-tpp", "bias-in-bios", tmp_path)
    said = holdfast("run", study, "--out", tmp_path / "run", *sets)
    assert said.code == 0, said.err
    run = RunFolder.read(tmp_path / "run")
    rows = [row for row in run.summary()["trials"] if row["control"] == "none"]
    assert [row["point"]["discovery.n_features"] for row in rows] == [4, 12]
    for row in rows:
        record = run.load(row["id"])
        result, checks = record["result"], record["result"]["checks"]
        assert row["n_valid"] > 0 and "geometry" in row["sentence"]
        assert checks["preactivation_drift_mean"] <= 1.5 * checks["rounding_floor_mean"]
        assert result["readout"]["classes"][3] == "dentist"
        assert {m["name"] for m in result["measurements"]} >= {"score.tpp", "neighbor.rest.clean"}
        trial = json.dumps(record["trial"])
        assert str(lives.parent) not in trial
        assert len(record["trial"]["behavior"]["source"]["sha256"]) == 64
    page = (tmp_path / "run" / "report.html").read_text()
    assert "tpp.unintended" in page and "is geometry" in page


def write_reviews(path: Path, n: int) -> Path:
    """Invented reviews in the columns of the Amazon set, n of each category and rating."""
    from holdfast.datasets.labelled import PRESETS

    rows = [
        {"text": f"Rated {'well' if rating == 5 else 'badly'}: {i} {COLORS[k]} {COLORS[k]} kettle "
                 f"for a {SUBJECTS[i % len(SUBJECTS)]}.", "category": int(value), "rating": rating}
        for k, value in enumerate(PRESETS["amazon_reviews"].classes.values())
        for rating in (1, 5) for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_tpp_as_published_on_gemma_2(gemma_base: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Classes of two of the four sets: figures of a set are beside the mean over its classes."""
    model, sae, lives = gemma_base
    reviews = write_reviews(tmp_path / "reviews.jsonl", 40)
    local = {"bias_in_bios_1": lives, "amazon_reviews": reviews}
    variants = {"dentist": "bias_in_bios_1", "attorney": "bias_in_bios_1",
                "instruments": "amazon_reviews"}  # fmt: skip
    tables = tomllib.loads(bundled("gemma-2-2b-tpp"))
    assert len(tables["variants"]) == 20
    sets = overrides(
        model, sae, f'audits.0.behavior.source={{kind="file", path="{lives}"}}',
        "audits.0.discovery.n_features=12", "audits.0.data={fit=24, tune=24, test=16}",
        f"audits.0.grid.variant={json.dumps(list(variants))}",
        'audits.0.grid."recovery.constraint.kind"=["unconstrained", "gradient_projection"]',
    )  # fmt: skip
    for name, preset in variants.items():
        at = f"variants.{name}.behavior"
        assert tables["variants"][name]["behavior"]["preset"] == preset
        sets += ["--set", f'{at}.source={{kind="file", path="{local[preset]}"}}',
                 "--set", f"{at}.penalties=[0.01]"]  # fmt: skip
    for name in set(tables["variants"]) - set(variants):
        del tables["variants"][name]
    tables["audits"] = [each for each in tables["audits"] if each["name"] == "published"]
    study = write(tmp_path / "study.toml", tables)
    said = holdfast("run", study, "--out", tmp_path / "run", *sets)
    assert said.code == 0, said.err
    found = beside(tmp_path / "run", "tpp", tmp_path)
    filled = [row for row in found if row.ours is not None]
    assert len(found) == 70
    run = RunFolder.read(tmp_path / "run")
    rates = {(row["point"]["variant"], row["constraint"]): row["recovery_rate"]
             for row in run.summary()["trials"]}  # fmt: skip
    one = next(row for row in filled if row.label == "Bios 1, none")
    assert one.measure == "recovery_rate" and one.trial.endswith("and 1 more")
    mean = (rates["dentist", "unconstrained"] + rates["attorney", "unconstrained"]) / 2
    assert one.ours is not None and one.ours.estimate == pytest.approx(mean)
    whole = next(row for row in filled if row.label == "all, unweighted, none")
    every = [rates[name, "unconstrained"] for name in variants]
    assert whole.ours is not None and whole.ours.estimate == pytest.approx(sum(every) / 3)
    score = next(row for row in filled if row.measure == "score.tpp.intended")
    assert score.label == "Musical_Instruments" and score.ours is not None
    assert score.ours.estimate is not None
    for row in found:
        other = row.label.startswith(("Bios 2", "Bios 3", "journalist", "surgeon"))
        assert (row.ours is None) == other, row.label
