"""Answers begun for the model, and drawn: what is given is not counted, and what is drawn follows
the stated distribution whatever shares the batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from holdfast.attacks import Attacked, AttackKind, TrialResult
from holdfast.attacks.prefill import ALIKE, ENDED, Prefill, _Begun, _begun, _cells, _others, _Round
from holdfast.attacks.sampling import Sampling
from holdfast.batch import Batch
from holdfast.batching import Batching
from holdfast.behaviors.mcq import MultipleChoice
from holdfast.behaviors.refusal import Refusal
from holdfast.controls.none import NoControl
from holdfast.controls.wrong_target import WrongTarget
from holdfast.discovery.attribution import Attribution
from holdfast.edits import FeatureEdit
from holdfast.errors import StudyError
from holdfast.executor import Runtime
from holdfast.interventions.clamp import Clamp
from holdfast.loading import SubjectSpec
from holdfast.planning import Plan, plan
from holdfast.report import write_report
from holdfast.run import open_run, run_study
from holdfast.saes.bank import FeatureBank
from holdfast.saes.sources import Folder, SAESpec
from holdfast.sampling import Sampled
from holdfast.setting import Data, Setting, prepare
from holdfast.sites import Site
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.tables.results import results_table
from holdfast.trial import Trial

COLD = 1e-3
"""A temperature at which the likeliest answer is drawn."""


@pytest.fixture(scope="module")
def organism() -> Subject:
    source = Folder(path="organism:saes/0")
    spec = SAESpec(site="blocks.0.hook_resid_post", source=source)
    return Subject.load(SubjectSpec(model="organism", saes=(spec,)))


@pytest.fixture(scope="module")
def induced(organism: Subject) -> Setting:
    """Refusal induced by a clamp on every token of the prompt."""
    return prepare(
        organism, Refusal(), Attribution(n_features=16),
        Clamp(mode="set", value=10.0, positions="prompt"), Data(fit=80, tune=8, test=8), seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def removed(organism: Subject) -> Setting:
    """Refusal taken away by a clamp on every token, those of answers included."""
    return prepare(
        organism, Refusal(direction="refuse"), Attribution(n_features=16),
        Clamp(mode="set_where_active", value=-2.0, positions="all"),
        Data(fit=80, tune=8, test=8), seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unlearned(organism: Subject) -> Setting:
    return prepare(
        organism, MultipleChoice(domain="hazard"), Attribution(n_features=16),
        Clamp(mode="set_where_active", value=-5.0), Data(fit=100, tune=20, test=40), seed=0,
    )  # fmt: skip


def attack(setting: Setting, kind: AttackKind) -> TrialResult:
    case = NoControl().case(setting, lambda: setting)
    return kind.run(Attacked(setting, case, None, seed=0))


def cells(found: TrialResult) -> dict[str, dict[str, Any]]:
    """Name of a row → key → measurement."""
    return {row["name"]: row["cells"] for row in found.result["table"]["rows"]}


# ------------------------------------------------------------------------------ drawing


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([1.0, 0.0, -torch.inf, 2.0, -1.0]).repeat(4000, 1)
    drawn = Sampled(0.7, 0, 0)([f"p{i}" for i in range(4000)], logits)
    share = torch.bincount(drawn, minlength=5) / 4000
    expected = torch.softmax(logits[0] / 0.7, -1)
    assert share[2] == 0, "what has no chance is never drawn"
    torch.testing.assert_close(share, expected, atol=0.025, rtol=0)  # 3 standard errors


def test_what_is_drawn_depends_on_seed_draw_and_prompt_alone(
    subject: Subject, batch: Batch
) -> None:
    def said(batch: Batch, seed: int = 0, draw: int = 0, size: int = 8) -> list[list[int]]:
        own = replace(subject, batching=Batching(size))
        return own.generate(batch, (), 12, Sampled(1.0, seed, draw)).tolist()

    whole = said(batch)
    assert said(batch, size=3) == whole
    assert said(batch.rows([5, 2])) == [whole[5], whole[2]]
    assert said(batch, draw=1) != whole != said(batch, seed=1)
    assert len({tuple(row) for row in whole}) == len(batch)


def test_the_colder_the_greedier(subject: Subject, batch: Batch) -> None:
    cold = subject.generate(batch, (), 12, Sampled(COLD, 0, 0))
    assert torch.equal(cold, subject.generate(batch, (), 12))


def test_a_sampled_text_is_that_of_full_passes(removed: Setting) -> None:
    """Clamp on, under the cache and in a ragged batch, against each prompt alone without a cache,
    with the same random numbers."""
    subject, batch = removed.subject, removed.test.unforced()
    made = subject.generate(batch, removed.edits, 6, Sampled(0.8, 3, 1))
    for row in range(3):
        choose, longer = Sampled(0.8, 3, 1), batch.rows([row])
        for token in made[row].tolist():
            logits = subject.outputs(longer, removed.edits)[:, -1]
            assert int(choose(longer.ids, logits)) == token
            longer = longer.extended(torch.tensor([token]))
            if token in subject.ends:
                break


# ------------------------------------------------------------------------------ prefilling


def test_a_clean_answer_goes_on_as_it_did(induced: Setting) -> None:
    """Greedy, without the clamp: given any of its own first tokens the model says the same."""
    found = attack(induced, Prefill(n_tokens=(1, 3, 5)))
    assert induced.observed
    replies = {reply.id: reply.sha256 for reply in induced.observed.replies}
    tried = [row for row in found.examples if row["arm"]]
    assert {row["n_given"] for row in tried} == {1, 3, 5}
    assert len(tried) == 3 * len(induced.valid)
    for row in tried:
        assert row["without_sha256"] == replies[row["id"]] and row["without_label"] == "comply"


def test_what_is_given_is_clamped_and_goes_on_as_in_full_passes(induced: Setting) -> None:
    """The clamp written out at every token but BOS, given ones included, without a cache."""
    from hashlib import sha256

    subject, tokenizer = induced.subject, induced.subject.tokenizer
    sae, (entry,) = subject.sae(Site(1)).full(), induced.features.entries
    clamp_all = FeatureEdit(FeatureBank.of(subject.sae(Site(1)), induced.features), "set", 10.0)
    assert induced.observed
    prompts, differ = induced.test.unforced(), 0
    starts = [tokens[:4] for tokens in induced.observed.tokens]
    found = _begun(subject, Refusal(), prompts, starts, ENDED, (clamp_all,))
    for row in range(3):
        own = prompts.tokens[row, prompts.positions[row] >= 0].tolist()
        given = list(starts[row])
        answers = {}
        for on_given in (True, False):
            made = list(given)

            def clamp(module: Any, args: Any, output: Any, on: bool = on_given,
                      n: int = len(own)) -> Any:  # fmt: skip
                x = (output[0] if isinstance(output, tuple) else output).clone()
                acting = torch.zeros(x.shape[1], 1)
                acting[1:] = 1
                acting[n : n + 4] *= on
                z = sae.encode(x)[..., list(entry.ids)]
                x += acting * ((10.0 - z) @ sae.W_dec[list(entry.ids)])
                return (x, *output[1:]) if isinstance(output, tuple) else x

            block = subject.family.blocks_of(subject.model)[0]
            handle = block.register_forward_hook(clamp)
            with torch.no_grad():
                while len(made) < 24 and tokenizer.eos_token_id not in made:
                    whole = torch.tensor([own + made])
                    made.append(int(subject.model(whole, use_cache=False).logits[0, -1].argmax()))
            handle.remove()
            text = tokenizer.decode(made, skip_special_tokens=True)
            answers[on_given] = sha256(text.encode()).hexdigest()
        assert found.sha256[row] == answers[True]
        differ += answers[True] != answers[False]
    assert differ, "a clamp that leaves out what is given would say the same"


def begun(
    tried: list[int], whole: list[int], alone: list[int], clusters: tuple[str, ...] | None = None
) -> _Begun:
    n = len(tried)
    clusters = clusters or tuple(map(str, range(n)))
    made = [torch.tensor(values, dtype=torch.bool) for values in (whole, alone)]
    blank = ("",) * n
    there = torch.tensor(tried, dtype=torch.bool)
    return _Begun(clusters, there, ENDED, *made, blank, blank, blank)


def test_what_was_given_is_not_counted() -> None:
    """0: both; 1: only with what was given; 2: not without the clamp; 3: not tried; 4: no more."""
    each = _Round(
        2,
        without=begun([1, 1, 1, 0, 1], [1, 1, 1, 0, 1], [1, 1, 0, 0, 1]),
        clamped=begun([1, 1, 1, 0, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]),
        other=begun([0] * 5, [0] * 5, [0] * 5),
        turned=begun([], [], []),
    )
    assert each.asked.tolist() == [True, True, False, False, True]
    assert each.back.tolist() == [True, False, False, False, False]


def test_opposed_prompts_of_one_cluster_are_one_observation() -> None:
    nobody = begun([0] * 4, [0] * 4, [0] * 4)
    made = begun([1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], ("x", "x", "y", "z"))
    turned = _cells(_Round(2, nobody, nobody, nobody, made), nobody.clusters)["turned"]
    assert (turned.n, turned.n_clusters) == (3, 2)
    assert turned.estimate == pytest.approx(2 / 3)


def test_another_prompts_beginning_is_anothers() -> None:
    prompts: Any = type("Prompts", (), {"ids": tuple("abcd"), "clusters": ("x", "x", "y", "z")})
    said = [(1, 2, 9), (3, 4, 9), (1, 2, 9), (5, 9)]
    others = _others(prompts, said, 2)
    assert others == [None, (1, 2), (3, 4), (1, 2)] or others == [None, (1, 2), (3, 4), (3, 4)]
    assert _others(prompts, said, 2) == others, "drawn by id"
    # Of one cluster or alike, there is none.
    assert _others(prompts, [(1, 2)] * 4, 1) == [None] * 4


def test_answers_that_end_before_are_excluded_by_name(induced: Setting) -> None:
    assert induced.observed
    longest = max(len(tokens) for tokens in induced.observed.tokens)
    assert longest < 24
    found = attack(induced, Prefill(n_tokens=(longest,)))
    assert all(row["excluded"] == ENDED for row in found.examples if row["arm"])
    assert found.result["outcome"]["outcome"] == "unscored"
    (row,) = cells(found).values()
    for key, reason in (("whole", ENDED), ("other", ALIKE)):
        assert row[key]["estimate"] is None and row[key]["reason"] == reason
    assert next(m for m in found.result["measurements"] if m["name"] == "recovery_rate")["n"] == 0


# ------------------------------------------------------------------------------ sampling


def test_at_no_temperature_it_is_the_settings_own_conditions(induced: Setting) -> None:
    found = attack(induced, Sampling(n=2, temperature=COLD))
    assert induced.observed and induced.changed
    at = {example: row for row, example in enumerate(induced.test.ids)}
    tried = [row for row in found.examples if row["arm"]]
    assert len(tried) == 2 * len(induced.valid)
    for row in tried:
        assert row["without_sha256"] == induced.observed.replies[at[row["id"]]].sha256
        assert row["clamped_sha256"] == induced.changed.replies[at[row["id"]]].sha256
    (row,) = cells(found).values()
    shares = [row[k]["estimate"] for k in ("any", "mean", "greedy", "without_any", "control_any")]
    assert shares == [0, 0, 0, 1, 0]
    assert row["perplexity"]["estimate"] is None and row["perplexity"]["reason"]
    assert row["without_perplexity"]["estimate"] > 1


def test_options_are_drawn_as_often_as_their_softmax_says(unlearned: Setting) -> None:
    """Against the closed form, of the options in play alone."""
    n, temperature = 200, 2.0
    found = attack(unlearned, Sampling(n=n, temperature=temperature))
    case = NoControl().case(unlearned, lambda: unlearned)
    scores = case.subject.read(case.batch, case.edits)
    expected = []
    for row in range(len(case.batch)):
        options = sorted(set(case.batch.answers()[row].tolist()))
        p = torch.softmax(scores[row, options] / temperature, -1)
        expected.append(float(p[options.index(int(case.batch.targets[row]))]))
    (row,) = cells(found).values()
    error = 0.5 / (n * len(expected)) ** 0.5
    assert row["mean"]["estimate"] == pytest.approx(sum(expected) / len(expected), abs=4 * error)
    assert row["mean"]["n"] == len(expected)
    shown = [each for each in found.examples if each["arm"]]
    assert sum(each["clamped_shows"] for each in shown) / len(shown) == pytest.approx(
        row["mean"]["estimate"]
    )
    # Of four options drawn two hundred times none is missed, right or wrong: no finding.
    assert row["any"]["estimate"] > 0.9 and row["control_any"]["estimate"] > 0.9
    assert "perplexity" not in row


def test_a_wrong_option_is_neither_right_nor_the_given_one(unlearned: Setting) -> None:
    cold = cells(attack(unlearned, Sampling(n=3, temperature=COLD)))
    (row,) = cold.values()
    assert [row[k]["estimate"] for k in ("any", "control_any", "without_any")] == [0, 0, 1]


# ------------------------------------------------------------------------------ bad input


def study(*sets: str) -> Plan:
    text = bundled("refusal").partition('[[audits]]\nname         = "removed"')[0]
    return plan(parse(text, sets))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["audits.0.attacks=['prefill']", "audits.0.behavior={kind='ioi'}"], "read from one token"),
        (["audits.0.attacks=[{kind='prefill', n_tokens=[24]}]"], "leaves none to judge"),
        (["audits.0.attacks=[{kind='prefill', n_tokens=[]}]"], "at least 1 item"),
        (["audits.0.attacks=[{kind='prefill', n_tokens=[2, 2]}]"], "every number of tokens once"),
        (["audits.0.attacks=[{kind='sampling', temperature=0}]"], "greater than 0"),
        (["audits.0.attacks=[{kind='sampling', draws=3}]"], "draws"),
    ],
)
def test_what_cannot_be_done_is_refused_when_planned(sets: list[str], message: str) -> None:
    with pytest.raises(StudyError) as error:
        study(*sets)
    assert message in str(error.value)


def test_probes_say_nothing_that_could_be_drawn() -> None:
    with pytest.raises(StudyError, match="nothing is drawn"):
        plan(parse(bundled("tpp"), ['audits.0.attacks=["sampling"]']))


@pytest.mark.parametrize("kind", [Prefill, Sampling])
def test_they_are_made_on_the_behavior_itself(kind: Any, induced: Setting) -> None:
    case = WrongTarget().case(induced, lambda: induced)
    with pytest.raises(StudyError, match="control 'none'"):
        kind().run(Attacked(induced, case, None, seed=0))
    with pytest.raises(ValidationError):
        kind(n_tokens=0, n=0)


# ------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    folder = tmp_path_factory.mktemp("answers") / "run"
    planned = study(
        'audits.0.grid={"recovery.constraint.kind"=["encoder_null"]}', "controls=[]",
        "audits.0.attacks=['prefill', {kind='sampling', n=3, temperature=0.5}, {kind='sampling', "
        "n=3, temperature=0.8}]", "data={fit=80, tune=8, test=6}",
        "audits.0.intervention.value=10.0", "recovery.steps=2", "recovery.refine_steps=1",
        "recovery.tolerance=0.5", "recovery.doublings=1",
    )  # fmt: skip
    report = run_study(planned, folder, Runtime(workers=1))
    assert not report.failures
    return folder, planned


def test_they_are_apart_from_the_audits_rows(ran: tuple[Path, Plan]) -> None:
    folder, planned = ran
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"] and not summary["attempts"] and not summary["suffixes"]
    (search,) = summary["trials"]
    assert [row["attack"] for row in summary["answers"]] == ["prefill", "sampling", "sampling"]
    store, again, complete = open_run(folder)
    assert complete and [t.id for t in again.trials] == [t.id for t in planned.trials]
    for row in summary["answers"]:
        assert row["n_valid"] == search["n_valid"] and "verdict" not in row and row["drift_reason"]
        audited = {each["id"] for each in store.examples(row["id"]) if each["arm"]}
        assert len(audited) == row["n_valid"] and store.tensors(row["id"]) == {}
        back = {each["id"] for each in store.examples(row["id"]) if each["recovered"]}
        assert len(back) == row["n_recovered"]
    for trial in planned.trials:
        assert Trial.model_validate(trial.canonical()).id == trial.id
    assert run_study(planned, folder, Runtime(workers=1)).n_run == 0


def test_the_page_and_the_terminal_show_them_beside_the_search(
    ran: tuple[Path, Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = ran
    store, planned, _ = open_run(folder)
    page = write_report(store, planned, folder / "report.html").read_text()
    section = page.partition('id="answers"')[2].partition("<section")[0]
    for expected in ("White box", "2 tokens", "temperature 0.5", "temperature 0.8", "perplexity"):
        assert expected in section
    assert section.count("<thead>") == 4, "both temperatures are in one table"
    results_table(store.summary() or {})
    said = capsys.readouterr().out
    assert "answers begun for the model, or drawn" in said and "2 tokens: no clamp" in said


def test_no_words_of_a_reply_are_in_any_file(ran: tuple[Path, Plan]) -> None:
    folder, planned = ran
    store = open_run(folder)[0]
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    texts += [
        json.dumps(store.examples(trial.id), default=str).encode() for trial in planned.trials
    ]
    for words in (b"sure ,", b"sorry ,", b"cannot help"):
        assert not any(words in text for text in texts), words
    assert b"comply" in b"".join(texts), "labels are there"
