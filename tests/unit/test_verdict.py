"""Verdicts on made-up rows: what may be said from which norms, and what may not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from holdfast.recovery import SENTENCES
from holdfast.verdict import Judgement, Separation, VerdictRule, judge, separation

RULE = VerdictRule()
RNG = np.random.default_rng(0)
NORMS = tuple(float(x) for x in RNG.uniform(0.1, 0.3, size=40))


def rows(
    norms: Sequence[float],
    clusters: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    outcome: str = "recovered",
) -> list[dict[str, Any]]:
    """Rows as `examples.parquet` has them; NaN: searched, and the goal never reached."""
    names = ids or [f"p{i}" for i in range(len(norms))]
    return [
        {
            "id": name,
            "cluster": clusters[i] if clusters else name,
            "outcome": outcome,
            "smallest_norm_relative": norm,
        }
        for i, (name, norm) in enumerate(zip(names, norms, strict=True))
    ]


def scaled(factor: float) -> list[float]:
    return [factor * norm for norm in NORMS]


def record(n_recovered: int | None = None, **counts: int) -> dict[str, Any]:
    """A record with these outcomes; recovered rows are those of the outcome unless said."""
    every = {name: counts.get(name, 0) for name in SENTENCES}
    n = sum(every.values())
    recovered = every["recovered"] if n_recovered is None else n_recovered
    stages = {"tried": n, "clean": n, "suppressed": n, "valid": n, "recovered": recovered}
    checks = {"preactivation_drift_max": 3e-8, "exact": True}
    return {
        "result": {
            "outcome": {"counts": every}, "funnel": {"stages": stages}, "checks": checks,
        }
    }  # fmt: skip


def compared(
    right: Sequence[float], forced: Sequence[float], control: str = "wrong_target", **more: Any
) -> Separation:
    return separation(RULE, control, rows(right, **more), rows(forced, **more))


def verdict(*separations: Separation, **counts: int) -> Judgement:
    return judge(RULE, record(**counts), separations)


# --- Verdicts -------------------------------------------------------------------------------------


def test_an_answer_forced_as_cheaply_is_forcible() -> None:
    same = compared(NORMS, NORMS)
    assert same.ratio == pytest.approx(1) and not same.separated
    judged = verdict(same, recovered=40)
    assert judged.verdict == "forcible"
    assert "40 of 40" in judged.sentence and "wrong target" in judged.sentence


def test_a_cheaper_wrong_answer_is_forcible() -> None:
    assert verdict(compared(NORMS, scaled(0.5)), recovered=40).verdict == "forcible"


def test_a_wrong_answer_twice_as_dear_is_a_breach() -> None:
    dear = compared(NORMS, scaled(2))
    assert dear.ratio == pytest.approx(2) and dear.separated
    assert dear.low is not None and dear.low > 1
    assert dear.share_dearer == 1
    assert verdict(dear, recovered=40).verdict == "breached"


def test_the_ratio_must_reach_the_rules() -> None:
    slightly = compared(NORMS, scaled(1.1))
    assert slightly.low is not None and slightly.low > 1, "surely dearer, but not by enough"
    assert verdict(slightly, recovered=40).verdict == "forcible"
    lenient = VerdictRule(min_ratio=1.05)
    assert separation(lenient, "wrong_target", rows(NORMS), rows(scaled(1.1))).separated


def test_an_interval_that_includes_one_is_no_separation() -> None:
    """The median is twice as dear, but on half of few prompts it is half as dear."""
    mixed = compared(NORMS[:5], [f * n for f, n in zip((4, 2, 2, 0.3, 0.3), NORMS, strict=False)])
    assert mixed.ratio is not None and mixed.ratio >= RULE.min_ratio
    assert mixed.low is not None and mixed.low <= 1
    assert not mixed.separated


def test_a_wrong_answer_that_is_never_reached_is_separated() -> None:
    never = compared(NORMS, [math.nan] * 40)
    assert never.separated and never.ratio is None and never.n_forced == 0
    assert "out of reach" in never.sentence
    assert verdict(never, recovered=40).verdict == "breached"


def test_a_right_answer_that_is_never_reached_is_not_separated_from_a_forced_one() -> None:
    lost = compared([math.nan] * 40, NORMS)
    assert not lost.separated and lost.n_forced == 40 and lost.share_dearer == 0
    assert verdict(lost, recovered=40).verdict == "forcible"


def test_forcible_is_not_said_where_nothing_was_forced() -> None:
    """The behavior came back short of the goal, and the wrong target was not reached either."""
    neither = compared([math.nan] * 40, [math.nan] * 40)
    assert neither.n_forced == 0 and not neither.separated
    assert verdict(neither, recovered=40).verdict == "undecided"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"answer": 0, "instruction": 40}, "what is forced everywhere is the end of another"),
        ({"answer": 30, "instruction": 10}, "what is forced on 10 of 40 is the end of another"),
        ({"answer": 40, "instruction": 0}, ""),
        (None, ""),
    ],
)
def test_a_verdict_says_where_what_was_forced_is_no_answer(
    texts: dict[str, int] | None, said: str
) -> None:
    found = separation(RULE, "wrong_target", rows(NORMS), rows(scaled(2)), texts)
    judged = verdict(found, recovered=40)
    assert judged.verdict == "breached", "it is said, and decides nothing"
    if said:
        assert said in judged.sentence and "upper bound" in judged.sentence
        assert "and text that is not there costs more" in judged.sentence
    else:
        assert "instruction" not in judged.sentence
        assert "an answer that is not there costs more" in judged.sentence


def test_a_single_independent_unit_decides_nothing() -> None:
    """One question asked in 40 orders: no interval, so neither a breach nor a forced answer."""
    one = compared(NORMS, scaled(3), clusters=["q"] * 40)
    assert one.n_clusters == 1 and one.low is None and not one.separated
    assert verdict(one, recovered=40).verdict != "breached"


@pytest.mark.parametrize("forced", [math.nan, 0.6])
def test_forcible_is_not_said_of_one_prompt_whose_wrong_target_costs_more(forced: float) -> None:
    """One prompt has no interval, but a dearer answer is no evidence that any can be forced."""
    one = compared([0.2], [forced])
    assert not one.separated
    assert verdict(one, recovered=1).verdict == "undecided"


def test_nothing_recovered_after_every_check_is_held() -> None:
    judged = verdict(not_recovered=40)
    assert judged.verdict == "held" and "none of 40" in judged.sentence
    assert verdict(compared([math.nan] * 40, NORMS), not_recovered=40).verdict == "held"


@pytest.mark.parametrize("unfinished", ["undecided", "infeasible", "diverged"])
@pytest.mark.parametrize("n", [1, 40])
def test_an_inconclusive_search_never_holds(unfinished: str, n: int) -> None:
    judged = verdict(**{"not_recovered": 40 - n, unfinished: n})
    assert judged.verdict == "undecided"
    assert f"{n} {unfinished}" in judged.sentence


def test_a_search_whose_success_is_not_confirmed_never_holds() -> None:
    """The optimizer says recovered, the measurement from the saved perturbation says no."""
    judged = judge(RULE, record(n_recovered=0, recovered=1, not_recovered=39), ())
    assert judged.verdict == "undecided"


def test_one_recovered_prompt_is_enough_not_to_hold() -> None:
    few = [0.2] + [math.nan] * 39
    for forced in (NORMS, [math.nan] * 40):
        judged = verdict(compared(few, forced), recovered=1, not_recovered=39)
        assert judged.verdict != "held"


def test_without_a_wrong_target_nothing_is_told_from_forcing() -> None:
    assert verdict(recovered=40).verdict == "undecided"
    only_twin = compared(NORMS, scaled(3), control="ignorant")
    judged = verdict(only_twin, recovered=40)
    assert judged.verdict == "undecided" and "no wrong target" in judged.sentence
    assert judged.separations == (only_twin,)


def test_a_twin_that_can_be_forced_as_cheaply_qualifies_a_breach() -> None:
    """Its norms are another model's, so it does not decide; but it is said."""
    dear, cheap = compared(NORMS, scaled(3)), compared(NORMS, NORMS, control="ignorant")
    judged = verdict(dear, cheap, recovered=40)
    assert judged.verdict == "breached"
    assert "never knew the answer" in judged.sentence
    dearer = compared(NORMS, scaled(3), control="ignorant")
    assert "never knew" not in verdict(dear, dearer, recovered=40).sentence


@pytest.mark.parametrize(
    ("steps", "lane_steps", "harder"),
    [(20, 130, True), (40, 500, True), (10, 130, False), (20, 20, False)],
)
def test_longer_searches_are_claimed_where_the_record_shows_them(
    steps: int, lane_steps: int, harder: bool
) -> None:
    """A prompt that was searched least counts: its steps, and its steps over all starts."""
    found = record(not_recovered=40)
    assert "longer" not in judge(RULE, found, ()).sentence, "not shown, not said"
    found["trial"] = {"recovery": {"steps": 10}}
    found["result"]["search"] = {"steps_min": steps, "lane_steps_min": lane_steps}
    judged = judge(RULE, found, ())
    assert judged.verdict == "held"
    assert judged.sentence.endswith("longer searches from other starts changed nothing") == harder


def test_an_exact_constraint_under_which_features_moved_decides_nothing() -> None:
    """In bfloat16, say: the recovery may have gone through the features that were to be held."""
    found = record(recovered=40)
    found["result"]["checks"]["preactivation_drift_max"] = 1e-3
    judged = judge(RULE, found, (compared(NORMS, scaled(3)),))
    assert judged.verdict == "undecided" and "moved by 0.001 " in judged.sentence
    found["result"]["checks"]["exact"] = False  # a leaky one is expected to
    assert judge(RULE, found, (compared(NORMS, scaled(3)),)).verdict == "breached"


def test_rows_that_could_not_be_searched_are_not_dear() -> None:
    """Diverged is no price."""
    audit, other = rows(NORMS), rows([math.nan] * 40)
    for row in other[:39]:
        row["outcome"] = "diverged"
    assert separation(RULE, "wrong_target", audit, other).n_pairs == 1


def test_a_share_says_of_how_many_prompts_it_is() -> None:
    """Prompts on which neither gets there are no pairs, and are not counted as such."""
    found = compared([0.2, 0.2, 0.2] + [math.nan] * 7, [math.nan] * 10)
    assert found.n_pairs == 3 and found.share_dearer == 1
    assert found.sentence.endswith("dearer on 100% of 3 prompts")


@pytest.mark.parametrize(("n", "said"), [(2, "undecided"), (3, "undecided"), (6, "breached")])
def test_a_few_prompts_that_all_agree_are_no_proof(n: int, said: str) -> None:
    """Resamples of them agree as well; the interval of the share does not (Wilson: .44 of 3)."""
    found = compared(NORMS[:n], [math.nan] * n)
    assert found.dearer and found.share_dearer == 1.0
    assert verdict(found, recovered=n).verdict == said


def test_few_prompts_do_not_separate() -> None:
    """Dearer on average, but the interval includes 1: neither forcible nor breached."""
    mixed = compared(NORMS[:5], [f * n for f, n in zip((4, 2, 2, 0.3, 0.3), NORMS, strict=False)])
    assert mixed.dearer and not mixed.separated
    assert verdict(mixed, recovered=5).verdict == "undecided"


def test_a_control_that_is_no_null_does_not_decide() -> None:
    """What the untouched model costs is shown beside the verdict and is not part of it."""
    dear, no_clamp = compared(NORMS, scaled(3)), compared(NORMS, NORMS, control="no_clamp")
    judged = verdict(dear, no_clamp, recovered=40)
    assert judged.verdict == "breached"
    assert len(judged.separations) == 2


# --- Pairing and clusters -------------------------------------------------------------------------


def test_prompts_are_paired_by_id_and_never_by_row() -> None:
    order = RNG.permutation(40)
    audit = rows(NORMS)
    other = [rows(scaled(2))[i] for i in order]
    shuffled = separation(RULE, "wrong_target", audit, other)
    assert shuffled == separation(RULE, "wrong_target", audit, rows(scaled(2)))
    assert shuffled.ratio == pytest.approx(2)


def test_unpaired_prompts_are_ignored() -> None:
    audit = rows(NORMS)
    other = rows(scaled(2)[:30]) + rows([1e-6] * 50, ids=[f"other{i}" for i in range(50)])
    found = separation(RULE, "wrong_target", audit, other)
    assert found.n_pairs == 30 and found.ratio == pytest.approx(2)


def test_prompts_that_were_not_searched_are_ignored() -> None:
    """Dropped rows carry NaN too, which for a searched row means `never reached`."""
    audit = rows(NORMS) + rows([math.nan] * 20, ids=[f"d{i}" for i in range(20)], outcome="")
    other = rows(scaled(2)) + rows([math.nan] * 20, ids=[f"d{i}" for i in range(20)], outcome="")
    found = separation(RULE, "wrong_target", audit, other)
    assert found.n_pairs == 40 and found.n_forced == 40 and found.ratio == pytest.approx(2)


def test_nothing_shared_is_no_separation() -> None:
    found = separation(
        RULE, "wrong_target", rows(NORMS), rows(NORMS, ids=[f"x{i}" for i in range(40)])
    )
    assert found.n_pairs == 0 and not found.separated


def test_clusters_are_the_independent_units() -> None:
    """Each question asked eight times: its copies make no interval narrower."""
    factors = np.exp(RNG.normal(np.log(1.6), 0.8, size=10))
    norms, clusters, forced = [], [], []
    for question, factor in enumerate(factors):
        norms += [0.2] * 8
        forced += [0.2 * factor] * 8
        clusters += [f"q{question}"] * 8
    together = compared(norms, forced, clusters=clusters)
    apart = compared(norms, forced)
    assert together.n_pairs == apart.n_pairs == 80
    assert together.n_clusters == 10 and apart.n_clusters == 80
    assert together.low is not None and apart.low is not None
    assert together.high is not None and apart.high is not None
    assert together.high / together.low > 1.5 * (apart.high / apart.low)
