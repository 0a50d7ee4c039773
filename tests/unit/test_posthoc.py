"""Methods on one valid set: the readout as computed by hand, and figures no denominator breaks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdfast.batch import Batch
from holdfast.edits import Capture, FeatureEdit, Perturbation
from holdfast.posthoc import MOVED, common, evaluate
from holdfast.report.page import environment
from holdfast.report.posthoc import section
from holdfast.saes.bank import FeatureBank
from holdfast.sites import Site
from holdfast.statistics import clustered_rate
from holdfast.subject import Subject
from holdfast.verify import Checks, verify

SITE = Site(2)


def checked(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit, where: int, size: float
) -> tuple[Perturbation, Checks]:
    """A random perturbation so many tokens before the last, verified."""
    delta = size * torch.randn(len(batch), 1, 32, generator=torch.Generator().manual_seed(3))
    added = Perturbation(batch.ids, batch.prompt_length[:, None] - 1 - where, {SITE: delta})
    median = {SITE: {"*": 1.0}}
    return added, verify(subject, batch, (clamp,), added, {SITE: bank}, median, clamp_first=True)


def test_the_readout_is_the_last_prompt_token_computed_by_hand(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit
) -> None:
    added, checks = checked(subject, batch, bank, clamp, 0, 2.0)
    codes = []
    for edits in ((clamp,), (clamp, added)):
        seen = Capture(SITE)
        subject.outputs(batch, (*edits, seen))
        x = seen.seen[0][1][:, -1].double()
        sae = subject.sae(SITE).full()
        p = x @ sae.W_enc.double() + sae.b_enc.double()
        z = torch.where(p > sae.threshold.double(), p.clamp_min(0), 0.0)
        codes.append(z[:, list(bank.ids[0])])
    change = codes[1] - codes[0]
    near = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(checks.readout_norm, codes[0].norm(dim=1), **near)
    torch.testing.assert_close(checks.readout_drift, change.norm(dim=1), **near)
    torch.testing.assert_close(checks.readout_rise, change.clamp_min(0).norm(dim=1), **near)
    torch.testing.assert_close(checks.readout_fall, change.clamp_max(0).norm(dim=1), **near)
    assert checks.readout_drift.max() > 0.1, "something moved"
    # There the perturbation is: over the perturbed positions it is the same.
    torch.testing.assert_close(checks.readout_drift, checks.drift_absolute)
    torch.testing.assert_close(checks.readout_relative, checks.drift_relative, equal_nan=True)
    floor = 0.01 * math.sqrt(len(bank.ids[0]))
    assert (checks.readout_relative <= checks.readout_drift / floor + 1e-9).all()


def test_nothing_added_is_no_drift_and_what_is_read_is_not_where_it_was_added(
    subject: Subject, batch: Batch, bank: FeatureBank, clamp: FeatureEdit
) -> None:
    _, still = checked(subject, batch, bank, clamp, 0, 0.0)
    for name in ("drift", "rise", "fall", "relative"):
        assert getattr(still, f"readout_{name}").abs().max() == 0.0
    _, before = checked(subject, batch, bank, clamp, 1, 2.0)
    assert before.drift_absolute.max() > 0.1 and before.readout_drift.max() == 0.0


def row(id_: str, hit: bool, drift: float = 0.0, norm: float = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "id": id_, "cluster": id_.split(":")[0], "recovered": hit, "readout_drift": drift,
        "readout_rise": drift, "readout_fall": 0.0, "readout_norm": norm,
        "readout_relative": drift / max(norm, 0.02),
    } | more  # fmt: skip


def test_every_method_is_read_on_the_prompts_that_all_have() -> None:
    methods = {
        "encoder": [row("a:1", True), row("a:2", True), row("b:1", False), row("c:1", True)],
        "none": [row("b:1", True, 0.5), row("a:2", True, 0.1), row("a:1", False, 0.0)],
        "suffix": [
            {"id": k, "cluster": k[0], "recovered": k == "a:1"} for k in ("a:1", "a:2", "b:1")
        ],
    }  # fmt: skip
    assert common(methods) == ["a:1", "a:2", "b:1"]
    encoder, none, suffix = evaluate(methods)
    assert (encoder.n_own, encoder.recovered.n, encoder.recovered.n_clusters) == (4, 3, 2)
    assert encoder.recovered.estimate == pytest.approx(2 / 3)
    assert encoder.by_question.estimate == pytest.approx(0.5), "questions weigh alike"
    assert (encoder.whole_questions, none.whole_questions, suffix.whole_questions) == (1, 1, 0)
    expected = clustered_rate([0.0, 1.0, 1.0], ["a", "a", "b"])
    assert (none.recovered.low, none.recovered.high) == (expected.low, expected.high)
    assert none.drift == pytest.approx(0.2) and none.drift_max == 0.5
    assert none.violating is not None and none.violating.estimate == pytest.approx(2 / 3)
    assert suffix.drift is None and suffix.violating is None and suffix.near_zero is None
    backwards = {name: rows[::-1] for name, rows in methods.items()}
    again = {r.method: r.recovered.estimate for r in evaluate(backwards)}
    assert again == {r.method: r.recovered.estimate for r in (encoder, none, suffix)}


def test_a_norm_of_zero_is_counted_and_breaks_nothing() -> None:
    quiet = [row("a:1", True, 0.3, norm=0.0), row("b:1", True, 0.0, norm=0.0)]
    undefined = [row("a:1", True, 0.0, 0.0, readout_relative=math.nan), row("b:1", True, 0.2)]
    first, second = evaluate({"quiet": quiet, "other": undefined})
    assert first.near_zero == 1.0 and first.relative_mean == pytest.approx(0.3 / 0.02 / 2)
    assert (second.n_relative, second.near_zero) == (1, 0.5)
    assert second.relative_mean == pytest.approx(0.1)
    at = evaluate({"at": [row("a:1", True, MOVED)], "above": [row("a:1", True, 2 * MOVED)]})
    assert [r.violating.estimate for r in at if r.violating] == [0.0, 1.0]


def test_methods_of_one_setting_stand_in_one_table_with_its_suffixes() -> None:
    def point(constraint: str, value: float, ids: str) -> Any:
        at = {"intervention.value": value, "recovery.constraint.kind": constraint}
        rows = tuple(row(f"{i}:1", True, outcome="recovered") for i in ids)
        return SimpleNamespace(
            constraint=constraint, main=SimpleNamespace(row={"point": at}, audited=rows)
        )

    def suffix(audit: str, outcomes: dict[str, str]) -> Any:
        rows = tuple(row(f"{i}:1", o == "recovered", outcome=o) for i, o in outcomes.items())
        trial = SimpleNamespace(audit=audit, label="suffix")
        return SimpleNamespace(trial=trial, row={"point": {"intervention.value": -1.0}}, rows=rows)

    points = (point("one", -1.0, "abc"), point("two", -1.0, "abcd"), point("one", -2.0, "ab"))
    outcomes = {"a": "recovered", "b": "placeholder", "c": "not_recovered"}
    data: Any = SimpleNamespace(
        audits=(SimpleNamespace(name="mine", points=points),),
        suffixes=(suffix("mine", outcomes), suffix("other", outcomes)),
    )
    made = section(data)
    assert made is not None
    (table,) = made.context["tables"]
    assert table["audit"] == "mine, intervention.value=-1.0" and table["n"] == 2
    shares = {r.method: (r.n_own, r.recovered.estimate) for r in table["rows"]}
    assert shares == {"one": (3, 1.0), "two": (4, 1.0), "suffix": (2, 0.5)}
    html = environment().get_template(made.template).render(made.context)
    assert "suffix" in html and "None" not in html
    alone: Any = SimpleNamespace(audits=data.audits, suffixes=())
    alone.audits[0].points = points[2:]
    assert section(alone) is None


def test_no_common_prompt_is_no_figure() -> None:
    assert evaluate({}) == []
    for found in evaluate({"one": [row("a:1", True)], "two": [row("b:1", True)]}):
        assert found.recovered.estimate is None and found.recovered.n == 0
        assert found.by_question.estimate is None and found.drift is None
