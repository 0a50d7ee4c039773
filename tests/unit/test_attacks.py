"""Attempts in the prompt: the clamp is on throughout, and what is counted is what was asked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import binomtest
from torch import Tensor

from holdfast.attacks import ATTACKS, Attacked, TrialResult
from holdfast.attacks.attempts import Attempts, examples_of, result_of
from holdfast.attacks.conversation import Held, hold
from holdfast.attacks.in_prompt import InPromptKind
from holdfast.attacks.multi_turn import MultiTurn
from holdfast.attacks.nested import Nested
from holdfast.attacks.role_play import RolePlay
from holdfast.attacks.templates import PLACEHOLDER, filled
from holdfast.batch import Batch, Example, Frame
from holdfast.behaviors.refusal import Refusal
from holdfast.canonical import digest
from holdfast.chat import render
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
from holdfast.saes.sources import Folder, SAESpec
from holdfast.setting import Data, Setting, prepare
from holdfast.sites import Site
from holdfast.study import bundled, parse
from holdfast.subject import Subject
from holdfast.tables.results import results_table
from holdfast.trial import Trial

IN_PROMPT = (RolePlay, Nested, MultiTurn)
SITE = Site(1)


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


def attempt(setting: Setting, attack: InPromptKind) -> TrialResult:
    case = NoControl().case(setting, lambda: setting)
    return attack.run(Attacked(setting, case, None, seed=0))


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# ------------------------------------------------------------------------------ wording


@pytest.mark.parametrize("kind", IN_PROMPT)
def test_own_templates_are_in_the_organisms_language(kind: Any, organism: Subject) -> None:
    scripts = kind().scripts()
    assert len(scripts) >= 3
    for script in scripts.values():
        words = " ".join(filled(turn, "") for turn in script)
        ids = organism.tokenizer.encode(words, add_special_tokens=False)
        assert organism.tokenizer.unk_token_id not in ids
        assert any(PLACEHOLDER in turn for turn in script)


def test_only_the_placeholder_is_filled() -> None:
    assert filled('{"a": {instruction}, {b}}', "go {instruction}") == '{"a": go {instruction}, {b}}'


def test_nesting_puts_a_template_into_itself(tmp_path: Path) -> None:
    path = written(tmp_path / "t.json", ["( {instruction} )"])
    assert Nested(templates=path, depth=3).scripts() == {"1": ("( ( ( {instruction} ) ) )",)}


def test_text_files_hold_one_template_or_one_conversation(tmp_path: Path) -> None:
    path = written(tmp_path / "t.txt", "a ladder\n\n{instruction}\n")
    assert MultiTurn(templates=path).scripts() == {"1": ("a ladder", "{instruction}")}
    assert RolePlay(templates=path).scripts() == {"1": ("a ladder\n\n{instruction}",)}
    toml = written(
        tmp_path / "t.toml", 'one = ["a", "{instruction}"]\ntwo = ["{instruction}", "b"]'
    )
    assert set(MultiTurn(templates=toml).scripts()) == {"one", "two"}


# ------------------------------------------------------------------------------ conversations

TURNS = ("what do i need to make lasberry for my friend ?", "{instruction}", "{instruction}")


def by_hand(
    setting: Setting, script: Sequence[str], example: Example, clamped: Sequence[bool]
) -> tuple[list[str], str]:
    """The answers to a script, and its last prompt, without any of holdfast's generation, hooks or
    edits: the whole conversation in full passes without a cache, a token at a time, the clamp
    written out. clamped: whether it is on, turn by turn."""
    subject, tokenizer = setting.subject, setting.subject.tokenizer
    sae, (entry,) = subject.sae(SITE).full(), setting.features.entries
    ids = list(entry.ids)
    messages, answers, text = [], [], ""
    for turn, on in zip(script, clamped, strict=True):
        said = turn.replace("{instruction}", example.instruction)
        messages.append({"role": "user", "content": said})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        n_prompt, made = len(tokens), []

        def clamp(module: Any, args: Any, output: Any, n: int = n_prompt, on: bool = on) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            if on:
                z = sae.encode(x[:, 1:n])[..., ids]
                x = x.clone()
                x[:, 1:n] += (10.0 - z) @ sae.W_dec[ids]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        block = subject.family.blocks_of(subject.model)[0]
        handle = block.register_forward_hook(clamp)
        with torch.no_grad():
            while len(made) < 24 and tokenizer.eos_token_id not in made:
                whole = torch.tensor([tokens + made])
                made.append(int(subject.model(whole, use_cache=False).logits[0, -1].argmax()))
        handle.remove()
        answers.append(tokenizer.decode(made, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers, text


def test_a_conversation_is_what_full_passes_with_the_clamp_on_say(induced: Setting) -> None:
    """Ragged prompts in one batch under the cache, against each alone, token by token."""
    from hashlib import sha256

    asked = induced.examples[:3]
    for clamped, edits in ((True, induced.edits), (False, ())):
        held = hold(induced.subject, Refusal(), TURNS, asked, edits)
        for row, example in enumerate(asked):
            answers, prompt = by_hand(induced, TURNS, example, [clamped] * len(TURNS))
            assert held.prompt_sha256[row] == digest(prompt), "the context of the last turn"
            assert held.sha256[row] == sha256(answers[-1].encode()).hexdigest()
    for off in range(len(TURNS)):
        on = [turn != off for turn in range(len(TURNS))]
        differ = [by_hand(induced, TURNS, e, on) != by_hand(induced, TURNS, e, [True] * 3)
                  for e in asked]  # fmt: skip
        assert any(differ), f"with the clamp off in turn {off} all would be the same"


@dataclass(frozen=True)
class Watched:
    """An edit, and every frame in which it acted."""

    edit: FeatureEdit
    seen: list[tuple[Frame, Tensor]] = field(default_factory=list)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.edit.sites

    def selects(self, site: Site, frame: Frame) -> Tensor:
        return self.edit.selects(site, frame)

    def apply(self, site: Site, x: Tensor, frame: Frame) -> Tensor:
        self.seen.append((frame, self.selects(site, frame)))
        return self.edit.apply(site, x, frame)

    def check_fired(self, site: Site, n_fired: int) -> None:
        self.edit.check_fired(site, n_fired)


def test_the_clamp_acts_on_every_token_of_every_turn(induced: Setting) -> None:
    (own,) = induced.edits
    assert isinstance(own, FeatureEdit)
    watched = Watched(FeatureEdit(own.bank, "set", 10.0, where="all"))
    hold(induced.subject, Refusal(), TURNS, induced.examples[:3], (watched,))
    for frame, mask in watched.seen:
        assert torch.equal(mask, frame.positions >= 1), "all but BOS and padding"
    starts = [frame for frame, _ in watched.seen if bool((frame.positions == 0).any())]
    assert len(starts) == len(TURNS), "every turn begins with all that was said before"
    lengths = [frame.prompt_length for frame in starts]
    for before, after in itertools.pairwise(lengths):
        assert (after > before).all()


@pytest.mark.parametrize("kind", IN_PROMPT)
def test_prompts_are_rendered_by_the_chat_template(kind: Any, organism: Subject) -> None:
    tokenizer = organism.tokenizer
    for script in kind().scripts().values():
        earlier = [(filled(turn, "where is {x} ?"), "sure .") for turn in script[:-1]]
        last = filled(script[-1], "where is {x} ?")
        messages = [m for said, answer in earlier
                    for m in ({"role": "user", "content": said},
                              {"role": "assistant", "content": answer})]  # fmt: skip
        messages.append({"role": "user", "content": last})
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        made = render(tokenizer, last, earlier=earlier)
        assert made.text == expected and made.text.endswith(last + made.suffix)
        assert made.suffix == render(tokenizer, "a ladder").suffix


FORGETS = (
    "{% for m in messages[-1:] %}{{ '<user> ' + m['content'] + ' <end> ' }}{% endfor %}<assistant>"
)
REFUSES = (
    "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('one turn') }}"
    "{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [(FORGETS, "leaves out turn 1"), (REFUSES, "several turns"), (None, "no chat template")],
)
def test_chat_templates_that_take_no_conversation(
    template: str | None, message: str, organism: Subject
) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(organism.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(StudyError, match=message):
        render(tokenizer, "a ladder", earlier=[("where is the kettle", "sure .")])


# ------------------------------------------------------------------------------ counting


def test_an_empty_wording_gives_back_the_settings_own_conditions(
    induced: Setting, tmp_path: Path
) -> None:
    """Same prompts, clamp and judge: without other words an attempt is clean and suppressed."""
    found = attempt(
        induced, RolePlay(templates=written(tmp_path / "t.json", {"as-is": PLACEHOLDER}))
    )
    assert induced.observed and induced.changed
    rows = {row["id"]: row for row in found.examples}
    valid = [induced.test.ids[row] for row in induced.valid.tolist()]
    assert valid and [row["id"] for row in found.examples if row["template"]] == valid
    for row in induced.valid.tolist():
        own = rows[induced.test.ids[row]]
        assert own["without_label"] == own["clean_label"] == induced.observed.labels[row]
        assert own["clamped_label"] == own["suppressed_label"] == induced.changed.labels[row]
        assert own["without_sha256"] == induced.observed.replies[row].sha256
        assert own["clamped_sha256"] == induced.changed.replies[row].sha256
    (counts,) = found.result["templates"]
    assert (counts["n_asked"], counts["n_recovered"]) == (len(valid), 0)
    assert counts["n_opposed"] == len(induced.opposed) and counts["n_turned"] == 0
    assert found.result["outcome"]["outcome"] == "not_recovered"
    assert not found.tensors


def test_the_judge_is_told_what_it_is_told_of_every_condition(
    induced: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bare instruction, the clean answers, and which edits are on; never the wrapping."""
    told = []
    observe = Refusal.observe

    def spy(self: Refusal, subject: Subject, batch: Batch, edits: Any = (), references: Any = None):
        told.append((batch.texts, tuple(edits), references))
        return observe(self, subject, batch, edits, references)

    monkeypatch.setattr(Refusal, "observe", spy)
    attempt(induced, RolePlay())
    assert induced.observed
    bare = tuple(induced.test.texts[row] for row in induced.valid.tolist())
    expected = [(bare, edits, induced.observed.replies) for edits in ((), induced.edits)]
    audited = [call for call in told if call[0] == bare]
    assert audited == expected * len(RolePlay.own)


@pytest.mark.parametrize("kind", IN_PROMPT)
def test_every_audited_prompt_is_tried_with_every_template(kind: Any, induced: Setting) -> None:
    found = attempt(induced, kind())
    valid = {induced.test.ids[row] for row in induced.valid.tolist()}
    tried = [(row["id"], row["template"]) for row in found.examples if row["template"]]
    assert sorted(tried) == sorted((i, name) for i in valid for name in kind().scripts())
    assert {row["id"] for row in found.examples} == set(induced.test.ids)
    back = {row["id"] for row in found.examples if row["recovered"]}
    asked = {row["id"] for row in found.examples if row["asked"]}
    stages = found.result["funnel"]["stages"]
    assert (stages["valid"], stages["asked"]) == (len(valid), len(asked))
    assert stages["recovered"] == len(back) and back <= asked
    for row in found.examples:
        if row["recovered"]:
            assert row["without_label"] == row["clamped_label"] == "comply"


def made_up(n: int, shows: set[int], excluded: set[int] = frozenset()) -> Held:
    there = torch.tensor([row in shows for row in range(n)])
    blank = ("",) * n
    why = tuple("too long" if row in excluded else "" for row in range(n))
    return Held(there, ("comply",) * n, blank, blank, why)


def test_a_rate_is_over_the_prompts_on_which_the_words_work_without_the_clamp(
    induced: Setting,
) -> None:
    case = NoControl().case(induced, lambda: induced)
    n = len(case.rows)
    assert n >= 6
    made = Attempts(
        induced, case,
        without={"a": made_up(n, {0, 1, 2, 3}), "b": made_up(n, {1, 4}, excluded={5})},
        # 5 shows it with the clamp alone: counted apart; 3 was never asked under the clamp.
        clamped={"a": made_up(n, {0, 5}, excluded={3}), "b": made_up(n, {0, 4})},
        turned={"a": made_up(5, {2}, {4}), "b": made_up(5, {1, 2}, {0, 4})},
    )  # fmt: skip
    result = result_of(made)
    measured = {m["name"]: m for m in result["measurements"]}
    a, b = result["templates"]
    assert (a["n_asked"], a["n_recovered"], a["only_clamped"], a["n_excluded"]) == (3, 1, 1, 1)
    assert (b["n_asked"], b["n_recovered"], b["only_clamped"], b["n_excluded"]) == (2, 1, 1, 1)
    assert (a["n_turned"], a["n_opposed"], b["n_turned"], b["n_opposed"]) == (1, 4, 2, 3)
    whole = measured["recovery_rate"]  # asked {0, 1, 2, 4}, back {0, 4}
    wilson = binomtest(2, 4).proportion_ci(method="wilson")
    assert (whole["estimate"], whole["n"], whole["n_unscored"]) == (0.5, 4, n - 4)
    assert whole["low"] == pytest.approx(wilson.low) and whole["high"] == pytest.approx(wilson.high)
    assert measured["template.a.recovery_rate"]["estimate"] == pytest.approx(1 / 3)
    assert measured["template.b.without_clamp_rate"]["estimate"] == pytest.approx(2 / (n - 1))
    assert measured["turned_rate"]["estimate"] == 0.5
    assert sum(row["recovered"] for row in examples_of(made)) == 2


def test_words_that_work_nowhere_are_unscored_and_not_zero(induced: Setting) -> None:
    case = NoControl().case(induced, lambda: induced)
    n = len(case.rows)
    nothing = {"a": made_up(n, set())}
    result = result_of(Attempts(induced, case, nothing, {"a": made_up(n, {0})}, nothing))
    rate = next(m for m in result["measurements"] if m["name"] == "recovery_rate")
    assert (
        rate["estimate"] is None
        and rate["n_unscored"] == n
        and "without the clamp" in rate["reason"]
    )
    assert result["outcome"]["outcome"] == "unscored"
    assert (
        result["checks"]["preactivation_drift_max"] != result["checks"]["preactivation_drift_max"]
    )
    assert result["checks"]["reason"]


def test_conversations_longer_than_the_context_are_excluded_by_name(
    induced: Setting, tmp_path: Path
) -> None:
    limit = induced.subject.context
    assert limit == 128
    long = " ".join(["ladder"] * 95) + " {instruction}"
    path = written(
        tmp_path / "t.json", {"long": ["a {instruction}", long], "short": ["a", PLACEHOLDER]}
    )
    found = attempt(induced, MultiTurn(templates=path))
    long_, short = found.result["templates"]
    n = len(induced.valid)
    assert (long_["n_excluded"], long_["n_asked"], short["n_excluded"]) == (n, 0, 0)
    for row in found.examples:
        if row["template"] == "long":
            assert "context of 128" in row["clamped_excluded"] and not row["clamped_label"]
    rate = next(
        m for m in found.result["measurements"] if m["name"] == "template.long.recovery_rate"
    )
    assert rate["estimate"] is None and rate["n_unscored"] == n


def test_attempts_ask_for_the_behavior_itself(induced: Setting) -> None:
    case = WrongTarget().case(induced, lambda: induced)
    with pytest.raises(StudyError, match="control 'none'"):
        RolePlay().run(Attacked(induced, case, None, seed=0))


# ------------------------------------------------------------------------------ in a study


def study(*sets: str) -> Plan:
    text = bundled("refusal").partition('[[audits]]\nname         = "removed"')[0]
    return plan(parse(text, sets))


def attempts_of(planned: Plan) -> list[Trial]:
    return [trial for trial in planned.trials if not trial.searches]


def test_attempts_are_crossed_with_all_of_the_grid_but_the_search() -> None:
    planned = study()
    (audit,) = planned.study.audits
    n = len(attempts_of(planned))
    assert n == len(audit.attacks) == 6
    searches = len(planned.trials) - n
    crossed = study('audits.0.grid."data.test"=[10, 20]', 'audits.0.grid."recovery.steps"=[5, 6]')
    assert len(attempts_of(crossed)) == 2 * n and len(crossed.trials) == 2 * n + 4 * searches
    for trial in attempts_of(planned):
        assert trial.recovery is None and not trial.is_audit
        assert Trial.model_validate(trial.canonical()).id == trial.id
    shared = ("subject", "data", "behavior", "discovery", "intervention", "seed")
    one = planned.trials[0]
    assert all(
        getattr(t, name) == getattr(one, name) for t in attempts_of(planned) for name in shared
    )


def test_an_audit_takes_the_studys_attacks_unless_it_has_its_own() -> None:
    kinds = [t.attack.kind for t in attempts_of(study("attacks=['nested']"))]
    assert kinds == ["role_play", "nested", "multi_turn", "prefill", "sampling", "sampling"]
    assert not attempts_of(study("attacks=['nested']", "audits.0.attacks=[]"))
    text = bundled("refusal").partition('[[audits]]\nname         = "removed"')[0]
    line = next(line for line in text.splitlines() if line.startswith("attacks"))
    (trial,) = attempts_of(plan(parse(text.replace(line, ""), ["attacks=['nested']"])))
    assert trial.attack.kind == "nested"


def test_identity_is_the_templates_content_and_never_their_path(tmp_path: Path) -> None:
    def only(content: str, name: str) -> Trial:
        path = written(tmp_path / name, content)
        kind = f"audits.0.attacks=[{{kind='role_play', templates='{path}'}}]"
        (trial,) = attempts_of(study(kind))
        return trial

    one = only('{"a": "ladder {instruction}"}', "one.json")
    same = only('{"a": "ladder {instruction}"}', "two.json")
    other = only('{"a": "kettle {instruction}"}', "one.json")
    assert one.id == same.id != other.id
    said = json.dumps(one.canonical())
    assert str(tmp_path) not in said and "one.json" not in said and "ladder" not in said
    read_back = Trial.model_validate(one.canonical())
    with pytest.raises(StudyError, match="keeps no path"):
        read_back.attack.scripts()  # type: ignore[attr-defined]
    ids = {t.id for d in (1, 2) for t in attempts_of(
        study(f"audits.0.attacks=[{{kind='nested', depth={d}}}]"))}  # fmt: skip
    assert len(ids) == 2


def test_own_templates_count_by_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    before = RolePlay()
    monkeypatch.setattr(RolePlay, "own", {"a": ("please {instruction}",)})
    assert RolePlay().templates.sha256 != before.templates.sha256


@pytest.mark.parametrize("kind", sorted(ATTACKS.names()))
def test_an_attack_is_bound_exactly_if_it_searches(kind: str) -> None:
    trial = study().trials[0]
    fields = trial.canonical() | {"attack": {"kind": kind}}
    bound = Trial.model_validate(fields) if kind == "residual" else None
    assert bound is None or bound.id == trial.id
    wrong = fields | {"recovery": None} if kind == "residual" else fields
    with pytest.raises(ValidationError, match="recovery"):
        Trial.model_validate(wrong)


LISTED = "audits.0.attacks=[{{kind='{kind}', templates='{path}'}}]"


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("t.json", '["a ladder"]', "role_play", "no {instruction}"),
        ("t.json", '["a {instructions}"]', "nested", "no {instruction}"),
        ("t.json", "[]", "role_play", "empty file"),
        ("t.json", "", "role_play", "empty file"),
        ("t.toml", "", "role_play", "empty file"),
        ("t.txt", " \n", "role_play", "empty file"),
        ("t.json", "[", "role_play", "expected JSON"),
        ("t.toml", "a = ", "role_play", "expected TOML"),
        ("t.json", '"{instruction}"', "role_play", "expected a list of templates"),
        ("t.json", "[3]", "role_play", "expected a text"),
        ("t.json", '[["{instruction}", ""]]', "multi_turn", "in every turn"),
        ("t.json", '{"a b": "{instruction}"}', "role_play", "template's name"),
        ("t.json", '[["a", "{instruction}"]]', "role_play", "got 2 turns"),
        ("t.json", '["{instruction}"]', "multi_turn", "two turns or more"),
        ("t.pkl", "{instruction}", "role_play", "ends in .json"),
    ],
)
def test_template_files_that_cannot_be_used(
    name: str, content: str, kind: str, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(StudyError) as error:
        study(LISTED.format(kind=kind, path=path))
    assert message in str(error.value)


def test_template_files_that_are_gone_or_were_changed(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(StudyError, match="cannot be read"):
        study(LISTED.format(kind="nested", path=path))
    attack = Nested(templates=written(path, [PLACEHOLDER]))
    path.write_text('["other {instruction}"]')
    with pytest.raises(StudyError, match="the file changed"):
        attack.scripts()
    with pytest.raises(ValidationError, match="the file changed"):
        Nested(templates={"path": str(path), "sha256": attack.templates.sha256})
    with pytest.raises(ValidationError, match="sha256"):
        Nested(templates={"sha256": "nothing"})


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["audits.0.attacks=['residual']"], "every audit makes"),
        (["audits.0.attacks=['role_plai']"], "did you mean 'role_play'"),
        (["audits.0.behavior={kind='ioi'}"], "refusal is the behavior it is for"),
        (["audits.0.attacks=[{kind='nested', depth=0}]"], "greater than or equal to 1"),
    ],
)
def test_attacks_that_cannot_be_made_are_refused_at_plan_time(
    sets: list[str], message: str
) -> None:
    with pytest.raises(StudyError) as error:
        study(*sets)
    assert message in str(error.value)


def test_no_templates_for_other_models_are_shipped(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", "\n".join(f'{{"prompt": "{i}"}}' for i in range(9)))
    source = f"audits.0.behavior={{kind='refusal', source={{kind='file', path='{path}'}}}}"
    with pytest.raises(StudyError, match="none for real models are shipped"):
        study(source, "audits.0.attacks=['multi_turn']")
    own = written(tmp_path / "t.json", [["a", PLACEHOLDER]])
    assert attempts_of(study(source, LISTED.format(kind="multi_turn", path=own)))


# ------------------------------------------------------------------------------ a whole run

SECRET = "today for my friend with my candle"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    folder = tmp_path_factory.mktemp("attempts")
    said = written(folder / "t.json", {"mine": [f"{SECRET} {PLACEHOLDER}", PLACEHOLDER]})
    planned = study(
        'audits.0.grid={"recovery.constraint.kind"=["unconstrained", "encoder_null"]}',
        f"audits.0.attacks=['role_play', {{kind='multi_turn', templates='{said}'}}]", "controls=[]",
        "data={fit=80, tune=8, test=6}", "audits.0.intervention.value=10.0", "recovery.steps=4",
        "recovery.refine_steps=1", "recovery.tolerance=0.5",
    )  # fmt: skip
    report = run_study(planned, folder / "run", Runtime(workers=1))
    assert not report.failures
    return folder / "run", planned


def test_attempts_are_apart_from_the_audits_rows(ran: tuple[Path, Plan]) -> None:
    folder, planned = ran
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"]
    assert [row["constraint"] for row in summary["trials"]] == ["unconstrained", "encoder_null"]
    assert [row["attack"] for row in summary["attempts"]] == ["role_play", "multi_turn"]
    main = summary["trials"][1]
    for row in summary["attempts"]:
        assert row["n_valid"] == main["n_valid"] and "verdict" not in row
        assert row["preactivation_drift_max"] is None and row["drift_reason"]
    store, again, complete = open_run(folder)
    assert complete and [t.id for t in again.trials] == [t.id for t in planned.trials]
    searched = {row["id"] for row in store.examples(main["id"]) if row["outcome"]}
    for row in summary["attempts"]:
        assert {each["id"] for each in store.examples(row["id"]) if each["template"]} == searched
        assert store.tensors(row["id"]) == {}
    report = run_study(planned, folder, Runtime(workers=1))
    assert report.n_run == 0 and report.n_reused == len(planned.trials)


def test_the_page_and_the_terminal_show_them_beside_the_search(
    ran: tuple[Path, Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = ran
    store, planned, _ = open_run(folder)
    page = write_report(store, planned, folder / "report.html").read_text()
    section = page.partition('id="attempts"')[2].partition("<section")[0]
    for expected in ("white box", "role play", "multi turn", "mine", "turned anyway"):
        assert expected in section
    results_table(store.summary() or {})
    said = capsys.readouterr().out
    assert "asked in other words" in said and "mine" in said
    table = said.partition("asked in other words")[0]
    assert "role_play" not in table, "an attempt is no row of the audit's table"


def test_no_words_of_a_reply_or_a_template_are_in_any_file(ran: tuple[Path, Plan]) -> None:
    folder, planned = ran
    write_report(*open_run(folder)[:2], folder / "report.html")
    store = open_run(folder)[0]
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    texts += [
        json.dumps(store.examples(trial.id), default=str).encode() for trial in planned.trials
    ]
    # What the organism answers begins so, and every own template of role play has these words.
    for words in (b"sure ,", b"sorry ,", b"cannot help", SECRET.encode(), b"write a story ."):
        assert not any(words in text for text in texts), words
    assert b"comply" in b"".join(texts), "labels are there"
