"""Passing on less of the SAE's error: what is measured beside it, and what the report says."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.batch import Example
from holdfast.behaviors import BehaviorKind
from holdfast.canonical import SCHEMA, digest
from holdfast.edits import Capture
from holdfast.hooks import apply_edits
from holdfast.interventions.clamp import Clamp, Scale
from holdfast.interventions.several import Several
from holdfast.planning import Plan
from holdfast.reconstruction import explained
from holdfast.report.data import ReportData, gather
from holdfast.report.error_term import LINES, section
from holdfast.report.page import render
from holdfast.setting import prepare
from holdfast.sites import Site
from holdfast.store import RunFolder
from holdfast.study import Study
from holdfast.subject import Subject
from holdfast.testing import WORDS, fitted_sae, random_sae, tiny_batch, tiny_subject
from holdfast.trial import Lab, SAEIdentity, SubjectIdentity, Trial, run_trial
from tests.unit.recovered import features_at

SITE = Site(2)
IDS = (1, 5, 9, 30)


class Words(BehaviorKind):
    """Random words, read for one of two others; aimed at what the tiny subject gives anyway."""

    kind: str = "words"

    def examples(self, tokenizer: Any, split: Any, n: int, seed: int) -> list[Example]:
        generator = torch.Generator().manual_seed({"fit": 1, "tune": 2, "test": 3}[split])
        made = []
        for i in range(n):
            words = [WORDS[j] for j in torch.randint(40, (5,), generator=generator).tolist()]
            pair = ("w3", "w17") if i % 2 else ("w17", "w3")
            made.append(
                Example(
                    id=f"{split}{i}", text=" ".join(words), target=pair[0], rivals=pair[1:],
                    alternatives=("w9",), cluster=f"{split}{i}",
                )
            )  # fmt: skip
        return made


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject(sites=(SITE,))


# --- The edits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_bare_edits_scale_the_error_and_touch_no_feature(subject: Subject, alpha: float) -> None:
    clamp = Clamp(mode="set", value=50.0, error_term=Scale(scale=alpha))
    batch = tiny_batch(subject, 4)
    x = torch.randn(*batch.tokens.shape, 32)
    edited = apply_edits(clamp.bare_edits(subject, features_at((SITE,))), SITE, x, batch.frame())
    sae = subject.sae(SITE).full()
    decoded = sae.decode(sae.encode(x), x)
    on = batch.positions >= 1  # BOS is left alone
    torch.testing.assert_close(edited[on], (decoded + alpha * (x - decoded))[on])
    assert torch.equal(edited[~on], x[~on])


def test_with_all_of_the_error_there_is_nothing_to_do(subject: Subject) -> None:
    features = features_at((SITE,))
    kept = Clamp(mode="set", value=2.0)
    assert kept.bare_edits(subject, features) == ()
    dropped = Clamp(mode="set", value=2.0, error_term="drop")
    both = Several(of=(kept, dropped))
    assert len(both.bare_edits(subject, both.clamped(features))) == 1


def test_units_and_modes_of_the_clamp_do_not_matter(subject: Subject) -> None:
    batch, x = tiny_batch(subject, 3), None
    for clamp in (
        Clamp(mode="max_scaled", value=2.0, error_term="drop"),
        Clamp(mode="mean", error_term="drop"),
        Clamp(mode="set", value=2.0, units="unit_decoder", error_term="drop"),
    ):
        edits = clamp.bare_edits(subject, features_at((SITE,)))
        torch.manual_seed(0)
        residual = torch.randn(*batch.tokens.shape, 32)
        edited = apply_edits(edits, SITE, residual, batch.frame())
        assert x is None or torch.equal(edited, x)
        x = edited


# --- What is measured -----------------------------------------------------------------------------


def test_explained_variance_is_that_of_tokens_but_bos(subject: Subject) -> None:
    batch = tiny_batch(subject, 6)
    read = Capture(SITE)
    subject.outputs(batch, (read,))
    x = torch.cat([h[frame.positions >= 1] for frame, h in read.seen])
    sae = subject.sae(SITE).full()
    residual = (x - sae.decode(sae.encode(x), x)).double()
    by_hand = 1 - float(residual.square().sum()) / float(
        (x.double() - x.double().mean(0)).square().sum()
    )
    assert explained(subject, batch, (SITE,)) == {str(SITE): pytest.approx(by_hand, abs=1e-6)}
    perfect = Subject.of("t", subject.model, subject.tokenizer, {SITE: fitted_sae(SITE, x)})
    assert explained(perfect, batch, (SITE,))[str(SITE)] == pytest.approx(1, abs=1e-4)


def set_up(subject: Subject, error: Any) -> Any:
    from holdfast.discovery.given import Given
    from holdfast.setting import Data

    given = Given.model_validate({"features": [{"site": str(SITE), "ids": IDS}]})
    clamp = Clamp(mode="set", value=4.0, error_term=error)
    return prepare(subject, Words(), given, clamp, Data(fit=8, tune=1, test=16), 0)


def test_the_setting_says_what_the_sae_alone_costs(subject: Subject) -> None:
    kept, dropped = set_up(subject, "keep"), set_up(subject, "drop")
    assert kept.spliced is None and kept.explained == {}
    bare = dropped.intervention.bare_edits(subject, dropped.features)
    margin = dropped.test.margin(subject.read(dropped.test, bare))
    assert torch.equal(dropped.spliced, margin > 0)
    assert not torch.equal(dropped.spliced, dropped.clean), "this SAE is no good one"
    assert set(dropped.explained) == {str(SITE)}
    assert kept.fit is not None and kept.fit.ids[0] == "fit0"


# --- In the report --------------------------------------------------------------------------------

ALPHAS = (1.0, 0.5, 0.0)
ORDERS = ("clamp_then_perturbation", "perturbation_then_clamp")


def make_trial(alpha: float, order: str, texts: Path | None = None) -> Trial:
    sae = SAEIdentity(site=str(SITE), sha256="5" * 64)
    identity = SubjectIdentity(
        name="tiny", weights_sha256="a" * 64, dtype="float32", attention="sdpa", saes=(sae,)
    )
    features = [{"site": str(SITE), "ids": IDS}]
    named = texts and {"source": {"kind": "file", "path": str(texts)}, "n": 10}
    return Trial.model_validate(
        {
            "audit": "words", "seed": 0, "subject": identity, "twin": None,
            "data": {"fit": 8, "tune": 1, "test": 24, "texts": named}, "behavior": Words(),
            "discovery": {"kind": "given", "features": features},
            "intervention": {
                "kind": "clamp", "mode": "set", "value": 4.0, "error_term": {"scale": alpha}
            },
            "recovery": {
                "constraint": {"kind": "encoder_null"}, "order": order, "steps": 10,
                "refine_steps": 4, "doublings": 1, "budget": {"relative": 1.0},
            },
            "control": "none", "paths": {"scales": [1.0], "draws": 1, "margin_draws": 2},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """A sweep over α in both orders, run for real on the tiny subject, with texts beside it."""
    texts = tmp_path_factory.mktemp("texts") / "lines.txt"
    texts.write_text("\n".join(f"w{i} w{i + 3} w{2 * i} w9 w{i + 1}" for i in range(12)))
    trials = tuple(make_trial(alpha, order, texts) for alpha in ALPHAS for order in ORDERS)
    lab = Lab({digest(trials[0].subject.model_dump(mode="json")): subject})
    study = Study.model_validate(
        {
            "schema": 1, "name": "sweep",
            "subject": {
                "model": "organism",
                "saes": [
                    {"site": str(SITE), "source": {"kind": "folder", "path": "organism:saes/1"}}
                ],
            },
            "recovery": {"constraint": {"kind": "encoder_null"}},
            "audits": [
                {
                    "name": "words", "behavior": {"kind": "ioi"},
                    "discovery": {"kind": "given", "features": [{"site": str(SITE), "ids": IDS}]},
                    "intervention": {"kind": "clamp", "mode": "set", "value": 4.0},
                }
            ],
            "grid": {
                "intervention.error_term": [{"scale": alpha} for alpha in ALPHAS],
                "recovery.order": list(ORDERS),
            },
        }
    )  # fmt: skip
    path: Path = tmp_path_factory.mktemp("runs") / "sweep"
    run = {
        "started": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "device": "cpu", "threads": 1,
        "batch_plan": {"batch_size": 8}, "versions": {}, "platform": "x", "weights_sha256": "a",
        "command": "",
    }  # fmt: skip
    with RunFolder.open(path, study.canonical(), None) as store:
        for trial in trials:
            made = run_trial(trial, lab)
            record = {
                "schema": SCHEMA, "id": trial.id, "trial": trial.canonical(),
                "result": made.result, "run": run,
            }  # fmt: skip
            store.write(record, made.tensors, made.examples)
    where = {
        trial.id: {"intervention.error_term": {"scale": alpha}, "recovery.order": order}
        for trial, (alpha, order) in zip(trials, product(ALPHAS, ORDERS), strict=True)
    }
    return gather(RunFolder.read(path), Plan(study, trials, {}, where))


def test_the_sweep_is_read_from_the_records(data: ReportData) -> None:
    made = section(data)
    assert made is not None
    assert [s["order"] for s in made.context["sweeps"]] == [
        "vector added after the clamp", "vector passes through the clamp",
    ]  # fmt: skip
    for sweep in made.context["sweeps"]:
        rows = sweep["rows"]
        assert [row.alpha for row in rows] == list(ALPHAS)
        arms = {
            point.main.trial.intervention.error_scale: point.main  # type: ignore[attr-defined]
            for point in data.points
            if (point.main.trial.recovery.order == ORDERS[0]) == ("after" in sweep["order"])
        }
        valid = {alpha: {r["id"]: r for r in arm.audited} for alpha, arm in arms.items()}
        common = set.intersection(*(set(rows) for rows in valid.values()))
        for row in rows:
            arm, own = arms[row.alpha], valid[row.alpha]
            stages = arm.result["funnel"]["stages"]
            assert row.n_valid == len(own) and row.n_common == len(common)
            assert row.recovered.estimate == sum(r["recovered"] for r in own.values()) / len(own)
            assert row.common.n == len(common)
            assert row.clamped.estimate == 1 - stages["suppressed"] / stages["clean"]
            if row.alpha == 1.0:
                assert row.survive.estimate == 1, "with all of the error nothing was changed"
                assert row.capability.estimate == stages["clean"] / stages["tried"]
            else:
                alone = [r["spliced"] for r in own.values()]
                assert row.survive.estimate == sum(alone) / len(alone)
        assert set(sweep["explained"]) == {str(SITE)}
        for row in rows:
            told = {
                m["name"]: m
                for m in arms[row.alpha].result["measurements"]
                if m["name"].startswith("texts.")
            }
            assert row.texts is not None and row.texts.loss.n == 10
            if row.alpha == 1.0:
                assert row.texts.more_loss is None and set(told) == {
                    "texts.loss.clean", "texts.accuracy.clean"
                }  # fmt: skip
                without = row.texts
            else:
                assert row.texts.more_loss is not None and row.texts.loss.estimate is not None
                assert row.texts.loss.model_dump(mode="json") == told["texts.loss.spliced"]
                assert without.loss.estimate is not None
                assert row.texts.more_loss.estimate == pytest.approx(
                    row.texts.loss.estimate - without.loss.estimate
                )


def test_a_page_has_the_sections_and_their_figures(data: ReportData) -> None:
    page = render(data, "<svg></svg>")
    for id_ in ("forcing", "path", "heads", "error_term"):
        assert page.count(f'<section id="{id_}">') == 1
    n = len(ALPHAS) * len(ORDERS)
    drawn = re.findall(r'data-figure="((?:forcing|path|error)-\d+)"', page)
    assert len(drawn) == len(set(drawn)) == 2 * n + len(ORDERS)
    assert "error_term=0.5, order=clamp_then_perturbation" in page
    for word in ("nan", "None", "inf%"):
        assert not re.search(rf">\s*{word}\b", page), word


def test_lines_over_alpha_have_the_intervals_of_their_rows_and_gaps_without(
    data: ReportData,
) -> None:
    from dataclasses import replace

    (audit,) = data.audits
    points = [
        replace(point, main=replace(point.main, audited=()))
        if point.main.trial.intervention.error_scale == 0.5  # type: ignore[attr-defined]
        else point
        for point in audit.points
    ]
    made = section(replace(data, audits=(replace(audit, points=tuple(points)),)))
    assert made is not None
    for sweep in made.context["sweeps"]:
        assert [row.recovered.estimate is None for row in sweep["rows"]] == [False, True, False]
        for trace, (key, name, _) in zip(json.loads(sweep["figure"].json)["data"], LINES,
                                         strict=True):  # fmt: skip
            own = [getattr(row, key) for row in sweep["rows"]]
            assert (trace["name"], trace["x"]) == (name, list(ALPHAS))
            assert trace["y"] == [m.estimate for m in own]
            known = [(m, at) for at, m in enumerate(own) if m.estimate is not None]
            for m, at in known:
                high, low = (trace["error_y"][side][at] for side in ("array", "arrayminus"))
                assert (m.estimate + high, m.estimate - low) == pytest.approx((m.high, m.low))


def test_saes_that_explain_more_and_less_are_told_apart(data: ReportData) -> None:
    """A second SAE at the same points is a sweep of its own, and is set beside the first."""
    from dataclasses import replace

    (audit,) = data.audits
    worse = []
    for point in audit.points:
        trial = point.main.trial
        (sae,) = trial.subject.saes
        other = sae.model_copy(update={"sha256": "f" * 64})
        subject = trial.subject.model_copy(update={"saes": (other,)})
        result = {**point.main.result}
        if result["explained"]:
            result["explained"] = {str(SITE): -1.0}
        record = {**point.main.record, "result": result}
        main = replace(
            point.main, trial=trial.model_copy(update={"subject": subject}), record=record
        )
        worse.append(replace(point, main=main))
    both = replace(audit, points=(*audit.points, *worse))
    made, one = section(replace(data, audits=(both,))), section(data)
    assert made is not None and one is not None and one.context["fidelity"] == []
    assert len(made.context["sweeps"]) == 2 * len(one.context["sweeps"])
    assert len(made.context["fidelity"]) == len(ORDERS)
    for group in made.context["fidelity"]:
        better, less = group["sweeps"]
        assert better["explained"][str(SITE)] > less["explained"][str(SITE)] == -1.0
        assert less["saes"] == (f"{SITE} ffffffff",)
        assert [row.alpha for row in less["rows"]] == group["alphas"] == list(ALPHAS)
    page = render(replace(data, audits=(both,)), "<svg></svg>")
    assert page.count("by how much the SAE explains") == len(ORDERS)
    assert len(set(re.findall(r'id="(error-loss-\d+)"', page))) == len(ORDERS)
    assert page.count("Loss on other texts that the SAE in place adds") == len(ORDERS)


def test_without_texts_the_page_speaks_of_none(data: ReportData) -> None:
    from dataclasses import replace

    (audit,) = data.audits
    bare = []
    for point in audit.points:
        measurements = [
            m for m in point.main.result["measurements"] if not m["name"].startswith("texts.")
        ]
        result = {**point.main.result, "measurements": measurements}
        main = replace(point.main, record={**point.main.record, "result": result})
        bare.append(replace(point, main=main))
    page = render(replace(data, audits=(replace(audit, points=tuple(bare)),)), "<svg></svg>")
    assert "What the SAE costs elsewhere" not in page
    assert "What the SAE costs elsewhere" in render(data, "<svg></svg>")


def test_one_value_is_no_sweep(data: ReportData) -> None:
    from dataclasses import replace

    (audit,) = data.audits
    one = replace(audit, points=audit.points[:1], headlines=audit.headlines[:1])
    assert section(replace(data, audits=(one,))) is None


def test_every_audited_prompt_has_its_variants(data: ReportData) -> None:
    for point in data.points:
        rows = point.main.audited
        n = point.main.result["paths"]["n"]
        assert sum(row["recovered"] for row in rows) == n > 0
        for row in rows:
            back = row["variant.all.back"]
            assert (back == 1.0) == row["recovered"], "the vector again is the recovery again"
            assert (row["variant.nothing.margin"] == row["variant.nothing.margin"]) == row[
                "recovered"
            ]


def test_a_trial_that_is_not_compared_says_nothing(subject: Subject) -> None:
    trial = make_trial(1.0, ORDERS[0]).model_copy(update={"paths": None})
    lab = Lab({digest(trial.subject.model_dump(mode="json")): subject})
    made = run_trial(trial, lab)
    assert made.result["paths"] is None
    assert not [name for name in made.examples[0] if name.startswith(("variant.", "part."))]


def test_the_sae_of_the_fixture_is_random() -> None:
    """Its error is most of the residual, or none of the above would show anything."""
    sae = random_sae(SITE)
    x = torch.randn(50, 32)
    assert (x - sae.decode(sae.encode(x))).norm() > 0.5 * x.norm()
