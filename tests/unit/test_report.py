"""The report is one file that asks for nothing, escapes everything, and says what is missing."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.canonical import SCHEMA
from holdfast.constraints.jacobian_null import JacobianNull
from holdfast.errors import EmptyValidSetError
from holdfast.finding import Finding
from holdfast.planning import Plan
from holdfast.report import drift, norms, write_picture, write_report
from holdfast.report.data import gather
from holdfast.report.figures import script_safe
from holdfast.report.known_answer import findings
from holdfast.store import RunFolder
from holdfast.study import Study
from holdfast.summary import name_of
from holdfast.trial import SAEIdentity, SubjectIdentity, Trial
from holdfast.undone import ARMS, FORCED, LEADS, WHOLE

SITE = "blocks.1.hook_resid_post"
CONSTRAINTS = ("unconstrained", "gradient_projection", "encoder_null")
CONTROLS = ("none", "wrong_target", "no_clamp", "ignorant")
DRIFT = {"unconstrained": 0.1, "gradient_projection": 0.03, "encoder_null": 1e-8}
HOSTILE = "<script>alert(1)</script>"


@dataclass(frozen=True)
class Fake:
    """An audit to make up. norms: control → typical smallest norm, None for never reached."""

    norms: dict[str, float | None]
    known: str | None = None
    constraints: tuple[str, ...] = CONSTRAINTS
    neighbors: bool = False


FAKES = {
    "ioi": Fake({"none": 0.12, "wrong_target": 0.31, "no_clamp": 0.36, "ignorant": 0.33}),
    "mcq": Fake(
        {"none": 0.19, "wrong_target": 0.2, "no_clamp": 0.34, "ignorant": None}, neighbors=True
    ),
    "bottleneck": Fake({"none": None, "wrong_target": None}, "holds"),
    "second_route": Fake({"none": 0.1, "wrong_target": 0.3}, "does_not_hold"),
}


def make_trial(audit: str, constraint: str, control: str) -> Trial:
    def subject(name: str) -> SubjectIdentity:
        sae = SAEIdentity(site=SITE, sha256="5" * 64)
        return SubjectIdentity(
            name=name, weights_sha256="a" * 64, dtype="float32", attention="sdpa", saes=(sae,)
        )

    return Trial(
        audit=audit,
        seed=0,
        subject=subject("organism"),
        twin=subject("organism-ignorant") if control == "ignorant" else None,
        data={"fit": 40, "test": 60},
        behavior={"kind": "ioi"},
        discovery={"kind": "given", "features": [{"site": SITE, "ids": [3, 5]}]},
        intervention={"kind": "clamp", "value": [-2.0, -5.0]},
        recovery={"constraint": {"kind": constraint}, "budget": {"relative": 0.5}},
        control={"kind": control},
    )


def make_study(fakes: dict[str, Fake]) -> Study:
    names = [name if re.fullmatch(r"\w+", name) else "hostile" for name in fakes]
    audits = [
        {
            "name": name,
            "known_answer": fake.known,
            "behavior": {"kind": "ioi"},
            "discovery": {"kind": "given", "features": [{"site": SITE, "ids": [3, 5]}]},
            "intervention": {"kind": "clamp", "value": [-2.0, -5.0]},
        }
        for name, fake in zip(names, fakes.values(), strict=True)
    ]
    source = {"kind": "folder", "path": "organism:saes/1"}
    study = {
        "schema": 1,
        "name": "made-up",
        "subject": {"model": "organism", "saes": [{"site": SITE, "source": source}]},
        "recovery": {"constraint": {"kind": "encoder_null"}, "budget": {"relative": 0.5}},
        "audits": audits,
        "grid": {"recovery.constraint.kind": list(CONSTRAINTS)},
    }
    return Study.model_validate(study)


def measurement(name: str, estimate: float | None, n: int, width: float = 0.05) -> dict[str, Any]:
    low, high = (None, None) if estimate is None else (estimate - width, estimate + width)
    if name.startswith(("recovery", "neighbor")) and estimate is not None:
        low, high = max(estimate - width, 0.0), min(estimate + width, 1.0)
    return {
        "name": name, "unit": "share", "estimate": estimate, "low": low, "high": high,
        "method": "made up", "n": n, "n_unscored": 0, "n_clusters": n, "reason": "",
    }  # fmt: skip


def make_rows(
    n: int, typical: float | None, drift: float, rng: random.Random, prefix: str
) -> list[dict[str, Any]]:
    """The last five of n prompts are not audited; every ninth never reaches its goal."""
    rows = []
    for i in range(n):
        audited = i < n - 5
        norm = math.nan
        if audited and typical is not None and i % 9 != 8:
            norm = min(typical * math.exp(rng.gauss(0, 0.35)), 0.5)
        rows.append(
            {
                "id": f"{prefix}{i}",
                "cluster": f"c{i}",
                "group": "*",
                "text_sha256": f"{i:064x}",
                "dataset": "",
                "row": None,
                "prompt_sha256": f"{i:064x}",
                "template_sha256": "",
                "tokens_sha256": f"{i:064x}",
                "clean": i < n - 1,
                "valid": audited,
                "clean_label": "",
                "suppressed_label": "",
                "clean_margin": 4.0 + rng.random(),
                "suppressed_margin": -1.0 - rng.random(),
                "dropped": "" if audited else "the intervention does not suppress it",
                "outcome": ("not_recovered" if typical is None else "recovered") if audited else "",
                "recovered": audited and typical is not None,
                "margin": math.nan if not audited else -0.5 if typical is None else 2.0,
                "smallest_norm_relative": norm,
                "preactivation_drift": drift * math.exp(rng.gauss(-0.7, 0.4))
                if audited
                else math.nan,
            }
        )
    return rows


def make_record(
    trial: Trial, fake: Fake, typical: float | None, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    audited = [row for row in rows if row["outcome"]]
    n, recovered = len(audited), sum(row["recovered"] for row in audited)
    drifts = sorted(row["preactivation_drift"] for row in audited)
    measurements = [
        measurement("recovery_rate", recovered / n, n),
        measurement("smallest_norm_relative", typical, n, 0.02),
        measurement("preactivation_drift", drifts[len(drifts) // 2], n, 0.0),
        measurement("reactivated_within_eligible", 0.0625, n, 0.01),
        measurement("zero_reactivation_rate", 0.5 * recovered / n, n),
        measurement("none_reactivated_rate", recovered / n, n),
        measurement("lane_steps", 151.5, n, 4.0),
    ]
    for name in (WHOLE, *ARMS):
        alone = name.endswith(".alone")
        measurements += [
            measurement(f"undo.{name}.rate", 0.1875 if alone else 0.9375, recovered),
            measurement(f"undo.{name}.margin", -1.5 if alone else 2.25, recovered, 0.5),
        ]
    if trial.control.kind == "none":
        measurements.append(measurement("gain_unclamped", 0.125, n, 0.0625))
    if fake.neighbors:
        measurements += [
            measurement("neighbor.music.clean", 0.98, 80),
            measurement("neighbor.music.suppressed", 0.91, 80),
        ]
    counts = dict.fromkeys(
        ("recovered", "not_recovered", "undecided", "infeasible", "diverged"), 0
    ) | {"recovered": recovered, "not_recovered": n - recovered}
    n_clean = sum(row["clean"] for row in rows)
    stages = {"tried": len(rows), "clean": n_clean, "suppressed": n, "valid": n}
    constraint = trial.recovery.constraint.kind
    return {
        "schema": SCHEMA,
        "id": trial.id,
        "trial": trial.canonical(),
        "result": {
            "funnel": {
                "stages": stages | {"recovered": recovered},
                "dropped": {"the intervention does not suppress it": 5},
                "splits": {"fit": 40, "tune": 20, "test": len(rows)},
            },
            "outcome": {"outcome": "recovered", "sentence": "made up", "counts": counts},
            "measurements": measurements,
            "checks": {
                "preactivation_drift_max": drifts[-1],
                "preactivation_drift_max_absolute": 10 * drifts[-1],
                "drift_relative_mean": math.nan if constraint == "encoder_null" else 0.4,
                "drift_relative_max": math.nan if constraint == "encoder_null" else 3.2,
                "drift_absolute_max": 0.1,
                "n_drift_undefined": 2,
                "drift_assigned_mean": math.nan,
                "clamp_mismatch_mean": math.nan,
                "firings_kept_mean": math.nan,
                "displacement_mean": 1.0,
                "n_slots": 2 * n,
                "n_eligible": 2 * n - 3,
                "n_reactivated": 5,
                "reactivated_of_all": 5 / (2 * n),
                "reactivated_within_eligible": 5 / (2 * n - 3),
                "reactivated_mass_mean": 0.0375,
                "decode_drift_mean": 0.52,
                "undo_cosine_mean": 0.21,
                "decoder_share_mean": 0.08,
                "gate_flips": 0 if constraint == "encoder_null" else 17,
                "norm_relative_max": 0.5,
                "budget_relative": 0.5,
                "null_dimension": 112,
                "replay_error": 2e-6,
            },
            "undo": {
                "n": recovered,
                "read": FORCED if trial.audit == "mcq" else LEADS,
                "reason": "" if recovered else "no prompt was recovered",
            },
            "features": {
                "entries": [
                    {"site": SITE, "group": "*", "ids": [3, 5], "scores": [0.02, 0.001],
                     "median_active": 4.0},
                    {"site": SITE, "group": HOSTILE, "ids": [7], "scores": [],
                     "median_active": None},
                ],
                "source": "given",
            },
            "intervention": trial.canonical()["intervention"] | {"value": -5.0},
            "trace": [
                {"step": step, "n_searching": n, "n_reached": 0, "margin_mean": 0.1 * step,
                 "norm_relative_mean": 0.01 * step,
                 "violation_max": DRIFT[constraint] * (1 - math.exp(-step / 8))}
                for step in range(40)
            ],
        },
        "run": {
            "started": "2026-11-21T08:43:45+00:00", "seconds": 4.2, "device": "cpu", "threads": 1,
            "batch_plan": {"batch_size": 256}, "versions": {"holdfast": "0.1.0", "torch": "2.13"},
            "platform": "Linux x86_64, 2 cores", "weights_sha256": "a" * 64,
            "command": "holdfast demo",
        },
    }  # fmt: skip


def make_findings(audit: str) -> list[Finding]:
    """Three checks, all passed."""
    where = f"{audit} on organism"
    return [
        Finding(check=c, passed=True, expected="small", measured="<b>1e-7</b>", where=where)
        for c in ("padding", "cache", f"scale of the SAE at {SITE}")
    ]


def make_run(
    path: Path,
    fakes: dict[str, Fake] = FAKES,
    n: int = 24,
    keep: Callable[[Trial], bool] = lambda trial: True,
    prefix: str = "p/",
    findings: Callable[[Trial], list[Finding] | None] = lambda trial: make_findings(trial.audit),
) -> tuple[RunFolder, Plan]:
    """A finished run of made-up records, or an unfinished one of those that `keep` says."""
    study = make_study(fakes)
    trials = []
    with RunFolder.open(path, study.canonical(), None) as store:
        for audit, fake in fakes.items():
            for constraint in fake.constraints:
                for control in CONTROLS:
                    if control not in fake.norms:
                        continue
                    trial = make_trial(audit, constraint, control)
                    trials.append(trial)
                    if not keep(trial):
                        continue
                    typical = fake.norms[control]
                    if fake.known == "holds" and constraint != "encoder_null":
                        typical = 0.22  # the leak
                    rng = random.Random(f"{audit} {constraint} {control}")
                    rows = make_rows(n, typical, DRIFT[constraint], rng, prefix)
                    record = make_record(trial, fake, typical, rows)
                    if (made := findings(trial)) is not None:
                        record["run"]["preflight"] = [f.model_dump(mode="json") for f in made]
                    store.write(record, {"delta": torch.zeros(1)}, rows)
    return RunFolder.read(path), Plan(study, tuple(trials), {})


def page_of(store: RunFolder, plan: Plan) -> str:
    return write_report(store, plan, store.path / "report.html").read_text()


def own(page: str) -> str:
    """The page without plotly's source."""
    scripts = re.findall(r"<script>.*?</script>", page, re.S)
    longest = max(scripts, key=len)
    assert len(longest) > 1_000_000
    return page.replace(longest, "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Plan]:
    return make_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def page(whole: tuple[RunFolder, Plan]) -> str:
    return page_of(*whole)


def test_all_sections_of_a_whole_run(page: str) -> None:
    for id_ in (
        "verdicts", "preflight", "funnel", "norms", "drift", "posthoc", "steps", "known_answer",
        "side_effects", "clamped", "prompts", "limits", "provenance",
    ):  # fmt: skip
        assert page.count(f'<section id="{id_}">') == 1
    text = own(page)
    assert "This run is incomplete" not in text
    for verdict in ("held", "breached", "forcible"):
        assert f'class="card {verdict}"' in text
    assert "wrong target 2 of 19" in text, "prompts never reached are counted in words"


def test_it_asks_for_nothing(page: str) -> None:
    text = own(page)
    assert page.count("plotly.js v") == 1, "plotly is in the page once"
    assert "default-src 'none'" in text
    assert not re.findall(
        r"""(?:src|srcset|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", text
    )
    assert not re.findall(r"""<link|@import|url\(|<iframe|<object|fetch\(|XMLHttp""", text)
    assert {m.split(":")[0] for m in re.findall(r'href="([^"]*)"', text) if m[0] != "#"} == {"data"}
    allowed = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\s\"'<>)]*", text)) <= allowed


def test_every_figure_has_its_place_and_is_json(page: str) -> None:
    found = re.findall(
        r'<script type="application/json" data-figure="([^"]+)">(.*?)</script>', page, re.S
    )
    assert len(found) == 3 * len(FAKES) + 2
    for id_, text in found:
        assert json.loads(text)["data"]
        assert page.count(f'id="{id_}"') == 1


def test_tables_can_be_taken_away(page: str) -> None:
    tables = re.findall(
        r'href="data:(text/csv|application/json);charset=utf-8;base64,([^"]+)"', page
    )
    (_, csv_text), (_, json_text) = tables
    n = len(json.loads(base64.b64decode(json_text))["trials"])
    assert len(base64.b64decode(csv_text).decode().splitlines()) == n + 1


def test_what_a_search_took_and_what_its_vector_does_without_the_clamp(page: str) -> None:
    """Of every search; the constraint's own passes beside it, where it has any."""
    n_own = sum(len(fake.constraints) for fake in FAKES.values())
    n_all = sum(len(fake.constraints) * len(fake.norms) for fake in FAKES.values())
    assert page.count("<td>152</td>") == n_all
    share = '<td>12% <span class="ci">[6%, 19%]</span></td>'
    assert page.count(share) == n_own and "runs more each" not in page


def test_passes_of_the_constraint_itself_are_said(whole: tuple[RunFolder, Plan]) -> None:
    """As the constraint has them for so many sites: the Jacobian's solves, and none of others."""
    data = gather(*whole)
    arm = data.points[0].main
    spec = arm.recovery.model_copy(update={"constraint": JacobianNull(kind="jacobian_null")})
    solved = replace(arm, trial=arm.trial.model_copy(update={"recovery": spec}))
    point = replace(data.points[0], main=solved, controls=())
    audit = replace(data.audits[0], points=(point,))
    least, most = spec.constraint.repeats(1)
    assert 0 < least < most
    shown = norms.section(replace(data, audits=(audit,))).context["audits"][0]["rows"]
    assert [row["repeats"] for row in shown] == [f"{least} to {most}"]


def test_a_baseline_that_is_adapted_says_so_and_in_what(page: str) -> None:
    """Where its constraint is kept for a published search, and nowhere else."""
    drift = page.split('<section id="drift">')[1].split("</section>")[0]
    rows = [row for row in drift.split("<tr")[1:] if '<span class="tag">adapted</span>' in row]
    assert rows and all("<code>gradient_projection</code>" in row for row in rows)
    assert "adapted from the published search: it looks for the smallest norm" in drift


def test_features_that_came_on_again_are_counted(page: str) -> None:
    text = own(page)
    section = text[text.index('<section id="drift">') : text.index('<section id="steps">')]
    assert "Clamped features that came on again" in section
    n = 19  # of 24 prompts five are not audited
    rows = re.findall(rf"<td>{2 * n - 3} of {2 * n}</td><td>14%</td><td>6%", section)
    assert len(rows) == len(FAKES) * len(CONSTRAINTS)


def test_what_takes_the_clamp_back_is_told_of_every_search_that_recovered(
    whole: tuple[RunFolder, Plan], page: str
) -> None:
    """Alone and left out, in both readings, beside the vector itself; of text with a mark."""
    text = own(page)
    section = text[text.index('<section id="drift">') : text.index('<section id="steps">')]
    rows = re.findall(
        r"<td>(\d+)(\*?)</td><td>0.21</td><td>8%</td>\n(.*?)</tr>", section, re.DOTALL
    )
    points = gather(*whole).points
    recovering = [point for point in points if point.main.row["n_recovered"]]
    assert len(rows) == len(recovering) < len(points)
    assert [bool(mark) for _, mark, _ in rows].count(True) == len(CONSTRAINTS)
    for n, _, cells in rows:
        assert int(n) > 0
        led = re.findall(r"<td>(\d+%).*?<br>(\S+)", cells)
        assert [rate for rate, _ in led] == ["94%", "19%", "94%", "19%", "94%"]
        assert led[0][1] == led[2][1] != led[1][1]


def test_records_from_before_it_was_replayed_have_no_such_table(
    whole: tuple[RunFolder, Plan],
) -> None:
    data = gather(*whole)
    arm = data.points[0].main
    result = {name: value for name, value in arm.result.items() if name != "undo"}
    old = replace(arm, record={**arm.record, "result": result})
    audit = replace(data.audits[0], points=(replace(data.points[0], main=old, controls=()),))
    assert drift.section(replace(data, audits=(audit,))).context["undone"] == []


def test_hostile_names_are_text(tmp_path: Path) -> None:
    store, plan = make_run(
        tmp_path / "run", {HOSTILE: Fake({"none": 0.1, "wrong_target": 0.3})}, prefix=HOSTILE
    )
    page = page_of(store, plan)
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;0</td>" in page
    picture = (store.path / "picture.svg").read_text()
    assert HOSTILE not in picture
    ElementTree.fromstring(picture)


def test_json_cannot_close_its_script() -> None:
    text = script_safe('{"a": "</script><!--\u2028&"}')
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--\u2028&"}


def test_a_leaky_recovery_where_the_clamp_holds_is_a_false_breach(
    whole: tuple[RunFolder, Plan],
) -> None:
    data = gather(*whole)
    audits = {audit.name: audit for audit in data.audits}
    status = {
        (name, finding.label): finding.status
        for name in ("bottleneck", "second_route")
        for finding in findings(audits[name], audits[name].points)
    }
    assert status == {
        ("bottleneck", "unconstrained"): "no test",
        ("bottleneck", "gradient_projection"): "false breach",
        ("bottleneck", "encoder_null"): "agrees",
        ("second_route", "unconstrained"): "no test",
        ("second_route", "gradient_projection"): "open",
        ("second_route", "encoder_null"): "agrees",
    }


def test_false_breach_and_specificity_are_on_the_page(page: str) -> None:
    text = own(page)
    assert "FALSE BREACH" in text
    assert "Specificity of encoder_null on bottleneck: 100%" in text
    assert "19 of 19 prompts rightly left unrecovered; no false breach" in text


@pytest.mark.parametrize(
    "norms",
    [
        {"none": 0.1},
        {"none": None},
        {"none": None, "wrong_target": None, "no_clamp": None, "ignorant": None},
        {"none": None, "wrong_target": 0.2},
        {"none": 0.2, "wrong_target": None},
    ],
)
def test_missing_controls_and_nothing_recovered(tmp_path: Path, norms: dict[str, Any]) -> None:
    page = page_of(*make_run(tmp_path / "run", {"only": Fake(norms, known="does_not_hold")}))
    assert page.count("<section id=") == 13
    assert ("No control is finished" in page) == (len(norms) == 1)


def test_without_the_exact_constraint_the_last_one_is_the_headline(tmp_path: Path) -> None:
    fake = Fake({"none": 0.1}, constraints=("unconstrained", "gradient_projection"))
    data = gather(*make_run(tmp_path / "run", {"only": fake}))
    assert [point.label for point in data.audits[0].headlines] == ["gradient_projection"]


def test_an_incomplete_run_says_so(tmp_path: Path) -> None:
    store, plan = make_run(
        tmp_path / "run", keep=lambda t: t.audit == "ioi" and t.control.kind == "none"
    )
    page = own(page_of(store, plan))
    assert "This run is incomplete." in page
    assert "ioi, unconstrained, wrong target" in page
    assert '<section id="known_answer">' not in page
    assert "incomplete run" in (store.path / "picture.svg").read_text()


def test_a_plan_of_finished_trials_still_names_the_audits_that_are_missing(tmp_path: Path) -> None:
    store, plan = make_run(tmp_path / "run", keep=lambda t: t.audit == "ioi")
    done = Plan(plan.study, tuple(t for t in plan.trials if store.has(t.id)), {})
    data = gather(store, done)
    assert not data.complete
    assert data.unfinished == ("all of mcq", "all of bottleneck", "all of second_route")


@pytest.mark.parametrize("empty", [("ioi", "no_clamp"), ("mcq", ""), ("", "")])
def test_a_trial_without_a_valid_prompt_has_ended_and_the_page_says_why(
    tmp_path: Path, empty: tuple[str, str]
) -> None:
    """Of one control, of a whole audit, and of all there is."""

    def has_prompts(trial: Trial) -> bool:
        own = (trial.audit, trial.control.kind)
        return any(mine not in ("", its) for mine, its in zip(empty, own, strict=True))

    store, plan = make_run(tmp_path / "run", keep=has_prompts)
    first, *others = [trial for trial in plan.trials if not has_prompts(trial)]
    with RunFolder.open(store.path, store.study, None) as writing:
        for trial in others:
            writing.write_empty(trial, EmptyValidSetError("<none>", {"tried": 8, "valid": 0}))
        assert gather(store, plan).unfinished == (name_of(plan, first),)
        writing.write_empty(first, EmptyValidSetError("too strong", {"tried": 8, "valid": 0}))
    data, page = gather(store, plan), own(page_of(store, plan))
    assert data.complete and not data.unfinished
    n = f"{len(others) + 1} of {len(plan.trials)} finished trials"
    assert f"{n} had no valid prompt" in page and f"<li>{name_of(plan, first)}." in page
    assert "too strong" in page and "&lt;none&gt;" in page
    assert "is incomplete" not in page and "No trial is finished yet." not in page


def test_a_run_without_any_trial(tmp_path: Path) -> None:
    store, plan = make_run(tmp_path / "run", keep=lambda t: False)
    assert "No trial is finished yet." in page_of(store, plan)


def test_the_picture_stands_alone(whole: tuple[RunFolder, Plan], tmp_path: Path) -> None:
    text = write_picture(*whole, tmp_path / "picture.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.attrib["viewBox"] == "0 0 920 420"
    words = " ".join(root.itertext())
    for word in (*CONSTRAINTS, *FAKES, "held", "breached", "forcible", "never reached on any"):
        assert word in words
    assert set(re.findall(r"https?://[^\s\"'<>)]*", text)) == {"http://www.w3.org/2000/svg"}


def test_the_same_records_make_the_same_page(whole: tuple[RunFolder, Plan], page: str) -> None:
    assert page_of(*whole) == page


def section_of(page: str, id_: str) -> str:
    (found,) = re.findall(rf'<section id="{id_}">(.*?)</section>', own(page), re.S)
    return str(found)


def test_preflight_that_found_nothing(page: str) -> None:
    section = section_of(page, "preflight")
    assert f"{3 * len(FAKES)} checks, all passed" in section, "each is counted once, not by trial"
    assert "<b>1e-7</b>" not in section and "&lt;b&gt;1e-7&lt;/b&gt;" in section
    assert '<details class="print">' in section and "despite" not in own(page)
    listed = section[section.index("<tbody>") :]
    for check in ("padding", "cache", f"scale of the SAE at {SITE}"):
        assert listed.count(f'<th scope="row">{check}</th>') == 1, "each is said once"
    for audit in FAKES:
        assert listed.count(f"{audit} on organism") == 1


def test_what_preflight_found_is_on_the_page(tmp_path: Path) -> None:
    def findings(trial: Trial) -> list[Finding]:
        levels = {"ioi": "fault", "mcq": "caution"}
        if trial.audit not in levels:
            return make_findings(trial.audit)
        bad, *good = make_findings(trial.audit)
        changes = {"passed": False, "level": levels[trial.audit], "remedy": f"{HOSTILE} mend it"}
        return [bad.model_copy(update=changes), *good]

    page = page_of(*make_run(tmp_path / "run", findings=findings))
    section = section_of(page, "preflight")
    assert "12 checks, 1 fault, 1 caution" in section
    table, _, every = section.partition("<details")
    assert table.index("ioi on organism") < table.index("mcq on organism"), "faults come first"
    assert table.count("mend it") == 2 and "mend it" not in every
    assert every.count(">fault<") == every.count(">caution<") == 1
    assert every.count('scope="row">padding</th>') == 1, "one row for a check that some fail"
    assert HOSTILE not in page
    assert "This run went on despite 1 fault</strong>" in own(page)


def test_records_from_before_there_was_a_preflight(tmp_path: Path) -> None:
    page = page_of(*make_run(tmp_path / "old", findings=lambda trial: None))
    assert '<section id="preflight">' not in page

    def findings(trial: Trial) -> list[Finding] | None:
        return make_findings(trial.audit) if trial.audit == "ioi" else None

    mixed = page_of(*make_run(tmp_path / "mixed", findings=findings))
    n, n_ioi = sum(3 * len(f.norms) for f in FAKES.values()), 3 * len(FAKES["ioi"].norms)
    assert f"{n - n_ioi} of {n} trials come from a version" in section_of(mixed, "preflight")
