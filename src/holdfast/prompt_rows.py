"""A row for every prompt of the test split: what a trial measured of it, or why it was not audited.

The rows are the trial's manifest too. Prompts and replies are in them by label and hash, never by
text.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from holdfast.behaviors.observation import Observation
from holdfast.canonical import digest
from holdfast.checks import Checks
from holdfast.controls import Case
from holdfast.found import Found
from holdfast.funnel import dropped_of
from holdfast.second_opinions import labels_of
from holdfast.setting import Setting
from holdfast.undone import COLUMNS

_COLUMNS = (
    *(f.name for f in fields(Checks)), "smallest_norm", "smallest_norm_relative",
    "closed_form_norm", "goal", "steps", "lane_steps", "null_dimension",
    "margin_other_order", "margin_unclamped", *COLUMNS,
)  # fmt: skip


def prompt_of(setting: Setting, index: int) -> dict[str, Any]:
    """Which prompt a row is about."""
    return {
        "id": setting.test.ids[index],
        "cluster": setting.test.clusters[index],
        "group": setting.test.groups[index],
        "text_sha256": digest(setting.test.texts[index]),
    }


def unsearched_examples(setting: Setting, case: Case) -> list[dict[str, Any]]:
    """A row for every prompt of the test split, none of them audited."""
    dropped = dropped_of(setting, case)
    return [_example(setting, index, dropped) for index in range(len(setting.test))]


def _example(setting: Setting, index: int, dropped: dict[str, str]) -> dict[str, Any]:
    """The row of a prompt that was not audited: NaN and empty text where a search would say."""
    return {
        **prompt_of(setting, index),
        **setting.manifest(index),
        "clean_margin": float(setting.clean_margin[index]),
        "suppressed_margin": float(setting.suppressed_margin[index]),
        "dropped": dropped.get(setting.test.ids[index], ""),
        "outcome": "",
        "recovered": False,
        "clean_label": _label(setting.observed, index),
        "suppressed_label": _label(setting.changed, index),
        "spliced": _spliced(setting, index),
        "recovered_label": "",
        "clean_sha256": _sha256(setting.observed, index),
        "suppressed_sha256": _sha256(setting.changed, index),
        "recovered_sha256": "",
        **labels_of(setting.observed, "clean", index),
        **labels_of(setting.changed, "suppressed", index),
        "drift_generated": float("nan"),
        **dict.fromkeys(_COLUMNS, float("nan")),
    }


def examples_of(found: Found) -> list[dict[str, Any]]:
    """A row for every prompt of the test split; NaN and empty text where it was not audited."""
    setting, case, problem, recovery = found.setting, found.case, found.problem, found.recovery
    checks, regained = found.checks, found.regained
    columns = {f.name: getattr(checks, f.name) for f in fields(Checks)}
    columns["smallest_norm"] = recovery.smallest_norm
    columns["smallest_norm_relative"] = recovery.smallest_norm / problem.reference_norm
    columns["closed_form_norm"] = recovery.closed_form.norm
    columns["goal"] = problem.goal
    columns["margin_other_order"] = found.turned
    columns |= regained.measured
    if found.bare is not None:
        columns["margin_unclamped"] = found.bare.margin
    columns |= found.undone.columns(len(case.rows))
    columns["steps"] = recovery.steps.double()
    columns["lane_steps"] = recovery.lane_steps.double()
    columns["null_dimension"] = recovery.null_dimension.double()
    if found.paths is not None:
        columns |= found.paths.laid(len(case.rows))
    blank = dict.fromkeys(columns, float("nan")) | labels_of(regained.seen, "recovered", None)
    rows = [row | blank for row in unsearched_examples(setting, case)]
    row_of = {row["id"]: row for row in rows}
    for index, example in enumerate(case.batch.ids):
        row_of[example] |= {
            "outcome": recovery.outcomes[index],
            "recovered": bool(regained.recovered[index]),
            "recovered_label": regained.label(index),
            "recovered_sha256": _sha256(regained.seen, index),
            **labels_of(regained.seen, "recovered", index),
            "drift_generated": float(regained.drift[index]),
            **{name: float(values[index]) for name, values in columns.items()},
        }
    return rows


def _spliced(setting: Setting, row: int) -> float:
    """1 if the behavior is there with the SAEs in place alone, 0 if not; NaN where that is no
    change."""
    return float("nan") if setting.spliced is None else float(setting.spliced[row])


def _label(seen: Observation | None, row: int) -> str:
    return "" if seen is None else seen.labels[row]


def _sha256(seen: Observation | None, row: int) -> str:
    """The hash of a reply, which is all that is stored of it."""
    return "" if seen is None else seen.replies[row].sha256
