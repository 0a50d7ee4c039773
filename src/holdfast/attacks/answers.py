"""What was found where answers are begun for the model, or drawn, as plain numbers.

Nothing is searched and no prompt is changed. Rates are by prompt, whole clusters resampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from torch import Tensor

from holdfast.controls import Case
from holdfast.funnel import dropped_of, funnel_of
from holdfast.measure import Measurement, rate_where
from holdfast.prompt_rows import prompt_of
from holdfast.setting import Setting

NOTHING_ADDED = "nothing is added to the residual stream: what moves is what other tokens move"


@dataclass(frozen=True)
class AnswersFound:
    """n audited prompts, whose answers were made in some ways, the arms.

    asked [n] bool: prompts of which something can be said, `unasked` says why not of the others;
    back [n] bool: of these, where the behavior came with the intervention on. columns: key → what
    was done, in words; table: a name → key → what came of it. labels: condition → the judge's
    words. arms: name → what the rows of examples say of each of the n prompts.
    """

    setting: Setting
    case: Case
    asked: Tensor
    back: Tensor
    unasked: str
    sentence: str
    columns: Mapping[str, str]
    table: Mapping[str, Mapping[str, Measurement]]
    labels: Mapping[str, Sequence[str]]
    arms: Mapping[str, Sequence[Mapping[str, Any]]]


def result_of(found: AnswersFound) -> dict[str, Any]:
    """The `result` of a record: plain numbers and words, the same for every run of one trial."""
    setting, case = found.setting, found.case
    n, n_asked = len(found.asked), int(found.asked.sum())
    n_back = int((found.asked & found.back).sum())
    funnel = funnel_of(setting, case, None)
    funnel["stages"] |= {"asked": n_asked, "recovered": n_back}
    clusters = case.batch.clusters
    measured = [rate_where("recovery_rate", found.back, found.asked, clusters, found.unasked)]
    measured += [cell for row in found.table.values() for cell in row.values()]
    return {
        "funnel": funnel,
        "outcome": {
            "outcome": "recovered" if n_back else "not_recovered" if n_asked else "unscored",
            "sentence": found.sentence if n_asked else f"on none of {n} prompts: {found.unasked}",
            "counts": {
                "recovered": n_back,
                "not_recovered": n_asked - n_back,
                "unscored": n - n_asked,
            },
        },
        "measurements": [m.model_dump(mode="json") for m in measured],
        "table": {
            "columns": dict(found.columns),
            "rows": [
                {"name": name, "cells": {k: m.model_dump(mode="json") for k, m in row.items()}}
                for name, row in found.table.items()
            ],
        },
        "checks": {
            "preactivation_drift_max": nan,
            "drift_relative_mean": nan,
            "drift_relative_max": nan,
            "reason": NOTHING_ADDED,
        },
        "labels": {
            name: dict(sorted(Counter(label for label in labels if label).items()))
            for name, labels in found.labels.items()
        },
        "features": case.features.model_dump(mode="json"),
        "intervention": setting.intervention.model_dump(mode="json"),
    }


def examples_of(found: AnswersFound) -> list[dict[str, Any]]:
    """A row for every audited prompt and arm, and one for every prompt that is not audited.

    Prompts and replies are in it by label and hash, never by text.
    """
    setting = found.setting
    dropped = dropped_of(setting, found.case)
    audited = {example: row for row, example in enumerate(found.case.batch.ids)}
    blank = {
        name: nan if isinstance(value, float) else type(value)()
        for said in found.arms.values()
        for name, value in (said[0].items() if said else ())
    }
    rows = []
    for index, example in enumerate(setting.test.ids):
        at = audited.get(example)
        own = {
            **prompt_of(setting, index),
            "dropped": dropped.get(example, ""),
            "arm": "",
            "asked": at is not None and bool(found.asked[at]),
            "recovered": at is not None and bool((found.asked & found.back)[at]),
        }
        if at is None:
            rows.append(own | blank)
        else:
            rows += [own | {"arm": name, **said[at]} for name, said in found.arms.items()]
    return rows
