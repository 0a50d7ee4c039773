"""Comparisons: a run and itself differ in nothing, and what was planted is found and named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.compare import Comparison, Finished, Pair, Side, compare, read_side
from holdfast.errors import CompareError, StoreError, UnknownNameError
from holdfast.grid import Point
from holdfast.measure import median, rate
from holdfast.published import (
    PREFIX,
    Published,
    PublishedPoint,
    published_names,
    read_published,
)
from holdfast.published.beside import MEASURES, about, beside, beside_named
from holdfast.recovery import RecoverySpec
from holdfast.report.compared import page_of, write_comparisons
from holdfast.statistics import difference, wilson
from holdfast.store import RunFolder
from tests.e2e.cli import holdfast
from tests.unit.test_report import Fake, make_run, make_trial

N = 30


def finished(
    hits: Sequence[bool],
    norms: Sequence[float] | None = None,
    constraint: str = "encoder_null",
    audit: str = "ioi",
    prefix: str = "p",
    point: Point | None = None,
    clusters: Sequence[str] | None = None,
    behavior: dict[str, Any] | None = None,
    **recovery: Any,
) -> Finished:
    """A trial with these prompts recovered, at these norms (infinite: never reached)."""
    trial = make_trial(audit, constraint, "none")
    spec = RecoverySpec.model_validate(trial.recovery.model_dump(mode="json") | recovery)
    trial = trial.model_copy(update={"recovery": spec})
    if behavior is not None:
        trial = type(trial).model_validate(trial.model_dump(mode="json") | {"behavior": behavior})
    n = len(hits)
    far = [0.2] * n if norms is None else list(norms)
    names = [f"{prefix}{i}" for i in range(n)] if clusters is None else list(clusters)
    rows = tuple(
        {
            "id": f"{prefix}{i}", "text_sha256": f"text {prefix}{i}", "cluster": names[i],
            "outcome": "recovered" if hits[i] else "not_recovered", "recovered": hits[i],
            "smallest_norm_relative": far[i] if math.isfinite(far[i]) else None,
            "clean_margin": 3.0, "suppressed_margin": -1.0, "margin": 2.0,
            "drift_absolute": 0.5, "drift_relative": None,
        }
        for i in range(n)
    )  # fmt: skip
    measurements = [
        rate("recovery_rate", torch.tensor(hits), names),
        median("smallest_norm_relative", "share", torch.tensor(far), names),
        rate("zero_reactivation_rate", torch.tensor(hits) & (torch.arange(n) % 2 == 0), names),
    ]
    result = {
        "measurements": [m.model_dump(mode="json") for m in measurements],
        "checks": {"preactivation_drift_max": 1e-8},
        "intervention": {"kind": "clamp", "value": -5.0},
        "funnel": {"stages": {"tried": n + 4, "valid": n}},
    }
    return Finished(trial, point or {}, result, rows)


def side(*trials: Finished, name: str = "here") -> Side:
    axes: dict[str, frozenset[str]] = {}
    for each in trials:
        own = frozenset(each.point) - {"recovery.constraint.kind"}
        axes[each.trial.audit] = axes.get(each.trial.audit, frozenset()) | own
    return Side(name, trials, axes)


def only(made: Comparison) -> Pair:
    (pair,) = made.pairs
    return pair


# --- Two runs -------------------------------------------------------------------------------------


def test_a_run_beside_itself_differs_in_nothing(tmp_path: Path) -> None:
    store, _ = make_run(tmp_path / "run", {"ioi": Fake({"none": 0.2, "wrong_target": 0.3})})
    # Made-up runs have no summary, which says which trials are the run's.
    trials = [{"id": r["id"], "point": {}} for r in store.records()]
    with RunFolder.open(store.path, store.study, None) as open_store:
        open_store.write_summary({"complete": True, "trials": trials})
    own = read_side(store.path)
    made = compare(own, own)
    assert len(made.pairs) == len(own.trials) == 6
    assert made.differs == () and made.unmatched == ((), ())
    for pair in made.pairs:
        assert pair.rate is not None and pair.norm is not None and pair.shared is not None
        found = pair.rate.value
        assert (found.estimate, found.low, found.high, pair.rate.p, pair.rate.p_holm) == (
            0, 0, 0, 1, 1,
        )  # fmt: skip
        assert (pair.norm.value.estimate, pair.norm.value.low, pair.norm.value.high) == (1, 1, 1)
        assert pair.n_shared == pair.rates[0].n and pair.differs == ()
    text = "\n".join(page_of(made).head)
    assert "no field differs" in text


def test_a_planted_difference_is_found_and_named() -> None:
    norms = [0.1 + 0.01 * i for i in range(N)]
    a = finished([True] * N, norms)
    b = finished([True] * (N - 8) + [False] * 8, [2 * x for x in norms], lr=0.05)
    made = compare(side(a), side(b))
    pair = only(made)
    assert made.differs == ("recovery.lr: 0.1 → 0.05",) and pair.differs == ()
    assert pair.rate is not None and pair.rate.paired and pair.rate.value.estimate is not None
    assert pair.rate.value.estimate == pytest.approx(8 / N)
    assert pair.rate.p == pytest.approx(2 / 2**8), "eight discordant pairs, all one way"
    assert pair.norm is not None and pair.norm.value.estimate == pytest.approx(0.5)
    swapped = only(compare(side(b), side(a)))
    assert swapped.rate is not None and swapped.rate.value.estimate == pytest.approx(-8 / N)


def test_only_prompts_that_both_have_are_paired() -> None:
    """By id and text: the same id can be another prompt in another run."""
    a = finished([True] * N)
    b = finished([False] * 10 + [True] * (N - 10))
    moved = [dict(row) | ({"text_sha256": "other"} if i >= 12 else {})
             for i, row in enumerate(b.audited)]  # fmt: skip
    b = Finished(b.trial, b.point, b.result, tuple(moved))
    pair = only(compare(side(a), side(b)))
    assert pair.n_shared == 12 and pair.shared is not None
    assert [value.estimate for value in pair.shared] == [1, pytest.approx(2 / 12)]
    assert [value.n for value in pair.rates] == [N, N], "own rates are of all own prompts"


def test_without_shared_prompts_the_difference_is_newcombes() -> None:
    a, b = finished([True] * 20 + [False] * 10), finished([True] * 9 + [False] * 21, prefix="q")
    pair = only(compare(side(a), side(b)))
    expected = difference(wilson(20, 30), wilson(9, 30))
    assert pair.rate is not None and not pair.rate.paired and pair.rate.p is None
    assert pair.rate.value.estimate == pytest.approx(expected.estimate)
    assert (pair.rate.value.low, pair.rate.value.high) == pytest.approx(
        (expected.low, expected.high)
    )
    assert pair.shared is None and pair.norm is None


def test_several_tests_are_corrected() -> None:
    at = [{"recovery.steps": steps} for steps in (10, 20, 30)]
    a = [finished([True] * N, point=p, steps=p["recovery.steps"]) for p in at]
    b = [finished([True] * (N - k) + [False] * k, point=p, steps=p["recovery.steps"])
         for p, k in zip(at, (6, 7, 0), strict=True)]  # fmt: skip
    rates = [pair.rate for pair in compare(side(*a), side(*b)).pairs]
    p = [contrast.p for contrast in rates if contrast]
    assert p == pytest.approx([2 / 2**6, 2 / 2**7, 1])
    assert [c.p_holm for c in rates if c] == pytest.approx([2 * 2 / 2**6, 3 * 2 / 2**7, 1])


@pytest.mark.parametrize("n, tells", [(5, False), (6, True)])
def test_too_few_prompts_have_no_p_value(n: int, tells: bool) -> None:
    """Five that all disagree have 2 of 32 sign patterns; six have 2 of 64, below 0.05."""
    made = compare(side(finished([True] * n)), side(finished([False] * n)))
    rate = only(made).rate
    assert rate is not None and rate.test is not None and rate.test.tells == tells
    table = page_of(made)
    (row,) = table.rows
    assert "notes" not in table.columns and len(row) == len(table.columns)
    assert (f"too few prompts to tell (n = {n})" in row) == (not tells)
    assert ("0.031 (0.031)" in row) == tells


def test_clusters_are_what_is_counted() -> None:
    questions = [f"q{i // 10}" for i in range(N)]
    a, b = (finished([hit] * N, clusters=questions) for hit in (True, False))
    pair = only(compare(side(a), side(b)))
    assert pair.rate is not None and pair.rate.p == pytest.approx(2 / 2**3), "three questions"


def test_a_point_of_a_grid_meets_its_like_in_a_run_without_that_grid() -> None:
    swept = [finished([True] * N, point={"recovery.steps": s}, steps=s) for s in (50, 100)]
    fixed = finished([True] * N, steps=100, constraint="encoder_null")
    made = compare(side(*swept), side(fixed))
    pair = only(made)
    assert pair.point == ("steps=100",) and made.differs == ()
    assert made.unmatched == (("ioi, encoder_null, steps=50",), ())


def test_what_differs_on_some_pairs_alone_is_said_there() -> None:
    a = [finished([True] * N, constraint=c) for c in ("unconstrained", "encoder_null")]
    b = [finished([True] * N, constraint="unconstrained", steps=7, lr=0.2),
         finished([True] * N, constraint="encoder_null", lr=0.2)]  # fmt: skip
    made = compare(side(*a), side(*b))
    assert made.differs == ("recovery.lr: 0.1 → 0.2",)
    assert [pair.differs for pair in made.pairs] == [("recovery.steps: 100 → 7",), ()]


def test_things_of_two_kinds_differ_in_their_kind_alone() -> None:
    a, b = finished([True] * 3), finished([True] * 3)
    clamp = {"kind": "several", "of": [{"kind": "clamp", "value": -5.0}]}
    trial = type(b.trial).model_validate(b.trial.model_dump(mode="json") | {"intervention": clamp})
    made = compare(side(a), side(Finished(trial, {}, b.result, b.audited)))
    assert made.differs == ("intervention.kind: clamp → several",)


def test_another_behavior_under_the_same_name_is_no_match() -> None:
    a, b = finished([True] * 3), finished([True] * 3, behavior={"kind": "mcq"})
    with pytest.raises(CompareError, match="no point in common"):
        compare(side(a), side(b))


def test_nothing_in_common_says_what_each_has() -> None:
    a, b = finished([True] * 3), finished([True] * 3, audit="mcq", constraint="unconstrained")
    with pytest.raises(CompareError, match=r"ioi, encoder_null.*mcq, unconstrained"):
        compare(side(a), side(b))


# --- Published figures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", published_names())
def test_published_files_are_what_they_should_be(name: str) -> None:
    found = read_published(name)
    assert found.name == name and found.source
    for point in found.points:
        if point.measure.endswith("_rate"):
            assert 0 <= point.estimate <= 1
        if point.measure == "recovery_rate" and name in ("ioi", "wmdp", "k_sweep", "budget"):
            assert point.interval is not None, "a rate without k and n cannot be weighed"


def test_some_published_figures_as_their_sources_have_them() -> None:
    def of(name: str, label: str, measure: str) -> PublishedPoint:
        return next(
            p for p in read_published(name).points if (p.label, p.measure) == (label, measure)
        )

    assert (of("wmdp", "encoder", "recovery_rate").k, of("ioi", "none", "recovery_rate").n) == (
        90, 37,
    )  # fmt: skip
    assert of("k_sweep", "K = 61", "n_valid").estimate == 64
    assert of("budget", "budget 10", "recovery_rate").estimate == 0.5


@pytest.mark.parametrize(
    "point, message",
    [
        ({"estimate": 0.5, "k": 1, "n": 4}, "1 of 4 is not 0.5"),
        ({"estimate": 0.5, "low": 0.6, "high": 0.9}, "outside its own interval"),
        ({"estimate": 1.0, "k": 4}, "4 of None"),
        ({"estimat": 1.0}, "did you mean 'estimate'"),
    ],
)
def test_a_published_figure_that_contradicts_itself(point: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PublishedPoint.model_validate({"label": "x", "measure": "recovery_rate"} | point)


def published(*points: dict[str, Any], behavior: str = "ioi") -> Published:
    made = [{"label": "p", "measure": "recovery_rate", "estimate": 0.5} | p for p in points]
    return Published.model_validate(
        {"name": "made-up", "source": "nowhere", "subject": "another model", "behavior": behavior,
         "points": made}
    )  # fmt: skip


def test_a_figure_meets_the_run_at_its_own_point() -> None:
    at = [{"discovery.n_features": k} for k in (4, 8)]
    attribution = {"kind": "attribution", "n_features": 4}
    trials = []
    for point in at:
        each = finished([True] * 20 + [False] * 10, point=point)
        discovery = attribution | {"n_features": point["discovery.n_features"]}
        trial = type(each.trial).model_validate(
            each.trial.model_dump(mode="json") | {"discovery": discovery}
        )
        trials.append(Finished(trial, point, each.result, each.audited))
    where = {"constraint": "encoder_null", "discovery.n_features": 8, "recovery.steps": 150}
    found = published(
        {"where": where, "k": 12, "n": 24},
        {"where": where | {"discovery.n_features": 5}},
        {"where": where | {"constraint": "unconstrained"}},
        {"where": {"attack.kind": "soft_suffix"}},
        {"where": where, "measure": "drift_mixed_mean"},
        {"where": where, "measure": "drift_absolute_mean", "estimate": 2.0},
        {"where": where, "measure": "zero_reactivation_rate", "k": 12, "n": 24},
    )
    rows = beside(side(*trials), found).rows
    matched = rows[0]
    assert matched.trial == "ioi, encoder_null, n_features=8" and matched.ours is not None
    assert matched.difference is not None and matched.difference.value.estimate is not None
    expected = difference(wilson(20, 30), wilson(12, 24))
    assert matched.difference.value.estimate == pytest.approx(expected.estimate)
    assert matched.difference.value.low == pytest.approx(expected.low)
    assert matched.unlike == ("recovery.steps: 100 here, 150",)
    reasons = [" ".join(row.unlike) for row in rows[1:5]]
    for reason, words in zip(
        reasons, ("no such point.*n_features=4", "no such point", "no attack beside its own",
                  "not measured"), strict=True
    ):  # fmt: skip
        assert re.search(words, reason), reason
    assert [row.ours for row in rows[1:5]] == [None] * 4
    assert rows[5].ours is not None and rows[5].ours.estimate == 0.5
    assert rows[5].difference is None, "no interval, no difference"
    assert rows[6].ours is not None and rows[6].ours.estimate == pytest.approx(1 / 3)
    gap = rows[6].difference
    assert gap is not None and gap.value.estimate == pytest.approx(1 / 3 - 1 / 2)


def test_a_page_of_published_figures_says_what_they_are_of() -> None:
    made = beside(side(finished([True] * 9)), published({"k": 1, "n": 2, "note": "odd"}))
    page = page_of(made)
    text = " ".join(page.head)
    assert "another model" in text and "nowhere" in text and "no replication" in text
    assert page.rows[0][-1] == "[1]" and "[1] odd" in page.foot


def test_every_measure_can_be_read_of_a_run() -> None:
    each = finished([True] * 5)
    for name, read in MEASURES.items():
        assert read(each).n in (0, 5, 9), name
    assert MEASURES["clean_margin_mean"](each).estimate == 3.0
    assert MEASURES["drift_relative_mean"](each).estimate is None, "unscored is no zero"


def test_what_is_read_from_records_is_what_it_is_called() -> None:
    """Each against its definition, on numbers made up here."""
    plain = finished([True, True, False, True])
    rows = [dict(row) | {"drift_relative": drift, "norm": 3.0 * i, "norm_relative": 0.1 * i,
                         "code_norm": size, "code_fall": 0.5 * i}
            for i, (row, drift, size) in enumerate(
                zip(plain.audited, (0.01, 0.03, 0.2, None), (2.0, 4.0, 0.0, 8.0), strict=True))
            ]  # fmt: skip
    labels = {
        "suppressed": {"comply": 3, "full_refusal": 5, "degenerate": 2},
        "recovered": {"comply": 1, "full_refusal": 1, "partial": 1, "moralize_deflect": 1},
    }
    result = dict(plain.result) | {
        "labels": labels, "funnel": {"stages": {"tried": 10, "valid": 4}}, "checks": {},
    }  # fmt: skip
    refusal = {"kind": "refusal", "direction": "comply"}
    told = plain.trial.model_dump(mode="json") | {"behavior": refusal}
    comply = Finished(type(plain.trial).model_validate(told), {}, result, tuple(rows))
    told = told | {"behavior": refusal | {"direction": "refuse"}}
    refuse = Finished(type(plain.trial).model_validate(told), {}, result, tuple(rows))
    expected = {
        "suppressed_rate": (5 / 10, 10), "valid_rate": (4 / 10, 10), "unrefused_rate": (1 / 4, 4),
        "drift_within_003_rate": (2 / 3, 3), "drift_relative_max": (0.2, 3),
        "norm_absolute_mean": (4.5, 4), "norm_relative_mean": (0.15, 4),
        "norm_over_codes_mean": ((0 / 2 + 3 / 4 + 9 / 8) / 3, 3),
        "floor_violation_mean": ((0 / 2 + 0.5 / 4 + 1.5 / 8) / 3, 3),
        "floor_violation_median": (0.125, 3),
    }  # fmt: skip
    for name, (estimate, n) in expected.items():
        value = MEASURES[name](comply)
        assert (value.estimate, value.n) == (pytest.approx(estimate), n), name
    assert MEASURES["suppressed_rate"](refuse).estimate == pytest.approx(3 / 10)
    assert MEASURES["suppressed_rate"](plain).estimate is None, "nothing is read from text"
    assert MEASURES["base_like_rate"](comply).estimate is None, "unmeasured is no zero"


def test_a_figure_over_several_trials_is_beside_their_mean() -> None:
    at = [{"recovery.steps": steps} for steps in (50, 100)]
    few = finished([True] * 10 + [False] * 10, point=at[0], steps=50)
    many = finished([True] * 10 + [False] * 30, point=at[1], steps=100)
    another = finished([True] * 20, audit="mcq", behavior={"kind": "ioi"})
    where = {"constraint": "encoder_null"}
    alike, by_prompts = (
        beside(side(few, many, another), published({"where": where, "pooled": how})).rows
        for how in ("trials", "prompts")
    )
    for rows, mean in ((alike, (0.5 + 0.25) / 2), (by_prompts, 20 / 60)):
        (row,) = rows
        assert row.trial == "ioi, encoder_null, steps=50; and 1 more", "of the audit with most"
        assert row.ours is not None and row.ours.n == 60
        assert row.ours.estimate == pytest.approx(mean) and row.difference is None


def test_a_figure_is_beside_the_trials_that_are_most_like_it() -> None:
    near, far = (finished([True] * 5, audit=name, behavior={"kind": "ioi"}, steps=steps)
                 for name, steps in (("ioi", 150), ("mcq", 20)))  # fmt: skip
    where = {"constraint": "encoder_null", "recovery.steps": 150, "recovery.lr": 0.9}
    (row,) = beside(side(far, near), published({"where": where})).rows
    assert row.trial.startswith("ioi, ") and row.unlike == ("recovery.lr: 0.1 here, 0.9",)
    (alone,) = beside(side(far), published({"where": where})).rows
    assert len(alone.unlike) == 2, "where there is none nearer"


def test_a_reason_stands_in_place_of_a_trial() -> None:
    (row,) = beside(side(finished([True] * 3)), published({"reason": "measures nothing"})).rows
    assert row.ours is None and row.unlike == ("measures nothing",)
    words = {"features": "by cosine"}
    (row,) = beside(side(finished([True] * 3)), published({"where": words})).rows
    assert row.ours is not None and row.unlike == ("features: by cosine",)


def test_figures_about_another_behavior() -> None:
    own = side(finished([True] * 3))
    assert "ioi" in about(own) and "wmdp" not in about(own)
    with pytest.raises(CompareError, match=r"about mcq.*audits ioi.*about that: ioi"):
        beside_named(own, "published:wmdp")
    with pytest.raises(UnknownNameError, match=r"no published figures 'wmpd': did you mean 'wmdp'"):
        beside_named(own, PREFIX + "wmpd")
    assert [made.name for made in beside_named(own, None)] == about(own)


# --- Files and the command ------------------------------------------------------------------------


def test_what_is_written_is_whole_and_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    made = compare(side(finished([True] * 4), name=hostile), side(finished([False] * 4)))
    page = write_comparisons([made], tmp_path / "c.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    data = json.loads(write_comparisons([made], tmp_path / "c.json").read_text())
    (found,) = data["comparisons"]
    assert Comparison.model_validate(found) == made
    with pytest.raises(CompareError, match=r"\.html or \.json file, got 'c\.txt'"):
        write_comparisons([made], tmp_path / "c.txt")


def test_the_command(tmp_path: Path) -> None:
    store, _ = make_run(tmp_path / "run", {"ioi": Fake({"none": 0.2})})
    trials = [{"id": r["id"], "point": {}} for r in store.records()]
    with RunFolder.open(store.path, store.study, None) as open_store:
        open_store.write_summary({"complete": True, "trials": trials})
    listed = holdfast("compare", "--list")
    assert listed.code == 0 and all(PREFIX + name in listed.out for name in published_names())
    said = holdfast("compare", store.path, store.path, "--out", tmp_path / "c.html")
    assert said.code == 0 and "no field differs" in said.out and "1.00" in said.out
    assert (tmp_path / "c.html").is_file()
    beside_it = holdfast("compare", store.path, "published:ioi")
    assert beside_it.code == 0 and "GPT-2 small" in beside_it.out
    for arguments, message in (
        ((store.path, "published:iow"), "did you mean 'ioi'"),
        ((tmp_path / "nothing",), "holds no run"),
        ((store.path, tmp_path / "nothing"), "holds no run"),
        ((), "takes a run's folder"),
    ):
        refused = holdfast("compare", *arguments)
        assert refused.code == 2 and message in refused.err, refused.err


def test_a_run_without_a_finished_trial(tmp_path: Path) -> None:
    store, _ = make_run(tmp_path / "run", {"ioi": Fake({"none": 0.2})}, keep=lambda trial: False)
    with pytest.raises(CompareError, match="no finished trial"):
        read_side(store.path)
    with pytest.raises(StoreError, match="holds no run"):
        read_side(tmp_path / "none")
